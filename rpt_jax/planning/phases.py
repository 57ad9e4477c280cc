"""The phases of a step, compiled for a TPU slice that is not there: what `rpt plan` knows about memory.

In: an experiment's settings and the slice's mesh. Out: bytes of each phase on one chip, from libtpu's own account of
the program (`memory_analysis`), for prompts and responses as long as they may be.
"""

import re
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rpt_jax.config import ModelConfig, PromptConfig, SampleConfig, UpdateConfig
from rpt_jax.learning import update
from rpt_jax.learning.text_loss import Text
from rpt_jax.mesh import BATCH, batch_parts, copies_of_heads, param_shardings, replicated
from rpt_jax.parts import parts_of_groups
from rpt_jax.policy import caches, decoder, sampler, slots
from rpt_jax.policy.decoder import KeyValues
from rpt_jax.policy.stream import QUERIES, packed, packed_prompts
from rpt_jax.records import Batch, InputError

END = (0,)  # any token: which one makes no difference


@dataclass(frozen=True)
class Job:
    """What is compiled: settings, and the mesh of the slice."""

    model: ModelConfig
    batch_size: int
    prompt: PromptConfig
    sample: SampleConfig
    update: UpdateConfig
    mesh: Mesh
    averaged: bool = False  # the state has an average of policies

    @property
    def units(self) -> int:
        return batch_parts(self.mesh)


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip. resident: what lies there meanwhile and is no argument of the phase."""

    arguments: int
    outputs: int
    temporaries: int
    resident: int
    cache: int = 0  # of the arguments: keys and values

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.resident


def phases(job: Job) -> dict:
    """{name: function that compiles the phase and returns its Memory}, in the order of a step.

    Left out: the first seating, which is smaller than a refill, the whole sequences of check_shared_prefix, and the
    passes in which a reward scores the next token; what those read of the state is counted.
    """
    made = {
        "prefill": _prefill,
        "decode": _decode,
        "refill": _refill,
        "grow": _grow,
        "shrink": _shrink,
        "score": _score,
    }
    if not job.sample.slots:
        del made["refill"]
    if not job.update.kl_coefficient and job.update.check_shared_prefix == "never":
        del made["score"]
    made["update"] = _update
    return {name: partial(compiled, job) for name, compiled in made.items()}


def spread(job: Job, shape: tuple[int, ...], dtype, *axes) -> jax.ShapeDtypeStruct:
    """An array that is not there, split by mesh axes."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(job.mesh, PartitionSpec(*axes)))


