"""Claims: the vectorised reward is Eq. 3 byte for byte, whatever the tokenizer does to bytes, spaces and braces; the
others are what their formulas say."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_jax.config import RewardConfig
from rpt_jax.corpus.surroundings import continuation
from rpt_jax.learning.advantages import group_advantages
from rpt_jax.learning.judge import CRASHED, RIGHT, TIMED_OUT, WRONG
from rpt_jax.learning.rewards import (
    Outcomes,
    answer_logprobs,
    conditional_dense,
    dense,
    exact,
    first_token,
    information_gain,
    pack_predictions,
    prefix_matching,
    reward,
    right,
    truths,
    verified,
)
from rpt_jax.records import Prompts


def eq3(prediction, pieces):
    """Eq. 3 read off the paper: walk the bytes of the prediction, then look its length up among the boundaries."""
    if prediction is None:
        return 0.0
    truth, boundaries = b"", []
    for piece in pieces:
        truth += piece
        boundaries.append(len(truth))
    for i in range(len(prediction)):
        if i >= len(truth) or prediction[i] != truth[i]:
            return 0.0
    if len(prediction) == 0 or len(prediction) not in boundaries:
        return 0.0
    return 1.0


def prompts_from(pieces_N, width):
    """Prompts that continue with the given token bytes; only the truth matters to the reward."""
    truths = [continuation(pieces, range(len(pieces)), width) for pieces in pieces_N]
    empty = np.zeros((len(pieces_N), 1))
    truth_NX, boundaries_NX = (np.stack(arrays) for arrays in zip(*truths, strict=True))
    return Prompts(empty, empty[:, 0], empty, truth_NX, boundaries_NX, empty[:, 0])


def test_numbers_by_hand():
    prompts = prompts_from([[b" the", b" c", b"at", b"."], [b"", b"\xf0\x9f", b"\x98\x80}", b"\0"]], width=12)
    first = [b" the", b" the c", b" the cat.", b" th", b"the", b" the ca", b" the cat. ", b" The"]
    second = [b"\xf0\x9f", b"\xf0\x9f\x98\x80}", b"\xf0\x9f\x98\x80}\0", b"\xf0", "😀".encode(), b"", None, b"\0"]
    rewards_NG = prefix_matching([first, second], prompts)
    assert rewards_NG.dtype == np.float32
    assert rewards_NG.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]


def test_padding_is_not_text():
    # The document ends after "ab"; zero bytes that follow in the array are no continuation.
    prompts = prompts_from([[b"a", b"b"], [b"", b""]], width=6)
    assert prefix_matching([[b"ab", b"ab\0", b"a\0"], [b"", b"\0", None]], prompts).tolist() == [[1, 0, 0], [0, 0, 0]]


def test_predictions_longer_than_the_kept_truth_earn_nothing():
    prompts = prompts_from([[b"abc", b"def", b"gh"]], width=6)
    assert prefix_matching([[b"abcdef", b"abcdefgh", b"abcdefg" * 40]], prompts).tolist() == [[1, 0, 0]]


def test_no_prediction_does_not_match_the_last_byte_of_a_full_row():
    prompts = prompts_from([[b"abc", b"def"]], width=6)
    assert prefix_matching([[b"", None, b"abcdef"]], prompts).tolist() == [[0, 0, 1]]


def test_packing():
    bytes_NGX, lengths_NG = pack_predictions([[b"abc", None], [b"", b"\xff" * 9]], width=4)
    assert bytes_NGX.dtype == np.uint8 and lengths_NG.dtype == np.int32
    assert bytes_NGX.tolist() == [[[97, 98, 99, 0], [0] * 4], [[0] * 4, [255] * 4]]
    assert lengths_NG.tolist() == [[3, 0], [0, 9]]
    with pytest.raises(ValueError, match=r"groups of \[1, 2\]"):
        pack_predictions([[b"a"], [b"a", b"b"]], width=4)


PIECES = st.lists(st.sampled_from([b"", b"a", b"b", b"ab", b"\0", b"aab"]), max_size=6)
ANSWERS = st.lists(st.one_of(st.none(), PIECES.map(b"".join)), min_size=4, max_size=4)


@given(st.lists(st.tuples(PIECES, ANSWERS), min_size=1, max_size=4), st.permutations(range(4)))
def test_law_of_permuted_rollouts_and_tiny_cases(cases, order):
    prompts = prompts_from([pieces for pieces, _ in cases], width=20)
    rewards_NG = prefix_matching([answers for _, answers in cases], prompts)
    permuted_NG = prefix_matching([[answers[i] for i in order] for _, answers in cases], prompts)
    np.testing.assert_array_equal(permuted_NG, rewards_NG[:, order])
    assert rewards_NG.tolist() == [[eq3(answer, pieces) for answer in answers] for pieces, answers in cases]


KINDS_OF_REWARD = ("prefix", "first_token", "dense", "conditional_dense")
THE_CAT = [b"", b" the", b" c", b"at", b"."]


def test_first_token_by_hand():
    """Only the bytes of the first token that has any count, whatever stands behind them."""
    right = [b" the", b" the cat", b" the dog", b" the ca", b" then", b" the" + b"x" * 99]
    wrong = [b" th", b"the", b" The", b"", None, b" tha"]
    prompts = prompts_from([THE_CAT] * 2 + [[b"a long token"]] * 2 + [[b"", b""]] * 2, width=10)
    long, none = [b"a long token", b"a long tok"] * 3, [b"", None, b"\0"] * 2
    rewards_NG = first_token(Outcomes([right, wrong, long, none, none, right], prompts))
    assert rewards_NG.dtype == np.float32 and rewards_NG.tolist() == [[1] * 6] + [[0] * 6] * 5


def test_exact_by_hand():
    """Of next tokens the first one as it stands; of a segment all of it, white space around it aside."""
    predictions = [[b" the", b"the", b" the ", b" the cat.", b" th", b"", None]] * 2 + [
        [b"", None, b" ", b"\0"] + [b"x"] * 3
    ]
    prompts = prompts_from([THE_CAT, [b"", b" "], [b""]], width=12)
    rewards_NG = exact(Outcomes(predictions, prompts))
    assert rewards_NG.dtype == np.float32 and rewards_NG.tolist() == [[1] + [0] * 6, [0] * 7, [0] * 7]
    assert exact(Outcomes([[b" ", b""]], prompts_from([[b"", b" "]], width=12))).tolist() == [[1, 0]]
    predictions = [[b" the cat.", b"the cat.", b"\tthe cat. \n", b" the", b" the  cat.", b" the cat", None]]
    whole = Outcomes(predictions, prompts_from([THE_CAT], width=12), whole=True)
    assert exact(whole).tolist() == [[1, 1, 1, 0, 0, 0, 0]] == right(whole).tolist()
    assert prefix_matching(predictions, whole.prompts).tolist() == [[1, 0, 0, 1, 0, 1, 0]]
    assert right(dataclasses.replace(whole, whole=False)).tolist() == [[1, 0, 0, 1, 0, 1, 0]]
    assert not exact(Outcomes([[b" ", b""]], prompts_from([[b" ", b"\n"]], width=12), whole=True)).any()


@given(st.lists(st.tuples(PIECES, ANSWERS), min_size=1, max_size=4))
def test_laws_of_exact(cases):
    """Against definitions walked token by token; what is exact is right by prefix matching, but for white space."""
    pieces_N, answers_N = zip(*cases, strict=True)
    prompts = prompts_from(pieces_N, 40)
    assert truths(prompts) == [b"".join(pieces) for pieces in pieces_N]
    first_NG, whole_NG = exact(Outcomes(answers_N, prompts)), exact(Outcomes(answers_N, prompts, whole=True))
    prefix_NG = prefix_matching(answers_N, prompts)
    for n, (pieces, answers) in enumerate(cases):
        first = next((piece for piece in pieces if piece), None)
        assert first_NG[n].tolist() == [bool(answer) and answer == first for answer in answers]
        text = b"".join(pieces).strip()
        assert whole_NG[n].tolist() == [bool(text) and (answer or b"").strip() == text for answer in answers]
        bare = [answer == b"".join(pieces) for answer in answers]
        assert (prefix_NG[n] >= first_NG[n]).all() and (prefix_NG[n][bare] >= whole_NG[n][bare]).all()


def test_dense_by_hand():
    """1 for a right prediction, p of its first token for a wrong one, also where that token is right; 0 without."""
    predictions = [[b" the", b" a", b" the dog", b"", None], [b" an", b" th", b"x", None, None]]
    logprobs_NG = np.log(np.array([[0.5, 0.25, 0.75, 0.5, 0.5], [0.125, 0.0625, 1.0, 0.5, 0.5]], np.float32))
    outcomes = Outcomes(predictions, prompts_from([THE_CAT] * 2, width=12), logprobs_NG)
    expected = np.array([[1, 0.25, 0.75, 0, 0], [0.125, 0.0625, 1, 0, 0]])
    assert dense(outcomes).dtype == conditional_dense(outcomes).dtype == np.float32
    np.testing.assert_allclose(dense(outcomes), expected, rtol=1e-6)
    np.testing.assert_allclose(conditional_dense(outcomes), [expected[0], [0] * 5], rtol=1e-6)


def test_the_config_chooses_the_reward():
    """One case that every kind pays differently."""
    predictions = [[b" the", b" the dog", b" a", None], [b" the dog", b" a", b"x", None]]
    logprobs_NG = np.log(np.array([[0.5, 0.75, 0.25, 0.5]] * 2, np.float32))
    outcomes = Outcomes(predictions, prompts_from([THE_CAT] * 2, width=12), logprobs_NG)
    paid = {kind: reward(RewardConfig(kind), outcomes).round(6).tolist() for kind in KINDS_OF_REWARD}
    assert paid == {
        "prefix": [[1, 0, 0, 0], [0, 0, 0, 0]],
        "first_token": [[1, 1, 0, 0], [1, 0, 0, 0]],
        "dense": [[1, 0.75, 0.25, 0], [0.5, 0.75, 0.25, 0]],
        "conditional_dense": [[1, 0.75, 0.25, 0], [0, 0, 0, 0]],
    }
    several = Outcomes([[b" the c", b" the"]], prompts_from([THE_CAT], width=12))
    assert reward(RewardConfig("exact"), several).tolist() == [[0, 1]]
    assert reward(
        RewardConfig("exact"), dataclasses.replace(several, predictions=[[b"the cat.", b" the"]], whole=True)
    ).tolist() == [[1, 0]]


@given(st.lists(st.tuples(PIECES, ANSWERS), min_size=1, max_size=4), st.permutations(range(4)), st.integers(0, 99))
def test_laws_of_the_variants(cases, order, seed):
    """Against definitions walked byte by byte; permuting rollouts permutes rewards; what is right earns 1 in all."""
    pieces_N, answers_N = zip(*cases, strict=True)
    probabilities_NG = np.random.default_rng(seed).uniform(0.01, 0.99, (len(cases), 4)).astype(np.float32)

    def paid(kind, order=range(4)):
        predictions = [[answers[i] for i in order] for answers in answers_N]
        outcomes = Outcomes(predictions, prompts_from(pieces_N, 20), np.log(probabilities_NG[:, list(order)]))
        return reward(RewardConfig(kind), outcomes)

    right_NG = paid("prefix")
    for kind in KINDS_OF_REWARD:
        np.testing.assert_array_equal(paid(kind, order), paid(kind)[:, order])
        assert kind == "conditional_dense" or (paid(kind)[right_NG == 1] == 1).all()
    for n, (pieces, answers) in enumerate(cases):
        first = next((piece for piece in pieces if piece), None)
        begins = [bool(first) and answer is not None and answer.startswith(first) for answer in answers]
        assert paid("first_token")[n].tolist() == begins
        wrong_G = [p if answer else 0 for p, answer in zip(probabilities_NG[n], answers, strict=True)]
        expected_G = np.where(right_NG[n] == 1, 1, wrong_G)
        np.testing.assert_allclose(paid("dense")[n], expected_G, rtol=1e-5)
        np.testing.assert_allclose(paid("conditional_dense")[n], expected_G * (right_NG[n].max() == 1), rtol=1e-5)


def test_information_gain_by_hand():
    """p(next token) 0.5 and 0.125 after two thoughts, 0.25 without: a factor of 2 gained, a factor of 2 lost."""
    outcomes = Outcomes(
        [[None, b" the"], [None, None]],
        prompts_from([THE_CAT] * 2, width=12),
        thought_logprobs_NG=np.log(np.array([[0.5, 0.125], [1.0, 0.1]], np.float32)),
        plain_logprobs_N=np.log(np.array([0.25, 0.1], np.float32)),
    )
    expected = np.log([[2, 0.5], [10, 1]])
    assert information_gain(outcomes).dtype == np.float32
    np.testing.assert_allclose(information_gain(outcomes), expected, atol=1e-6)
    np.testing.assert_allclose(reward(RewardConfig("information_gain"), outcomes), expected, atol=1e-6)


LOGPROBS = st.floats(-20, 0, width=32)


@given(st.lists(st.tuples(st.lists(LOGPROBS, min_size=3, max_size=3), LOGPROBS, ANSWERS), min_size=1, max_size=4))
def test_laws_of_information_gain(cases):
    """The ratio of the probabilities; the answers play no part; RLP's advantage does not see the plain log-prob."""
    after, plain, answers = zip(*cases, strict=True)
    paid = [
        information_gain(Outcomes(predictions, prompts, None, np.array(after, np.float32), np.array(minus, np.float32)))
        for predictions, prompts, minus in (
            (answers, prompts_from([THE_CAT] * len(cases), width=12), plain),
            (None, None, plain),
            (None, None, np.zeros(len(cases))),
        )
    ]
    np.testing.assert_array_equal(paid[0], paid[1])
    for n, (after_G, minus, _) in enumerate(cases):
        np.testing.assert_allclose(paid[0][n], [each - minus for each in after_G], atol=1e-5)
    moved = [np.asarray(group_advantages(each, "leave_one_out", 0.0)) for each in paid[1:]]
    np.testing.assert_allclose(*moved, atol=1e-4)


