"""Grouped log-prob: every implementation against float64, masks, extremes, meshes, memory and errors.

The Pallas kernels run interpreted here, with small blocks, so that every case has several tiles and ragged ends.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rpt_jax.kernels import grouped_logprob as module
from rpt_jax.kernels import grouped_logprob_tpu, grouped_logprob_xla
from rpt_jax.kernels.grouped_logprob_blocks import Blocks

ONE_PASS = Blocks(forward=(16, 512), backward=(16, 128), one_pass=True, cores=2, vmem_bytes=1 << 24)
OPTIONS = {
    "reference": {"implementation": "reference"},
    "xla": {"implementation": "xla", "chunk": 16},
    "one_pass": {"implementation": "pallas", "interpret": True, "blocks": ONE_PASS},
    "two_pass": {"implementation": "pallas", "interpret": True, "blocks": ONE_PASS._replace(one_pass=False)},
}
ALL = pytest.mark.parametrize("name", OPTIONS)
KERNELS = pytest.mark.parametrize("name", [name for name in OPTIONS if name != "reference"])
TEMPERATURE = 0.7


def case(T, D, V, dtype=np.float32, *, tied=False, scale=1.0, seed=0):
    """Logits of standard deviation about 2 * scale; the last target is the last column."""
    random = np.random.default_rng(seed)
    hidden = jnp.asarray(random.normal(size=(T, D)) * scale * 2 / D**0.5, dtype)
    head = jnp.asarray(random.normal(size=(V, D) if tied else (D, V)), dtype)
    targets, mask = random.integers(0, V, T).astype(np.int32), random.random(T) < 0.7
    targets[-1], mask[-1] = V - 1, True
    return hidden, head, targets, mask


def mix(T):
    """Cotangents of the three outputs, different for each token."""
    return np.random.default_rng(1).normal(size=(3, T)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("name", "tied", "softcap"))
def values_and_gradients(arrays, temperature, *, name, tied=False, softcap=None):
    """(logprob, entropy, lse, d hidden, d head) of a random mix of the three outputs."""
    hidden, head, targets, mask = arrays

    def mixed(hidden, head):
        out = module.grouped_logprob(
            hidden, head, targets, mask, temperature, tied=tied, softcap=softcap, **OPTIONS[name]
        )
        return jnp.vdot(mix(targets.size), jnp.stack(out).reshape(3, -1)), out

    gradients, out = jax.grad(mixed, (0, 1), has_aux=True)(hidden, head)
    return *out, *gradients


def in_float64(arrays, temperature=TEMPERATURE, *, tied=False, softcap=None):
    """The same by the formulas, one token after the other."""
    hidden, head, targets, mask = (np.asarray(a) for a in arrays)
    hidden, W = hidden.astype(np.float64), head.astype(np.float64).T if tied else head.astype(np.float64)
    T, V = len(targets), W.shape[1]
    temperature, g_3T = np.float64(np.float32(temperature)), mix(T)
    values, d_hidden, d_W = np.zeros((3, T)), np.zeros_like(hidden), np.zeros_like(W)
    for t in np.flatnonzero(mask):
        raw = hidden[t] @ W
        z = (raw if softcap is None else softcap * np.tanh(raw / softcap)) / temperature
        lse = z.max() + np.log(np.exp(z - z.max()).sum())
        logp = z - lse
        p, onehot = np.exp(logp), np.arange(V) == targets[t]
        entropy = -(p * logp).sum()
        values[:, t] = logp[targets[t]], entropy, lse
        d = g_3T[0, t] * (onehot - p) - g_3T[1, t] * p * (logp + entropy) + g_3T[2, t] * p
        d *= (1 if softcap is None else 1 - np.tanh(raw / softcap) ** 2) / temperature
        d_hidden[t] = W @ d
        d_W += np.outer(hidden[t], d)
    return *values, d_hidden, d_W.T if tied else d_W


def assert_near(got, expected, values=1e-6, gradients=1e-6):
    """Relative L2 distance of each of the three values and two gradients."""
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == (jnp.float32 if index < 3 else got[3].dtype)
        distance = np.linalg.norm(np.asarray(a, np.float64).ravel() - np.ravel(b))
        assert distance <= (values if index < 3 else gradients) * np.linalg.norm(b), ("values", "gradients")[index > 2]


@ALL
def test_two_logits_worked_by_hand(name):
    """z = (ln 3, 0) at temperature 1: p = (3/4, 1/4); at temperature 1/2: p = (9/10, 1/10)."""
    arrays = np.ones((2, 1), np.float32), np.array([[np.log(3.0), 0.0]], np.float32), np.array([0, 1]), np.ones(2, bool)
    out = module.grouped_logprob(*arrays, **OPTIONS[name])
    np.testing.assert_allclose(out.logprob, np.log([0.75, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(out.entropy, [-0.75 * np.log(0.75) - 0.25 * np.log(0.25)] * 2, rtol=1e-6)
    np.testing.assert_allclose(out.lse, np.log([4.0, 4.0]), rtol=1e-6)
    out = module.grouped_logprob(*arrays, 0.5, **OPTIONS[name])
    np.testing.assert_allclose(out.logprob, np.log([0.9, 0.1]), rtol=1e-6)


def test_float64_gradients_equal_finite_differences():
    """What everything else is compared with: its gradients against central differences of its values."""
    arrays = case(3, 4, 6)
    step = 1e-6
    for softcap in (None, 2.0):
        *_, d_hidden, d_head = in_float64(arrays, softcap=softcap)
        for place, expected in ((0, d_hidden), (1, d_head)):
            for index in np.ndindex(expected.shape):
                moved = []
                for sign in (1, -1):
                    shifted = [np.asarray(a, np.float64) if n < 2 else a for n, a in enumerate(arrays)]
                    shifted[place][index] += sign * step
                    moved.append((mix(3) * np.stack(in_float64(shifted, softcap=softcap)[:3])).sum())
                assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(expected[index], rel=1e-6, abs=1e-8)


@ALL
@pytest.mark.parametrize(
    ("T", "D", "V", "tied", "softcap"),
    [
        (1, 1, 2, False, None),
        (9, 7, 13, True, None),
        (33, 24, 129, False, 4.0),
        (50, 16, 1000, True, 4.0),
        (70, 520, 1003, False, None),
    ],
)
def test_values_and_gradients_equal_float64(name, T, D, V, tied, softcap):
    """Odd sizes, one token, a last target in the last column, a vocabulary that fills no tile, D in two matmuls."""
    arrays = case(T, D, V, tied=tied)
    got = values_and_gradients(arrays, TEMPERATURE, name=name, tied=tied, softcap=softcap)
    assert_near(got, in_float64(arrays, tied=tied, softcap=softcap))


@ALL
@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_inputs(name, tied):
    """Values as exact as in float32 (sums are float32); gradients have the inputs' dtype and rounding."""
    arrays = case(50, 64, 1000, jnp.bfloat16, tied=tied)
    got = values_and_gradients(arrays, TEMPERATURE, name=name, tied=tied)
    assert got[3].dtype == got[4].dtype == jnp.bfloat16
    assert_near(got, in_float64(arrays, tied=tied), values=1e-5, gradients=5e-3)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["xla", "one_pass"]),
    T=st.integers(1, 40),
    D=st.integers(1, 9),
    V=st.integers(1, 300),
    tied=st.booleans(),
    seed=st.integers(0, 2**16),
    temperature=st.floats(0.25, 4),
)
def test_any_size_mask_and_temperature(name, T, D, V, tied, seed, temperature):
    arrays = case(T, D, V, tied=tied, seed=seed)
    expected = in_float64(arrays, temperature, tied=tied)
    got = values_and_gradients(arrays, temperature, name=name, tied=tied)
    for a, b in zip(got, expected, strict=True):  # small cases can be all zero: no relative bound
        np.testing.assert_allclose(np.asarray(a, np.float64).reshape(b.shape), b, rtol=2e-5, atol=2e-5)


