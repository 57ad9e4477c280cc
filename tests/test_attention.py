"""Attention: precision, and blocks of a stream against numpy; caches and streams are tested with what uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.policy import attention, stream


def test_softmax_is_float32():
    """Scores 100 and 100.25 are one number in bf16; in float32 the second has weight 1 / (1 + exp(-0.25))."""
    q_BHTC = jnp.array([16.0, 0.5, 0, 0], jnp.bfloat16).reshape(1, 1, 1, 4)
    k_NKSC = jnp.array([[12.5, 0, 0, 0], [12.5, 1, 0, 0]], jnp.bfloat16)[None, None]
    v_NKSC = jnp.array([[0.0, 0, 0, 0], [1, 1, 1, 1]], jnp.bfloat16)[None, None]
    out_BHTC = attention.attend(q_BHTC, jnp.array([[2]]), ((k_NKSC, v_NKSC, jnp.array([[0, 1]])),))
    np.testing.assert_allclose(np.asarray(out_BHTC, np.float32), 0.5622, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_of_a_stream_equal_numpy(dtype):
    """Two prompts with a common beginning and a response each, four heads on two kv heads, softmax in float64."""
    given = (
        np.array([[1, 2, 3], [1, 4, 0]]),
        np.array([3, 2]),
        np.array([[[5, 6, 7]], [[8, 9, 0]]]),
        np.array([[3], [2]]),
    )
    laid_out = stream.packed(*given)
    paths = [[0, 1, 2, 4, 5], [0, 3, 6]]  # places of 1 2 3 5 6 and of 1 4 8; the last tokens are left out
    T = laid_out.tokens_UT.shape[1]
    np.testing.assert_array_equal(laid_out.tokens_UT[0, :7], [1, 2, 3, 4, 5, 6, 8])
    random = np.random.default_rng(0)
    q_THC, k_TKC, v_TKC = (jnp.asarray(random.normal(size=(T, heads, 6)), dtype) for heads in (4, 2, 2))
    got_THC = attention.attend_in_blocks(q_THC[None], k_TKC[None], v_TKC[None], laid_out)[0]
    assert got_THC.dtype == dtype
    q_THC, k_TKC, v_TKC = (np.asarray(a, np.float64) for a in (q_THC, k_TKC, v_TKC))
    for path in paths:
        for place, t in enumerate(path):
            for head in range(4):
                z_S = k_TKC[path[: place + 1], head // 2] @ q_THC[t, head] / 6**0.5
                p_S = np.exp(z_S - z_S.max())
                expected_C = p_S @ v_TKC[path[: place + 1], head // 2] / p_S.sum()
                tolerance = 1e-5 if dtype == "float32" else 2e-2
                np.testing.assert_allclose(np.asarray(got_THC[t, head], np.float64), expected_C, atol=tolerance)


@pytest.mark.parametrize("blocks", ["one by one", "at once"])
def test_what_many_blocks_give_back_to_a_prompt_is_added_up_beyond_bfloat16(monkeypatch, blocks):
    """A prompt of one token that 1,025 queries see alone, each in a block of its own; a bfloat16 sum stops at 256."""
    monkeypatch.setitem(attention.SCORES_AT_ONCE, "cpu", 1 if blocks == "one by one" else 1 << 19)
    responses_NGR = np.arange(32 * 33).reshape(1, 32, 33) % 97
    laid_out = stream.packed(np.array([[5]]), np.array([1]), responses_NGR, np.full((1, 32), 33), queries=1)
    T = laid_out.tokens_UT.shape[1]
    q_UTHC = jnp.ones((1, T, 1, 2), jnp.bfloat16)
    k_UTKC = jnp.zeros((1, T, 1, 2), jnp.bfloat16).at[0, 0].set(64)
    live_UT11 = (laid_out.positions_UT >= 0)[..., None, None]

    def gathered(v_UTKC):
        out_UTHC = attention.attend_in_blocks(q_UTHC, k_UTKC, v_UTKC, laid_out)
        return jnp.sum(out_UTHC, where=live_UT11, dtype=jnp.float32)

    grad_UTKC = jax.grad(gathered)(jnp.zeros((1, T, 1, 2), jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(grad_UTKC[0, 0, 0], np.float32), 1025, atol=4)
