"""Streams: what stands in them worked by hand, and scores and gradients equal to those of whole sequences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rpt_jax.config import ModelConfig
from rpt_jax.policy import attention, decoder, scorer, stream

MODEL = ModelConfig(vocab_size=11, width=16, layers=2, heads=4, kv_heads=2, head_channels=8, hidden=24, qkv_bias=True)
# Two positions of a document, a prompt that is the beginning of another, one of a single token, one repeated.
PROMPTS = ([5, 6, 1, 2, 3, 9], [5, 6, 1, 2, 9], [5, 6], [7], [5, 6, 1, 2, 9], [5, 6, 8])
G, R = 3, 5


def rollouts(seed=0):
    """Prompts in twos to sixes, responses of none, one and up to five tokens."""
    random = np.random.default_rng(seed)
    lengths_N = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    prompts_NT = np.stack([np.pad(prompt, (0, 7 - len(prompt))) for prompt in PROMPTS]).astype(np.int32)
    lengths_NG = random.integers(0, R + 1, (len(PROMPTS), G)).astype(np.int32)
    lengths_NG[0] = 1, R, 0
    live_NGR = np.arange(R) < lengths_NG[:, :, None]
    return prompts_NT, lengths_N, (random.integers(0, 11, live_NGR.shape) * live_NGR).astype(np.int32), lengths_NG


@functools.cache
def policy(model=MODEL):
    params = jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(0))
    biased = {name: jax.random.normal(jax.random.key(1), params["layers"][name].shape) for name in ("bq", "bk", "bv")}
    return params | {"head": 2 * params["head"], "layers": params["layers"] | biased}


@functools.partial(jax.jit, static_argnames=("model", "shared_prefix"))
def score(params, given, laid_out=None, model=MODEL, shared_prefix=True):
    return jnp.stack(scorer.score(params, model, *given, 0.8, 5, stream=laid_out, shared_prefix=shared_prefix))


@functools.partial(jax.jit, static_argnames=("model", "shared_prefix"))
def gradients(params, given, laid_out=None, model=MODEL, shared_prefix=True):
    """Of a random mix of log-probs and entropies."""
    mix = jnp.asarray(np.random.default_rng(3).normal(size=(2, *given[2].shape)), jnp.float32)
    return jax.grad(lambda p: jnp.vdot(mix, score(p, given, laid_out, model, shared_prefix)))(params)


def assert_same(got, expected):
    """To 1e-5 of the largest entry of all, in a tree or an array."""
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale), got, expected)


def test_a_stream_by_hand():
    """Prompts [4, 5] and [4, 6, 7] share the 4; responses lose their last token, which predicts nothing."""
    given = np.array([[4, 6, 7], [4, 5, 0]]), np.array([3, 2]), np.array([[[8, 9]], [[1, 0]]]), np.array([[2], [1]])
    got = stream.packed(*given)
    assert got.tokens_UT.shape == (1, 32), "3 to predict and 4 of prompts, each rounded up to 16"
    np.testing.assert_array_equal(got.tokens_UT[0, :5], [4, 5, 6, 7, 8])
    np.testing.assert_array_equal(got.positions_UT[0, :6], [0, 1, 1, 2, 2 + 1, -1])
    prompts, responses = got.blocks
    assert prompts.queries_UBQ.shape == (1, 16, 64) and prompts.keys_UBS.shape == (1, 16, 128)
    np.testing.assert_array_equal(prompts.queries_UBQ[0, :3, -3:], [[32, 0, 1], [32, 2, 3], [32] * 3])  # 32: nothing
    np.testing.assert_array_equal(prompts.keys_UBS[0, :3, -3:], [[32, 0, 1], [0, 2, 3], [32] * 3])
    np.testing.assert_array_equal(responses.queries_UBQ[0, 0, -2:], [32, 4])
    np.testing.assert_array_equal(responses.keys_UBS[0, 0, -5:], [32, 0, 2, 3, 4])
    np.testing.assert_array_equal(got.places_UT[0, :5], [62, 63, 126, 127, 16 * 64 + 63])
    np.testing.assert_array_equal(got.predictors_UX[0, :3], [3, 4, 1])
    np.testing.assert_array_equal(got.targets_UX[0, :4], [8, 9, 1, -1])
    np.testing.assert_array_equal(got.places_UY, [[0, 1, 2, 16]])  # 16: nothing


@pytest.mark.parametrize("units", [1, 2, 3])
def test_packed_has_the_scores_and_gradients_of_repeated_prompts(units):
    """Ragged prompts and responses, one of one token, an empty one, forked documents; 1e-5."""
    given = rollouts()
    laid_out = stream.packed(*given, units)
    expected = score(policy(), given, shared_prefix=False)
    assert_same(score(policy(), given, laid_out), expected)
    assert_same(gradients(policy(), given, laid_out), gradients(policy(), given, shared_prefix=False))
    live_NGR = np.arange(R) < given[3][:, :, None]
    assert (np.asarray(expected)[0][live_NGR] < 0).all() and not np.asarray(expected)[:, ~live_NGR].any()


def test_padded_has_the_scores_and_gradients_of_repeated_prompts():
    given = rollouts()
    assert_same(score(policy(), given), score(policy(), given, shared_prefix=False))
    assert_same(gradients(policy(), given), gradients(policy(), given, shared_prefix=False))


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_what_is_made_again_in_the_backward_pass_changes_nothing(remat):
    given, model = rollouts(), dataclasses.replace(MODEL, remat=remat)
    laid_out = stream.packed(*given)
    assert_same(gradients(policy(), given, laid_out, model), gradients(policy(), given, shared_prefix=False))


def test_sequences_longer_than_a_block_in_several_turns(monkeypatch):
    """Blocks of 2 queries, 6 blocks a turn: the last turn is not full."""
    given = rollouts()
    expected = gradients(policy(), given, shared_prefix=False)
    monkeypatch.setattr(stream, "QUERIES_ELSEWHERE", 2)
    laid_out = stream.packed(*given)
    (_, B, Q), S = laid_out.blocks[1].queries_UBQ.shape, laid_out.blocks[1].keys_UBS.shape[2]
    monkeypatch.setitem(attention.SCORES_AT_ONCE, "cpu", 6 * MODEL.heads * Q * S)
    assert B % 6 and Q == 2
    jax.clear_caches()  # sizes of blocks and turns are no arguments
    assert_same(gradients(policy(), given, laid_out), expected)
    assert_same(gradients(policy(), given), expected)


def test_shared_tokens_stand_once():
    """Prefixes of all prompts together: 5 6 1 2 3 9, then 9, 8 and 7 are new; two prompts add nothing."""
    given = rollouts()
    got = stream.packed(*given)
    prompts = 6 + 1 + 1 + 1
    assert (got.positions_UT >= 0).sum() == prompts + np.maximum(given[3] - 1, 0).sum()
    alone = stream.packed(*given, units=6)
    assert (alone.positions_UT >= 0).sum() == sum(map(len, PROMPTS)) + np.maximum(given[3] - 1, 0).sum()


def test_only_the_prompt_runs_for_responses_of_one_token():
    given = rollouts()
    first = (*given[:2], given[2][:, :, :1], np.minimum(given[3], 1))
    for laid_out in (stream.packed(*first), None):
        assert_same(score(policy(), first, laid_out), score(policy(), given)[..., :1])


def test_units_over_eight_devices_equal_one():
    """Four units on (data, fsdp) = (2, 2), heads and vocabulary over tensor = 2."""
    given = tuple(np.concatenate([a, a[:2]]) for a in rollouts())
    laid_out = stream.packed(*given, units=4)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    over = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    expected = gradients(policy(), given, laid_out)
    with jax.set_mesh(mesh):
        got = gradients(policy(), jax.device_put(given, over), jax.device_put(laid_out, over))
    assert_same(jax.device_get(got), jax.device_get(expected))


def test_prompts_are_dealt_evenly_and_documents_stay_together():
    loads_N, documents_N = np.array([9, 1, 1, 1, 8, 2, 1, 1]), np.array([0, 3, 3, 3, 1, 2, 4, 5])
    dealt = stream.deal(loads_N, documents_N, 2)
    assert sorted(dealt.ravel()) == list(range(8)) and dealt.shape == (2, 4)
    assert {loads_N[unit].sum() for unit in dealt} == {11, 13}
    assert any({1, 2, 3} <= set(unit) for unit in dealt)
    np.testing.assert_array_equal(np.sort(stream.deal(loads_N, np.zeros(8), 4).ravel()), np.arange(8))


def test_what_is_picked_past_the_end_is_nothing():
    got = stream.pick(jnp.array([[10, 11, 12], [20, 21, 22]]), jnp.array([[2, 0], [1, 3]]), -1)
    np.testing.assert_array_equal(got, [[12, 10], [21, -1]])


def test_padded_lengths_are_few_and_near():
    lengths = [stream.padded_length(n) for n in range(1, 4097)]
    assert all(n <= length <= max(16, 1.5 * n) for n, length in enumerate(lengths, start=1))
    assert sorted(set(lengths))[:6] == [16, 24, 32, 48, 64, 96] and len(set(lengths)) == 17
