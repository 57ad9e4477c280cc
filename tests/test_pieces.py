"""Claims: pieces joined are the decoded bytes, no character that tokens share is torn, and no number is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_jax.corpus.pieces import number_within, readable_pieces


def test_tokens_that_share_a_character_are_one_piece():
    """The euro sign is e2 82 ac."""
    euro = [b"costs ", b"\xe2\x82", b"\xac", b"5", b""]
    assert readable_pieces(euro, [-1, -2, -3, -4, -5]) == [("costs ", -1), ("€", -5), ("5", -4), ("", -5)]
    assert readable_pieces([b"a\xe2", b"\x82", b"\xacb"], [-1, -2, -4]) == [("a€b", -7)]


def test_what_is_no_text_shows_as_such():
    """A character that never ends, and a byte that cannot begin one."""
    assert readable_pieces([b"a", b"\xe2\x82"], [-1, -2]) == [("a", -1), ("\ufffd", -2)]
    assert readable_pieces([b"\xff", b"b"], [-1, -2]) == [("\ufffd", -1), ("b", -2)]
    assert readable_pieces([b"\xe2", b"b"], [-1, -2]) == [("\ufffdb", -3)]
    assert readable_pieces([], []) == []


@given(st.lists(st.binary(max_size=4)))
def test_nothing_is_lost(contents):
    pieces = readable_pieces(contents, range(len(contents)))
    assert "".join(text for text, _ in pieces) == b"".join(contents).decode("utf-8", errors="replace")
    assert sum(number for _, number in pieces) == sum(range(len(contents)))


@given(st.text(), st.lists(st.integers(0, 40)))
def test_text_that_is_whole_stays_whole(text, cuts):
    """However its bytes are cut into tokens."""
    content = text.encode()
    places = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    tokens = [content[a:b] for a, b in zip(places, places[1:], strict=False)]
    pieces = readable_pieces(tokens, [1] * len(tokens))
    assert "".join(piece for piece, _ in pieces) == text and sum(number for _, number in pieces) == len(tokens)


@pytest.mark.parametrize(
    ("start", "end", "total"),
    [(0, 2, 1), (1, 3, 3), (2, 4, 2), (2, 5, 10), (4, 5, 8), (0, 5, 11), (3, 3, 2), (2, 2, 0), (5, 9, 0)],
)
def test_numbers_of_a_stretch(start, end, total):
    """Bytes ab | cd | (none) | e with numbers 1, 2, 4, 8; an empty stretch counts the token around it."""
    assert number_within([b"ab", b"cd", b"", b"e"], [1, 2, 4, 8], start, end) == total
