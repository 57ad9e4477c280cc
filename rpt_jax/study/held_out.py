"""Which of the held-out positions are evaluated: so many of each split, the same ones whatever the policy.

In: named sets of positions. Out: the distinct positions, and the rows of each set among them.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rpt_jax.corpus.positions import Position, Positions

Splits = Mapping[str, Positions | Sequence[Position]]


def choose_positions(splits: Splits, count: int, seed: int) -> tuple[Positions, dict[str, np.ndarray]]:
    """(distinct positions by document and index, rows of each split): `count` of each split, 0 or too many: all.

    Those that come first in an order drawn from the seed by (document, index) alone: the choice within a split does
    not depend on the others, and nested splits share as many as they can.
    """
    tables = {name: _table(positions) for name, positions in splits.items()}
    chosen = {name: np.unique(ids[_lots(ids, seed).argsort()][: count or None]) for name, (ids, *_) in tables.items()}
    every, entropies, lengths = (
        np.concatenate([np.zeros(0, kind), *(table[i] for table in tables.values())])
        for i, kind in enumerate((np.uint64, np.float32, np.int32))
    )
    distinct = np.unique(np.concatenate([np.zeros(0, np.uint64), *chosen.values()]))
    known, first = np.unique(every, return_index=True)
    rows = first[np.searchsorted(known, distinct)]
    positions = Positions(
        (distinct >> np.uint64(32)).astype(np.int32),
        (distinct & np.uint64(0xFFFFFFFF)).astype(np.int32),
        entropies[rows],
        lengths[rows] if lengths.any() else None,
    )
    return positions, {name: np.searchsorted(distinct, ids) for name, ids in chosen.items()}


def _table(positions: Positions | Sequence[Position]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, entropies, lengths); an id is document and index in one uint64."""
    if not isinstance(positions, Positions):
        rows = [(p.document, p.index, p.entropy, p.length) for p in positions]
        positions = Positions(*map(np.array, zip(*rows, strict=True) if rows else [()] * 4))
    ids = positions.documents.astype(np.uint64) << np.uint64(32) | positions.indices.astype(np.uint64)
    lengths = np.zeros(len(ids), np.int32) if positions.lengths is None else positions.lengths.astype(np.int32)
    return ids, positions.entropies.astype(np.float32), lengths


def _lots(ids: np.ndarray, seed: int) -> np.ndarray:
    """A number for each id that looks random and depends on it and the seed alone (finaliser of MurmurHash3)."""
    x = ids ^ (np.array([seed % 2**64], np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))