def bytes_on_chip(tree) -> int:
    """Of arrays that are not there, padding of the chip's layout left out."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def state_bytes(model: ModelConfig, config: UpdateConfig, averaged: bool = False) -> int:
    """Of parameters, optimizer state and average, on all chips together."""
    params = decoder.shapes(model)
    state = _optimizer_state(update.make_optimizer(config, 1), params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state, _wide(params) if averaged else None)))


def train_state(job: Job) -> update.TrainState:
    """Parameters, optimizer state and average, as an update has them."""
    shapes = decoder.shapes(job.model)
    shardings = param_shardings(job.mesh, decoder.logical_axes(job.model), shapes)
    params = jax.tree.map(_placed, shapes, shardings)
    optimizer = update.make_optimizer(job.update, 1)
    state = optax.tree.map_params(
        optimizer,
        _placed,
        _optimizer_state(optimizer, shapes),
        shardings,
        transform_non_params=lambda x: _placed(x, replicated(job.mesh)),
    )
    average = jax.tree.map(_placed, _wide(shapes), shardings) if job.averaged else None
    return update.TrainState(params, state, spread(job, (), jnp.int32), average)


def _optimizer_state(optimizer: optax.GradientTransformation, shapes):
    """Its shapes: in float32, whatever dtype the parameters have."""
    return jax.eval_shape(optimizer.init, _wide(shapes))


def _wide(shapes):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shapes)


def sampling_params(job: Job):
    """What decoder.gathered makes of the parameters."""

    def copied(path, x):
        dtype = decoder.sampling_dtype(path, x, job.model)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=decoder.sampling_format(path, x, x.sharding))

    return jax.tree_util.tree_map_with_path(copied, train_state(job).params)


def seats(job: Job) -> tuple[int, int]:
    """(rollouts that are decoded at one time in a unit, slots that share a prompt's keys and values)."""
    sample = job.sample
    seating, _ = slots.first_seating(job.batch_size // job.units, sample.group_size, job.units, sample.slots)
    return seating.rollouts_US.shape[1], 1 if sample.slots else sample.group_size  # refilled slots stand alone


def prefilled(job: Job) -> caches.Prefilled:
    """Of all prompts of the step."""
    model, (stream, _) = job.model, _prompts(job)
    L, K, C, U = model.layers, model.kv_heads, model.head_channels, job.units
    heads = "tensor" if K % job.mesh.shape["tensor"] == 0 else None
    kv = spread(job, (L, U, stream.tokens_UT.shape[1], K, C), jnp.dtype(model.dtype), None, BATCH, None, heads)
    last = spread(job, (U, job.batch_size // U, model.width), jnp.dtype(model.dtype), BATCH)
    return caches.Prefilled(kv, kv, last)


def decode_state(job: Job, columns: int) -> caches.DecodeState:
    """With all slots taken and caches of so many columns."""
    model, U, (S, width), T = job.model, job.units, seats(job), _prompts(job)[1].shape[2]
    B, dtype = U * S, jnp.dtype(job.model.dtype)
    with jax.set_mesh(job.mesh):
        K = model.kv_heads * copies_of_heads(model.kv_heads)

    def key_values(rows, places):
        kv = spread(job, (model.layers, rows, K, places, model.head_channels), dtype, None, BATCH, "tensor")
        return KeyValues(kv, kv, spread(job, (rows, places), jnp.int32, BATCH))

    def row(dtype):
        return spread(job, (B,), dtype, BATCH)

    return caches.DecodeState(
        prompt=key_values(B // width, T),
        prompt_lengths_B=row(jnp.int32),
        keys_B=row(jax.random.key(0).dtype),
        limits_B=row(jnp.int32),
        cache=key_values(B, columns),
        column=spread(job, (), jnp.int32),
        hidden_BD=spread(job, (B, model.width), dtype, BATCH),
        made_B=row(jnp.int32),
        alive_B=row(jnp.bool_),
    )


def batch(job: Job) -> Batch:
    """Of rollouts of full length, split over microbatches and devices."""
    U, parts, sample = job.units, job.update.microbatches, job.sample
    split = parts_of_groups(job.batch_size, sample.group_size, U * parts)
    N, G, P, R = job.batch_size * split, sample.group_size // split, job.prompt.max_tokens, sample.max_tokens
    rows = N // (U * parts)
    stream = packed(*_distinct(rows, P), np.ones((rows, G, R), np.int32), np.full((rows, G), R), queries=QUERIES["tpu"])
    stream = jax.tree.map(lambda a: spread(job, (parts, U, *a.shape[1:]), a.dtype, None, BATCH), stream)

    def row(dtype, *shape):
        return spread(job, (N, *shape), dtype, BATCH)

    tokens, lengths = row(jnp.int32, P), row(jnp.int32)
    responses = row(jnp.int32, G, R), row(jnp.int32, G), row(jnp.float32, G, R), row(jnp.float32, G)
    return Batch(tokens, lengths, *responses, stream)


def _prompts(job: Job):
    """(stream, paths) of one unit's prompts, none of which begins like another."""
    return packed_prompts(*_distinct(job.batch_size // job.units, job.prompt.max_tokens), queries=QUERIES["tpu"])


def _distinct(count: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    prompts = np.broadcast_to(np.arange(count)[:, None], (count, tokens)).astype(np.int32)
    return prompts, np.full(count, tokens)


def _prefill(job: Job) -> Memory:
    stream, _ = _prompts(job)
    stream = jax.tree.map(lambda a: spread(job, (job.units, *a.shape[1:]), a.dtype, BATCH), stream)
    lasts = spread(job, (job.units, job.batch_size // job.units), jnp.int32, BATCH)
    resident = bytes_on_chip(train_state(job))
    return _compiled(job, sampler.prefill.lower, (sampling_params(job), job.model, stream, lasts), resident)


def _decode(job: Job) -> Memory:
    state = decode_state(job, job.sample.max_tokens)
    look = slots.Look(spread(job, (job.units,), jnp.int32), spread(job, (), jnp.int32))
    arguments = sampling_params(job), job.model, job.sample, END, state, look
    resident = bytes_on_chip((train_state(job), prefilled(job)))
    return _compiled(job, sampler.decode.lower, arguments, resident, (state.prompt, state.cache))


def _refill(job: Job) -> Memory:
    """The prompts of the slots before are still there."""
    state = decode_state(job, job.sample.max_tokens)
    arguments = *_moving(job, *seats(job)), 1, state.cache, state.hidden_BD, state.column
    resident = bytes_on_chip((train_state(job), sampling_params(job), state.prompt))
    return _compiled(job, caches.refill.lower, arguments, resident, state.cache)


def _grow(job: Job) -> Memory:
    """From the last size of the cache but one to the last."""
    before = [columns for columns in sampler.cache_sizes(job.sample) if columns < job.sample.max_tokens]
    state = decode_state(job, before[-1] if before else job.sample.max_tokens)
    arguments = *_moving(job, *seats(job)), seats(job)[1], state.cache, state.hidden_BD, job.sample.max_tokens
    resident = bytes_on_chip((train_state(job), sampling_params(job), state.prompt))
    return _compiled(job, caches.move.lower, arguments, resident, state.cache)


def _shrink(job: Job) -> Memory:
    """To half the slots, each with a prompt of its own."""
    state = decode_state(job, job.sample.max_tokens)
    arguments = *_moving(job, -(-seats(job)[0] // 2), 1), 1, state.cache, state.hidden_BD, job.sample.max_tokens
    resident = bytes_on_chip((train_state(job), sampling_params(job), state.prompt))
    return _compiled(job, caches.move.lower, arguments, resident, state.cache)


def _moving(job: Job, S: int, width: int) -> tuple:
    """(prefilled prompts, keys of rollouts, moves to S slots a unit)."""
    U, T = job.units, _prompts(job)[1].shape[2]

    def of(*shape, dtype=jnp.int32):
        return spread(job, (U, *shape), dtype, BATCH)

    rows, rollouts = S // width, job.batch_size // U * job.sample.group_size
    moves = caches.Moves(of(rows), of(rows, T), of(rows), of(S), of(S), of(S), of(S))
    return prefilled(job), of(rollouts, dtype=jax.random.key(0).dtype), moves


def _score(job: Job) -> Memory:
    state = train_state(job)
    resident = bytes_on_chip((state.optimizer_state, state.step, state.average))
    arguments = state.params, batch(job), spread(job, (), jnp.float32)
    lower = partial(update.response_logprobs.lower, model=job.model, config=job.update)
    return _compiled(job, lower, arguments, resident)


def _update(job: Job) -> Memory:
    lower = partial(update.train_step.lower, model=job.model, config=job.update, steps=1)
    rollouts = batch(job)
    limit = job.sample.max_tokens if job.update.aggregate == "constant" else None
    reference = rollouts.logprobs_NGR if job.update.kl_coefficient else None
    arguments = train_state(job), rollouts, spread(job, (), jnp.float32), limit, reference, _text(job)
    return _compiled(job, lower, arguments, 0)


def _text(job: Job) -> Text | None:
    """The windows of training text that an update reads beside the rollouts."""
    if not job.update.next_token_share:
        return None
    rows, length = job.update.next_token_sequences or job.batch_size, job.update.next_token_length
    return Text(spread(job, (rows, length), jnp.int32, BATCH), spread(job, (rows,), jnp.int32, BATCH))


def _compiled(job: Job, lower, arguments: tuple, resident: int, cache=()) -> Memory:
    if job.update.kl_coefficient:
        resident += bytes_on_chip(train_state(job).params)  # the policy that the run began with
    with jax.set_mesh(job.mesh):
        lowered = lower(*arguments)
        try:
            memory = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Memory(*_too_much(str(error), arguments), resident, bytes_on_chip(cache))
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = memory.argument_size_in_bytes, outputs, memory.temp_size_in_bytes
    return Memory(*sizes, resident, bytes_on_chip(cache))


def _too_much(message: str, arguments: tuple) -> tuple[int, int, int]:
    """(arguments, outputs, temporaries) of a program that the compiler refuses, as far as its message tells."""
    given = bytes_on_chip([leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.ShapeDtypeStruct)])
    found = re.search(r"temporaries \(([\d.]+)G\)|Used ([\d.]+)G", message)
    if found is None:
        raise InputError(
            f"plan: the compiler has not enough memory and does not say how much it takes: {message[:300]}"
        )
    temporaries, used = (0 if number is None else round(float(number) * (1 << 30)) for number in found.groups())
    return given, 0, temporaries or max(0, used - given)


def _placed(x, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
