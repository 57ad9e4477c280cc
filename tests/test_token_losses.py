"""Claims: a token's loss and its gradient (clipped; on-policy, with KL and entropy), and its share of the whole, are
those worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import UpdateConfig
from rpt_jax.learning import update
from rpt_jax.records import Batch


def hand_batch(sampler, advantages):
    """One prompt, two responses of two tokens each."""
    empty = np.zeros((1, 1), int)
    return Batch(
        empty, empty[0], np.zeros((1, 2, 2), int), np.full((1, 2), 2), np.log(np.array(sampler)), np.array(advantages)
    )


def test_off_policy_losses_worked_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5 for A = 1, 1, -1, -1 and clip 0.2 / 0.28: -min(rho A, clip(rho) A)."""
    config = UpdateConfig(on_policy=False, clip_low=0.2, clip_high=0.28)
    batch = hand_batch([[[0.5, 0.5], [0.5, 0.5]]], [[1.0, -1.0]])

    def total(logprobs_NGR):
        losses_NGR, clipped_NGR = update.token_losses(logprobs_NGR, jnp.zeros((1, 2, 2)), batch, config)
        return losses_NGR.sum(), (losses_NGR, clipped_NGR)

    logprobs_NGR = jnp.log(jnp.array([[[0.75, 0.25], [0.75, 0.25]]]))
    (_, (losses_NGR, clipped_NGR)), gradient_NGR = jax.value_and_grad(total, has_aux=True)(logprobs_NGR)
    np.testing.assert_allclose(losses_NGR, [[[-1.28, -0.5], [1.5, 0.8]]], rtol=1e-6)
    np.testing.assert_array_equal(clipped_NGR, [[[True, False], [False, True]]])
    np.testing.assert_allclose(gradient_NGR, [[[0.0, -0.5], [1.5, 0.0]]], rtol=1e-6)  # -rho A where not clipped


def test_on_policy_losses_kl_and_entropy_worked_by_hand():
    """Ratio 1: loss -A; + 0.1 k3 with k3 = ref/p - log(ref/p) - 1 at ref/p = 2; - 0.01 H. d k3 / d logp = 1 - ref/p."""
    config = UpdateConfig(kl_coefficient=0.1, entropy_coefficient=0.01)
    batch = hand_batch([[[0.9, 0.9], [0.9, 0.9]]], [[0.5, -2.0]])
    logprobs_NGR = jnp.log(jnp.full((1, 2, 2), 0.25))

    def losses(logprobs_NGR):
        reference_NGR = jnp.log(jnp.full((1, 2, 2), 0.5))
        return update.token_losses(logprobs_NGR, jnp.full((1, 2, 2), 1.5), batch, config, reference_NGR)[0]

    extra = 0.1 * (2 - np.log(2) - 1) - 0.015
    np.testing.assert_allclose(losses(logprobs_NGR), [[[-0.5 + extra] * 2, [2.0 + extra] * 2]], rtol=1e-5)
    gradient_NGR = jax.grad(lambda x: losses(x).sum())(logprobs_NGR)
    np.testing.assert_allclose(gradient_NGR, [[[-0.5 - 0.1] * 2, [2.0 - 0.1] * 2]], rtol=1e-5)


def test_aggregates_worked_by_hand():
    """Lengths 1, 3 and 0: the empty response counts nowhere."""
    lengths_NG = jnp.array([[1, 3], [0, 3]])
    live_NGR = np.array([[[1, 0, 0], [1, 1, 1]], [[0, 0, 0], [1, 1, 1]]])
    shares_NG1 = np.array([[[1.0], [1 / 3]], [[1.0], [1 / 3]]])
    weights = functools.partial(update.token_weights, lengths_NG, 3)
    np.testing.assert_allclose(weights("token_mean"), live_NGR / 7, rtol=1e-6)
    np.testing.assert_allclose(weights("sequence_mean"), live_NGR * shares_NG1 / 3, rtol=1e-6)
    np.testing.assert_allclose(weights("constant", 8), live_NGR / (3 * 8), rtol=1e-6)
    with pytest.raises(ValueError, match="response limit"):
        weights("constant")


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "constant"])
def test_a_divisor_may_be_beyond_int32(aggregate):
    """256 x 128 responses of 65,536 tokens, as many as there may be: 2^31."""
    weights_NGR = update.token_weights(jnp.full((256, 128), 65536, jnp.int32), 1, aggregate, 65536)
    np.testing.assert_array_equal(weights_NGR, np.full((256, 128, 1), 2.0**-31, np.float32))
