"""The XLA path of grouped_logprob, for CPU, GPU and any backend: a chunk of tokens at a time.

In and out as in grouped_logprob_tpu. Chunks of masked tokens are not computed: the number of turns of the loop is
traced.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

LOWEST = -(2.0**100)  # the logit of a column that stands for nothing; finite, so that 0 times it is 0


class Plan(NamedTuple):
    """What is known when the loops are traced."""

    tied: bool  # the head is [V, D]
    softcap: float | None
    every_column: bool  # the head has no columns that stand for nothing (a split vocabulary may be padded)
    chunk: int  # tokens


def forward(plan: Plan, hidden_TD, head, targets_T, live, columns, scale):
    """(logprob_T, entropy_T, top_T, log_sum_T) within the first `columns` columns; 0 in chunks without live tokens."""
    one = functools.partial(_forward_chunk, plan, head, columns, scale)
    T = hidden_TD.shape[0]
    if plan.chunk >= T:
        return one(hidden_TD, targets_T)
    size, parts = _in_chunks(plan.chunk, hidden_TD, targets_T)

    def body(i, outs):
        new = one(*(_slice(part, i, size) for part in parts))
        return tuple(lax.dynamic_update_slice_in_dim(out, n, i * size, 0) for out, n in zip(outs, new, strict=True))

    start = (jnp.zeros(parts[0].shape[0], jnp.float32),) * 4
    return tuple(out[:T] for out in lax.fori_loop(0, _count(live, size), body, start))


def _forward_chunk(plan, head, columns, scale, hidden_TD, targets_T):
    """Relative to the row's largest logit: the entropy of large logits then subtracts no large numbers."""
    logits_TV = _masked(plan, _logits(plan, hidden_TD, head) * scale, columns, LOWEST)
    top_T = jnp.max(logits_TV, axis=1)
    shifted_TV = logits_TV - top_T[:, None]
    exp_TV = jnp.exp(shifted_TV)
    sum_T = jnp.sum(exp_TV, axis=1)
    log_sum_T = jnp.log(sum_T)
    entropy_T = log_sum_T - jnp.sum(exp_TV * shifted_TV, axis=1) / sum_T
    target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=1, mode="clip")[:, 0]
    return target_T - top_T - log_sum_T, entropy_T, top_T, log_sum_T


def backward(plan: Plan, hidden_TD, head, targets_T, live, columns, scale, *rows):
    """(dh_TD float32, dW in the head's dtype), with d z = p (constant - g_H log p) + g_logp onehot."""
    one = functools.partial(_backward_chunk, plan, head, columns, scale)
    T = hidden_TD.shape[0]
    rows = hidden_TD, targets_T, *rows
    if plan.chunk >= T:
        dh_TD, d_head = one(*rows)
        return dh_TD, d_head.astype(head.dtype)
    size, parts = _in_chunks(plan.chunk, *rows)

    def body(i, sums):
        dh_TD, d_head = sums
        new_TD, more = one(*(_slice(part, i, size) for part in parts))
        return lax.dynamic_update_slice_in_dim(dh_TD, new_TD, i * size, 0), d_head + more

    start = jnp.zeros(parts[0].shape, jnp.float32), jnp.zeros(head.shape, jnp.float32)
    dh_TD, d_head = lax.fori_loop(0, _count(live, size), body, start)
    return dh_TD[:T], d_head.astype(head.dtype)


def _backward_chunk(plan, head, columns, scale, hidden_TD, targets_T, *rows):
    """One softmax and three matmuls; (dh_TD, dW), both float32."""
    raw_TV = _logits(plan, hidden_TD, head)
    top_T1, log_sum_T1, constant_T1, g_logprob_T1, g_entropy_T1 = (row_T[:, None] for row_T in rows)
    logp_TV = raw_TV * scale - top_T1 - log_sum_T1
    d_TV = jnp.exp(logp_TV) * (constant_T1 - g_entropy_T1 * logp_TV)
    columns_TV = lax.broadcasted_iota(jnp.int32, raw_TV.shape, 1)
    d_TV += jnp.where(columns_TV == targets_T[:, None], g_logprob_T1, 0.0)
    if plan.softcap is not None:
        d_TV *= 1 - jnp.square(raw_TV / plan.softcap)
    d_TV = _masked(plan, d_TV * scale, columns, 0.0).astype(hidden_TD.dtype)
    d_head = _dot(d_TV, hidden_TD, 0, 0) if plan.tied else _dot(hidden_TD, d_TV, 0, 0)
    return _dot(d_TV, head, 1, 0 if plan.tied else 1), d_head


def _logits(plan, hidden_TD, head):
    raw_TV = _dot(hidden_TD, head, 1, 1 if plan.tied else 0)
    if plan.softcap is not None:
        raw_TV = plan.softcap * jnp.tanh(raw_TV / plan.softcap)
    return raw_TV


def _masked(plan, values_TV, columns, instead):
    """The values, with others in columns that stand for nothing."""
    if plan.every_column:
        return values_TV
    return jnp.where(lax.broadcasted_iota(jnp.int32, (1, values_TV.shape[1]), 1) < columns, values_TV, instead)


def _dot(a, b, a_axis, b_axis):
    """Sum over one axis of each, in float32; float32 inputs are multiplied in full (a TPU would round them first)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _in_chunks(chunk, *arrays):
    T = arrays[0].shape[0]
    size = -(-T // -(-T // chunk))
    return size, [jnp.pad(a, [(0, -T % size)] + [(0, 0)] * (a.ndim - 1)) for a in arrays]


def _count(live, size):
    return (live + size - 1) // size


def _slice(array, i, size):
    return lax.dynamic_slice_in_dim(array, i * size, size)
