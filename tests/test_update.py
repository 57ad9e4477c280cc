"""GRPO update: schedules by hand, gradients by the formula, microbatches, guards, eight devices. Losses by hand:
test_token_losses.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rpt_jax.config import ModelConfig, PretrainConfig, UpdateConfig
from rpt_jax.learning import update
from rpt_jax.policy import decoder, scorer
from rpt_jax.records import Batch, InputError

MODEL = ModelConfig(vocab_size=11, width=16, layers=2, heads=2, kv_heads=1, head_channels=8, hidden=24)
CONFIG = UpdateConfig(learning_rate=1e-2, warmup_steps=4, token_chunk=32)
N, G, T, R = 16, 2, 3, 4
LIMIT = 6  # response limit, above the padded length of the batch


@functools.cache
def policy():
    return jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))


def make_batch():
    """Ragged prompts and responses of random tokens; the sampler's log-probs are off by up to 0.6 nats."""
    random = np.random.default_rng(0)
    prompt_lengths_N, lengths_NG = random.integers(1, T + 1, N), random.integers(1, R + 1, (N, G))
    live_NGR = np.arange(R) < lengths_NG[:, :, None]
    return Batch(
        prompt_tokens_NT=random.integers(0, 11, (N, T)) * (np.arange(T) < prompt_lengths_N[:, None]),
        prompt_lengths_N=prompt_lengths_N,
        tokens_NGR=random.integers(0, 11, (N, G, R)) * live_NGR,
        lengths_NG=lengths_NG,
        logprobs_NGR=((-2.4 + random.uniform(-0.6, 0.6, (N, G, R))) * live_NGR).astype(np.float32),
        advantages_NG=random.normal(size=(N, G)).astype(np.float32),
    )


compute = jax.jit(update.loss_and_gradients, static_argnames=("model", "config"))


def loss_and_gradients(batch, config=CONFIG, reference_NGR=None):
    return compute(policy(), batch, 0.8, LIMIT, reference_NGR, model=MODEL, config=config)


@jax.jit
def score_and_policy_gradient(params, batch):
    """Scores, and -sum w A grad log p with w = 1 / response tokens, from the scorer alone."""
    rollouts = batch.prompt_tokens_NT, batch.prompt_lengths_N, batch.tokens_NGR, batch.lengths_NG
    logprobs_NGR, pull, entropies_NGR = jax.vjp(
        lambda p: scorer.score(p, MODEL, *rollouts, 0.8, 32), params, has_aux=True
    )
    live_NGR = jnp.arange(R)[None, None] < batch.lengths_NG[:, :, None]
    weighted_NGR = jnp.where(live_NGR, batch.advantages_NG[:, :, None], 0.0)
    return logprobs_NGR, entropies_NGR, pull(-weighted_NGR / batch.lengths_NG.sum())[0]


def step(state, batch, config=CONFIG):
    return update.train_step(state, batch, 0.8, LIMIT, model=MODEL, config=config, steps=10)


def fresh_state(config=CONFIG):
    return update.init_state(policy(), update.make_optimizer(config, 10))


def assert_same_tree(a, b, rtol=1e-5):
    """Equal to rtol of each entry, or of the largest entry of all."""
    scale = max(np.abs(x).max() for x in jax.tree.leaves(b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=0.1 * rtol * scale), a, b)


def test_on_policy_gradient_is_minus_advantage_times_grad_logprob():
    """The policy gradient, and a loss of -mean A over tokens, whatever the sampler's log-probs."""
    batch = make_batch()
    loss, gradients, _ = loss_and_gradients(batch)
    expected_loss = -(batch.advantages_NG * batch.lengths_NG).sum() / batch.lengths_NG.sum()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_same_tree(gradients, score_and_policy_gradient(policy(), batch)[2])


