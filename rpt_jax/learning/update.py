"""One policy update: GRPO's loss on a batch of rollouts, its gradient, and AdamW (for a base also Muon).

In: TrainState and Batch (prompts, G responses each, their advantages). Out: the next TrainState and metrics. Paper:
Eq. 4 and its training table, which make the update exactly on-policy; the loss is GRPO's [arXiv 2402.03300, Eq. 3]
with the options of DAPO and Dr. GRPO. Optimizer and non-finite guard serve next-token training too (pretrain.py).
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import struct

from rpt_jax.config import ModelConfig, PretrainConfig, UpdateConfig
from rpt_jax.learning.text_loss import Text, mixed
from rpt_jax.policy.scorer import score
from rpt_jax.records import Array, Batch, InputError, Params


@struct.dataclass
class TrainState:
    """All that an update changes."""

    params: Params
    optimizer_state: optax.OptState
    step: Array  # int32, updates made
    average: Params | None = None  # float32, exponential moving average of params, where the reward asks for one


def learning_rate(config: UpdateConfig | PretrainConfig, steps: int, step: Array) -> Array:
    """Rate of update `step` (from 0) of `steps`: linear warm-up, then constant, or cosine or a line down to 0."""
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
    done = jnp.clip((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 0.0, 1.0)
    shape = {"constant": 1.0, "cosine": 0.5 + 0.5 * jnp.cos(math.pi * done), "linear": 1.0 - done}
    return config.learning_rate * warm * shape[config.schedule]


def make_optimizer(config: UpdateConfig | PretrainConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW (or Muon) with decay, at learning_rate(config, steps, .).

    Muon [arXiv 2502.16982] turns the matrices of the layers with orthogonalised momentum, scaled to AdamW's step size;
    embedding, head, norms and biases stay with AdamW (with Nesterov momentum, as optax has it).
    """
    rate = functools.partial(learning_rate, config, steps)
    if isinstance(config, PretrainConfig) and config.optimizer == "muon":
        descend = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
    else:
        narrow = config.first_moment if isinstance(config, UpdateConfig) else None
        descend = optax.adamw(rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mu_dtype=narrow)
    if config.max_gradient_norm == 0:
        return descend
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), descend)


def _matrices(params: Params) -> Params:
    """Which axes of the layers' stacked matrices are summed over and which are made; None for all else."""
    made_by = {"wq": ((1,), (2, 3)), "wk": ((1,), (2, 3)), "wv": ((1,), (2, 3)), "wo": ((1, 2), (3,))}
    made_by |= dict.fromkeys(("w_gate", "w_up", "w_down"), ((1,), (2,)))

    def axes(path, leaf):
        name = path[-1].key
        return optax.contrib.MuonDimensionNumbers(*made_by[name]) if name in made_by else None

    return jax.tree.map_with_path(axes, params)


def init_state(params: Params, optimizer: optax.GradientTransformation, averaged: bool = False) -> TrainState:
    """State at step 0 with a copy of params, so that donating the state leaves the caller's intact.

    Moments are float32, the first one as config.first_moment says. (The second would stand still in bfloat16: at
    beta2 = 0.999 a step changes it by less than bfloat16 can tell.) They lie on the devices as their parameters do;
    counters are replicated over the same mesh. averaged: with an average, which begins as the params.
    """
    params = jax.tree.map(jnp.copy, params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    average = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params) if averaged else None
    state = TrainState(params, optimizer.init(wide), jnp.zeros((), jnp.int32), average)
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return state
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, everywhere), state)


def token_weights(lengths_NG: Array, R: int, aggregate: str, response_limit: int | None = None) -> Array:
    """weights_NGR that turn the sum of token losses into the aggregate over the whole step; 0 in padding.

    token_mean: 1 / response tokens of the step. sequence_mean: 1 / (tokens of the response * responses).
    constant: 1 / (response_limit * responses) [Dr. GRPO, arXiv 2503.20783]. An empty response counts nowhere.
    """
    live_NGR = jnp.arange(R)[None, None, :] < lengths_NG[:, :, None]
    lengths_NG = lengths_NG.astype(jnp.float32)  # divisors of large steps are beyond int32
    responses = jnp.maximum(jnp.sum(lengths_NG > 0), 1).astype(jnp.float32)
    if aggregate == "token_mean":
        divisor = jnp.maximum(jnp.sum(lengths_NG), 1).reshape(1, 1, 1)
    elif aggregate == "sequence_mean":
        divisor = responses * jnp.maximum(lengths_NG, 1)[:, :, None]
    elif response_limit is None:
        raise ValueError("aggregate='constant' divides by the response limit: give response_limit")
    else:
        divisor = jnp.reshape(responses * response_limit, (1, 1, 1))
    return live_NGR / divisor


