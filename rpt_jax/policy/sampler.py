"""Prompts to rollouts: prefill once per prompt, then slots in which rollouts are decoded many tokens at a time.

What begins alike is prefilled once: the G rollouts of a prompt, and prompts of one document (policy/stream.py). While
a group stands together, its slots share one copy of the prompt's keys and values, read once for all of them; every
slot has a cache of its own behind it. Between two calls the host gives slots of finished rollouts to waiting ones,
goes on with fewer slots when none wait, and takes a larger cache when one is full (policy/slots.py), so that neither a
long rollout nor the longest that is allowed is paid for by the others.

Randomness: the key of a token is folded from (the caller's key, document, position, member of the group, token
index), never from a slot, so a rollout does not depend on what it is batched with.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax import preemption
from rpt_jax.config import ModelConfig, SampleConfig
from rpt_jax.mesh import (
    batch_parts,
    batch_sharding,
    check_batch_divides,
    laid_out,
    mesh_of,
    place,
    to_host,
)
from rpt_jax.policy import decoder
from rpt_jax.policy.caches import DecodeState, Moves, Prefilled, begin, in_place, move, refill
from rpt_jax.policy.decoder import KeyValues
from rpt_jax.policy.draw import draw
from rpt_jax.policy.slots import Look, Seating, first_seating, next_seating, worth_a_look
from rpt_jax.policy.stream import Stream, packed_prompts, pick
from rpt_jax.records import Array, InputError, Params, Prompts, Rollouts

FIRST_CACHE = 64  # columns; doubled when too few


def sample(
    params: Params,
    model: ModelConfig,
    sampling: SampleConfig,
    prompts: Prompts,
    key: Array,
    end_ids: tuple[int, ...],
    *,
    limits_NG: Array | None = None,
    stop: Callable[[np.ndarray], bool] | None = None,
) -> Rollouts:
    """Draws `sampling.group_size` rollouts for each prompt; host arrays in and out.

    `key` is the run's key folded with the step, and with the round of dynamic sampling behind the first. A rollout
    ends with a token of `end_ids` (kept) or after `sampling.max_tokens` (or limits_NG, where given and less). Log-probs
    are those of the softmax at `sampling.temperature` before top-k, top-p and min-p cut it (the distribution that the
    scorer gives), or at temperature 1 when it is 0 (greedy). Work is split over data and fsdp of the mesh that the
    parameters lie on; decoder.gathered says how they lie best.

    stop: asked by the host after each call of the decoder about the tokens of each rollout so far, int32 [R]; where it
    says yes the rollout ends there, as with an end token. That is up to `sampling.tokens_per_call` tokens late.

    Raises InputError for prompts that do not divide over data and fsdp and for a limit below 1, FloatingPointError
    where the policy gives log-probs that are not finite.
    """
    params = decoder.gathered(params, model)
    mesh = mesh_of(params)
    limits_NG = np.full(
        (len(prompts.lengths_N), sampling.group_size), sampling.max_tokens if limits_NG is None else limits_NG
    )
    if limits_NG.min(initial=1) < 1:
        raise InputError(f"a rollout may have {limits_NG.min()} tokens: use limits of 1 or more")
    if mesh is None:
        return _sample(params, model, sampling, prompts, key, end_ids, limits_NG, stop, 1, lambda tree: tree)
    check_batch_divides(len(prompts.lengths_N), mesh)
    with jax.set_mesh(mesh):
        spread = partial(place, shardings=batch_sharding(mesh))
        return _sample(params, model, sampling, prompts, key, end_ids, limits_NG, stop, batch_parts(mesh), spread)


def _sample(params, model, sampling, prompts, key, end_ids, limits_NG, stop, units, spread) -> Rollouts:
    """The same in `units` parts; `spread` puts a tree of [units, ...] on their devices."""
    tokens_NT, lengths_N, ids_N2 = to_host((prompts.tokens_NT, prompts.lengths_N, prompts.ids_N2))
    N, G = len(lengths_N), sampling.group_size
    written = _Written(np.minimum(limits_NG, sampling.max_tokens).reshape(units, -1), end_ids, stop)
    stream, paths_UNT = packed_prompts(tokens_NT, lengths_N, units)
    lengths_UN = lengths_N.reshape(units, -1)
    lasts_UN = np.take_along_axis(paths_UNT, lengths_UN[:, :, None] - 1, axis=2)[:, :, 0]
    prefilled = prefill(params, model, spread(stream), spread(lasts_UN))
    keys_UY = rollout_keys(key, spread(ids_N2.reshape(units, -1, 2)), G)
    seating, waiting = first_seating(N // units, G, units, sampling.slots)
    first, before, state = seating.rollouts_US.shape[1], None, None
    while written.alive(seating).any():
        preemption.passing()
        needed = written.needed(seating, sampling.tokens_per_call)
        if seating is not before or written.stopped or needed > state.cache.positions_BS.shape[1]:
            moves = _moves(before, seating, written, paths_UNT, lengths_UN, G)
            given = prefilled, keys_UY, spread(moves), seating.width
            columns = next(size for size in cache_sizes(sampling) if size >= needed)
            if state is None:
                state = begin(*given, columns)
            elif needed <= state.cache.positions_BS.shape[1] and in_place(before, moves):
                state = refill(*given, state.cache, state.hidden_BD, state.column)
            else:
                state = move(*given, state.cache, state.hidden_BD, columns)
        look = worth_a_look(seating, waiting, first)
        state, steps, *drawn = decode(params, model, sampling, end_ids, state, look)
        written.note(seating, int(steps), *to_host(drawn))
        before = seating
        seating, waiting = next_seating(seating, written.alive(seating), waiting, G, first)
    return written.rollouts(N, G, sampling.max_tokens)


class _Written:
    """What has been drawn so far, on the host: Y rollouts of each unit."""

    def __init__(self, limits_UY: np.ndarray, end_ids: tuple[int, ...], stop: Callable | None):
        self.limits_UY, self.end_ids, self.stop = limits_UY, end_ids, stop
        self.stopped = False  # in the last call, one of those that the device takes to go on
        self.tokens_UYR = np.zeros((*limits_UY.shape, int(limits_UY.max(initial=0))), np.int32)
        self.logprobs_UYR = np.zeros(self.tokens_UYR.shape, np.float32)
        self.made_UY, self.ended_UY = np.zeros(limits_UY.shape, np.int32), np.zeros(limits_UY.shape, bool)
        self.slot_steps = 0

    def of(self, array_UY: np.ndarray, seating: Seating, nobody) -> np.ndarray:
        """[U, S] of what sits there."""
        taken_US = np.take_along_axis(array_UY, np.maximum(seating.rollouts_US, 0), axis=1)
        return np.where(seating.rollouts_US >= 0, taken_US, nobody)

    def left(self, seating: Seating) -> np.ndarray:
        """Tokens that may still come."""
        return self.of(np.where(self.ended_UY, 0, self.limits_UY - self.made_UY), seating, 0)

    def alive(self, seating: Seating) -> np.ndarray:
        return self.left(seating) > 0

    def needed(self, seating: Seating, ahead: int) -> int:
        """Columns of a cache that holds what the living have made and up to so many tokens more."""
        limits_US = self.of(self.limits_UY, seating, 0)
        more_US = np.minimum(self.of(self.made_UY, seating, 0) + ahead, limits_US)
        return int(more_US[self.alive(seating)].max())

    def note(self, seating: Seating, steps: int, tokens_XB, logprobs_XB, counts_B: np.ndarray) -> None:
        """Takes in what a call of so many steps has drawn: the first counts_B of each column."""
        made_XB = np.arange(len(logprobs_XB))[:, None] < counts_B
        if not np.isfinite(logprobs_XB, where=made_XB, out=np.ones_like(made_XB)).all():
            raise FloatingPointError(
                "log-probs of sampled tokens are not finite: the policy's parameters are broken, or the temperature is "
                "so low that logits overflow"
            )
        self.slot_steps += steps * seating.rollouts_US.size
        self.stopped = False
        for (u, s), count in np.ndenumerate(counts_B.reshape(seating.rollouts_US.shape)):
            if count:
                y, b = seating.rollouts_US[u, s], u * seating.rollouts_US.shape[1] + s
                made = slice(self.made_UY[u, y], self.made_UY[u, y] + count)
                self.tokens_UYR[u, y, made], self.logprobs_UYR[u, y, made] = (
                    tokens_XB[:count, b],
                    logprobs_XB[:count, b],
                )
                self.made_UY[u, y] += count
                self.ended_UY[u, y] = tokens_XB[count - 1, b] in self.end_ids
                ended, tokens_R = self.ended_UY[u, y], self.tokens_UYR[u, y, : self.made_UY[u, y]]
                if self.stop and not ended and self.stop(tokens_R):
                    self.ended_UY[u, y] = self.stopped = True

    def rollouts(self, N: int, G: int, R: int) -> Rollouts:
        by_prompt = (N, G)
        missing = ((0, 0), (0, 0), (0, R - self.tokens_UYR.shape[2]))
        return Rollouts(
            tokens_NGR=np.pad(self.tokens_UYR, missing).reshape(*by_prompt, R),
            lengths_NG=self.made_UY.reshape(by_prompt),
            logprobs_NGR=np.pad(self.logprobs_UYR, missing).reshape(*by_prompt, R),
            finished_NG=self.ended_UY.reshape(by_prompt),
            slot_steps=self.slot_steps,
        )


def _moves(before: Seating | None, seating: Seating, written: _Written, paths_UNT, lengths_UN, G: int) -> Moves:
    rollouts_US, prompts_UR = np.maximum(seating.rollouts_US, 0), seating.prompts(G)
    made_US = written.of(written.made_UY, seating, 0)
    sources_US = np.full(rollouts_US.shape, -1, np.int32)
    if before is not None:
        for u, s in np.argwhere(made_US > 0):
            sources_US[u, s] = np.flatnonzero(before.rollouts_US[u] == rollouts_US[u, s])[0]
    return Moves(
        prompts_UR=prompts_UR.astype(np.int32),
        paths_URT=np.take_along_axis(paths_UNT, prompts_UR[:, :, None], axis=1),
        lengths_UR=np.take_along_axis(lengths_UN, prompts_UR, axis=1),
        rollouts_US=rollouts_US.astype(np.int32),
        sources_US=sources_US,
        made_US=made_US,
        limits_US=(made_US + written.left(seating)).astype(np.int32),
    )


def cache_sizes(sampling: SampleConfig) -> list[int]:
    """Columns that a cache may have, ascending: few, since each is compiled."""
    sizes = [FIRST_CACHE]
    while sizes[-1] < sampling.max_tokens:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], sampling.max_tokens]


@partial(jax.jit, static_argnums=2)
def rollout_keys(key: Array, ids_UN2: Array, group_size: int) -> Array:
    """One key per rollout, [U, N * G]: folded from the position's identity and the member of the group."""

    def of_member(ids_2, member):
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, ids_2[0]), ids_2[1]), member)

    of_group = jax.vmap(of_member, (None, 0))
    keys_UNG = jax.vmap(jax.vmap(of_group, (0, None)), (0, None))(ids_UN2, jnp.arange(group_size))
    return keys_UNG.reshape(len(ids_UN2), -1)


