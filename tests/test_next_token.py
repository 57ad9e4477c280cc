"""Claims: thoughts are found by their bytes; the next token is scored after exactly what stands before it, as one whole
sequence at a time would be, on any mesh and in any number of microbatches."""

import jax
import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from rpt_jax.config import MeshConfig
from rpt_jax.corpus.positions import Position
from rpt_jax.learning import next_token
from rpt_jax.learning.next_token import Sequences
from rpt_jax.mesh import make_mesh, param_shardings, place
from rpt_jax.policy import decoder, flops
from rpt_jax.policy.scorer import score_tokens
from rpt_jax.records import Prompts, Rollouts

CONTENTS = [b"", b"hm ", b"</think>", b"</thi", b"nk>", b"k>\n", b"</thin", b"\\boxed{", b"<end>"]


def bytes_of(ids):
    return b"".join(CONTENTS[i] for i in ids)


def thought(*tokens, length=None):
    """(tokens of the thought, closed) of one response."""
    lengths_NG = np.full((1, 1), len(tokens) if length is None else length)
    count_NG, closed_NG = next_token.thought_lengths(bytes_of, np.array([[tokens]]), lengths_NG)
    assert count_NG.dtype == np.int32
    return count_NG.item(), closed_NG.item()


def test_a_thought_goes_on_to_the_token_that_ends_it():
    assert thought(1, 2, 7, 8) == (2, True)
    assert thought(2) == (1, True)
    assert thought(1, 3, 0, 4, 7) == (4, True)  # in two tokens, with one without bytes between
    assert thought(6, 5, 7) == (2, True)  # the token that ends it holds a line break, too
    assert thought(1, 2, 1, 2, 7) == (2, True)  # the first one, as where sampling stops at it
    assert thought(1, 7, 8) == (3, False) and thought(1, 2, length=1) == (1, False)


@given(st.lists(st.integers(0, len(CONTENTS) - 1), min_size=1, max_size=10))
def test_law_of_thoughts(tokens):
    """The shortest beginning whose bytes hold the mark; all tokens where none does."""
    holding = [r + 1 for r in range(len(tokens)) if b"</think>" in bytes_of(tokens[: r + 1])]
    assert thought(*tokens) == ((holding[0], True) if holding else (len(tokens), False))


def case():
    """Two prompts of three thoughts, of which one is not closed, and the plain texts."""
    prompts = Prompts(np.array([[5, 6, 7, 0], [5, 8, 0, 0]]), np.array([3, 2]), None, None, None, None)
    tokens_NGR = np.array([[[9, 10, 11], [9, 12, 0], [13, 0, 0]], [[9, 10, 11], [14, 9, 0], [9, 10, 11]]])
    rollouts = Rollouts(tokens_NGR, np.array([[3, 2, 1], [3, 2, 3]]), None, None)
    thoughts_NG, closed_NG = np.array([[2, 2, 1], [3, 1, 2]]), np.array([[True, False, True], [True] * 3])
    return prompts, rollouts, thoughts_NG, closed_NG


AFTER = [
    [5, 6, 7, 9, 10, 3],
    [5, 6, 7, 9, 12, 1, 2, 3],
    [5, 6, 7, 13, 3],
    [5, 8, 9, 10, 11, 3],
    [5, 8, 14, 3],
    [5, 8, 9, 10, 3],
]


def test_what_stands_before_the_next_token():
    """The prompt, the thought, its end where it has none, the opening; and of the plain text the last tokens."""
    after = next_token.after_thoughts(*case(), closing=[1, 2], opening=[3])
    assert [row[:length].tolist() for row, length in zip(*after, strict=True)] == AFTER
    assert after.tokens_BT.dtype == np.int32 and not after.tokens_BT[4, 4:].any()
    documents = [np.arange(10, 20), np.arange(30, 36)]
    plain, targets_N = next_token.plain_contexts(documents, [Position(0, 2, 0.0), Position(1, 5, 0.0)], 4)
    assert plain.tokens_BT.tolist() == [[10, 11, 0, 0], [31, 32, 33, 34]] and plain.lengths_B.tolist() == [2, 4]
    assert targets_N.tolist() == [12, 35]


@pytest.mark.parametrize(
    ("shape", "microbatches"), [((1, 1, 1), 1), ((1, 1, 1), 3), ((2, 1, 2), 1), ((3, 1, 1), 2), ((1, 2, 1), 3)]
)
def test_the_next_token_is_scored_as_in_whole_sequences(shape, microbatches):
    """Against one forward pass over all sequences with padding, at temperature 1; targets all over the vocabulary."""
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    after = next_token.after_thoughts(*case(), closing=[1, 2], opening=[3])
    targets_B = np.array([4, 20, 31, 0, 9, 9], np.int32)
    whole_BT = np.pad(after.tokens_BT, ((0, 0), (0, 1)))
    whole_BT[np.arange(6), after.lengths_B] = targets_B
    params = jax.tree.map(lambda x: 0.3 * x, toy.params())
    expected_BT = score_tokens(params, toy.model(), whole_BT, after.lengths_B + 1)
    on_mesh = place(params, param_shardings(mesh, decoder.logical_axes(toy.model()), params))
    with jax.set_mesh(mesh):
        found_B = next_token.next_logprobs(on_mesh, toy.model(), after, targets_B, mesh, microbatches)
    np.testing.assert_allclose(found_B, np.asarray(expected_BT)[np.arange(6), after.lengths_B], atol=2e-5)


def test_flops_by_hand():
    """Prompts of 3 and 2 tokens once, 19 tokens of their own behind, six places through the head; then the texts."""
    model, (prompts, *_) = toy.model(), case()
    after = next_token.after_thoughts(*case(), closing=[1, 2], opening=[3])
    plain = Sequences(np.zeros((2, 4), np.int32), np.array([2, 4]))
    prompt, own, text = (5, 2.5 / 2, 0), (19, 2.5 + 19 / 12, 6), (6, 1.5, 2)
    expected = sum(flops.forward(model, *each) for each in (prompt, own, text))
    assert next_token.scoring_flops(model, after, prompts, plain) == pytest.approx(expected)
