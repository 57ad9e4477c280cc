"""Tokens of a document -> its segments, sentences and lines, which may be predicted whole; by rule, on bytes.

In: the bytes of each token. Out: where segments begin and end, in tokens. For positions.target next_segment and
masked_span: what comes next, or what is missing, is a whole segment [RLPT, arXiv 2509.19249; PretrainZero, arXiv
2512.03442]. They split text by other means and judge meaning; the rule here needs no model and no language.

The rule. A run of white space (space, tab, line feed, carriage return) may separate segments:

    it holds a line feed                        a segment ends behind the last line feed of the run
    . or ! or ? stands before it, perhaps       a segment ends before the run, which begins the next one
    with closing quotes or brackets between

A cut falls on the first token boundary from there to the end of the run; where a token reaches across the run, there
is none. So "3.14" is not cut and "e.g. this" is; a run at the end of the text belongs to the last segment.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from rpt_jax.config import PositionConfig
from rpt_jax.records import InputError

SPACE = re.compile(rb"[ \t\r\n]+")
END = re.compile(rb"[.!?](?:[\"')\]}]|\xe2\x80\x9d|\xe2\x80\x99|\xc2\xbb){0,4}\Z")  # then ” ’ »
END_BYTES = 13  # the longest match of END


def segments(pieces: Sequence[bytes]) -> np.ndarray:
    """(first token, token behind the last) of each segment, int32 [segments, 2], in order, without gaps.

    pieces: the bytes of each token. Together the segments are the whole document; none is empty.
    """
    text = b"".join(pieces)
    ends_T = np.cumsum([len(piece) for piece in pieces])
    cuts = [0]
    for run in SPACE.finditer(text):
        start, end = run.span()
        if b"\n" in run[0]:
            earliest = start + run[0].rindex(b"\n") + 1
        elif end < len(text) and END.search(text, max(0, start - END_BYTES), start):
            earliest = start
        else:
            continue
        token = int(np.searchsorted(ends_T, earliest))
        if ends_T[token] <= end and token + 1 > cuts[-1]:
            cuts.append(token + 1)
    if cuts[-1] < len(pieces):
        cuts.append(len(pieces))
    return np.stack([cuts[:-1], cuts[1:]], axis=1).astype(np.int32)


def targets(pieces: Sequence[bytes], config: PositionConfig) -> np.ndarray:
    """The segments that may be predicted, int32 [segments, 2]; as `segments`, without those that

    - have fewer tokens than config.shortest_target or more than config.longest_target,
    - have fewer than config.minimum_context tokens (or none) before them, or for a masked span none behind them,
    - are nothing but white space, or have no bytes at all.
    """
    made = segments(pieces)
    lengths, last = made[:, 1] - made[:, 0], len(pieces) - (config.target == "masked_span")
    fits = (lengths >= config.shortest_target) & (lengths <= config.longest_target)
    fits &= (made[:, 0] >= max(config.minimum_context, 1)) & (made[:, 1] <= last)
    fits &= np.array([bool(b"".join(pieces[start:end]).strip()) for start, end in made.tolist()], bool)
    return made[fits]


def mean_entropies(entropies_T: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The mean of the tokens' entropies in each segment, float32 nats [segments]: what a token of it is worth."""
    return np.array([entropies_T[start:end].mean() for start, end in bounds.tolist()], np.float32)


def require_room(documents: Mapping[int, np.ndarray], pieces_V: Sequence[bytes], positions, truth_bytes: int) -> None:
    """Raises InputError where a target has more than truth_bytes bytes; positions: a table with lengths, or without.

    Reads the documents once.
    """
    if positions.lengths is None or not positions.lengths.any():
        return
    sizes_V, longest, count = np.array([len(piece) for piece in pieces_V]), 0, 0
    order = np.argsort(positions.documents, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(positions.documents[order])) + 1):
        ends = np.concatenate([[0], np.cumsum(sizes_V[documents[positions.documents[rows[0]]]])])
        starts = positions.indices[rows]
        sizes = ends[starts + positions.lengths[rows]] - ends[starts]
        longest, count = max(longest, int(sizes.max())), count + int((sizes > truth_bytes).sum())
    if count:
        raise InputError(
            f"{count} of {len(positions)} targets are longer than prompt.truth_bytes={truth_bytes}, the longest has "
            f"{longest} bytes: use --prompt.truth-bytes {longest} or a lower --positions.longest-target"
        )
