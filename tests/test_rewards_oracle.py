"""Claims: on real text, with real tokenizers, the vectorised reward is Eq. 3 read off the paper, also for predictions
that split characters or have braces, and for those that come out of the box of a response."""

import json
from collections import Counter

import numpy as np
import pytest
from test_rewards import eq3

from rpt_jax.config import PromptConfig
from rpt_jax.corpus.positions import Position
from rpt_jax.corpus.prompts import assemble, parse_answer, parse_answers
from rpt_jax.corpus.templates import Template, load_template
from rpt_jax.corpus.tokenizer import load_tokenizer
from rpt_jax.learning.rewards import prefix_matching
from rpt_jax.records import InputError

EMOJI_PAGE = "😀👩‍👩‍👧 漢字かな Ελληνικά \x07 «ñ» {x}_{i} 𝕏\t\n } { }{ \\frac{a}{b}}\n\n"


def documents_of(tokenizer, real_data, rng):
    """Real text where the tokenizer can represent it, and random ids, which split characters and mix in controls."""
    texts = [json.loads(line)["solution"][:300] for line in first_lines(real_data / "omni-math", 120)] + [
        EMOJI_PAGE
    ] * 20
    documents = []
    for text in texts:
        try:
            documents.append(tokenizer.encode(text))
        except InputError:  # no byte fallback: keep to the characters that it knows
            known = {chr(byte) for piece in tokenizer.token_bytes for byte in piece}
            documents.append(tokenizer.encode("".join(char for char in text if char in known)))
    noise = [rng.integers(0, min(tokenizer.vocab_size, size), 40).tolist() for size in (300, 10**6) for _ in range(30)]
    return [np.array(tokens, np.int32) for tokens in documents + noise if len(tokens) > 1]


def first_lines(folder, count):
    with next(folder.glob("*.jsonl")).open() as file:
        return [line for line, _ in zip(file, range(count), strict=False)]


def invent(kind, pieces, tokenizer, rng):
    """A prediction of a kind: right, nearly right, or of another shape."""
    right = b"".join(pieces[: rng.integers(1, 7)])
    start = b"".join(pieces[:8])
    if kind == "cut":
        return start[: rng.integers(0, len(start) + 1)]
    if kind == "changed" and right:
        at = rng.integers(len(right))
        return right[:at] + bytes([right[at] ^ 1 << rng.integers(8)]) + right[at + 1 :]
    if kind == "space":
        return right[1:] if right[:1] == b" " else b" " + right
    others = {
        "right": right,
        "longer": right + bytes([rng.integers(256)]),
        "other": tokenizer.token_bytes[rng.integers(tokenizer.vocab_size)],
        "brace": (b"}", b"{", b"}}", b"{}", b"}{", b"_{", b"}$")[rng.integers(7)],
        "past the end": b"".join(pieces) + b"x",
        "empty": b"",
        "none": None,
    }
    return others.get(kind, right)


KINDS = ("right", "right", "right", "cut", "cut", "cut", "changed", "space", "longer", "other", "brace", "past the end")


def writable(answer):
    """The predictions that the docstring of parse_answer promises to read back from their box."""
    depths = np.cumsum([0] + [(byte == ord("{")) - (byte == ord("}")) for byte in answer])
    unspaced = b"}" not in answer or b" " not in answer[answer.index(b"}") :]
    if b"\\boxed{" in answer or b"</think>" in answer:
        return False
    if depths.min() >= 0:
        return depths[-1] == 0 or unspaced
    return answer[:1] == b"}" and unspaced