def test_microbatches_change_nothing():
    """1, 2 and 4 parts of ragged responses give one loss, gradient and set of metrics, every option on."""
    batch = make_batch()
    options = {"on_policy": False, "kl_coefficient": 0.1, "entropy_coefficient": 0.01}
    results = [
        loss_and_gradients(batch, dataclasses.replace(CONFIG, microbatches=parts, **options), batch.logprobs_NGR - 0.1)
        for parts in (1, 2, 4)
    ]
    for loss, gradients, metrics in results[1:]:
        np.testing.assert_allclose(loss, results[0][0], rtol=1e-5)
        assert_same_tree(gradients, results[0][1])
        assert metrics.keys() == results[0][2].keys() >= {"kl", "clip_share", "mismatch_max"}
        for name, value in metrics.items():
            np.testing.assert_allclose(value, results[0][2][name], rtol=1e-5, err_msg=name)


def test_microbatches_that_do_not_divide_are_named():
    config = dataclasses.replace(CONFIG, microbatches=3)
    with pytest.raises(InputError, match="batch of 16 prompts does not divide into update.microbatches=3"):
        loss_and_gradients(make_batch(), config)


def test_kl_without_reference_is_refused():
    with pytest.raises(ValueError, match="kl_coefficient=0.5 needs the reference"):
        loss_and_gradients(make_batch(), dataclasses.replace(CONFIG, kl_coefficient=0.5))


def test_shuffled_prompts_and_rollouts_change_nothing():
    batch = make_batch()
    order_N = np.random.default_rng(1).permutation(N)
    shuffled = jax.tree.map(lambda x: x[order_N], batch)
    names = ("tokens_NGR", "lengths_NG", "logprobs_NGR", "advantages_NG")
    shuffled = shuffled.replace(**{name: getattr(shuffled, name)[:, ::-1] for name in names})
    for got, expected in zip(loss_and_gradients(shuffled), loss_and_gradients(batch), strict=True):
        assert_same_tree(got, expected)