def token_losses(
    logprobs_NGR: Array,
    entropies_NGR: Array,
    batch: Batch,
    config: UpdateConfig,
    reference_NGR: Array | None = None,
) -> tuple[Array, Array]:
    """(losses_NGR, clipped_NGR): loss of each token before aggregation, and whether the ratio clip acted on it.

    -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl k3 - entropy H. On-policy rho = exp(logp -
    stop_gradient(logp)): 1 in value, so the clip cannot act and is left out. Otherwise rho = exp(logp - sampler's).
    k3 = exp(ref - logp) - (ref - logp) - 1, unbiased for KL(policy || reference) [arXiv 2402.03300, Eq. 4].
    """
    advantages_NG1 = batch.advantages_NG[:, :, None]
    old_NGR = jax.lax.stop_gradient(logprobs_NGR) if config.on_policy else batch.logprobs_NGR
    ratio_NGR = jnp.exp(logprobs_NGR - old_NGR)
    gain_NGR = ratio_NGR * advantages_NG1
    clipped_NGR = jnp.zeros(gain_NGR.shape, bool)
    if not config.on_policy:
        held_NGR = jnp.clip(ratio_NGR, 1 - config.clip_low, 1 + config.clip_high) * advantages_NG1
        clipped_NGR = held_NGR < gain_NGR
        gain_NGR = jnp.where(clipped_NGR, held_NGR, gain_NGR)
    losses_NGR = -gain_NGR
    if config.kl_coefficient:
        apart_NGR = reference_NGR - logprobs_NGR
        losses_NGR += config.kl_coefficient * (jnp.exp(apart_NGR) - apart_NGR - 1)
    if config.entropy_coefficient:
        losses_NGR -= config.entropy_coefficient * entropies_NGR
    return losses_NGR, clipped_NGR


def _part_loss(params, part, model, config, temperature):
    """Loss of one microbatch, (sums over its tokens, largest mismatch); every sum is meant for the whole step."""
    batch, weights_NGR, reference_NGR = part
    logprobs_NGR, entropies_NGR = _score(params, batch, model, config, temperature)
    losses_NGR, clipped_NGR = token_losses(logprobs_NGR, entropies_NGR, batch, config, reference_NGR)
    loss = jnp.sum(jnp.where(weights_NGR > 0, losses_NGR, 0.0) * weights_NGR)
    apart_NGR = jnp.where(weights_NGR > 0, jax.lax.stop_gradient(logprobs_NGR) - batch.logprobs_NGR, 0.0)
    sums = {
        "entropy": jnp.sum(entropies_NGR),
        "mismatch_mean": jnp.sum(jnp.abs(apart_NGR)),
        "ratio_mean": jnp.sum(jnp.where(weights_NGR > 0, jnp.exp(apart_NGR), 0.0)),
        "clip_share": jnp.sum(clipped_NGR & (weights_NGR > 0)),
    }
    if config.kl_coefficient:
        back_NGR = jnp.where(weights_NGR > 0, reference_NGR - jax.lax.stop_gradient(logprobs_NGR), 0.0)
        sums["kl"] = jnp.sum(jnp.exp(back_NGR) - back_NGR - 1)
    return loss, (sums, jnp.max(jnp.abs(apart_NGR)))


def _score(params, batch, model, config, temperature):
    """Log-probs and entropies of one microbatch."""
    prompts, responses = (batch.prompt_tokens_NT, batch.prompt_lengths_N), (batch.tokens_NGR, batch.lengths_NG)
    with jax.named_scope("score"):
        return score(params, model, *prompts, *responses, temperature, config.token_chunk, stream=batch.stream)


def loss_and_gradients(
    params: Params,
    batch: Batch,
    temperature: Array | float,
    response_limit: int | None = None,
    reference_NGR: Array | None = None,
    *,
    model: ModelConfig,
    config: UpdateConfig,
) -> tuple[Array, Params, dict]:
    """(loss, gradients, token metrics) of the whole step, the same whatever the number of microbatches.

    Raises InputError when config.microbatches does not divide the prompts, ValueError for a KL without reference_NGR.
    """
    if config.kl_coefficient and reference_NGR is None:
        raise ValueError(f"kl_coefficient={config.kl_coefficient} needs the reference policy's log-probs")
    weights_NGR = token_weights(batch.lengths_NG, batch.tokens_NGR.shape[2], config.aggregate, response_limit)
    parts = _split(batch, config.microbatches), *_split((weights_NGR, reference_NGR), config.microbatches)
    evaluate = jax.value_and_grad(_part_loss, has_aux=True)
    if config.microbatches == 1:
        (loss, (sums, peak)), gradients = evaluate(params, jax.tree.map(_first, parts), model, config, temperature)
    else:

        def body(total, part):
            (loss, aux), gradients = evaluate(params, part, model, config, temperature)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, gradients), (loss, aux)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        gradients, (losses, (sums, peaks)) = jax.lax.scan(body, zeros, parts)
        loss, sums, peak = losses.sum(), {name: x.sum() for name, x in sums.items()}, peaks.max()
    tokens = jnp.maximum(jnp.sum(batch.lengths_NG), 1)
    return loss, gradients, {name: x / tokens for name, x in sums.items()} | {"mismatch_max": peak}


