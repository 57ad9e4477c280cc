"""Log-prob, entropy and log-sum-exp of target tokens without logits of all tokens in memory.

In: hidden states of some tokens, the head, the token that came at each. Out: what GRPO needs of softmax(h W / T), with
gradients for h and W. "Grouped" because the responses of all groups go through the head as one list of live tokens.
Here: the specification (_reference), the public function, its gradient and its way over a mesh. The work is done by
grouped_logprob_tpu (Pallas) or grouped_logprob_xla. Names as everywhere: T tokens, D width, V vocabulary.
"""

import functools
import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from . import grouped_logprob_tpu, grouped_logprob_xla
from .grouped_logprob_blocks import Blocks, choose_blocks

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "pallas", "xla", "reference")


class LogProbs(NamedTuple):
    """Per token, in the shape of the targets, float32, 0 where masked."""

    logprob: jax.Array  # log softmax(z)[target], nats
    entropy: jax.Array  # of softmax(z), nats
    lse: jax.Array  # log sum exp z


class Setup(NamedTuple):
    """What is known when a call is traced."""

    implementation: str
    tied: bool
    softcap: float | None
    chunk: int | None
    blocks: Blocks | None
    interpret: bool
    columns: int  # V, without padding
    mesh: AbstractMesh | None  # None: everything lies on one device, or the caller has split it himself
    token_axes: tuple[str, ...]  # mesh axes that the tokens are split over
    vocabulary_axis: str | None  # and the vocabulary


def resolve(implementation: str, interpret: bool = False) -> str:
    """The implementation that a name stands for here; raises ValueError for one that is unknown or cannot run.

    "Here" is the kind of device in the mesh of jax.set_mesh, so that a program for a TPU can be compiled elsewhere;
    without one, that of the default backend.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    on_tpu = pltpu.is_tpu_device()
    if implementation == "pallas" and not (on_tpu or interpret):
        raise ValueError(
            f"implementation='pallas' runs on TPUs, and this is {jax.default_backend()}: use 'xla', 'reference', or "
            "'auto' (pallas on TPUs, xla elsewhere)"
        )
    if implementation == "auto":
        implementation = "pallas" if on_tpu else "xla"
        _announce(implementation, "TPU" if on_tpu else jax.default_backend())
    return implementation


@functools.cache
def _announce(implementation: str, backend: str) -> None:
    log.info("grouped log-prob: implementation %r on %s", implementation, backend)


def grouped_logprob(
    hidden,
    head,
    targets,
    mask,
    temperature=1.0,
    *,
    tied: bool = False,
    softcap: float | None = None,
    implementation: str = "auto",
    chunk: int | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
    token_axes: tuple[str, ...] = ("data", "fsdp"),
    vocabulary_axis: str = "tensor",
) -> LogProbs:
    """log p, H and lse of softmax(z) at each token, z = h W / temperature.

    log p = z_y - lse; H = lse - sum_v p_v z_v; d z = g_logp (onehot_y - p) - g_H p (log p + H) + g_lse p. Matmuls
    accumulate in float32 and the softmax runs in it. Where mask is False all three are 0, no gradient flows, hidden
    and targets may hold anything, nan included, and nothing is computed: live tokens are packed to the front of each
    device first, and tiles without any are left out.

    Inside jax.set_mesh, tokens are split over token_axes and the vocabulary over vocabulary_axis, as far as the mesh
    has them, for any T and V (a T or V that does not divide is padded).

    Args:
        hidden: [..., D], float32 or bfloat16; [N, G, T, D] and [T, D] alike.
        head: [D, V], or [V, D] if `tied` (the embedding as it is, never transposed in memory); the same dtype, or
            another that promotes with it.
        targets: [...] int32 in [0, V); one outside makes a nan, not a wrong number.
        mask: [...] bool.
        temperature: scalar above 0, may be traced; gets no gradient.
        softcap: c for z = c tanh(h W / c) / temperature.
        implementation: "pallas" (TPU); "xla", a chunk of tokens at a time, anywhere; "reference", all logits at once
            by plain jax.numpy; "auto", pallas on TPU and xla elsewhere.
        chunk: "xla" only, tokens whose logits exist at one time; memory is about 3 * chunk * V * 4 bytes. None takes
            32 MiB of logits on CPU, 1024 tokens elsewhere.
        blocks: "pallas" only, instead of what choose_blocks takes for this chip.
        interpret: "pallas" only, runs the kernels as plain operations on any backend, slowly, for tests.

    Raises ValueError for shapes that clash and for an implementation that cannot run, NotImplementedError for a
    second derivative ("reference" has one).
    """
    # Over 40 lines for its arguments and what they mean; the work is done by what it calls.
    implementation = resolve(implementation, interpret)
    _check(hidden, head, targets, mask, tied, softcap, chunk)
    D, V = hidden.shape[-1], head.shape[0 if tied else 1]
    dtype = jnp.result_type(hidden, head)
    mask_T, targets_T = jnp.reshape(mask, -1), jnp.reshape(targets, -1)
    hidden_TD = jnp.where(mask_T[:, None], jnp.reshape(hidden, (-1, D)), 0).astype(dtype)
    scale = lax.stop_gradient(1.0 / jnp.asarray(temperature, jnp.float32))
    if implementation == "reference":
        outputs = _reference(hidden_TD, head, targets_T, scale, tied, softcap)
    else:
        split = _split(token_axes, vocabulary_axis)
        setup = Setup(implementation, tied, softcap, chunk, blocks, interpret, V, *split)
        rows = (_pad(a, 0, _size(setup, *setup.token_axes)) for a in (hidden_TD, targets_T, mask_T))
        hidden_TD, *rows = rows
        head = _pad(head.astype(dtype), 0 if tied else 1, _size(setup, setup.vocabulary_axis))
        outputs = LogProbs(*(out_T[: mask_T.shape[0]] for out_T in _grouped(setup, hidden_TD, head, *rows, scale)))
    known_T = (targets_T >= 0) & (targets_T < V)
    outputs = outputs._replace(logprob=jnp.where(known_T, outputs.logprob, jnp.nan))
    return LogProbs(*(jnp.where(mask_T, out_T, 0.0).reshape(targets.shape) for out_T in outputs))


def _check(hidden, head, targets, mask, tied, softcap, chunk):
    if not hidden.shape[:-1] == targets.shape == mask.shape:
        raise ValueError(
            f"hidden {hidden.shape} without its last axis, targets {targets.shape}, mask {mask.shape} differ"
        )
    if head.ndim != 2 or head.shape[1 if tied else 0] != hidden.shape[-1]:
        shape = "[V, D] (tied=True)" if tied else "[D, V] (tied=False)"
        raise ValueError(f"head {head.shape} is not {shape} for hidden states of D={hidden.shape[-1]}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} tokens must be 1 or more")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be above 0, or None for logits as they are")


def _reference(hidden_TD, head, targets_T, scale, tied, softcap) -> LogProbs:
    """The specification: all logits at once, gradients by autodiff."""
    precision = lax.Precision.HIGHEST if hidden_TD.dtype == jnp.float32 else None
    head = head.T if tied else head
    logits_TV = jnp.dot(hidden_TD, head, precision=precision, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits_TV = softcap * jnp.tanh(logits_TV / softcap)
    logprobs_TV = jax.nn.log_softmax(logits_TV * scale)
    entropy_T = -jnp.sum(jnp.exp(logprobs_TV) * logprobs_TV, axis=1)
    logprob_T = jnp.take_along_axis(logprobs_TV, targets_T[:, None], axis=1, mode="clip")[:, 0]
    return LogProbs(logprob_T, entropy_T, jax.nn.logsumexp(logits_TV * scale, axis=1))


def _split(token_axes, vocabulary_axis):
    """(mesh, token axes, vocabulary axis) of jax.set_mesh; a mesh axis inside shard_map is the caller's own matter."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None, (), None
    return mesh, *(
        tuple(axis for axis in token_axes if axis in mesh.shape),
        vocabulary_axis if vocabulary_axis in mesh.shape else None,
    )


