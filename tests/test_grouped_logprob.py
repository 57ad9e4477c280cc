"""Grouped log-prob: against float64 by hand, the chunked path against the reference, masks, extremes and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rpt_jax.kernels import grouped_logprob as module

BOTH = pytest.mark.parametrize("implementation", ["reference", "xla"])
grouped_logprob = jax.jit(module.grouped_logprob, static_argnames=("implementation", "chunk"))


def case(T, D, V, dtype=np.float32, scale=1.0):
    random = np.random.default_rng(0)
    hidden_TD = (scale * random.normal(size=(T, D))).astype(dtype)
    head_DV = random.normal(size=(D, V)).astype(dtype)
    return hidden_TD, head_DV, random.integers(0, V, T).astype(np.int32), random.random(T) < 0.7


def by_hand(hidden_TD, head_DV, targets_T, temperature):
    """log p, H and lse in float64, one token at a time."""
    rows = []
    for hidden_D, target in zip(np.asarray(hidden_TD, np.float64), np.asarray(targets_T), strict=True):
        z_V = hidden_D @ np.asarray(head_DV, np.float64) / temperature
        lse = z_V.max() + np.log(np.exp(z_V - z_V.max()).sum())
        p_V = np.exp(z_V - lse)
        rows.append((z_V[target] - lse, lse - (p_V * z_V).sum(), lse))
    return np.array(rows).T


def mix(T, weights):
    return np.random.default_rng(1).normal(size=(3, T)).astype(np.float32) * np.array(weights, np.float32)[:, None]


@functools.partial(jax.jit, static_argnames=("implementation", "chunk"))
def mixed_gradients(arrays, mix_3T, implementation, chunk):
    def mixed(hidden_TD, head_DV):
        out = module.grouped_logprob(hidden_TD, head_DV, *arrays[2:], 0.6, implementation=implementation, chunk=chunk)
        return jnp.vdot(mix_3T, jnp.stack(out))

    return jax.grad(mixed, (0, 1))(*arrays[:2])


def gradients(implementation, arrays, *, chunk=4, weights=(1.0, -0.7, 0.3)):
    """d/d(hidden, head) of a different random mix of the three outputs at each token, at temperature 0.6."""
    return mixed_gradients(arrays, mix(len(arrays[2]), weights), implementation, chunk)


def close(a, b, tolerance):
    """Largest difference relative to the largest entry."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@BOTH
