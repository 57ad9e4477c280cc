"""Exact softmax attention, in two shapes: queries that share sources of keys, and blocks of queries of a stream.

In: rotated queries, keys, values. Out: what each query has gathered. Which keys a query sees follows from places alone:
those with 0 <= place of the key <= its own place in the sequence; padding has -1. Scores and softmax are float32.
"""

import logging
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from rpt_jax.policy import splash
from rpt_jax.policy.stream import LANES, Block, Stream, pick
from rpt_jax.records import Array

log = logging.getLogger(__name__)

Implementation = Literal["auto", "xla", "splash", "interpret"]
SCORES_AT_ONCE = {"cpu": 1 << 19}  # float32 scores of a stream's attention: what fits into a CPU's cache
SCORES_ELSEWHERE = 1 << 26
UNSEEN = -1e30  # score of a key that a query does not see; finite, so that a query without keys makes no nan


def attend(q_BHTC: Array, positions_BT: Array, sources: tuple) -> Array:
    """Exact softmax attention of B x T queries over all sources together; [B, H, T, C].

    sources: (k_NKSC, v_NKSC, positions_NS) each; a source with N rows serves B = N*G query rows, G in a row, and is
    read once for the whole group, as one matrix product. Every source is summed up by itself, with its own largest
    score, and the sums are put together: scores are never moved.
    """
    parts = [_attend_source(q_BHTC, positions_BT, *source) for source in sources]
    top = jnp.stack([top for top, _, _ in parts]).max(axis=0)
    weights = [jnp.exp(own - top) for own, _, _ in parts]
    total = sum(weight * part for weight, (_, part, _) in zip(weights, parts, strict=True))
    out = sum(weight * part for weight, (_, _, part) in zip(weights, parts, strict=True))
    return (out / total).reshape(q_BHTC.shape).astype(q_BHTC.dtype)


