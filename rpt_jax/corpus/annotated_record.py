"""A document with what a proxy policy predicted at each of its tokens, as a record of bytes and back."""

import struct
from dataclasses import dataclass

import numpy as np

from rpt_jax.records import InputError

RECORD = struct.Struct("<4sIII")  # mark, document, T, bytes of the name; then tokens, entropies, arg-maxes, name
MARK = b"RPT1"


@dataclass(frozen=True)
class Annotated:
    """A document with what a proxy policy predicted at each of its tokens, given the tokens before it."""

    document: int  # number in the corpus
    name: str  # "file:line"
    tokens_T: np.ndarray  # int32
    entropies_T: np.ndarray  # float32 nats, of the prediction of token t from tokens < t; nan at 0
    argmaxes_T: np.ndarray  # int32, most probable token under the same prediction; -1 at 0


def pack(document: Annotated) -> bytes:
    """The record; raises ValueError for arrays of unequal lengths."""
    name = document.name.encode(errors="replace")  # of a file whose name is no UTF-8
    tokens = np.asarray(document.tokens_T, "<i4")
    entropies = np.asarray(document.entropies_T, "<f4")
    argmaxes = np.asarray(document.argmaxes_T, "<i4")
    if not tokens.shape == entropies.shape == argmaxes.shape == (len(tokens),):
        raise ValueError(
            f"{document.name}: {tokens.shape} tokens, {entropies.shape} entropies, {argmaxes.shape} arg-maxes"
        )
    start = RECORD.pack(MARK, document.document, len(tokens), len(name))
    return b"".join((start, tokens.tobytes(), entropies.tobytes(), argmaxes.tobytes(), name))


def unpack(record: bytes, where: str, vocab_size: int) -> Annotated:
    """What was packed; raises InputError that begins with `where` for another record, or a number that cannot be.

    Tokens are at least 0 and below vocab_size, the document's number fits into an int32.
    """
    if len(record) < RECORD.size or record[:4] != MARK:
        raise InputError(f"{where} is no annotated document: delete the part and annotate again")
    _, document, count, name_bytes = RECORD.unpack_from(record)
    size = RECORD.size + 12 * count + name_bytes
    if len(record) != size:
        raise InputError(f"{where} has {len(record)} bytes, its {count} tokens need {size}: annotate again")
    arrays = [
        np.frombuffer(record, kind, count, RECORD.size + 4 * count * i) for i, kind in enumerate(("<i4", "<f4", "<i4"))
    ]
    if document >= 2**31:
        raise InputError(f"{where} is of document {document}, numbers end below {2**31}: annotate again")
    tokens_T = arrays[0]
    if count and not 0 <= tokens_T.min() <= tokens_T.max() < vocab_size:
        found = f"{tokens_T.min()} to {tokens_T.max()}"
        raise InputError(f"{where} has tokens from {found} in a vocabulary of {vocab_size}: annotate again")
    name = record[len(record) - name_bytes :].decode("utf-8", errors="replace")  # for messages
    return Annotated(document, name, *arrays)