@partial(jax.jit, static_argnums=1)
def prefill(params: Params, model: ModelConfig, stream: Stream, lasts_UN: Array) -> Prefilled:
    """Keys and values of the prompts' stream and, of each prompt, the hidden state after its last token."""
    with jax.named_scope("prefill"):
        hidden_UTD, kv = decoder.prefill_stream(params, model, stream)
    k_LUTKC, v_LUTKC = (laid_out(a, "layers", "batch", None, "kv_heads") for a in kv)
    return Prefilled(k_LUTKC, v_LUTKC, pick(hidden_UTD, lasts_UN))


@partial(jax.jit, static_argnums=(1, 2, 3), donate_argnums=4)
def decode(
    params: Params,
    model: ModelConfig,
    sampling: SampleConfig,
    end_ids: tuple[int, ...],
    state: DecodeState,
    look: Look,
) -> tuple[DecodeState, Array, Array, Array, Array]:
    """(state, steps made, tokens_XB, logprobs_XB, counts_B): up to X more tokens for every slot.

    X is `sampling.tokens_per_call`; fewer if `look` says so or the cache is full, but one at least. Of a slot's column
    the first counts_B are its own.
    """
    X, B, columns = sampling.tokens_per_call, *state.cache.positions_BS.shape

    def goes_on(carry):
        index, state, *_ = carry
        room = jnp.max(jnp.where(state.alive_B, state.made_B, 0)) < columns
        alive_U = jnp.sum(state.alive_B.reshape(len(look.refill_U), -1), axis=1)
        enough = jnp.any(alive_U <= look.refill_U) | (jnp.max(alive_U) <= look.shrink)
        return (index == 0) | ((index < X) & room & ~enough)

    def one_token(carry):
        index, state, tokens_XB, logprobs_XB, counts_B = carry
        alive_B = state.alive_B
        state, tokens_B, logprobs_B = _one_token(params, model, sampling, end_ids, state)
        tokens_XB, logprobs_XB = tokens_XB.at[index].set(tokens_B), logprobs_XB.at[index].set(logprobs_B)
        return index + 1, state, tokens_XB, logprobs_XB, counts_B + alive_B

    empty = jnp.zeros((X, B), jnp.int32), jnp.zeros((X, B), jnp.float32), jnp.zeros((B,), jnp.int32)
    with jax.named_scope("decode"):
        steps, state, *drawn = jax.lax.while_loop(goes_on, one_token, (jnp.int32(0), state, *empty))
    return state, steps, *drawn


