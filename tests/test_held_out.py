"""Claims: the choice of a split depends on seed and positions alone, nested splits share it, and a segment keeps its
length. (More of choose_positions is in test_evaluate.py.)"""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rpt_jax.corpus.positions import Position, Positions
from rpt_jax.study.held_out import choose_positions

MANY = [Position(d, t, float(10 * d + t), 100 * d + t) for d in range(4) for t in range(1, 9)]


@given(st.integers(0, 40), st.integers(0, 2**65), st.permutations(MANY))
def test_chosen_positions_are_whole_and_their_order_does_not_matter(count, seed, shuffled):
    splits = {"all": shuffled, "late": [position for position in shuffled if position.index > 4]}
    chosen, rows = choose_positions(splits, count, seed)
    assert [len(rows[name]) for name in splits] == [min(count or 99, 32), min(count or 99, 16)]
    for name, split in splits.items():
        assert all(chosen[int(row)] in split for row in rows[name])
    again, other = choose_positions({"all": MANY, "late": splits["late"]}, count, seed)
    for column in ("documents", "indices", "entropies", "lengths"):
        np.testing.assert_array_equal(getattr(chosen, column), getattr(again, column))
    alone, _ = choose_positions({"late": splits["late"]}, count, seed)
    late = chosen[rows["late"]]
    assert {(p.document, p.index) for p in map(late.__getitem__, range(len(late)))} == {
        (p.document, p.index) for p in map(alone.__getitem__, range(len(alone)))
    }


def test_positions_without_an_end_have_no_lengths():
    columns = [np.array(column) for column in ([0, 0], [1, 2], [0.5, 1.5])]
    assert choose_positions({"a": Positions(*columns)}, 0, 0)[0].lengths is None
    assert choose_positions({"a": [Position(0, 1, 0.5)], "b": []}, 0, 0)[0].lengths is None
    mixed = Positions(*columns, np.array([0, 3], np.int32))
    assert choose_positions({"a": mixed}, 0, 0)[0].lengths.tolist() == [0, 3]
