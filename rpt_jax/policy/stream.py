"""Sequences that share prefixes as one stream in which every token stands once; how prefill, scorer and update run.

In: prompts and their responses. Out: `Stream`, the live tokens in a row with the lists that attention needs. All that
works token by token (embedding, projections, MLP, norms, head) runs over the stream, without padding and with each
shared token once. Only attention looks at sequences: in blocks of Q queries, each with the list of S tokens that may
be keys. A key is seen if its place in its own sequence is not behind the query's, and padding has place -1.

So a prompt runs once for its G responses (P + G R tokens instead of G (P + R)), and whatever begins alike, such as the
head of all prompts and the positions of one document, runs once too: the lists form a prefix tree. The last token of
a response predicts nothing and is left out.

U is the number of units: what one device (along data and fsdp) holds, or in `padded` one prompt. X counts the response
tokens to be predicted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rpt_jax.records import Array

QUERIES = {"tpu": 512}  # of a block, at most
QUERIES_ELSEWHERE = 64
LANES = 128  # of a TPU: its kernels take whole multiples
FEWEST_KEYS = 128  # places for keys of a block: lengths below are not told apart
FEWEST_PLACES = 64  # of a prompt, likewise


@struct.dataclass
class Block:
    """Queries with their keys, both as places in the stream; T (one past the end) stands for nothing."""

    queries_UBQ: Array
    keys_UBS: Array
    aligned: bool = struct.field(pytree_node=False, default=False)  # both at the right end: query r is key S - Q + r


@struct.dataclass
class Stream:
    """Tokens of many sequences, shared ones once."""

    tokens_UT: Array  # int32
    positions_UT: Array  # int32, place in the token's own sequence; -1 padding
    blocks: tuple[Block, ...]  # each token is the query of one
    places_UT: Array  # int32, where in the blocks' queries, one behind the other
    predictors_UX: Array  # int32, the token in whose hidden state a response token is predicted
    targets_UX: Array  # int32, that response token; -1 padding
    places_UY: Array  # int32, the x of each of the Y = N/U * G * R places of responses; X where there is no token


def padded(prompt_tokens_NT: Array, prompt_lengths_N: Array, tokens_NGR: Array, lengths_NG: Array) -> Stream:
    """A stream with a unit for each prompt and all padding in it; needs no values, so it can be traced."""
    (N, P), (_, G, R) = prompt_tokens_NT.shape, tokens_NGR.shape
    kept = R - 1
    T, X = P + G * kept, G * R
    prompt_P, own_GR = np.arange(P), P + np.arange(G * kept).reshape(G, kept)
    blocks = [_cut(prompt_P[None], prompt_P[None], T)]
    if kept:
        blocks.append(_cut(own_GR, np.concatenate([np.tile(prompt_P, (G, 1)), own_GR], axis=1), T))
    predictors_GR = np.concatenate([np.zeros((G, 1), int), own_GR], axis=1)  # r = 0: the prompt's last token, below

    def every(array):
        return jnp.broadcast_to(jnp.asarray(array, jnp.int32)[None], (N, *np.shape(array)))

    places_1P, places_11R = jnp.arange(P)[None, :], jnp.arange(R)[None, None, :]
    prompts_NP = jnp.where(places_1P < prompt_lengths_N[:, None], places_1P, -1)
    live_NGR = places_11R < lengths_NG[:, :, None]
    responses_NGR = jnp.where(live_NGR, prompt_lengths_N[:, None, None] + places_11R, -1)
    predictors_NGR = every(predictors_GR).at[:, :, 0].set(prompt_lengths_N[:, None].astype(jnp.int32) - 1)
    return Stream(
        tokens_UT=jnp.concatenate([prompt_tokens_NT, tokens_NGR[:, :, :kept].reshape(N, -1)], axis=1),
        positions_UT=jnp.concatenate([prompts_NP, responses_NGR[:, :, :kept].reshape(N, -1)], axis=1),
        blocks=tuple(Block(every(queries_BQ), every(keys_BS)) for queries_BQ, keys_BS in blocks),
        places_UT=every(_places([queries_BQ for queries_BQ, _ in blocks], T)),
        predictors_UX=predictors_NGR.reshape(N, X),
        targets_UX=jnp.where(live_NGR, tokens_NGR, -1).reshape(N, X),
        places_UY=every(np.arange(X)),
    )


def _cut(queries_BR: np.ndarray, keys_BS: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of queries in blocks, each with all keys of its row."""
    (B, R), parts = queries_BR.shape, -(-queries_BR.shape[1] // QUERIES_ELSEWHERE)
    size = -(-R // parts)
    filled_BR = np.pad(queries_BR, ((0, 0), (0, parts * size - R)), constant_values=T)
    return filled_BR.reshape(B * parts, size), np.repeat(keys_BS, parts, axis=0)


def _places(queries: Sequence[np.ndarray], T: int) -> np.ndarray:
    """Where each of T tokens is among the queries, 0 for one that is none (padding)."""
    flat = np.concatenate([part.ravel() for part in queries])
    places_T = np.zeros(T + 1, np.int32)
    places_T[flat] = np.arange(len(flat))
    return places_T[:T]


def packed(
    prompt_tokens_NT: np.ndarray,
    prompt_lengths_N: np.ndarray,
    tokens_NGR: np.ndarray,
    lengths_NG: np.ndarray,
    units: int = 1,
    queries: int = 0,
) -> Stream:
    """The stream of live tokens alone, on the host; N / units consecutive prompts make a unit.

    Sizes are rounded up, so that the batches of a run have few shapes between them: each takes seconds to compile.
    queries: the most of a block; 0 leaves it to JAX's backend.
    """
    return _packed(prompt_tokens_NT, prompt_lengths_N, tokens_NGR, lengths_NG, units, queries)[0]


def packed_prompts(
    prompt_tokens_NT: np.ndarray, prompt_lengths_N: np.ndarray, units: int = 1, queries: int = 0
) -> tuple[Stream, np.ndarray]:
    """(the stream of prompts alone, paths_UNT: the place in it of each prompt's tokens, the first repeated behind)."""
    N, T = len(prompt_lengths_N), padded_length(max(FEWEST_PLACES, int(prompt_lengths_N.max())))
    nothing_NGR = np.zeros((N, 1, 0), np.int32)
    stream, parts = _packed(prompt_tokens_NT, prompt_lengths_N, nothing_NGR, np.zeros((N, 1), np.int32), units, queries)
    paths_UNT = [[np.pad(path, (0, T - len(path)), constant_values=path[0]) for path in part.paths] for part in parts]
    return stream, np.array(paths_UNT, np.int32)


def _packed(prompt_tokens_NT, prompt_lengths_N, tokens_NGR, lengths_NG, units, queries):
    N, G, R = tokens_NGR.shape
    queries, parts = queries or QUERIES.get(jax.default_backend(), QUERIES_ELSEWHERE), []
    for rows in np.arange(N).reshape(units, -1):
        prompts = [prompt_tokens_NT[n, : prompt_lengths_N[n]] for n in rows]
        responses = [[tokens_NGR[n, g, : lengths_NG[n, g]] for g in range(G)] for n in rows]
        parts.append(_unit(prompts, responses, R, queries))
    X = padded_length(max(len(part.targets_X) for part in parts)) if R else 0
    T = X + padded_length(max(part.prompt_tokens for part in parts))
    kinds = zip(*(part.blocks for part in parts), strict=True)
    blocks = tuple(_filled(lists, T, queries) for lists in kinds if any(lists))
    queries_U = [[block.queries_UBQ[u] for block in blocks] for u in range(units)]
    stream = Stream(
        tokens_UT=np.stack([_to(part.tokens_T, T, 0) for part in parts]),
        positions_UT=np.stack([_to(part.positions_T, T, -1) for part in parts]),
        blocks=blocks,
        places_UT=np.stack([_places(each, T) for each in queries_U]),
        predictors_UX=np.stack([_to(part.predictors_X, X, 0) for part in parts]),
        targets_UX=np.stack([_to(part.targets_X, X, -1) for part in parts]),
        places_UY=np.stack([np.where(part.places_Y < 0, X, part.places_Y) for part in parts]).astype(np.int32),
    )
    return stream, parts


class _Unit(NamedTuple):
    """Lists of one unit before they are filled up."""

    tokens_T: np.ndarray
    positions_T: np.ndarray
    blocks: tuple[list, list]  # of prompts, of responses: (places of queries, places of keys) each
    predictors_X: np.ndarray
    targets_X: np.ndarray
    places_Y: np.ndarray  # -1 where there is no token
    paths: list[np.ndarray]  # places of each prompt's tokens
    prompt_tokens: int  # of tokens_T, the first ones


def _unit(prompts: Sequence[np.ndarray], responses: Sequence[Sequence[np.ndarray]], R: int, queries: int) -> _Unit:
    """Prompts in the order of their tokens, so that each has its longest known prefix right before it."""
    tokens, positions, predictors, targets, blocks, size = [], [], [], [], ([], []), 0
    paths: list[np.ndarray] = [np.zeros(0, int)] * len(prompts)

    def append(path, new, first):
        """The places of path and new tokens, which are appended and become the queries of blocks of kind `first`."""
        nonlocal size
        places = np.arange(size, size + len(new))
        tokens.append(new)
        positions.append(np.arange(len(path), len(path) + len(new)))
        size += len(new)
        whole = np.concatenate([path, places])
        for some in np.array_split(places, -(-len(new) // queries)) if len(new) else ():
            seen = len(path) + some[-1] - places[0] + 1
            blocks[first].append((some, whole[:seen]))
        return whole

    before, path = np.zeros(0, np.int32), np.zeros(0, int)
    for n in sorted(range(len(prompts)), key=lambda n: prompts[n].astype(">i4").tobytes()):
        shared = _common(before, prompts[n])
        before, path = prompts[n], append(path[:shared], prompts[n][shared:], 0)
        paths[n] = path
    prompt_tokens = size
    places_NGR, made = np.full((len(prompts), len(responses[0]), R), -1, np.int32), 0
    for n, g in np.ndindex(*places_NGR.shape[:2]):
        response = responses[n][g]
        if len(response):
            whole = append(paths[n], response[:-1], 1)
            predictors.append(whole[len(paths[n]) - 1 :])
            targets.append(response)
            places_NGR[n, g, : len(response)] = made + np.arange(len(response))
            made += len(response)
    joined = (np.concatenate([np.zeros(0, np.int32), *parts]) for parts in (tokens, positions, predictors, targets))
    tokens_T, positions_T, predictors_X, targets_X = joined
    return _Unit(tokens_T, positions_T, blocks, predictors_X, targets_X, places_NGR.ravel(), paths, prompt_tokens)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    short = min(len(a), len(b))
    differ = np.flatnonzero(a[:short] != b[:short])
    return int(differ[0]) if len(differ) else short


def _filled(lists: Sequence[list], T: int, queries: int) -> Block:
    """Blocks of all units as one array each, filled with T on the left.

    Short queries make narrow blocks where `queries` fill lanes; all rows are then whole lanes, as kernels want them.
    """
    Q, lanes = queries, LANES if queries % LANES == 0 else 1
    longest = max(len(each) for pairs in lists for each, _ in pairs)
    while Q % 2 == 0 and Q // 2 % LANES == 0 and longest <= Q // 2:
        Q //= 2
    B = padded_length(max(map(len, lists)))
    S = padded_length(max(FEWEST_KEYS, Q, *(len(keys) for pairs in lists for _, keys in pairs)))
    S = -(-S // lanes) * lanes
    queries_UBQ, keys_UBS = np.full((len(lists), B, Q), T, np.int32), np.full((len(lists), B, S), T, np.int32)
    for u, pairs in enumerate(lists):
        for b, (some, keys) in enumerate(pairs):
            queries_UBQ[u, b, Q - len(some) :], keys_UBS[u, b, S - len(keys) :] = some, keys
    return Block(queries_UBQ, keys_UBS, aligned=True)


def _to(line: np.ndarray, length: int, value: int) -> np.ndarray:
    return np.pad(line, (0, length - len(line)), constant_values=value).astype(np.int32)


def pick(array_UT: Array, places_UX: Array, nothing: int | None = None) -> Array:
    """[u, places_ux] of [U, T, ...]; past the end `nothing`, or anything where that is None."""
    mode = "clip" if nothing is None else "fill"
    return jax.vmap(lambda a, i: a.at[i].get(mode=mode, fill_value=nothing))(array_UT, places_UX)


def padded_length(tokens: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds so many tokens: few shapes, little padding.

    From 16 tokens, less than a third of it is padding.
    """
    power = 16
    while power < tokens:
        power *= 2
    return power if power == 16 or tokens > power * 3 // 4 else power * 3 // 4


def deal(loads_N: np.ndarray, documents_N: np.ndarray, bins: int) -> np.ndarray:
    """Prompts for each of `bins` units, which divide N, of like total load; int [bins, N / bins].

    Positions of one document stay together where there is room, since they share it. The heaviest documents choose
    first, each the lightest unit.
    """
    room = np.full(bins, len(loads_N) // bins)
    load, dealt = np.zeros(bins), [[] for _ in range(bins)]
    groups = [np.flatnonzero(documents_N == document) for document in np.unique(documents_N)]
    for group in sorted(groups, key=lambda group: -loads_N[group].sum()):
        while len(group):
            fitting = np.flatnonzero(room >= min(len(group), room.max()))
            unit = fitting[np.argmin(load[fitting])]
            chosen, group = group[: room[unit]], group[room[unit] :]
            dealt[unit].extend(chosen.tolist())
            room[unit] -= len(chosen)
            load[unit] += loads_N[chosen].sum()
    return np.array(dealt)