def test_metrics_of_a_step_equal_numpy_and_the_first_adam_step_moves_by_the_rate():
    """AdamW's first step is -rate (sign(g) + decay p) where |g| is well above its epsilon."""
    batch = make_batch()
    logprobs_NGR, entropies_NGR, gradients = score_and_policy_gradient(policy(), batch)
    state, metrics = step(fresh_state(), batch)

    live_NGR = np.arange(R) < batch.lengths_NG[:, :, None]
    apart = (logprobs_NGR - batch.logprobs_NGR)[live_NGR]
    prompts, responses = batch.prompt_lengths_N.sum(), batch.lengths_NG.sum()
    expected = {
        "loss": -(batch.advantages_NG * batch.lengths_NG).sum() / responses,
        "gradient_norm": optax.tree.norm(gradients),
        "learning_rate": 1e-2 / 4,
        "finite": True,
        "entropy": entropies_NGR[live_NGR].mean(),
        "mismatch_mean": np.abs(apart).mean(),
        "mismatch_max": np.abs(apart).max(),
        "ratio_mean": np.exp(apart).mean(),
        "clip_share": 0.0,
        "prompt_tokens": prompts,
        "response_tokens": responses,
        "sharing_ratio": (2 * prompts + responses) / (prompts + responses),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    assert int(state.step) == 1
    gradient_DV, before_DV = (np.asarray(tree["head"]) for tree in (gradients, policy()))
    moved_DV = np.asarray(state.params["head"]) - before_DV
    large_DV = np.abs(gradient_DV) > 1e-4
    assert large_DV.mean() > 0.5
    expected_DV = -1e-2 / 4 * (np.sign(gradient_DV) + CONFIG.weight_decay * before_DV)
    np.testing.assert_allclose(moved_DV[large_DV], expected_DV[large_DV], rtol=1e-3)


def test_schedules_worked_by_hand():
    def rates(schedule):
        config = UpdateConfig(learning_rate=1.0, schedule=schedule, warmup_steps=2)
        return [float(update.learning_rate(config, 6, step)) for step in (0, 1, 2, 4, 6)]

    np.testing.assert_allclose(rates("constant"), [0.5, 1, 1, 1, 1])
    np.testing.assert_allclose(rates("linear"), [0.5, 1, 1, 0.5, 0])
    np.testing.assert_allclose(rates("cosine"), [0.5, 1, 1, 0.5, 0], atol=1e-7)
    assert float(update.learning_rate(UpdateConfig(), 6, 0)) == np.float32(1e-6)


@pytest.mark.parametrize("limit", [0.5, 0.0])
def test_global_norm_clip(limit):
    """Adam forgets the scale of a gradient, so the clip is seen in the first moment: 0.1 g min(1, limit / |g|)."""
    config = UpdateConfig(max_gradient_norm=limit)
    optimizer = update.make_optimizer(config, 1)
    params = {"w": jnp.zeros(2)}
    _, state = optimizer.update({"w": jnp.array([3.0, 4.0])}, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")["w"]
    np.testing.assert_allclose(moment, 0.1 * np.array([3.0, 4.0]) * (0.1 if limit else 1.0), rtol=1e-5)


def test_a_step_that_is_not_finite_changes_no_bit_of_the_state():
    """And one after it, on good data, equals a step that never saw the bad one."""
    batch = make_batch()
    advantages_NG = batch.advantages_NG.copy()
    advantages_NG[1, 0] = np.nan
    before = jax.device_get(fresh_state())
    state, metrics = step(fresh_state(), batch.replace(advantages_NG=advantages_NG))
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, state, before)
    with pytest.raises(FloatingPointError, match="step 7: loss"):
        update.require_finite(metrics, 7)
    state, metrics = step(state, batch)
    update.require_finite(metrics, 8)
    jax.tree.map(np.testing.assert_array_equal, state, step(fresh_state(), batch)[0])


@pytest.mark.parametrize(("loss", "entry"), [(np.nan, 1.0), (1.0, np.inf), (1.0, 1e38)])
def test_loss_and_every_gradient_must_be_finite(loss, entry):
    """Also a gradient whose entries are finite and whose norm is not: scaled by 1 / inf it would teach nothing."""
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = update.init_state(params, update.make_optimizer(CONFIG, 10))
    gradients = {"a": jnp.ones(2), "b": jnp.full(3, entry)}
    new, metrics = update.apply_gradients(state, jnp.float32(loss), gradients, CONFIG, 10)
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_the_first_moment_may_be_bfloat16():
    """Half its bytes; four updates go where those of float32 go, to a hundredth."""
    ends = {}
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, first_moment=dtype)
        state = update.init_state(policy(), update.make_optimizer(config, 10))
        for _ in range(4):
            state, _ = step(state, make_batch(), config)
        moments = {name: optax.tree_utils.tree_get(state.optimizer_state, name) for name in ("mu", "nu")}
        assert {leaf.dtype for leaf in jax.tree.leaves(moments["mu"])} == {jnp.dtype(dtype)}
        assert {leaf.dtype for leaf in jax.tree.leaves(moments["nu"])} == {jnp.dtype("float32")}
        ends[dtype] = np.asarray(state.params["head"] - policy()["head"])
    apart = np.linalg.norm(ends["bfloat16"] - ends["float32"]) / np.linalg.norm(ends["float32"])
    assert 0 < apart < 1e-2


def test_the_average_moves_by_its_decay_and_an_update_leaves_it_alone():
    """0.75 * 1 + 0.25 * 3 = 1.5, in float32 whatever the parameters are in; without one, there is none."""
    average, params = {"w": jnp.ones((2,), jnp.float32)}, {"w": jnp.full((2,), 3, jnp.bfloat16)}
    moved = update.moved_average(average, params, 0.75)
    assert moved["w"].dtype == jnp.float32 and moved["w"].tolist() == [1.5, 1.5]
    assert fresh_state().average is None
    state = update.init_state(policy(), update.make_optimizer(CONFIG, 10), averaged=True)
    state, _ = step(state, make_batch())
    assert_same_tree(state.average, policy(), rtol=0)
    assert not np.array_equal(jax.tree.leaves(state.params)[0], jax.tree.leaves(policy())[0])


