"""Claims: segments end where the docstring says, whatever the tokens; together they are the document; targets keep to
their bounds; targets that would not fit into the truth kept are named before a run begins."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_jax.config import PositionConfig
from rpt_jax.corpus import segments
from rpt_jax.corpus.positions import Positions
from rpt_jax.records import InputError


def texts(pieces):
    return [b"".join(pieces[start:end]) for start, end in segments.segments(pieces).tolist()]


def characters(text):
    return [text[i : i + 1] for i in range(len(text))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"One is. Two is! Three?  Four", [b"One is.", b" Two is!", b" Three?", b"  Four"]),
        (b"pi is 3.14 or so", [b"pi is 3.14 or so"]),
        (b'He said "no." Then (it ended.) So', [b'He said "no."', b" Then (it ended.)", b" So"]),
        ("He said “no.” Then".encode(), ["He said “no.”".encode(), b" Then"]),
        (b"Line\nnext\n\n  third. \nlast", [b"Line\n", b"next\n\n", b"  third. \n", b"last"]),
        (b"ends here. ", [b"ends here. "]),
        (b"\n\nbegins", [b"\n\n", b"begins"]),
        (b"Wait... what?! Yes", [b"Wait...", b" what?!", b" Yes"]),
        (b"a, b; c: d", [b"a, b; c: d"]),
        (b"", []),
    ],
)
def test_segments_by_hand(text, expected):
    assert texts(characters(text)) == expected


def test_a_cut_falls_on_the_first_token_boundary_in_the_white_space():
    """Behind a line feed or before the space where a token ends there; else within the run; else there is no cut."""
    assert texts([b"so", b".", b" The"]) == [b"so.", b" The"]
    assert texts([b"so", b". ", b"The"]) == [b"so. ", b"The"]
    assert texts([b"so", b".\n\n", b"The"]) == [b"so.\n\n", b"The"]
    assert texts([b"so", b".\n\n ", b" The"]) == [b"so.\n\n ", b" The"]
    assert texts([b"so", b". T", b"he"]) == [b"so. The"]
    assert texts([b"so.", b"", b" The", b""]) == [b"so.", b" The"]  # tokens without bytes go with what comes


PIECES = st.lists(
    st.sampled_from([b"a", b"b.", b".", b"!", b" ", b"\n", b'"', b". ", b" a", b"", b"\xe2\x80", b"\x9d"])
)


@given(PIECES)
def test_laws_of_segments(pieces):
    """They follow each other and are the document; the same rule walked by a regular expression gives the same cuts."""
    bounds = segments.segments(pieces)
    assert bounds.dtype == np.int32 and bounds.shape == (len(bounds), 2) and (bounds[:, 0] < bounds[:, 1]).all()
    assert bounds[:, 0].tolist() == [0, *bounds[:-1, 1].tolist()][: len(bounds)]
    assert bounds[-1:, 1].tolist() == [len(pieces)] * bool(pieces)
    text, ends = b"".join(pieces), np.cumsum([len(piece) for piece in pieces]).tolist()
    closers = rb"(?:[\"')\]}]|\xe2\x80\x9d|\xe2\x80\x99|\xc2\xbb){0,4}"
    expected = set()
    for run in re.finditer(rb"[ \t\r\n]+", text):
        sentence = re.search(rb"[.!?]" + closers + rb"$(?!\n)", text[: run.start()]) and run.end() < len(text)
        line = run[0].rfind(b"\n") + 1
        if line or sentence:
            first = next((end for end in ends if end >= run.start() + line), None)
            if first is not None and first <= run.end():
                expected.add(ends.index(first) + 1)
    assert set(bounds[:, 1].tolist()) == (expected | {len(pieces)} if pieces else set())


@given(PIECES, st.integers(1, 3), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_targets_keep_their_bounds(pieces, shortest, more, context, span):
    config = PositionConfig(
        target="masked_span" if span else "next_segment",
        shortest_target=shortest,
        longest_target=shortest + more,
        minimum_context=context,
    )
    expected = [
        (start, end)
        for start, end in segments.segments(pieces).tolist()
        if shortest <= end - start <= shortest + more
        and start >= max(context, 1)
        and not (span and end == len(pieces))
        and b"".join(pieces[start:end]).strip()
    ]
    assert [tuple(bound) for bound in segments.targets(pieces, config).tolist()] == expected


def test_the_entropy_of_a_segment_is_the_mean_of_its_tokens():
    entropies_T = np.array([np.nan, 1, 2, 3, 6], np.float32)
    found = segments.mean_entropies(entropies_T, np.array([[1, 3], [3, 5]]))
    assert found.dtype == np.float32 and found.tolist() == [1.5, 4.5]
    assert segments.mean_entropies(entropies_T, np.zeros((0, 2), int)).shape == (0,)


def test_targets_that_do_not_fit_are_counted():
    pieces, documents = [b"a", b"bcd", b""], {4: np.array([0, 1, 2, 1, 0]), 9: np.array([0, 0, 0])}
    columns = [np.array(column) for column in ([9, 4, 4], [1, 1, 0], [0.0, 0.0, 0.0], [2, 3, 2])]
    positions = Positions(*columns)  # 2, 6 and 4 bytes
    segments.require_room(documents, pieces, positions, 6)
    with pytest.raises(InputError, match="1 of 3 targets .*truth_bytes=5, the longest has 6 bytes: use .*-bytes 6"):
        segments.require_room(documents, pieces, positions, 5)
    with pytest.raises(InputError, match="2 of 3 targets"):
        segments.require_room(documents, pieces, positions, 3)
    segments.require_room(documents, pieces, Positions(*columns[:3]), 1)  # without an end nothing has to fit
