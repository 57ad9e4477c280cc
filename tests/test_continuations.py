"""Claims: log-probs and greedy flags are those of a plain float64 softmax over the decoder's logits; order, batch,
shared beginnings and devices do not change them; a joined text is split where the harness splits it, into tokens."""

import functools
import tempfile
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy

from rpt_jax import mesh as meshes
from rpt_jax.config import MeshConfig
from rpt_jax.corpus.tokenizer import train_sentencepiece
from rpt_jax.policy import decoder
from rpt_jax.records import InputError
from rpt_jax.study import continuations
from rpt_jax.study.continuations import cut_left, encode_pair, score_pairs

RNG = np.random.default_rng(5)
SHARED = RNG.integers(1, 24, 9).tolist()
PAIRS = [
    (SHARED, [3]),
    (SHARED, [7, 2, 9]),
    ([*SHARED, 4], [5, 5]),
    ([8], RNG.integers(1, 24, 20).tolist()),
    (SHARED, []),
    (RNG.integers(1, 24, 40).tolist(), [1, 2]),
    ([8], [11]),
]


@functools.cache
def params():
    """Random, with logits large enough that softmax is far from flat."""
    tree = jax.jit(decoder.init, static_argnums=0)(toy.model(), jax.random.key(3))
    return tree | {"head": tree["head"] * 20}


def plain(context, continuation) -> tuple[float, bool]:
    """One sequence by itself, softmax and sum in float64."""
    return toy.plain_logprob(params(), toy.model(), [*context, *continuation], len(continuation))


def greedy_pair(context, count):
    """The context with what greedy decoding gives after it."""
    made = []
    for _ in range(count):
        made.append(next(token for token in range(toy.model().vocab_size) if plain([*context, *made], [token])[1]))
    return context, made


@functools.cache
def pairs():
    greedy = greedy_pair(SHARED, 2)
    return [*PAIRS, greedy, (greedy[0], [*greedy[1][:1], (greedy[1][1] + 1) % 24])]


def check(scored):
    assert len(scored) == len(pairs())
    for each, pair in zip(scored, pairs(), strict=True):
        logprob, greedy = plain(*pair) if pair[1] else (0.0, True)
        assert each.logprob == pytest.approx(logprob, abs=2e-4) and each.greedy == greedy
    assert [each.greedy for each in scored][-2:] == [True, False] and not scored[0].greedy


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_against_a_plain_softmax_of_one_sequence_at_a_time(batch_size):
    ticks = []
    check(score_pairs(params(), toy.model(), pairs(), batch_size=batch_size, progress=lambda *n: ticks.append(n)))
    contexts = len({tuple(context) for context, _ in pairs()})  # a context runs once
    total = -(-contexts // min(batch_size, contexts))
    assert ticks == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_on_a_mesh(sizes):
    mesh = meshes.make_mesh(MeshConfig(**sizes))
    placed = meshes.place(params(), meshes.param_shardings(mesh, decoder.logical_axes(toy.model()), params()))
    check(score_pairs(placed, toy.model(), pairs(), batch_size=8, mesh=mesh))


def test_many_continuations_of_a_context(monkeypatch):
    """More than a row holds go into several, in their own order."""
    monkeypatch.setattr(continuations, "GROUP", 3)
    many = [(SHARED, [token]) for token in range(1, 9)]
    scored = score_pairs(params(), toy.model(), many, batch_size=2)
    expected = [plain(*pair)[0] for pair in many]
    np.testing.assert_allclose([each.logprob for each in scored], expected, atol=2e-4)


def test_nothing_to_score_and_no_context():
    assert score_pairs(params(), toy.model(), [], batch_size=4) == []
    with pytest.raises(InputError, match="context 1 has no token"):
        score_pairs(params(), toy.model(), [([1], [2]), ([], [2])], batch_size=4)


@functools.cache
def merging():
    """A tokenizer that has " ab", "bc" and "abc" as pieces."""
    texts = ["abc bc abc bc ab x" * 30, " ab ab ab x" * 30]
    return train_sentencepiece(texts, 270, tempfile.mkdtemp(), (" ab", "bc", "abc"))


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("x", " ab"), ("x ", "ab"), ("x  ", "bc"), ("a", "bc"), ("x a", "bc x"), ("", "abc"), ("x", ""), (" ", "ab")],
)
def test_a_joined_text_is_split_without_loss(context, continuation):
    """The two parts are the joined text's own tokens, and the continuation's bytes hold all of the continuation."""
    before, after = encode_pair(merging(), context, continuation)
    assert before + after == merging().encode(context + continuation)
    assert merging().bytes_of(after).endswith((context[len(context.rstrip()) :] + continuation).encode())
    assert context.rstrip().encode().startswith(merging().bytes_of(before))


def test_where_a_token_reaches_over_the_boundary():
    """It is scored whole, as part of the continuation; elsewhere the context keeps its own tokens."""
    bytes_of, id_of = merging().bytes_of, merging().id_of
    before, after = encode_pair(merging(), "xa", "bc")
    assert bytes_of(before) == b"x" and after == [id_of("abc")]
    before, after = encode_pair(merging(), "x ", "ab")
    assert bytes_of(before) == b"x" and after == [id_of("▁ab")]


def test_where_the_joined_text_is_cut_otherwise_before_the_boundary():
    """The tokens of the joined text count, up to the boundary."""
    pieces = {"xy": [0], "xyz": [1, 2, 3]}
    tokenizer = SimpleNamespace(encode=pieces.get, token_bytes=(b"xy", b"x", b"y", b"z"))
    assert encode_pair(tokenizer, "xy", "z") == ([1, 2], [3])


def test_cut_left():
    """The last token is never read, so that limit + 1 tokens fit."""
    assert cut_left([1, 2, 3, 4], 2, 5, "limit") == [1, 2, 3, 4]
    assert cut_left([1, 2, 3, 4], 2, 4, "limit") == [2, 3, 4]
    assert cut_left([1, 2, 3, 4], 4, 4, "limit") == [4]
    with pytest.raises(InputError, match="a continuation of 5 tokens leaves no room for context within limit=4"):
        cut_left([1], 5, 4, "limit")