def _size(setup, *axes):
    """Devices over these mesh axes."""
    return math.prod(setup.mesh.shape[axis] for axis in axes if axis)


def _once_differentiable(function):
    """The function, refusing to be differentiated: it is half of a derivative rule already."""

    def refuse(setup, primals, tangents):
        raise NotImplementedError(
            f"grouped_logprob has no second derivative with implementation={setup.implementation!r}: use 'reference'"
        )

    guarded = jax.custom_jvp(function, nondiff_argnums=(0,))
    guarded.defjvp(refuse)
    return guarded


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(setup, *arguments) -> LogProbs:
    """arguments: hidden_TD, head, targets_T, mask_T, scale."""
    return _grouped_forward(setup, *arguments)[0]


def _grouped_forward(setup, *arguments):
    logprob_T, entropy_T, top_T, log_sum_T = _values(setup, *arguments)
    return LogProbs(logprob_T, entropy_T, top_T + log_sum_T), (*arguments, entropy_T, top_T, log_sum_T)


def _grouped_backward(setup, residuals, cotangents):
    return *_gradients(setup, *residuals, cotangents), None, None, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


@_once_differentiable
def _values(setup, *arguments):
    rows, matrix, one = _specs(setup)
    return _on_mesh(setup, _forward, (rows, matrix, rows, rows, one), (rows,) * 4)(*arguments)


@_once_differentiable
def _gradients(setup, *arguments):
    rows, matrix, one = _specs(setup)
    return _on_mesh(setup, _backward, (rows, matrix, rows, rows, one, *(rows,) * 4), (rows, matrix))(*arguments)


def _specs(setup):
    """PartitionSpecs of rows of tokens (of any rank), of the head, and of a scalar."""
    matrix = (setup.vocabulary_axis, None) if setup.tied else (None, setup.vocabulary_axis)
    return PartitionSpec(setup.token_axes or None), PartitionSpec(*matrix), PartitionSpec()