def test_questions_are_paid_by_the_verdict_and_nothing_else():
    """The first answer is the truth byte for byte and the judge says no; the third is other bytes and it says yes."""
    prompts = prompts_from([[b"0", b".5"]], width=4)
    codes_NG = np.array([[WRONG, TIMED_OUT, RIGHT, CRASHED, WRONG]], np.int8)
    outcomes = Outcomes([[b"0.5", b"0.5", b"1/2", b"0", None]], prompts, verdicts_NG=codes_NG)
    np.testing.assert_array_equal(verified(outcomes), [[0, 0, 1, 0, 0]])
    assert reward(RewardConfig("verified"), outcomes).dtype == np.float32
    np.testing.assert_array_equal(reward(RewardConfig("verified"), outcomes), verified(outcomes))
    np.testing.assert_array_equal(right(outcomes), [[False, False, True, False, False]])
    of_text = Outcomes(outcomes.predictions, prompts)
    np.testing.assert_array_equal(right(of_text), [[True, True, False, True, False]])  # prefix matching


CONTENTS = [b"", b"hm ", b"</think>", b"</thi", b"nk>", b"\\boxed{", b"\\box", b"ed{4", b"4", b"2}", b"}", b"<end>"]


def logprob_of(*tokens, length=None):
    """answer_logprobs of one response whose r-th token (from 0) has log-prob -(r + 1)."""
    tokens_NGR, logprobs_NGR = np.array([[tokens]]), -1.0 - np.arange(len(tokens), dtype=np.float32)[None, None]
    lengths_NG = np.full((1, 1), len(tokens) if length is None else length)
    bytes_of = lambda ids: b"".join(CONTENTS[i] for i in ids)  # noqa: E731
    return answer_logprobs(bytes_of, tokens_NGR, lengths_NG, logprobs_NGR).item()


