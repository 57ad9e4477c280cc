"""Seatings to decode states: caches that are begun, refilled in place, or moved to other slots and sizes.

In: prefilled prompts and who sits where (slots.py). Out: DecodeState. A cache is a ring: all slots write their next
token to the same column, and the tokens of a slot are those of the newest columns, however long ago the ring began. So
a slot is refilled by forgetting what it holds; no cache moves as long as slots and columns stay as many. (Prompts are
copied to their rows anew at every change of seats.)
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rpt_jax.mesh import copies_of_heads, laid_out
from rpt_jax.policy.decoder import KeyValues, positions_from_lengths
from rpt_jax.policy.slots import Seating
from rpt_jax.policy.stream import pick
from rpt_jax.records import Array


@struct.dataclass
class Prefilled:
    """Keys and values of a stream of prompts, and what predicts the first token of each prompt."""

    k_LUTKC: Array
    v_LUTKC: Array
    last_UND: Array


@struct.dataclass
class Moves:
    """A seating for the device: what goes into each of S slots of a unit and each of its S / width rows."""

    prompts_UR: Array  # the row's prompt
    paths_URT: Array  # the places of its tokens in the stream
    lengths_UR: Array  # its tokens
    rollouts_US: Array  # prompt * G + member; any where there is none
    sources_US: Array  # the slot that the rollout had before, -1: none
    made_US: Array  # tokens that it has
    limits_US: Array  # tokens that it may have; 0 for an empty slot


@struct.dataclass
class DecodeState:
    """What a decode step reads and changes, for B = U * S slots; `cache` holds the responses only."""

    prompt: KeyValues  # of each row
    prompt_lengths_B: Array
    keys_B: Array  # of the rollout; the token's index is folded in
    limits_B: Array
    cache: KeyValues
    column: Array  # of the cache, a ring, where the next token of every slot goes: the tokens of a slot are the newest
    hidden_BD: Array  # after the newest token: predicts the next one
    made_B: Array  # tokens of the rollout so far
    alive_B: Array


def in_place(before: Seating, moves: Moves) -> bool:
    """Whether there are as many slots as before, and all who stay keep theirs."""
    slots_1S = np.arange(moves.sources_US.shape[1])[None]
    return before.rollouts_US.shape == moves.sources_US.shape and bool(
        ((moves.sources_US < 0) | (moves.sources_US == slots_1S)).all()
    )


@partial(jax.jit, static_argnums=(3, 4))
def begin(prefilled: Prefilled, keys_UY: Array, moves: Moves, width: int, columns: int) -> DecodeState:
    """The state of the first seating, with empty caches of so many columns.

    keys_UY: of the rollouts of each unit. width: slots that share a row's prompt.
    """
    (U, S), (L, _, _, K, C) = moves.rollouts_US.shape, prefilled.k_LUTKC.shape
    empty = jnp.zeros((L, U * S, K * copies_of_heads(K), columns, C), prefilled.k_LUTKC.dtype)
    cache = KeyValues(empty, empty, jnp.full((U * S, columns), -1, jnp.int32))
    return _state(prefilled, keys_UY, moves, width, cache, _first_hidden(prefilled, moves, width), jnp.int32(0))


@partial(jax.jit, static_argnums=3, donate_argnums=(4, 5, 6))
def refill(
    prefilled: Prefilled,
    keys_UY: Array,
    moves: Moves,
    width: int,
    cache: KeyValues,
    hidden_BD: Array,
    column: Array,
) -> DecodeState:
    """The state of a seating in which all who stay keep their slots: the others' caches are emptied in place."""
    stays_B1 = (moves.sources_US >= 0).reshape(-1, 1)
    fresh_BD = _first_hidden(prefilled, moves, width).reshape(hidden_BD.shape)
    cache = cache.replace(positions_BS=jnp.where(stays_B1, cache.positions_BS, -1))
    return _state(prefilled, keys_UY, moves, width, cache, jnp.where(stays_B1, hidden_BD, fresh_BD), column)


