"""Contexts with several continuations each -> how probable each continuation is, and whether greedy decoding gives it.

For choices among options and for lm-evaluation-harness: teacher-forced, temperature 1. A context runs once for all its
continuations, and whatever contexts of a batch begin with alike, too (policy/stream.py).
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rpt_jax import preemption
from rpt_jax.config import ModelConfig
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.mesh import batch_parts, batch_sharding, place, to_host
from rpt_jax.policy.scorer import score_greedy
from rpt_jax.policy.stream import packed, padded_length
from rpt_jax.records import InputError, Params

GROUP = 16  # continuations of a row at the most: one context with hundreds would make all rows as long


class Group(NamedTuple):
    """Token ids: a context of at least one token, and what may follow it."""

    context: list[int]
    continuations: list[list[int]]


class Scored(NamedTuple):
    """What a continuation came to."""

    logprob: float  # nats, sum over its tokens given all before them
    greedy: bool  # each token is the arg-max at its place


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """(ids of the context, ids of the continuation), which together are the ids of the joined text.

    White space at the end of the context goes to the continuation, as lm-evaluation-harness has it: most tokenizers
    put it in front of a word. Where a token reaches over the boundary, it belongs to the continuation whole (the
    harness's own models count tokens there and may score fewer). Either may come out empty.
    """
    before = context.rstrip()
    whole, ids = tokenizer.encode(context + continuation), tokenizer.encode(before)
    if whole[: len(ids)] == ids:
        return ids, whole[len(ids) :]
    ends = np.cumsum([len(tokenizer.token_bytes[token]) for token in whole])
    split = int(np.searchsorted(ends, len(before.encode()), side="right"))
    return whole[:split], whole[split:]


def cut_left(context: Sequence[int], longest: int, limit: int, setting: str) -> list[int]:
    """The last tokens of a context, so many that a continuation of `longest` tokens fits behind it.

    A model reads all but the last token, so context and continuation may be limit + 1 together. Raises InputError,
    naming `setting`, for a continuation that leaves no token of context.
    """
    room = limit + 1 - longest
    if room < 1:
        raise InputError(f"a continuation of {longest} tokens leaves no room for context within {setting}={limit}")
    return list(context[-room:])


def score_pairs(
    params: Params,
    model: ModelConfig,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    token_chunk: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scored]:
    """What each continuation came to, pairs being (ids of a context, ids of what follows); an empty one: 0, greedy.

    log p(continuation | context) = sum_i log softmax(z_i)[token i], summed in float64 over float32 log-probs. Neither
    order nor batch changes a result beyond rounding. Raises InputError for an empty context.

    Args:
        batch_size: distinct contexts of a forward pass; divides over data and fsdp of the mesh, on which params lie.
        token_chunk: continuation tokens whose logits exist at one time; 0 leaves it to the kernel.
        progress: called with (batches done, batches in all).
    """
    groups, places = _grouped(pairs)
    size = rows_of_batch(len(groups), batch_size, mesh)
    total = -(-len(groups) // size)
    scored: list[list[Scored]] = [[]] * len(groups)
    order = sorted(range(len(groups)), key=lambda n: (len(groups[n].context), groups[n].context))
    for done, start in enumerate(range(0, len(order), size), 1):
        preemption.passing()
        rows = order[start : start + size]
        filled = [groups[row] for row in np.resize(rows, size)]
        results = _score_batch(params, model, filled, mesh, token_chunk)
        for row, result in zip(rows, results, strict=False):
            scored[row] = result
        progress(done, total)
    return [scored[group][member] for group, member in places]


def rows_of_batch(count: int, most: int, mesh: Mesh | None) -> int:
    """Rows of a batch where there are `count` in all: `most`, or if they are fewer what divides over the mesh."""
    parts = 1 if mesh is None else batch_parts(mesh)
    return max(1, min(most, -(-count // parts) * parts))


def _grouped(pairs) -> tuple[list[Group], list[tuple[int, int]]]:
    """(contexts with their continuations, GROUP at the most; where each pair is: group and member)."""
    groups: list[Group] = []
    open_groups: dict[tuple[int, ...], int] = {}
    places = []
    for number, (context, continuation) in enumerate(pairs):
        if not len(context):
            raise InputError(f"context {number} has no token: put the end-of-text token before it")
        key = tuple(context)
        if key not in open_groups or len(groups[open_groups[key]].continuations) == GROUP:
            open_groups[key] = len(groups)
            groups.append(Group(list(context), []))
        members = groups[open_groups[key]].continuations
        places.append((open_groups[key], len(members)))
        members.append(list(continuation))
    return groups, places


def _score_batch(params, model, groups, mesh, token_chunk) -> list[list[Scored]]:
    prompts_NT, prompt_lengths_N = padded_rows([group.context for group in groups])
    G = max(1, *(len(group.continuations) for group in groups))
    ids = [each for group in groups for each in [*group.continuations, *[[]] * (G - len(group.continuations))]]
    tokens_BR, lengths_B = padded_rows(ids)
    tokens_NGR, lengths_NG = tokens_BR.reshape(len(groups), G, -1), lengths_B.reshape(-1, G)
    units = 1 if mesh is None else batch_parts(mesh)
    stream = packed(prompts_NT, prompt_lengths_N, tokens_NGR, lengths_NG, units)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        placed = stream if mesh is None else place(stream, batch_sharding(mesh))
        logprobs_UX, greedy_UX = to_host(_score(params, placed, model=model, token_chunk=token_chunk))

    def in_place(values_UX, nothing):
        filled_UX = np.pad(values_UX, ((0, 0), (0, 1)), constant_values=nothing)
        return np.take_along_axis(filled_UX, stream.places_UY, axis=1).reshape(tokens_NGR.shape)

    sums_NG = in_place(logprobs_UX, 0).sum(axis=2, dtype=np.float64)
    greedy_NG = in_place(greedy_UX, True).all(axis=2)
    return [
        [Scored(float(sums_NG[n, g]), bool(greedy_NG[n, g])) for g in range(len(group.continuations))]
        for n, group in enumerate(groups)
    ]


@partial(jax.jit, static_argnames=("model", "token_chunk"))
def _score(params, stream, *, model, token_chunk):
    with jax.named_scope("continuations"):
        return score_greedy(params, model, stream, token_chunk)


def padded_rows(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, T], padded on the right with 0; lengths [B]), int32."""
    lengths_B = np.array([len(row) for row in rows], np.int32)
    tokens_BT = np.zeros((len(rows), padded_length(int(lengths_B.max(initial=1)))), np.int32)
    for tokens_T, row in zip(tokens_BT, rows, strict=True):
        tokens_T[: len(row)] = row
    return tokens_BT, lengths_B