def test_donating_the_state_leaves_the_given_params_alive():
    step(fresh_state(), make_batch())
    assert np.isfinite(policy()["head"]).all()


def test_eight_devices_equal_one():
    """Two steps with prompts sharded over `data`, in 2 microbatches, equal one device without; one compilation."""
    config, batch = dataclasses.replace(CONFIG, microbatches=2), make_batch()
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    optimizer = update.make_optimizer(config, 10)
    state, expected = update.init_state(jax.device_put(policy(), whole), optimizer), fresh_state()
    compiled = update.train_step._cache_size()
    for _ in range(2):
        state, metrics = step(state, jax.device_put(batch, rows), config)
    assert update.train_step._cache_size() == compiled + 1
    for _ in range(2):
        expected, expected_metrics = step(expected, batch)
    assert len(state.params["head"].sharding.device_set) == 8
    assert_same_tree(jax.device_get(metrics), jax.device_get(expected_metrics))
    assert_same_tree(jax.device_get(state), jax.device_get(expected))


@pytest.mark.parametrize("tied", [False, True])
def test_the_kernel_gives_the_loss_and_gradients_of_all_logits(tied, monkeypatch):
    """With every term of the loss at work: chunked alone and over (data=2, tensor=2), and Pallas interpreted."""
    model = dataclasses.replace(MODEL, tied_head=tied, vocab_size=12)
    config = dataclasses.replace(CONFIG, on_policy=False, kl_coefficient=0.1, entropy_coefficient=0.05, microbatches=2)
    params, batch = decoder.init(model, jax.random.key(1)), make_batch()
    kernel = scorer.grouped_logprob

    def compute(mesh=None, **options):
        monkeypatch.setattr(scorer, "grouped_logprob", functools.partial(kernel, **options))
        run = jax.jit(
            lambda params: update.loss_and_gradients(
                params, batch, 0.8, LIMIT, batch.logprobs_NGR - 0.1, model=model, config=config
            )
        )
        if mesh is None:
            return jax.device_get(run(params))
        with jax.set_mesh(mesh):
            return jax.device_get(run(params))

    dense = compute(implementation="reference")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 1, 2), ("data", "fsdp", "tensor"))
    assert_same_tree(compute(), dense)
    assert_same_tree(compute(mesh), dense)
    assert_same_tree(compute(implementation="pallas", interpret=True), dense)


def test_muon_orthogonalises_the_layers_matrices_and_leaves_the_rest_to_adamw():
    """Singular values of a matrix's first step are alike (AdamW's are not); embedding, norms and biases get AdamW's."""
    model = ModelConfig(
        vocab_size=11, width=16, layers=2, heads=2, kv_heads=2, head_channels=8, hidden=24, qkv_bias=True
    )
    params = decoder.init(model, jax.random.key(0))
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    steps = {}
    for name in ("adamw", "muon"):
        optimizer = update.make_optimizer(PretrainConfig(optimizer=name, weight_decay=0.0, warmup_steps=0), 10)
        steps[name], _ = optimizer.update(gradients, optimizer.init(params), params)
    spread = {}
    for name, step in steps.items():
        for matrix in ("wq", "w_gate", "wo"):
            flat = np.asarray(step["layers"][matrix][1])
            flat = flat.reshape(16, -1) if matrix != "wo" else flat.reshape(-1, 16)
            values = np.linalg.svd(flat, compute_uv=False)
            spread[name, matrix] = values.max() / values.min()
    assert all(spread["muon", matrix] < 2 < spread["adamw", matrix] for matrix in ("wq", "w_gate", "wo"))
    for pick in (lambda s: s["embedding"], lambda s: s["layers"]["bq"], lambda s: s["final_norm"]["scale"]):
        ratio = np.asarray(pick(steps["muon"])) / np.asarray(pick(steps["adamw"]))
        np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-3)  # Adam's first step, with Nesterov momentum