def test_two_logits_worked_by_hand(implementation):
    """z = (ln 3, 0) at temperature 1: p = (3/4, 1/4); at temperature 1/2: p = (9/10, 1/10)."""
    hidden_TD, head_DV = np.ones((2, 1), np.float32), np.array([[np.log(3.0), 0.0]], np.float32)
    targets_T, mask_T = np.array([0, 1]), np.ones(2, bool)
    out = grouped_logprob(hidden_TD, head_DV, targets_T, mask_T, implementation=implementation)
    np.testing.assert_allclose(out.logprob_T, np.log([0.75, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(out.entropy_T, [-0.75 * np.log(0.75) - 0.25 * np.log(0.25)] * 2, rtol=1e-6)
    np.testing.assert_allclose(out.lse_T, np.log([4.0, 4.0]), rtol=1e-6)
    out = grouped_logprob(hidden_TD, head_DV, targets_T, mask_T, 0.5, implementation=implementation)
    np.testing.assert_allclose(out.logprob_T, np.log([0.9, 0.1]), rtol=1e-6)


@BOTH
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 64])
def test_values_equal_float64_for_every_chunk(implementation, chunk):
    hidden_TD, head_DV, targets_T, mask_T = case(7, 5, 13)
    out = grouped_logprob(
        hidden_TD, head_DV, targets_T, mask_T, jnp.float32(0.8), implementation=implementation, chunk=chunk
    )
    expected = by_hand(hidden_TD, head_DV, targets_T, 0.8) * mask_T
    np.testing.assert_allclose(np.stack(out), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("T", "D", "V"), [(1, 1, 2), (7, 5, 13), (33, 16, 129), (8, 3, 1)])
@pytest.mark.parametrize("chunk", [4, 100])
def test_gradients_equal_the_reference(T, D, V, chunk):
    arrays = case(T, D, V)
    for got, expected in zip(
        gradients("xla", arrays, chunk=chunk), gradients("reference", arrays, chunk=chunk), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_each_gradient_equals_finite_differences(weights):
    """Log-prob, entropy and lse apart, against central differences of the float64 formula."""
    hidden_TD, head_DV, targets_T, _ = case(3, 4, 6)
    arrays = hidden_TD, head_DV, targets_T, np.ones(3, bool)
    got_TD, _ = gradients("xla", arrays, chunk=2, weights=weights)
    mix_3T = mix(3, weights)
    expected_TD, step = np.zeros((3, 4)), 1e-5
    for index in np.ndindex(3, 4):
        shift_TD = np.zeros((3, 4))
        shift_TD[index] = step
        up, down = (
            by_hand(np.asarray(hidden_TD, np.float64) + sign * shift_TD, head_DV, targets_T, 0.6) for sign in (1, -1)
        )
        expected_TD[index] = (mix_3T * (up - down)).sum() / (2 * step)
    np.testing.assert_allclose(got_TD, expected_TD, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_near_the_same_numbers_in_float32():
    """bf16 inputs, f32 accumulation: values as exact as f32; gradients keep the inputs' dtype, off by its rounding."""
    arrays = case(19, 32, 65, jnp.bfloat16, scale=0.3)
    wide = (arrays[0].astype(np.float32), arrays[1].astype(np.float32), *arrays[2:])
    for got, expected in zip(grouped_logprob(*arrays, chunk=8), grouped_logprob(*wide, chunk=8), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for got, expected in zip(gradients("xla", arrays), gradients("reference", wide), strict=True):
        assert got.dtype == jnp.bfloat16
        close(got, expected, 2**-7)


@BOTH
def test_masked_tokens_give_zero_and_no_gradient_whatever_they_hold(implementation):
    hidden_TD, head_DV, targets_T, _ = case(6, 5, 13)
    mask_T = np.array([True, False, True, False, False, True])
    soiled = (
        np.where(mask_T[:, None], hidden_TD, np.float32(np.nan)),
        head_DV,
        np.where(mask_T, targets_T, -7),
        mask_T,
    )
    clean = (hidden_TD, head_DV, targets_T, mask_T)
    for got, expected in zip(
        grouped_logprob(*soiled, implementation=implementation, chunk=4), grouped_logprob(*clean), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        assert not np.asarray(got)[~mask_T].any()
    for got, expected in zip(gradients(implementation, soiled), gradients("reference", clean), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-6)
    assert not np.asarray(gradients(implementation, soiled)[0])[~mask_T].any()


@BOTH
def test_all_masked_is_all_zero(implementation):
    arrays = (*case(5, 4, 9)[:3], np.zeros(5, bool))
    assert not np.stack(grouped_logprob(*arrays, implementation=implementation, chunk=2)).any()
    assert not any(np.asarray(g).any() for g in gradients(implementation, arrays))


@BOTH
def test_extreme_logits_stay_finite_and_right(implementation):
    """Logits up to about 1e5: the target's log-prob and lse keep their relative precision, the entropy is near 0."""
    hidden_TD, head_DV, targets_T, _ = case(9, 6, 40, scale=1e4)
    arrays = hidden_TD, head_DV, targets_T, np.ones(9, bool)
    out = grouped_logprob(*arrays, implementation=implementation, chunk=4)
    expected = by_hand(hidden_TD, head_DV, targets_T, 1.0)
    np.testing.assert_allclose(np.stack(out), expected, rtol=1e-5, atol=0.1)
    assert np.isfinite(np.stack(out)).all() and (np.asarray(out.entropy_T) >= 0).all()
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients(implementation, arrays))


def test_target_outside_the_vocabulary_is_nan_and_not_a_wrong_number():
    hidden_TD, head_DV, _, _ = case(3, 4, 9)
    out = grouped_logprob(hidden_TD, head_DV, np.array([2, 9, -1]), np.ones(3, bool))
    assert np.isnan(out.logprob_T).tolist() == [False, True, True]


def test_memory_does_not_hold_tokens_by_vocabulary():
    """Value and gradient of 4096 x 8192 logits (134 MB) compile to less than a quarter of them for chunks of 256."""
    T, D, V = 4096, 8, 8192

    def loss(implementation, hidden_TD, head_DV, targets_T):
        out = module.grouped_logprob(
            hidden_TD, head_DV, targets_T, jnp.ones(T, bool), implementation=implementation, chunk=256
        )
        return jnp.sum(out.logprob_T + out.entropy_T)

    shapes = [jax.ShapeDtypeStruct(*a) for a in (((T, D), jnp.float32), ((D, V), jnp.float32), ((T,), jnp.int32))]
    temp = {}
    for implementation in ("xla", "reference"):
        step = jax.jit(jax.value_and_grad(lambda *a, i=implementation: loss(i, *a), (0, 1)))
        temp[implementation] = step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temp["xla"] < T * V * 4 / 4 < T * V * 4 <= temp["reference"]


def test_tokens_sharded_over_devices_change_nothing():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    hidden_TD, head_DV, targets_T, mask_T = case(48, 5, 13)
    sharded = (jax.device_put(hidden_TD, rows), head_DV, *jax.device_put((targets_T, mask_T), rows))
    got = grouped_logprob(*sharded, chunk=16)
    for a, b in zip(got, grouped_logprob(hidden_TD, head_DV, targets_T, mask_T, chunk=16), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_unknown_implementation_names_what_there_is():
    with pytest.raises(ValueError, match="pallas.*auto, xla, reference"):
        grouped_logprob(*case(2, 3, 4), implementation="pallas")