@ALL
def test_masked_tokens_give_zero_and_no_gradient_whatever_they_hold(name):
    hidden, head, targets, mask = case(40, 5, 13)
    soiled = jnp.where(mask[:, None], hidden, jnp.nan), head, np.where(mask, targets, -7), mask
    got = values_and_gradients(soiled, TEMPERATURE, name=name)
    assert_near(got, in_float64((hidden, head, targets, mask)))
    assert not any(np.asarray(a)[~mask].any() for a in got[:4])


@ALL
def test_all_masked_is_all_zero(name):
    arrays = (*case(20, 4, 9)[:3], np.zeros(20, bool))
    assert not any(np.asarray(a).any() for a in values_and_gradients(arrays, TEMPERATURE, name=name))


def test_tiles_without_live_tokens_are_not_computed():
    """Not even looked at: nan in them reaches nothing that other tokens share."""
    hidden, head, targets, _ = case(64, 8, 200)
    soiled, live = hidden.at[32:].set(jnp.nan), jnp.int32(20)
    one_pass = grouped_logprob_tpu.make_plan(ONE_PASS, head, False, None, True, True)
    rows = [jnp.where(jnp.arange(64) < 20, row, 0.0) for row in mix(64)]
    two_pass = one_pass._replace(blocks=ONE_PASS._replace(one_pass=False))
    in_chunks = grouped_logprob_xla.Plan(False, None, True, 16)
    for run, plan in (
        (grouped_logprob_xla, in_chunks),
        (grouped_logprob_tpu, one_pass),
        (grouped_logprob_tpu, two_pass),
    ):
        outs = [run.forward(plan, h, head, targets, live, 200, 1.0) for h in (hidden, soiled)]
        for a, b in zip(*outs, strict=True):
            np.testing.assert_array_equal(a[:32], b[:32])
        statistics = [jnp.where(jnp.arange(64) < 20, out, 0.0) for out in outs[0][2:]]
        grads = [run.backward(plan, h, head, targets, live, 200, 1.0, *statistics, *rows) for h in (hidden, soiled)]
        np.testing.assert_array_equal(grads[0][0][:20], grads[1][0][:20])
        np.testing.assert_array_equal(grads[0][1], grads[1][1])
        assert np.isfinite(grads[1][1]).all()


