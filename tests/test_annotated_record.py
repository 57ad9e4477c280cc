"""Claims: a record's bytes are as laid out and come back as they were; one that was cut or changed is named."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_jax.corpus.annotated_record import Annotated, pack, unpack
from rpt_jax.records import InputError


def annotated(tokens, entropies, argmaxes, document=7, name="ä:3"):
    columns = np.array(tokens, np.int32), np.array(entropies, np.float32), np.array(argmaxes, np.int32)
    return Annotated(document, name, *columns)


def test_bytes_by_hand():
    """Mark, document, tokens and bytes of the name; then the columns one behind the other, and the name."""
    by_hand = b"RPT1" + struct.pack("<3I", 7, 2, 4) + struct.pack("<2i2f2i", 3, 1, 0.5, 1.25, -1, 2) + "ä:3".encode()
    assert pack(annotated([3, 1], [0.5, 1.25], [-1, 2])) == by_hand


ENTROPIES = st.floats(0, 16, width=32) | st.just(np.nan)


@given(st.lists(st.tuples(st.integers(0, 8), ENTROPIES, st.integers(-1, 8))), st.integers(0, 2**31 - 1))
def test_a_record_comes_back(rows, document):
    written = annotated(*zip(*rows, strict=True), document=document) if rows else annotated([], [], [], document)
    read = unpack(pack(written), "here", 9)
    assert (read.document, read.name) == (written.document, written.name)
    for field in ("tokens_T", "entropies_T", "argmaxes_T"):
        assert getattr(read, field).dtype == getattr(written, field).dtype
        np.testing.assert_array_equal(getattr(read, field), getattr(written, field))


def test_columns_of_unequal_lengths():
    with pytest.raises(ValueError, match=r"ä:3: \(2,\) tokens, \(1,\) entropies, \(2,\) arg-maxes"):
        pack(annotated([0, 1], [0.5], [0, 1]))


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (b"", "is no annotated document"),
        (b"RPT2" + bytes(12), "is no annotated document"),
        (b"RPT1" + struct.pack("<3I", 0, 2, 1) + bytes(20), "has 36 bytes, its 2 tokens need 41"),
        (pack(annotated([0, 9], [0.5, 1.0], [0, 1])), "has tokens from 0 to 9 in a vocabulary of 9"),
        (pack(annotated([-1, 3], [0.5, 1.0], [0, 1])), "has tokens from -1 to 3 in a vocabulary of 9"),
        (pack(annotated([0], [0.5], [0], document=2**31)), "is of document 2147483648, numbers end below 2147483648"),
    ],
)
def test_records_that_cannot_be(record, found):
    with pytest.raises(InputError, match=f"^here {found}.* annotate again$"):
        unpack(record, "here", 9)