def _attend_source(q_BHTC, positions_BT, k_NKSC, v_NKSC, keys_NS):
    """(largest score, sum of exp, weighted sum of values) by query: float32 [B, K, H/K, T, 1 or C]."""
    (B, H, T, C), (N, K, S, _) = q_BHTC.shape, k_NKSC.shape
    G = B // N
    q_NKXC = q_BHTC.reshape(N, G, K, H // K * T, C).swapaxes(1, 2).reshape(N, K, -1, C)
    z_NKXS = jnp.einsum("nkxc,nksc->nkxs", q_NKXC, k_NKSC, preferred_element_type=jnp.float32) * C**-0.5
    places_NGT = positions_BT.reshape(N, G, T)
    seen_NGTS = (keys_NS[:, None, None, :] >= 0) & (keys_NS[:, None, None, :] <= places_NGT[..., None])
    seen_NXS = jnp.repeat(seen_NGTS[:, :, None], H // K, axis=2).reshape(N, -1, S)
    z_NKXS = jnp.where(seen_NXS[:, None], z_NKXS, UNSEEN)
    top_NKX1 = jax.lax.stop_gradient(jnp.max(z_NKXS, axis=-1, keepdims=True))
    e_NKXS = jnp.exp(z_NKXS - top_NKX1)
    sums_NKX1 = jnp.sum(e_NKXS, axis=-1, keepdims=True)
    out_NKXC = jnp.einsum("nkxs,nksc->nkxc", e_NKXS.astype(v_NKSC.dtype), v_NKSC, preferred_element_type=jnp.float32)

    def by_query(a_NKXC):
        return a_NKXC.reshape(N, K, G, H // K, T, -1).swapaxes(1, 2).reshape(B, K, H // K, T, -1)

    return by_query(top_NKX1), by_query(sums_NKX1), by_query(out_NKXC)


def attend_in_blocks(
    q_UTHC: Array, k_UTKC: Array, v_UTKC: Array, stream: Stream, implementation: Implementation = "auto"
) -> Array:
    """Exact softmax attention within a stream, [U, T, H, C]; scores and softmax are float32.

    A few blocks at a time, and again in the backward pass. "xla" keeps scores in the cache of a CPU; "splash" is
    JAX's kernel for TPUs, "interpret" the same anywhere, slowly; both raise ValueError for a stream that they cannot
    take (splash.takes). "auto" is splash on TPUs where it can, which is logged when compiled, and xla otherwise.
    """
    outs = [_attend_of(implementation, block, q_UTHC, k_UTKC, v_UTKC, stream.positions_UT) for block in stream.blocks]
    U, _, H, C = q_UTHC.shape
    return pick(jnp.concatenate([out.reshape(U, -1, H, C) for out in outs], axis=1), stream.places_UT)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _attend_of(
    implementation: Implementation, block: Block, q_UTHC: Array, k_UTKC: Array, v_UTKC: Array, positions_UT: Array
) -> Array:
    (U, B, Q), S, (H, C) = block.queries_UBQ.shape, block.keys_UBS.shape[2], q_UTHC.shape[2:]
    backend = "tpu" if pltpu.is_tpu_device() else jax.default_backend()  # that of jax.set_mesh, when compiling for it
    if implementation == "auto":
        implementation = "splash" if backend == "tpu" and splash.takes(block, C) else "xla"
        if backend == "tpu":  # elsewhere there is no choice to tell of
            log.info("attention of blocks of %d queries and %d keys: implementation %r", Q, S, implementation)
    elif implementation != "xla" and not splash.takes(block, C):
        raise ValueError(
            f"attention: implementation={implementation!r} wants blocks of a packed stream with queries, keys and "
            f"channels in multiples of {LANES}, not {Q}, {S} and {C} (aligned: {block.aligned}): use 'xla' or 'auto'"
        )
    if implementation == "xla":
        at_once = max(1, SCORES_AT_ONCE.get(backend, SCORES_ELSEWHERE) // (U * H * Q * S))
        gather = _softmax_attention
    else:
        at_once = max(1, splash.AT_ONCE // (2 * S * k_UTKC.shape[2] * C * k_UTKC.dtype.itemsize))
        gather = partial(splash.attend, interpret=implementation == "interpret")

    # Many blocks see the tokens of a prompt: what comes back from all of a list is added up in float32.
    wide = [a.astype(jnp.float32) for a in (k_UTKC, v_UTKC)]

    @partial(jax.checkpoint, prevent_cse=False)
    def some(part):
        queries_UNQ, keys_UNS = part
        places = [pick(positions_UT, each.reshape(U, -1), -1).reshape(each.shape) for each in part]
        q = pick(q_UTHC, queries_UNQ.reshape(U, -1)).reshape(*queries_UNQ.shape, H, C)
        k, v = (pick(a, keys_UNS.reshape(U, -1)).reshape(*keys_UNS.shape, -1, C).astype(k_UTKC.dtype) for a in wide)
        return gather(q, k, v, *places)

    chunks = -(-B // at_once)
    size = -(-B // chunks)
    parts = [_turns(a, chunks, size, q_UTHC.shape[1]) for a in (block.queries_UBQ, block.keys_UBS)]
    if chunks == 1:
        return some([part[0] for part in parts])
    out = jax.lax.map(some, parts)
    return out.swapaxes(0, 1).reshape(U, chunks * size, Q, H, C)[:, :B]


def _turns(lists_UBX, turns, size, nothing):
    """[U, B, X] -> [turns, U, size, X]."""
    U, B, X = lists_UBX.shape
    filled = jnp.pad(lists_UBX, ((0, 0), (0, turns * size - B), (0, 0)), constant_values=nothing)
    return filled.reshape(U, turns, size, X).swapaxes(0, 1)


def _softmax_attention(q_UBQHC, k_UBSKC, v_UBSKC, queries_UBQ, keys_UBS):
    """Attention of blocks; the last two are places, -1: nothing."""
    U, B, Q, H, C = q_UBQHC.shape
    K = k_UBSKC.shape[3]
    q = q_UBQHC.reshape(U, B, Q, K, H // K, C).transpose(0, 1, 3, 4, 2, 5).reshape(U, B, K, H // K * Q, C)
    k, v = (a.transpose(0, 1, 3, 2, 4) for a in (k_UBSKC, v_UBSKC))
    z = jnp.einsum("ubkqc,ubksc->ubkqs", q, k, preferred_element_type=jnp.float32) * C**-0.5
    seen_UBQS = (keys_UBS[:, :, None, :] >= 0) & (keys_UBS[:, :, None, :] <= queries_UBQ[..., None])
    z = jnp.where(jnp.tile(seen_UBQS, (1, 1, H // K, 1))[:, :, None], z, UNSEEN)
    e = jnp.exp(z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True)))
    total = jnp.sum(e, axis=-1, keepdims=True)
    out = jnp.einsum("ubkqs,ubksc->ubkqc", e.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    out = out.reshape(U, B, K, H // K, Q, C).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(U, B, Q, H, C).astype(q_UBQHC.dtype)
