"""The mesh changes nothing: one GRPO step and one sampling call on eight devices are those of a single one.

"Relative" is by norms, of each array on its own: |a - b| / |b| over all its entries, at most TOLERANCE. Gradients are
read from Adam's first moment, which after one step without a clip is (1 - beta1) times the gradient. The updated
parameters are compared themselves: a step moves them by some 1e-3 of their norm, a hundred times the tolerance. (Adam
divides its first step by |gradient|, so where a gradient is next to nothing the step is all rounding: the step alone
would measure that.)
"""

import functools
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from rpt_jax import mesh as meshes
from rpt_jax.config import MeshConfig, ModelConfig, SampleConfig, UpdateConfig
from rpt_jax.learning import batch, update
from rpt_jax.policy import decoder, sampler
from rpt_jax.records import Prompts, Rollouts

TOLERANCE = 1e-5
MODEL = ModelConfig(vocab_size=24, width=16, layers=2, heads=16, kv_heads=2, head_channels=4, hidden=32)
# With every term of the loss, off-policy: on-policy its value is minus the mean advantage, whatever the log-probs.
UPDATE = UpdateConfig(
    learning_rate=1e-3,
    max_gradient_norm=0.0,
    on_policy=False,
    kl_coefficient=0.1,
    entropy_coefficient=0.01,
    microbatches=2,
    token_chunk=16,
)
SAMPLE = SampleConfig(group_size=2, temperature=0.0, max_tokens=16, tokens_per_call=16)
N, G, T, R = 8, SAMPLE.group_size, 6, 5

# Meshes by kv heads: fewer than, as many as and more than the devices along tensor, for 8 devices there and for 2; and
# six for 4 devices, which then hold twelve copies.
MESHES = {
    1: [(2, 2, 2)],
    2: [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)],
    6: [(1, 2, 4)],
    8: [(1, 1, 8), (2, 2, 2)],
    16: [(1, 1, 8)],
}
BY_UNIT = "prompt_tokens", "sharing_ratio"  # metrics that a mesh may change: what two units have in common runs in both


@functools.cache
def policy(model: ModelConfig):
    """Random, with logits far enough apart that rounding changes no arg-max."""
    random = np.random.default_rng(0)

    def leaf(path, x):
        return (0.4 * random.normal(size=x.shape) + (path[-1].key == "scale")).astype(x.dtype)

    return jax.tree.map_with_path(leaf, decoder.shapes(model))


@functools.cache
def step_data() -> tuple[Prompts, Rollouts, np.ndarray]:
    """Ragged prompts, half of which begin alike; ragged responses, with log-probs that a sampler might have had."""
    random = np.random.default_rng(1)
    lengths_N, lengths_NG = random.integers(2, T + 1, N), random.integers(1, R + 1, (N, G))
    tokens_NT = random.integers(0, MODEL.vocab_size, (N, T))
    tokens_NT[: N // 2, :2] = tokens_NT[0, :2]
    tokens_NT *= np.arange(T) < lengths_N[:, None]
    ids_N2 = np.stack([np.arange(N) // 2, lengths_N], axis=1).astype(np.uint32)
    prompts = Prompts(tokens_NT.astype(np.int32), lengths_N, ids_N2, *[np.zeros((N, 1))] * 2, np.zeros(N))
    live_NGR = np.arange(R) < lengths_NG[:, :, None]
    tokens_NGR = (random.integers(0, MODEL.vocab_size, (N, G, R)) * live_NGR).astype(np.int32)
    logprobs_NGR = (random.uniform(-4, -2, (N, G, R)) * live_NGR).astype(np.float32)
    rollouts = Rollouts(tokens_NGR, lengths_NG, logprobs_NGR, np.ones((N, G), bool))
    return prompts, rollouts, random.normal(size=(N, G)).astype(np.float32)


def step_and_rollouts(shape: tuple[int, int, int], model: ModelConfig):
    """(parameters, gradients, metrics, rollouts) on the host: a step and a sampling call, as rpt train makes them."""
    mesh = meshes.make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
    prompts, rollouts, advantages_NG = step_data()
    with jax.set_mesh(mesh):
        params = meshes.place(policy(model), meshes.param_shardings(mesh, decoder.logical_axes(model), policy(model)))
        drawn = sampler.sample(params, model, SAMPLE, prompts, jax.random.key(0), ())
        state = update.init_state(params, update.make_optimizer(UPDATE, 10))
        packed = batch.pack(prompts, rollouts, advantages_NG, UPDATE, mesh)
        state, metrics = update.train_step(
            state, packed, 0.8, None, packed.logprobs_NGR, model=model, config=UPDATE, steps=10
        )
    moments = next(part.mu for part in state.optimizer_state if hasattr(part, "mu"))
    gradients = jax.tree.map(lambda m: np.asarray(m) / (1 - UPDATE.beta1), moments)
    metrics = {name: x for name, x in metrics.items() if name not in BY_UNIT}
    return *jax.device_get((state.params, gradients, metrics)), drawn


def apart(a, b) -> float:
    """|a - b| / |b|, the norms over all entries."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)) if b.any() else float(np.linalg.norm(a))


def far(**pairs) -> dict[str, float]:
    """Arrays of (tree, expected tree) that are more than TOLERANCE apart, by name."""
    measured = {name: jax.tree.map(apart, *pair) for name, pair in pairs.items()}
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(measured) if not x <= TOLERANCE}


@pytest.mark.parametrize("kv_heads", MESHES)
def test_every_mesh_gives_the_step_and_the_greedy_rollouts_of_one_device(kv_heads):
    """Loss (among the metrics), gradients and parameters within TOLERANCE; rollouts token for token."""
    model, broken = replace(MODEL, heads=math.lcm(MODEL.heads, kv_heads), kv_heads=kv_heads), {}
    params, gradients, metrics, drawn = step_and_rollouts((1, 1, 1), model)
    for shape in MESHES[kv_heads]:
        own_params, own_gradients, own_metrics, own = step_and_rollouts(shape, model)
        trees = {"params": (own_params, params), "gradients": (own_gradients, gradients)}
        trees |= {"metrics": (own_metrics, metrics), "logprobs": (own.logprobs_NGR, drawn.logprobs_NGR)}
        tokens = int((own.tokens_NGR != drawn.tokens_NGR).sum())
        broken |= {(shape, name): x for name, x in far(**trees).items()} | (
            {(shape, "tokens"): tokens} if tokens else {}
        )
    assert not broken
    moved = jax.tree.leaves(jax.tree.map(apart, policy(model), params))
    assert min(moved) > 30 * TOLERANCE, "a step that moves nothing would be alike anyway"
    assert (drawn.lengths_NG == SAMPLE.max_tokens).all() and len(np.unique(drawn.tokens_NGR)) > 8
    assert len({tuple(row) for row in drawn.tokens_NGR[:, 0]}) == N