@partial(jax.jit, static_argnums=(3, 6))
def move(
    prefilled: Prefilled,
    keys_UY: Array,
    moves: Moves,
    width: int,
    cache: KeyValues,
    hidden_BD: Array,
    columns: int,
) -> DecodeState:
    """The state of any new seating: caches of those who stay are copied to their slots, tokens in order."""
    U, S = moves.rollouts_US.shape
    L, _, K, _, C = cache.k_LBKSC.shape
    stays_US1 = ((moves.sources_US >= 0) & (moves.made_US < moves.limits_US))[:, :, None]

    def of_slots(a_B):
        """[B, ...] -> [U, S, ...] of the slots from which rollouts come."""
        return pick(a_B.reshape(U, -1, *a_B.shape[1:]), jnp.maximum(moves.sources_US, 0))

    top = jnp.max(jnp.where(stays_US1[:, :, 0], moves.made_US, 0))
    tokens_USX = jnp.arange(columns)[None, None] - (top - moves.made_US[:, :, None])  # the newest is at top - 1
    live_USX = (tokens_USX >= 0) & (tokens_USX < moves.made_US[:, :, None]) & stays_US1
    positions_USX = of_slots(cache.positions_BS)
    in_order_USX = jnp.argsort(positions_USX.astype(jnp.uint32), axis=2)  # -1, nothing, comes last
    places_USX = jnp.take_along_axis(in_order_USX, jnp.maximum(tokens_USX, 0), axis=2, mode="clip")
    positions_USX = jnp.where(live_USX, jnp.take_along_axis(positions_USX, places_USX, axis=2), -1)

    def reordered(a_LBKXC):
        a_USLKXC = of_slots(a_LBKXC.swapaxes(0, 1))
        a_USLKXC = jax.vmap(jax.vmap(lambda a_LKXC, places_X: a_LKXC.at[:, :, places_X].get(mode="clip")))(
            a_USLKXC, places_USX
        )
        return a_USLKXC.reshape(U * S, L, K, columns, C).swapaxes(0, 1)

    hidden_USD = jnp.where(stays_US1, of_slots(hidden_BD), _first_hidden(prefilled, moves, width))
    cache = KeyValues(reordered(cache.k_LBKSC), reordered(cache.v_LBKSC), positions_USX.reshape(U * S, columns))
    return _state(prefilled, keys_UY, moves, width, cache, hidden_USD, top % columns)


def _first_hidden(prefilled: Prefilled, moves: Moves, width: int) -> Array:
    """What predicts the first token in each slot, [U, S, D]."""
    return jnp.repeat(pick(prefilled.last_UND, moves.prompts_UR), width, axis=1)


def _state(prefilled, keys_UY, moves, width, cache, hidden, column) -> DecodeState:
    """Prompts copied to their rows, beside a cache for the seating."""
    U, R, T = moves.paths_URT.shape

    def of_rows(a_LUTKC):
        a_LURTKC = jax.vmap(pick, (0, None))(a_LUTKC, moves.paths_URT)
        a_LRKTC = a_LURTKC.swapaxes(3, 4).reshape(len(a_LUTKC), U * R, -1, T, a_LUTKC.shape[-1])
        return jnp.repeat(a_LRKTC, copies_of_heads(a_LRKTC.shape[2]), axis=2)

    lengths_US = jnp.repeat(moves.lengths_UR, width, axis=1)
    positions = positions_from_lengths(moves.lengths_UR.reshape(-1), T)  # [U * R, T]
    prompt = KeyValues(of_rows(prefilled.k_LUTKC), of_rows(prefilled.v_LUTKC), positions)
    return DecodeState(
        prompt=_over_mesh(prompt),
        prompt_lengths_B=lengths_US.reshape(-1),
        keys_B=pick(keys_UY, moves.rollouts_US).reshape(-1),
        limits_B=moves.limits_US.reshape(-1),
        cache=_over_mesh(cache),
        column=column,
        hidden_BD=laid_out(hidden.reshape(lengths_US.size, -1), "batch"),
        made_B=moves.made_US.reshape(-1),
        alive_B=(moves.made_US < moves.limits_US).reshape(-1),
    )


def _over_mesh(cache: KeyValues) -> KeyValues:
    """Rows over data and fsdp, heads over tensor."""
    k_LBKSC, v_LBKSC = (laid_out(a, "layers", "batch", "kv_heads") for a in (cache.k_LBKSC, cache.v_LBKSC))
    return KeyValues(k_LBKSC, v_LBKSC, laid_out(cache.positions_BS, "batch"))