def _on_mesh(setup, function, in_specs, out_specs):
    """The function of one device's part, over the mesh; reductions are its own, and its gradient is not asked for."""
    function = functools.partial(function, setup)
    if setup.mesh is None:
        return function
    return jax.shard_map(function, mesh=setup.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _forward(setup, hidden_TD, head, targets_T, mask_T, scale):
    """(logprob_T, entropy_T, top_T, log_sum_T) of one device's tokens; lse = top + log_sum, top the largest logit.

    Over the vocabulary axis the parts are weighed by their share of the probability.
    """
    run, plan = _backend(setup, hidden_TD, head)
    order_T, live = _live_first(mask_T)
    local_T, columns = _own_columns(setup, head, targets_T[order_T])
    outputs = run.forward(plan, hidden_TD[order_T], head, local_T, live, columns, scale)
    logprob_T, entropy_T, top_T, log_sum_T = (jnp.where(mask_T[order_T], out_T, 0.0) for out_T in outputs)
    if setup.vocabulary_axis:
        part_T, top_T = log_sum_T + top_T, lax.pmax(top_T, setup.vocabulary_axis)
        log_sum_T = jnp.log(lax.psum(jnp.exp(part_T - top_T), setup.vocabulary_axis))
        log_share_T = part_T - top_T - log_sum_T
        entropy_T = lax.psum(jnp.exp(log_share_T) * (entropy_T - log_share_T), setup.vocabulary_axis)
        logprob_T = lax.psum(jnp.where(local_T >= 0, logprob_T + log_share_T, 0.0), setup.vocabulary_axis)
    place_T = jnp.argsort(order_T)
    return tuple(out_T[place_T] for out_T in (logprob_T, entropy_T, top_T, log_sum_T))


def _backward(setup, hidden_TD, head, targets_T, mask_T, scale, entropy_T, top_T, log_sum_T, cotangents):
    """One device's d hidden and d head, summed over the devices that share them."""
    run, plan = _backend(setup, hidden_TD, head)
    order_T, live = _live_first(mask_T)
    g_logprob_T, g_entropy_T, g_lse_T = (jnp.where(mask_T, g_T, 0.0)[order_T] for g_T in cotangents)
    constant_T = g_lse_T - g_logprob_T - g_entropy_T * entropy_T[order_T]
    local_T, columns = _own_columns(setup, head, targets_T[order_T])
    rows = top_T[order_T], log_sum_T[order_T], constant_T, g_logprob_T, g_entropy_T
    d_hidden_TD, d_head = run.backward(plan, hidden_TD[order_T], head, local_T, live, columns, scale, *rows)
    d_hidden_TD = jnp.where(mask_T[:, None], d_hidden_TD[jnp.argsort(order_T)], 0)
    if setup.vocabulary_axis:
        d_hidden_TD = lax.psum(d_hidden_TD, setup.vocabulary_axis)
    if setup.token_axes:
        d_head = lax.psum(d_head, setup.token_axes)
    return d_hidden_TD.astype(hidden_TD.dtype), d_head


def _live_first(mask_T):
    """(order_T that puts live tokens in front and keeps their order, number of live ones)."""
    return jnp.argsort(~mask_T, stable=True), jnp.sum(mask_T, dtype=jnp.int32)


def _own_columns(setup, head, targets_T):
    """(targets as columns of this device's part of the head, -1 for those of another; columns of this part)."""
    width = head.shape[0 if setup.tied else 1]
    start = lax.axis_index(setup.vocabulary_axis) * width if setup.vocabulary_axis else 0
    columns = jnp.clip(setup.columns - start, 0, width)
    local_T = targets_T - start
    return jnp.where((local_T >= 0) & (local_T < columns), local_T, -1), columns


def _backend(setup, hidden_TD, head):
    (T, D), V = hidden_TD.shape, head.shape[0 if setup.tied else 1]
    every_column = V * _size(setup, setup.vocabulary_axis) == setup.columns
    if setup.implementation == "xla":
        chunk = setup.chunk or (max(1, (32 << 20) // (4 * V)) if jax.default_backend() == "cpu" else 1024)
        return grouped_logprob_xla, grouped_logprob_xla.Plan(setup.tied, setup.softcap, every_column, chunk)
    blocks = setup.blocks
    if blocks is None:
        on_tpu = pltpu.is_tpu_device()
        chip = pltpu.get_tpu_info() if on_tpu else pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)
        blocks = choose_blocks(chip, D, T, hidden_TD.dtype.itemsize)
    return grouped_logprob_tpu, grouped_logprob_tpu.make_plan(
        blocks, head, setup.tied, setup.softcap, every_column, setup.interpret
    )


def _pad(array, axis, multiple):
    return jnp.pad(array, [(0, -size % multiple if at == axis else 0) for at, size in enumerate(array.shape)])