def _one_token(params, model, sampling, end_ids, state) -> tuple[DecodeState, Array, Array]:
    """(the state with one more token in every living slot, tokens_B, logprobs_B); in the others 0 and anything."""
    alive_B = state.alive_B
    logits_BV = decoder.logits(params, model, state.hidden_BD)
    drawn_B, logprobs_B = draw(logits_BV, jax.vmap(jax.random.fold_in)(state.keys_B, state.made_B), sampling)
    tokens_B = jnp.where(alive_B, drawn_B, 0)
    ended_B = jnp.any(tokens_B[:, None] == jnp.array(end_ids, jnp.int32)[None, :], axis=1)
    positions_B1 = jnp.where(alive_B, state.prompt_lengths_B + state.made_B, -1)[:, None]
    hidden_B1D, kv = decoder.forward(params, model, tokens_B[:, None], positions_B1, (state.prompt, state.cache))
    made_B = state.made_B + alive_B
    state = state.replace(
        cache=_write(state.cache, kv, state.column),
        column=(state.column + 1) % state.cache.positions_BS.shape[1],
        hidden_BD=hidden_B1D[:, 0],
        made_B=made_B,
        alive_B=alive_B & ~ended_B & (made_B < state.limits_B),
    )
    return state, tokens_B, logprobs_B


def _write(cache: KeyValues, new: KeyValues, column: Array) -> KeyValues:
    """The cache with one more token in `column`."""
    return KeyValues(
        jax.lax.dynamic_update_slice_in_dim(cache.k_LBKSC, new.k_LBKSC, column, axis=3),
        jax.lax.dynamic_update_slice_in_dim(cache.v_LBKSC, new.v_LBKSC, column, axis=3),
        jax.lax.dynamic_update_slice_in_dim(cache.positions_BS, new.positions_BS, column, axis=1),
    )