@ALL
def test_extreme_logits_stay_finite_and_right(name):
    """Logits up to about 1e5: the target's log-prob and lse keep their relative precision, the entropy is near 0."""
    hidden, head, targets, _ = case(20, 6, 140, scale=1e4)
    arrays = hidden, head, targets, np.ones(20, bool)
    got = values_and_gradients(arrays, 1.0, name=name)
    expected = in_float64(arrays, 1.0)
    np.testing.assert_allclose(np.stack(got[:3]), np.stack(expected[:3]), rtol=1e-5, atol=0.1)
    assert all(np.isfinite(np.asarray(a)).all() for a in got) and (np.asarray(got[1]) >= 0).all()


@ALL
def test_target_outside_the_vocabulary_is_nan_and_not_a_wrong_number(name):
    hidden, head, _, _ = case(3, 4, 9)
    out = module.grouped_logprob(hidden, head, np.array([2, 9, -1]), np.ones(3, bool), **OPTIONS[name])
    assert np.isnan(out.logprob).tolist() == [False, True, True]
    assert np.isfinite(out.entropy).all() and np.isfinite(out.lse).all()


@ALL
def test_groups_of_rollouts_equal_a_flat_list(name):
    """[N, G, T, D] in, [N, G, T] out."""
    hidden, head, targets, mask = case(24, 5, 13)
    grouped = hidden.reshape(2, 3, 4, 5), head, targets.reshape(2, 3, 4), mask.reshape(2, 3, 4)
    out = module.grouped_logprob(*grouped, **OPTIONS[name])
    for a, b in zip(out, module.grouped_logprob(hidden, head, targets, mask, **OPTIONS[name]), strict=True):
        np.testing.assert_array_equal(a, b.reshape(2, 3, 4))