def _split(tree, parts):
    """[N, ...] -> [parts, N / parts, ...], part j with prompts j, j + parts, ...: each spread over all devices.

    The stream of a Batch is split already.
    """

    def split(array):
        if array.shape[0] % parts:
            raise InputError(
                f"a batch of {array.shape[0]} prompts does not divide into update.microbatches={parts}: "
                f"use a batch of {parts * -(-array.shape[0] // parts)} prompts or other microbatches"
            )
        return jnp.asarray(array).reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)

    if isinstance(tree, Batch):
        return jax.tree.map(split, tree.replace(stream=None)).replace(stream=tree.stream)
    return jax.tree.map(split, tree)


def _first(array):
    return array[0]


@functools.partial(jax.jit, static_argnames=("model", "config"))
def response_logprobs(
    params: Params, batch: Batch, temperature: Array | float, *, model: ModelConfig, config: UpdateConfig
) -> Array:
    """logprobs_NGR of a batch under any parameters, by the way that the update takes and as many microbatches."""
    parts = _split(batch, config.microbatches)
    logprobs = jax.lax.map(lambda part: _score(params, part, model, config, temperature)[0], parts)
    return logprobs.swapaxes(0, 1).reshape(batch.tokens_NGR.shape)


def apply_gradients(
    state: TrainState, loss: Array, gradients: Params, config: UpdateConfig | PretrainConfig, steps: int
) -> tuple[TrainState, dict]:
    """The next state and {loss, gradient_norm (before the clip), learning_rate, finite}.

    A non-finite loss or gradient leaves the state as it was, step included, and says so in `finite`.
    """
    gradients = jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, optimizer_state = make_optimizer(config, steps).update(gradients, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state.replace(params=params, optimizer_state=optimizer_state, step=state.step + 1)
    rate = learning_rate(config, steps, state.step)
    metrics = {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "finite": finite}
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state), metrics


@functools.partial(jax.jit, donate_argnums=0)
def moved_average(average: Params, params: Params, decay: Array | float) -> Params:
    """decay average + (1 - decay) params, in float32: bfloat16 would not see the change. average is donated."""
    return jax.tree.map(lambda a, x: decay * a + (1 - decay) * x.astype(jnp.float32), average, params)


def require_finite(metrics: dict, step: int, remedy: str = "use a lower learning rate") -> None:
    """Raises FloatingPointError for an update that apply_gradients refused; the state is still the last good one.

    step: the number of that update, from 1. remedy: what the message advises.
    """
    if not metrics["finite"]:
        raise FloatingPointError(
            f"step {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['gradient_norm'])}; the update "
            f"was not made: {remedy}"
        )


@functools.partial(jax.jit, static_argnames=("model", "config", "steps"), donate_argnums=0)
def train_step(
    state: TrainState,
    batch: Batch,
    temperature: Array | float,
    response_limit: int | None = None,
    reference_NGR: Array | None = None,
    text: Text | None = None,
    *,
    model: ModelConfig,
    config: UpdateConfig,
    steps: int,
) -> tuple[TrainState, dict]:
    """One update; state is donated. Arrays may be sharded over a mesh, the batch along its prompts.

    Args:
        temperature: the one the rollouts were sampled at.
        response_limit: tokens, for aggregate="constant" only.
        reference_NGR: log-probs of the response tokens under the reference policy at the same temperature, for a
            kl_coefficient above 0 only (nothing is computed for it otherwise).
        text: for a next_token_share above 0 only; see text_loss.py. `loss` is then the mix's.
        steps: updates of the whole run, for the schedule.

    Metrics, over the response tokens of the step: loss, gradient_norm, learning_rate, finite, entropy (nats),
    mismatch_mean and mismatch_max |log-prob(scorer) - log-prob(sampler)|, ratio_mean exp(scorer - sampler),
    clip_share, kl and those of text_loss.mixed (if asked for), prompt_tokens, response_tokens, sharing_ratio: how many
    tokens would run through the decoder without shared prefixes, over those that do; about G (P + R) / (P + G R), and
    more where prompts have a beginning in common.
    """
    loss, gradients, metrics = loss_and_gradients(
        state.params, batch, temperature, response_limit, reference_NGR, model=model, config=config
    )
    if text is not None:
        loss, gradients, of_text = mixed(state.params, loss, gradients, text, model=model, config=config)
        metrics |= of_text
    with jax.named_scope("update"):
        state, more = apply_gradients(state, loss, gradients, config, steps)
    prompts, responses = jnp.sum(batch.prompt_lengths_N), jnp.sum(batch.lengths_NG)
    G, run = batch.lengths_NG.shape[1], prompts + responses
    if batch.stream is not None:
        run = jnp.sum(batch.stream.positions_UT >= 0)
    counts = {
        "prompt_tokens": prompts,
        "response_tokens": responses,
        "sharing_ratio": (G * prompts + responses) / run,
    }
    return state, more | metrics | counts
