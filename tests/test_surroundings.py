"""Claims: around a masked span stands what is nearest to it, as much as fits; the truth of a target ends with it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_jax.corpus.positions import Position
from rpt_jax.corpus.surroundings import context_around, continuation, truth
from rpt_jax.records import InputError

TOKENS = np.arange(10, 20)
GAP = np.array([99])


@pytest.mark.parametrize(
    ("index", "length", "room", "expected"),
    [
        (4, 2, 20, [10, 11, 12, 13, 99, 16, 17, 18, 19]),  # all fits
        (4, 2, 6, [11, 12, 13, 99, 16, 17]),  # five tokens: three before, two behind
        (4, 2, 5, [12, 13, 99, 16, 17]),
        (1, 2, 7, [10, 99, 13, 14, 15, 16, 17]),  # the left side does not need its half
        (7, 2, 7, [12, 13, 14, 15, 16, 99, 19]),  # the right side does not
        (4, 2, 1, [99]),
        (4, 6, 4, [11, 12, 13, 99]),  # nothing behind
    ],
)
def test_what_stands_around_a_span_by_hand(index, length, room, expected):
    assert context_around(TOKENS, Position(0, index, 1.0, length), GAP, room).tolist() == expected


@given(st.integers(0, 9), st.integers(1, 10), st.integers(1, 14))
def test_laws_of_what_stands_around(index, length, room):
    """Nothing of the span is shown; the room is used up or all is shown; the longer side is cut."""
    length = min(length, 10 - index)
    shown = context_around(TOKENS, Position(0, index, 1.0, length), GAP, room).tolist()
    at = shown.index(99)
    left, right = shown[:at], shown[at + 1 :]
    end = index + length
    assert left == TOKENS[index - len(left) : index].tolist() and right == TOKENS[end : end + len(right)].tolist()
    assert len(shown) == min(room, 10 - length + 1)
    assert len(left) == index or len(left) >= len(right)
    assert len(right) == 10 - end or len(right) >= len(left) - 1


def test_a_gap_needs_a_span():
    with pytest.raises(InputError, match="--positions.target masked_span, or another template"):
        context_around(TOKENS, Position(0, 4, 1.0), GAP, 8)


PIECES = [b"a", b" bc", b"", b"d."]


def test_the_truth_of_a_target_ends_with_it():
    tokens_T = np.array([0, 1, 2, 3, 0])
    whole_X, whole = truth(PIECES, tokens_T, Position(0, 1, 1.0, 2), 6)
    assert bytes(whole_X) == b" bc\0\0\0" and np.flatnonzero(whole).tolist() == [2]
    open_X, ends = truth(PIECES, tokens_T, Position(0, 1, 1.0), 6)
    assert bytes(open_X) == b" bcd.a" and np.flatnonzero(ends).tolist() == [2, 4, 5]
    assert bytes(continuation(PIECES, [1, 3], 6)[0]) == b" bcd.\0"
    with pytest.raises(InputError, match="token 1 of document 7 has 5 bytes, more than prompt.truth_bytes=4"):
        truth(PIECES, tokens_T, Position(7, 1, 1.0, 3), 4)