def not_utf8(raw):
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["qwen2", "mistral", "sentencepiece-test/test_model.model"])
def test_ten_thousand_random_cases_against_the_oracle(real_data, name):
    tokenizer = load_tokenizer(real_data / "tokenizers" / name)
    rng = np.random.default_rng(7)
    documents = documents_of(tokenizer, real_data, rng)
    chosen = rng.integers(0, len(documents), 500)
    positions = [Position(int(d), int(rng.integers(1, len(documents[d]))), 2.0) for d in chosen]
    # All bytes to the end of each document are kept, so that the oracle sees the same truth.
    longest = max(len(tokenizer.bytes_of(tokens_T.tolist())) for tokens_T in documents) + 1
    config = PromptConfig(truth_bytes=longest)
    frame = load_template("v0") if tokenizer.represents_all else Template("empty", thought="")
    prompts = assemble(tokenizer, frame, config, documents, positions)
    pieces_N = [[tokenizer.token_bytes[i] for i in documents[p.document][p.index :].tolist()] for p in positions]
    predictions = [
        [invent(kind, pieces, tokenizer, rng) for kind in rng.permutation(KINDS * 2)[:18].tolist() + ["empty", "none"]]
        for pieces in pieces_N
    ]
    oracle_NG = np.array(
        [[eq3(y, pieces) for y in group] for group, pieces in zip(predictions, pieces_N, strict=True)], np.float32
    )
    assert oracle_NG.shape == (500, 20)
    np.testing.assert_array_equal(prefix_matching(predictions, prompts), oracle_NG)

    boxed = [
        [None if y is None else parse_answer(b"hm \xff{</think>So \\boxed{" + y + b"}\n") for y in group]
        for group in predictions
    ]
    read = [[y is None or writable(y) for y in group] for group in predictions]
    np.testing.assert_array_equal(np.where(read, prefix_matching(boxed, prompts), 0), np.where(read, oracle_NG, 0))
    assert np.mean(read) > 0.9
    seen = kinds_of_right_answers(predictions, pieces_N, oracle_NG, np.array(read))
    assert 0.2 < oracle_NG.mean() < 0.7 and seen["several tokens"] > 500 and seen["space"] > 100
    if tokenizer.represents_all:
        assert seen["split UTF-8"] > 100 and seen["brace"] > 100 and seen["unequal braces in a box"] > 50


def kinds_of_right_answers(predictions, pieces_N, oracle_NG, read_NG):
    """How often each of the cases that the reward must get right did occur, and was right."""
    seen = Counter()
    for n, g in np.argwhere(oracle_NG == 1):
        answer = predictions[n][g]
        first = next(piece for piece in pieces_N[n] if piece)
        seen["several tokens"] += len(answer) > len(first)
        seen["split UTF-8"] += not_utf8(answer)
        seen["brace"] += b"{" in answer or b"}" in answer
        seen["space"] += answer[:1] == b" "
        seen["unequal braces in a box"] += bool(read_NG[n, g]) and answer.count(b"{") != answer.count(b"}")
    return seen


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_right_tokens_in_a_sampled_response_are_rewarded(real_data, name):
    """The same through token ids: thought, box and the document's own next tokens, as the policy would emit them."""
    tokenizer = load_tokenizer(real_data / "tokenizers" / name)
    tokens_T = np.array(tokenizer.encode("We get $\\frac{1}{2}$ 😀漢.\n\nSo  it is {a}, }{ done"), np.int32)
    positions = [Position(0, t, 2.0) for t in range(1, len(tokens_T) - 3)]
    prompts = assemble(tokenizer, load_template("v0"), PromptConfig(), {0: tokens_T}, positions)
    opening, closing = tokenizer.encode("hm.</think>\n\\boxed{"), tokenizer.encode("}")
    counts = range(1, 4)  # tokens predicted
    tokens_NGR = np.zeros((len(positions), len(counts), 40), np.int32)
    lengths_NG = np.zeros((len(positions), len(counts)), np.int32)
    read_NG = np.zeros((len(positions), len(counts)), bool)
    for n, position in enumerate(positions):
        for g, count in enumerate(counts):
            ids = tokens_T[position.index : position.index + count].tolist()
            response = opening + ids + closing
            tokens_NGR[n, g, : len(response)] = response
            lengths_NG[n, g] = len(response)
            read_NG[n, g] = writable(tokenizer.bytes_of(ids))
    answers = parse_answers(tokenizer, tokens_NGR, lengths_NG, np.ones_like(read_NG))
    assert prefix_matching(answers, prompts)[read_NG].all()
    assert 0.6 < read_NG.mean() < 1
    assert not prefix_matching(parse_answers(tokenizer, tokens_NGR, lengths_NG, ~np.ones_like(read_NG)), prompts).any()