@KERNELS
def test_a_new_temperature_compiles_nothing_new(name):
    arrays = case(5, 3, 7)
    step = jax.jit(functools.partial(values_and_gradients.__wrapped__, name=name))
    for temperature in (0.5, 1.0, 2.0):
        assert_near(step(arrays, temperature), in_float64(arrays, temperature))
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("shape", "softcap"), [((2, 1, 2), None), ((1, 1, 4), 4.0), ((2, 2, 2), None), ((1, 8, 1), None)]
)
@pytest.mark.parametrize(("name", "T", "V", "tied"), [("xla", 33, 131, False), ("one_pass", 40, 515, True)])
def test_tokens_and_vocabulary_split_over_a_mesh_change_nothing(shape, softcap, name, T, V, tied):
    """(data, fsdp, tensor) meshes, where T and V divide over the axes and where not; each device has its own mask.

    With a softcap the columns that fill up a split vocabulary must be hidden behind it: tanh would let them count.
    """
    mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("data", "fsdp", "tensor"))
    for arrays in (case(T, 9, V, tied=tied), case(48, 9, 128, tied=tied)):
        with jax.set_mesh(mesh):
            step = functools.partial(values_and_gradients.__wrapped__, name=name, tied=tied, softcap=softcap)
            got = jax.jit(step)(arrays, TEMPERATURE)
        assert_near(got, in_float64(arrays, tied=tied, softcap=softcap))


def test_sharded_arrays_without_a_mesh_context_change_nothing():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    arrays = case(48, 5, 13)
    sharded = (jax.device_put(arrays[0], rows), arrays[1], *jax.device_put(arrays[2:], rows))
    assert_near(values_and_gradients(sharded, TEMPERATURE, name="xla"), in_float64(arrays))


def test_default_chunks_hold_less_than_a_quarter_of_the_logits():
    """Value and gradient of 2048 x 32768 logits, as compiled for this backend."""
    T, D, V = 2048, 256, 32768

    def loss(implementation, hidden, head, targets):
        out = module.grouped_logprob(hidden, head, targets, jnp.ones(T, bool), implementation=implementation)
        return jnp.sum(out.logprob + out.entropy)

    shapes = [jax.ShapeDtypeStruct(*a) for a in (((T, D), jnp.float32), ((D, V), jnp.float32), ((T,), jnp.int32))]
    held = {}
    for implementation in ("auto", "reference"):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, implementation), (0, 1)))
        memory = step.lower(*shapes).compile().memory_analysis()
        held[implementation] = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert held["reference"] > T * V * 4
    assert held["auto"] < held["reference"] / 4


def test_auto_is_chosen_once_and_logged(caplog):
    module._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="rpt_jax.kernels.grouped_logprob"):
        assert [module.resolve("auto"), module.resolve("auto")] == ["xla", "xla"]
    assert [record.getMessage() for record in caplog.records] == ["grouped log-prob: implementation 'xla' on cpu"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "triton"}, "'triton' is none of auto, pallas, xla, reference"),
        ({"implementation": "pallas"}, r"runs on TPUs, and this is cpu: use 'xla', 'reference', or 'auto' \(pallas on"),
        ({"tied": True}, r"head \(3, 4\) is not \[V, D\] \(tied=True\) for hidden states of D=3"),
        ({"mask": np.ones(3, bool)}, r"\(2, 3\) without its last axis, targets \(2,\), mask \(3,\) differ"),
        ({"chunk": 0}, "chunk=0 tokens must be 1 or more"),
        ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
    ],
)
def test_what_cannot_be_used_says_what_can(change, message):
    arguments = dict(zip(("hidden", "head", "targets", "mask"), case(2, 3, 4), strict=True))
    with pytest.raises(ValueError, match=message):
        module.grouped_logprob(**arguments | change)


@KERNELS
def test_a_second_derivative_raises(name):
    hidden, head, targets, mask = case(4, 3, 7)

    def entropy(hidden):
        return module.grouped_logprob(hidden, head, targets, mask, **OPTIONS[name]).entropy.sum()

    with pytest.raises(NotImplementedError, match="no second derivative.*use 'reference'"):
        jax.grad(lambda hidden: jnp.sum(jax.grad(entropy)(hidden) ** 2))(hidden)
