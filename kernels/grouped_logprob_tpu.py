"""The Pallas TPU kernels of grouped_logprob: one device's tokens against one device's part of the vocabulary.

In: hidden states with the live tokens in front, the head, the column of each target. Out: LogProbs within these
columns, and gradients. Logits live in VMEM only, a tile of t tokens x v columns at a time, as y = z log2(e): the
hardware's exponential is 2^x, and on v6e the forward pass with exp reaches 87 % of the MXU's peak instead of 95.

| kernel    | grid                        | stays in VMEM                          | passes through            |
|-----------|-----------------------------|----------------------------------------|---------------------------|
| forward   | token tile, column tile     | h [t, D], statistics of t rows         | W                         |
| one pass  | core, column tile, token t. | W and f32 dW [D, v]                    | h, f32 dh (in and out)    |
| dh alone  | token tile, column tile     | h and f32 dh [t, D]                    | W                         |
| dW alone  | column tile, token tile     | W and f32 dW [D, v]                    | h                         |

Every input that passes is held twice, one copy in use and the next on its way (grouped_logprob_blocks has the sums).
The number of token tiles is traced: tiles of masked tokens are no grid steps at all.

Longer than 350 lines because the forward and the three backward kernels share their blocks, scalars and matmuls.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .grouped_logprob_blocks import LANES, Blocks

LOG2E = math.log2(math.e)
LOWEST = -(2.0**60)  # below every logit, and finite when scaled: its share of a sum becomes 0, not nan
WIDTH = 512  # columns of D that one matmul of the backward pass writes at a time


class Plan(NamedTuple):
    """What is known when the kernels are traced."""

    blocks: Blocks
    tied: bool  # the head is [V, D]
    softcap: float | None
    ragged: bool  # some column tile reaches past the last column
    interpret: bool


def make_plan(blocks, head, tied, softcap, every_column, interpret) -> Plan:
    """every_column: the head has no columns that stand for nothing (a split vocabulary may be padded)."""
    V = head.shape[0 if tied else 1]
    ragged = not every_column or bool(V % blocks.forward[1] or V % blocks.backward[1])
    return Plan(blocks, tied, softcap, ragged, interpret)


def forward(plan: Plan, hidden_TD, head, targets_T, live, columns, scale):
    """(logprob_T, entropy_T, top_T, log_sum_T) within the first `columns` columns; anything behind `live` tokens.

    top is the largest logit z and log_sum = log sum exp(z - top): their sum is the lse, but apart they keep the digits
    that the gradient needs. The log-prob of a target that is no column is without meaning.
    """
    (T, D), (t, v) = hidden_TD.shape, plan.blocks.forward
    tiles = pl.cdiv(head.shape[0 if plan.tied else 1], v)
    part = 256 if v % 256 == 0 else v
    hidden_TD, targets_T1 = _pad(hidden_TD, t), _pad(targets_T[:, None], t)
    out_T = pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        grid=(_tiles(live, t), tiles),
        in_specs=_in_specs(D, t, 1, lambda i, j: i, _head_spec(plan, D, v, lambda i, j: j)),
        out_specs=pl.BlockSpec((t, LANES), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((hidden_TD.shape[0], LANES), jnp.float32),
        scratch_shapes=[pltpu.VMEM((t, LANES), jnp.float32)] * 4 + [pltpu.VMEM((t, part), jnp.float32)] * (v // part),
        **_options(plan, "parallel", "arbitrary"),
    )(_scalar(scale * LOG2E, jnp.float32), _scalar(columns, jnp.int32), hidden_TD, head, targets_T1)
    return tuple(out_T[:T, lane] for lane in range(4))


def _forward_kernel(plan, scale_ref, columns_ref, hidden_ref, head_ref, targets_ref, out_ref, *scratch):
    """Running maximum, sum of 2^y, sum of 2^y y and target logit, one of each per row and lane.

    So a step needs no reduction across lanes. A part's logits are taken in while the matrix units make the next. Over
    40 lines, since the first, the middle and the last step are one computation on the same references.
    """
    max_ref, sum_ref, moment_ref, hit_ref, *parts = scratch
    step, last, v = pl.program_id(1), pl.num_programs(1) - 1, plan.blocks.forward[1]
    width = parts[0].shape[1]
    lanes_1L = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)

    def take_in(part_ref, start, nobody=False):
        slabs = [_capped(plan, part_ref[:, at : at + LANES]) * scale_ref[0, 0] for at in range(0, width, LANES)]
        if plan.softcap is not None:
            slabs = [jnp.where(nobody, LOWEST, y) for y in slabs]
        if plan.ragged:
            left = columns_ref[0, 0] - start
            slabs = [jnp.where(lanes_1L < left - at * LANES, y, LOWEST) for at, y in enumerate(slabs)]
        old = max_ref[...]
        top = functools.reduce(jnp.maximum, slabs, old)
        shrink, total, hit = jnp.exp2(old - top), sum_ref[...], hit_ref[...]
        moment = shrink * (moment_ref[...] + (old - top) * total)  # sum of 2^(y - top) (y - top)
        total = shrink * total
        lane = targets_ref[...] - start
        for at, y in enumerate(slabs):
            e = jnp.exp2(y - top)
            total, moment = total + e, moment + e * (y - top)
            hit = jnp.where(lane == lanes_1L + at * LANES, y, hit)
        max_ref[...], sum_ref[...], moment_ref[...], hit_ref[...] = top, total, moment, hit

    @pl.when(step == 0)
    def _():
        for ref in (sum_ref, moment_ref, hit_ref):
            ref[...] = jnp.zeros_like(ref)
        for ref in (max_ref, parts[-1]):  # in the first step nobody's logits are taken in, and weigh nothing later
            ref[...] = jnp.full_like(ref, LOWEST)

    for index, part_ref in enumerate(parts):
        take_in(parts[index - 1], step * v + (index - 1) * width, nobody=(step == 0) & (index == 0))
        part = slice(index * width, (index + 1) * width)
        head = head_ref[part, :] if plan.tied else head_ref[:, part]
        part_ref[...] = _times_head(hidden_ref[...], head, plan.tied)

    @pl.when(step == last)
    def _():
        take_in(parts[-1], step * v + (len(parts) - 1) * width)
        top = jnp.max(max_ref[...], axis=1, keepdims=True)
        shift = max_ref[...] - top
        total = jnp.sum(jnp.exp2(shift) * sum_ref[...], axis=1, keepdims=True)
        moment = jnp.sum(jnp.exp2(shift) * (moment_ref[...] + shift * sum_ref[...]), axis=1, keepdims=True)
        log_sum = jnp.log2(total)
        logprob = jnp.sum(hit_ref[...], axis=1, keepdims=True) - top - log_sum
        entropy = log_sum - moment / total
        nats = top / LOG2E  # log_sum takes up what this rounding leaves, so that the backward pass has it all
        outs = logprob / LOG2E, entropy / LOG2E, nats, (log_sum + (top - nats * LOG2E)) / LOG2E
        for lane, out in enumerate(outs):
            out_ref[...] = jnp.where(lanes_1L == lane, out, out_ref[...])


def backward(plan: Plan, hidden_TD, head, targets_T, live, columns, scale, *rows):
    """(dh_TD, dW in the head's dtype): p (constant - g_H log p) + g_logp onehot = d z, within these columns.

    dh_TD is float32 from the one-pass kernel, and in the hidden states' dtype from the kernel of dh alone.
    rows: top_T, log_sum_T, constant_T, g_logprob_T, g_entropy_T. log p is z - top - log_sum, of the whole vocabulary
    even if these columns are a part of it. Behind the first `live` tokens gradients must be 0, and dh_TD is anything.
    """
    T, (t, _) = hidden_TD.shape[0], plan.blocks.backward
    top_T, log_sum_T, constant_T, g_logprob_T, g_entropy_T = rows
    rows = top_T * LOG2E, log_sum_T * LOG2E, constant_T, g_logprob_T, g_entropy_T / LOG2E, targets_T.astype(jnp.float32)
    rows_T8 = jnp.pad(jnp.stack(rows, axis=1), ((0, 0), (0, 2)))
    inputs = (
        _scalar(scale * LOG2E, jnp.float32),
        _scalar(columns, jnp.int32),
        _pad(hidden_TD, t),
        head,
        _pad(rows_T8, t),
    )
    if plan.blocks.one_pass:
        dh_TD, d_head = one_pass(plan, _tiles(live, t), *inputs)
    else:
        dh_TD, d_head = hidden_pass(plan, _tiles(live, t), *inputs), head_pass(plan, _tiles(live, t), *inputs)
    return dh_TD[:T], d_head


def one_pass(plan, token_tiles, scale, columns, hidden_TD, head, rows_T8):
    """(dh_TD float32, dW), with one recomputation of each tile of logits."""
    (T, D), (t, v) = hidden_TD.shape, plan.blocks.backward
    tiles = pl.cdiv(head.shape[0 if plan.tied else 1], v)
    cores = min(plan.blocks.cores, tiles)
    share = pl.cdiv(tiles, cores)
    # The last core's share may end in a step that has no tile: it is given the one before and does nothing.
    head_spec = _head_spec(plan, D, v, lambda c, j, i: jnp.minimum(c * share + j, tiles - 1))
    *dh_TD, d_head = pl.pallas_call(
        functools.partial(_one_pass_kernel, plan, tiles),
        grid=(cores, share, token_tiles),
        in_specs=_in_specs(D, t, 8, lambda c, j, i: i, head_spec),
        out_specs=[pl.BlockSpec(memory_space=pltpu.HBM)] * cores + [head_spec],
        out_shape=[jax.ShapeDtypeStruct((T, D), jnp.float32)] * cores + [jax.ShapeDtypeStruct(head.shape, head.dtype)],
        scratch_shapes=[
            pltpu.VMEM((v, D) if plan.tied else (D, v), jnp.float32),
            pltpu.VMEM((2, t, D), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        **_options(plan, "parallel", "arbitrary", "arbitrary"),
    )(scale, columns, hidden_TD, head, rows_T8)
    return functools.reduce(jnp.add, dh_TD), d_head


def _one_pass_kernel(plan, tiles, *refs):
    """One tile of d logits feeds dW, which stays for all tokens, and dh, which comes from HBM and goes back.

    dh is read while the logits and dW are computed, and written during the next step; with a single token tile the
    next step needs the very same one and waits for it. Over 40 lines, so that the order of copies, waits and matmuls,
    on which everything depends, can be read in one place.
    """
    inputs, dh_refs, (d_head_ref, sum_ref, tile_ref, ins, outs) = refs[:5], refs[5:-5], refs[-5:]
    _, _, hidden_ref, head_ref, _ = inputs
    core, column_tile, token_tile = (pl.program_id(axis) for axis in range(3))
    share, token_tiles = pl.num_programs(1), pl.num_programs(2)
    t = hidden_ref.shape[0]
    tile = core * share + column_tile
    mine = jnp.minimum(share, tiles - core * share)
    step, single = column_tile * token_tiles + token_tile, token_tiles == 1
    slot = jnp.where(single, 0, step & 1)

    def copy(dh_ref, slot, out):
        ends = tile_ref.at[slot], dh_ref.at[pl.ds(token_tile * t, t), :]
        return pltpu.make_async_copy(*(ends if out else ends[::-1]), (outs if out else ins).at[slot])

    def start(out):
        """Between this core's dh and the slot."""
        for number, dh_ref in enumerate(dh_refs):
            pl.when(core == number)(copy(dh_ref, slot, out).start)

    def wait(slot, out):
        copy(dh_refs[0], slot, out).wait()  # for as many bytes, whichever dh they belong to

    @pl.when(tile < tiles)
    def _():
        @pl.when(step >= jnp.where(single, 1, 2))
        def _():
            wait(slot, out=True)  # what this slot held before

        @pl.when(column_tile == 0)
        def _():
            tile_ref[slot] = jnp.zeros(tile_ref.shape[1:], jnp.float32)

        @pl.when(column_tile > 0)
        def _():
            start(out=False)

        _start_sum(sum_ref, token_tile == 0)
        d_TV = _d_logits(plan, tile, *inputs)
        _add_d_head(plan, sum_ref, d_TV, hidden_ref)

        @pl.when(column_tile > 0)
        def _():
            wait(slot, out=False)

        _add_d_hidden(plan, tile_ref.at[slot], d_TV, head_ref)
        start(out=True)

        @pl.when(token_tile == token_tiles - 1)
        def _():
            d_head_ref[...] = sum_ref[...].astype(d_head_ref.dtype)

        @pl.when((column_tile == mine - 1) & (token_tile == token_tiles - 1))
        def _():
            wait(slot, out=True)

            @pl.when(jnp.logical_not(single))
            def _():
                wait(1 - slot, out=True)


def hidden_pass(plan, token_tiles, scale, columns, hidden_TD, head, rows_T8):
    """dh_TD alone."""
    (T, D), (t, v) = hidden_TD.shape, plan.blocks.backward
    return pl.pallas_call(
        functools.partial(_hidden_kernel, plan),
        grid=(token_tiles, pl.cdiv(head.shape[0 if plan.tied else 1], v)),
        in_specs=_in_specs(D, t, 8, lambda i, j: i, _head_spec(plan, D, v, lambda i, j: j)),
        out_specs=pl.BlockSpec((t, D), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((T, D), hidden_TD.dtype),
        scratch_shapes=[pltpu.VMEM((t, D), jnp.float32)],
        **_options(plan, "parallel", "arbitrary"),
    )(scale, columns, hidden_TD, head, rows_T8)


def _hidden_kernel(plan, *refs):
    inputs, (dh_ref, sum_ref), step = refs[:5], refs[5:], pl.program_id(1)
    _start_sum(sum_ref, step == 0)
    _add_d_hidden(plan, sum_ref, _d_logits(plan, step, *inputs), inputs[3])

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        dh_ref[...] = sum_ref[...].astype(dh_ref.dtype)


def head_pass(plan, token_tiles, scale, columns, hidden_TD, head, rows_T8):
    """dW alone."""
    D, (t, v) = hidden_TD.shape[1], plan.blocks.backward
    head_spec = _head_spec(plan, D, v, lambda j, i: j)
    return pl.pallas_call(
        functools.partial(_head_kernel, plan),
        grid=(pl.cdiv(head.shape[0 if plan.tied else 1], v), token_tiles),
        in_specs=_in_specs(D, t, 8, lambda j, i: i, head_spec),
        out_specs=head_spec,
        out_shape=jax.ShapeDtypeStruct(head.shape, head.dtype),
        scratch_shapes=[pltpu.VMEM((v, D) if plan.tied else (D, v), jnp.float32)],
        **_options(plan, "parallel", "arbitrary"),
    )(scale, columns, hidden_TD, head, rows_T8)


def _head_kernel(plan, *refs):
    inputs, (d_head_ref, sum_ref) = refs[:5], refs[5:]
    tile, step = pl.program_id(0), pl.program_id(1)
    _start_sum(sum_ref, step == 0)
    _add_d_head(plan, sum_ref, _d_logits(plan, tile, *inputs), inputs[2])

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        d_head_ref[...] = sum_ref[...].astype(d_head_ref.dtype)


def _d_logits(plan, tile, scale_ref, columns_ref, hidden_ref, head_ref, rows_ref):
    """Gradient of the h W of this tile, in the hidden states' dtype for the matmuls that follow; 0 past the columns."""
    v = plan.blocks.backward[1]
    if plan.ragged:
        left = columns_ref[0, 0] - tile * v

        @pl.when(left < v)
        def _():  # past the columns memory may hold anything, and 0 x nan is nan
            columns = lax.broadcasted_iota(jnp.int32, head_ref.shape, 0 if plan.tied else 1)
            head_ref[...] = jnp.where(columns < left, head_ref[...], jnp.zeros_like(head_ref))

    raw_TV = _times_head(hidden_ref[...], head_ref[...], plan.tied)
    top_T1, log_sum_T1, constant_T1, g_logprob_T1, g_entropy_T1, target_T1 = (rows_ref[:, n : n + 1] for n in range(6))
    log2p_TV = _capped(plan, raw_TV) * scale_ref[0, 0] - top_T1 - log_sum_T1
    d_TV = jnp.exp2(log2p_TV) * (constant_T1 - g_entropy_T1 * log2p_TV)
    columns_TV = lax.broadcasted_iota(jnp.int32, raw_TV.shape, 1)
    d_TV += jnp.where(columns_TV == target_T1.astype(jnp.int32) - tile * v, g_logprob_T1, 0.0)
    d_TV *= scale_ref[0, 0] / LOG2E
    if plan.softcap is not None:
        d_TV *= 1 - jnp.square(jnp.tanh(raw_TV / plan.softcap))
    if plan.ragged:
        d_TV = jnp.where(columns_TV < left, d_TV, 0.0)
    return d_TV.astype(hidden_ref.dtype)


def _start_sum(sum_ref, fresh):
    """Before d logits: a condition between them and the matmuls would keep one from running beside the other."""

    @pl.when(fresh)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)


def _add_d_head(plan, sum_ref, d_TV, hidden_ref):
    """sum + h^T d."""
    for at in range(0, hidden_ref.shape[1], WIDTH):
        part = slice(at, min(at + WIDTH, hidden_ref.shape[1]))
        if plan.tied:
            sum_ref[:, part] += _dot(d_TV, hidden_ref[:, part], 0, 0)
        else:
            sum_ref[part, :] += _dot(hidden_ref[:, part], d_TV, 0, 0)


def _add_d_hidden(plan, sum_ref, d_TV, head_ref):
    """sum + d W^T."""
    for at in range(0, sum_ref.shape[1], WIDTH):
        part = slice(at, min(at + WIDTH, sum_ref.shape[1]))
        head, side = (head_ref[:, part], 0) if plan.tied else (head_ref[part, :], 1)
        sum_ref[:, part] += _dot(d_TV, head, 1, side)


def _times_head(hidden_TD, head, tied):
    return _dot(hidden_TD, head, 1, 1 if tied else 0)


def _dot(a, b, a_axis, b_axis):
    """Sum over one axis of each, in float32; float32 inputs are multiplied in full (a TPU would round them first)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _capped(plan, raw_TV):
    return raw_TV if plan.softcap is None else plan.softcap * jnp.tanh(raw_TV / plan.softcap)


def _in_specs(D, t, row, tile, head_spec):
    """Blocks of scale, columns, hidden states, head, and `row` figures a token; `tile` maps grid indices to tokens."""
    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
    hidden, rows = (pl.BlockSpec((t, width), lambda *grid: (tile(*grid), 0)) for width in (D, row))
    return [scalar, scalar, hidden, head_spec, rows]


def _head_spec(plan, D, v, tile):
    """Block of v columns (rows of a tied head), all of D; `tile` maps grid indices to the block's number."""
    if plan.tied:
        return pl.BlockSpec((v, D), lambda *grid: (tile(*grid), 0))
    return pl.BlockSpec((D, v), lambda *grid: (0, tile(*grid)))


def _options(plan, *semantics):
    params = pltpu.CompilerParams(vmem_limit_bytes=plan.blocks.vmem_bytes, dimension_semantics=semantics)
    return {"compiler_params": params, "interpret": plan.interpret}


def _tiles(live, t):
    """Token tiles with live tokens, at least one: a grid of none would leave dW unwritten."""
    return max(pl.cdiv(live, t), 1) if isinstance(live, int) else jnp.maximum((live + t - 1) // t, 1)


def _pad(array, t):
    return jnp.pad(array, [(0, -array.shape[0] % t)] + [(0, 0)] * (array.ndim - 1))


def _scalar(value, dtype):
    return jnp.reshape(jnp.asarray(value, dtype), (1, 1))
