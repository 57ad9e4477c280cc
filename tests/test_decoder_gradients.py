"""Laws of the decoder that its gradients show: prompts computed once are prompts repeated, no state sees what comes
later, and what is computed again in the backward pass changes nothing."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder import MODEL, assert_close, forward, policy

from rpt_jax.policy import decoder


def weighted(states, params, tokens_BT, positions_BT, weights_BTD):
    """(gradient of the weighted sum of all hidden states that `states` makes, those states)."""

    def objective(params):
        hidden_BTD = states(params, tokens_BT, positions_BT)
        return jnp.vdot(weights_BTD, hidden_BTD), hidden_BTD

    return jax.grad(objective, has_aux=True)(params)


@functools.partial(jax.jit, static_argnames="model")
def gradient(params, tokens_BT, positions_BT, weights_BTD, model=MODEL):
    return weighted(functools.partial(forward, model=model), params, tokens_BT, positions_BT, weights_BTD)


@functools.cache
def shared_prompts():
    """Two ragged prompts with three ragged responses each, as plain rows: prompt, its padding, response."""
    rng = np.random.default_rng(1)
    positions_BT = np.full((6, 7), -1)
    for b, (prompt, response) in enumerate([(4, 3), (4, 1), (4, 2), (2, 3), (2, 3), (2, 2)]):
        positions_BT[b, :prompt] = np.arange(prompt)
        positions_BT[b, 4 : 4 + response] = prompt + np.arange(response)
    tokens_BT = rng.integers(0, 13, (6, 7))
    tokens_BT[:, :4] = np.repeat(tokens_BT[::3, :4], 3, axis=0)
    weights_BTD = rng.normal(size=(6, 7, 16)) * (positions_BT >= 0)[..., None]
    return tokens_BT, positions_BT, weights_BTD.astype(np.float32)


def shared_hidden(params, tokens_BT, positions_BT):
    """Hidden states of plain rows, by way of prompts computed once for three rows each."""
    prompt_NTD, keys = decoder.forward(params, MODEL, tokens_BT[::3, :4], positions_BT[::3, :4])
    own_BRD, _ = decoder.forward(params, MODEL, tokens_BT[:, 4:], positions_BT[:, 4:], (keys,))
    return jnp.concatenate([jnp.repeat(prompt_NTD, 3, axis=0), own_BRD], axis=1)


def test_shared_context_equals_repeated_prompts():
    """In values, and in gradients through prompt and responses."""
    live = shared_prompts()[1] >= 0
    shared = jax.jit(functools.partial(weighted, shared_hidden))
    gradients, states_BTD = jax.device_get(shared(policy(), *shared_prompts()))
    plain_gradients, plain_states_BTD = jax.device_get(gradient(policy(), *shared_prompts()))
    assert_close(states_BTD[live], plain_states_BTD[live])
    assert_close(gradients, plain_gradients)


def test_causality_by_gradients():
    """State t depends on the embedding of each token up to t in its row, and on no other token."""
    tokens_BT, positions_BT, _ = shared_prompts()
    tokens_BT = np.vstack([np.arange(7), np.full((5, 7), 12)])
    for t in range(7):
        weights_BTD = np.zeros((6, 7, 16), np.float32)
        weights_BTD[0, t] = np.arange(16)
        by_embedding_VD = gradient(policy(), tokens_BT, positions_BT, weights_BTD)[0]["embedding"]
        strength_V = np.abs(by_embedding_VD).max(axis=1)
        np.testing.assert_array_equal(strength_V > 0, np.arange(13) <= t, err_msg=f"state {t}")


def test_a_frequent_token_is_added_up_beyond_bfloat16():
    """2,048 uses of a token, each with a gradient of 1; a sum in bfloat16 stands still at 256."""
    tokens_BT = np.full((4, 512), 5)
    grad_VD = jax.grad(lambda table_VD: decoder.look_up(table_VD, tokens_BT, "bfloat16").astype(jnp.float32).sum())(
        policy()["embedding"]
    )
    np.testing.assert_array_equal(grad_VD, 2048.0 * (np.arange(13) == 5)[:, None] * np.ones(16))


def test_no_gradient_is_reduced_in_bfloat16():
    """Neither over tokens nor over anything else; matrix products sum in float32 by themselves."""
    model = replace(MODEL, dtype="bfloat16", qkv_bias=True, qk_norm=True)
    with jax.allow_f16_reductions(False):
        gradient.trace(policy(model), *shared_prompts(), model)


@pytest.mark.parametrize("remat", ["dots", "layer"])
def test_remat_changes_no_gradient(remat):
    model = replace(MODEL, remat=remat)
    assert_close(gradient(policy(), *shared_prompts(), model)[0], gradient(policy(), *shared_prompts())[0], rtol=1e-5)


def test_remat_computes_again():
    """Matrix products in the gradient: fewest with everything kept, most with only layer inputs kept."""

    def products(remat):
        model = replace(MODEL, remat=remat)
        return str(gradient.trace(policy(), *shared_prompts(), model).jaxpr).count("dot_general")

    assert products("none") < products("dots") < products("layer")