def test_the_token_that_begins_the_answer_is_found_by_its_bytes():
    assert logprob_of(1, 2, 5, 8, 9, 11) == -4
    assert logprob_of(1, 3, 4, 5, 0, 8, 9) == -6  # an end of thought in two tokens; one without bytes passed over
    assert logprob_of(2, 6, 7, 9) == -3  # its first byte lies in the token that ends the opening
    assert logprob_of(5, 8, 10, 2, 5, 8, 10, 1, 5, 9) == -10  # the last box behind the thought
    assert logprob_of(1, 5, 8, 10) == logprob_of(2, 8, 10) == -np.inf  # no end of the thought, no box
    assert logprob_of(2, 5, 0, 8, length=3) == logprob_of(8, length=0) == -np.inf  # nothing in the box


@given(st.lists(st.integers(0, len(CONTENTS) - 1), min_size=1, max_size=12))
def test_law_of_the_token_that_begins_the_answer(tokens):
    """Taken away byte by byte: it is the last token before which no byte of the content has been seen."""
    found = logprob_of(*tokens)
    response = b"".join(CONTENTS[i] for i in tokens)
    _, mark, after = response.rpartition(b"</think>")
    _, box, content = after.rpartition(b"\\boxed{")
    if not mark or not box or not content:
        assert found == -np.inf
        return
    at = int(-found) - 1
    before = b"".join(CONTENTS[i] for i in tokens[:at])
    assert len(before) <= len(response) - len(content) < len(before) + len(CONTENTS[tokens[at]])
