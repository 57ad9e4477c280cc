"""Attention by the TPU's kernels, interpreted, against the blocks that run anywhere; value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax import mesh as meshes
from rpt_jax.config import MeshConfig
from rpt_jax.policy import splash, stream
from rpt_jax.policy.attention import attend_in_blocks

C = 128


def a_stream(units=1, queries=128):
    """Prompts with a common beginning, responses of one token, of a few and of more than a block."""
    random = np.random.default_rng(1)
    prompts_NT = random.integers(0, 50, (2, 140))
    prompts_NT[1, :30] = prompts_NT[0, :30]
    responses_NGR = random.integers(0, 50, (2, 2, 150))
    return stream.packed(
        prompts_NT, np.array([140, 50]), responses_NGR, np.array([[150, 1], [7, 130]]), units, queries=queries
    )


def arrays(laid_out, heads=4, kv_heads=2):
    random = np.random.default_rng(0)
    shape = laid_out.tokens_UT.shape
    q, k, v, g = (random.normal(size=(*shape, n, C)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads))
    g[laid_out.positions_UT < 0] = 0  # nothing reads what padding attends to
    return q, k, v, g


def with_gradients(laid_out, q, k, v, g, implementation):
    def weighted(q, k, v):
        out = attend_in_blocks(q, k, v, laid_out, implementation)
        return jnp.sum(out * g), out

    gradients, out = jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)
    return jnp.where(laid_out.positions_UT[..., None, None] >= 0, out, 0), *gradients


@pytest.mark.parametrize("queries", [128, 256])
def test_kernels_equal_blocks(queries):
    laid_out = a_stream(queries=queries)
    assert [block.queries_UBQ.shape[2] for block in laid_out.blocks] == [queries, queries]
    assert all(splash.takes(block, C) for block in laid_out.blocks)
    given = arrays(laid_out)
    for got, expected in zip(*(with_gradients(laid_out, *given, way) for way in ("interpret", "xla")), strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_short_queries_make_narrow_blocks():
    """Of at most 512, 256 hold 140 and 150 tokens; keys are whole lanes, at least as many as queries."""
    blocks = a_stream(queries=512).blocks
    assert [(block.queries_UBQ.shape[2], block.keys_UBS.shape[2]) for block in blocks] == [(256, 256), (256, 384)]
    assert not splash.takes(a_stream(queries=64).blocks[0], C)
    assert not splash.takes(blocks[0], 64)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (12, 6)])
def test_over_a_mesh_the_same(heads, kv_heads):
    """Units over data, heads over tensor, of more devices than kv heads, as many, or neither a part nor a multiple."""
    mesh = meshes.make_mesh(MeshConfig(data=2, tensor=4))
    laid_out = a_stream(units=2)
    given = arrays(laid_out, heads, kv_heads)
    expected = with_gradients(laid_out, *given, "xla")
    placed = meshes.place((laid_out, given), meshes.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda laid_out, given: with_gradients(laid_out, *given, "interpret"))(*placed)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_bfloat16_is_as_near_as_the_blocks_are():
    laid_out = a_stream()
    given = [a.astype(jnp.bfloat16) for a in arrays(laid_out)]
    exact = with_gradients(laid_out, *(a.astype(jnp.float32) for a in given), "xla")
    for way in ("interpret", "xla"):
        for got, expected in zip(with_gradients(laid_out, *given, way), exact, strict=True):
            apart = jnp.linalg.norm(got.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
            assert apart < 1e-2, way


def test_streams_that_the_kernel_cannot_take_are_refused():
    """Those with padding stand at the left of their rows: its mask would be wrong."""
    prompts, responses = np.zeros((1, 128), int), np.zeros((1, 2, 129), int)
    padded = stream.padded(prompts, np.array([128]), responses, np.array([[129, 129]]))
    q, k, v, _ = arrays(padded)
    with pytest.raises(ValueError, match="'interpret' wants blocks of a packed stream .* use 'xla' or 'auto'"):
        attend_in_blocks(q, k, v, padded, "interpret")
