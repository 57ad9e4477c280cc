"""A position in a document -> the text around it: what a prompt shows, and what really follows.

In: token ids of a document, and the position. Out: token ids around a masked span; bytes of the truth.
"""

from collections.abc import Sequence

import numpy as np

from rpt_jax.corpus.positions import Position
from rpt_jax.records import InputError


def context_around(tokens_T: np.ndarray, position: Position, gap: np.ndarray, room: int) -> np.ndarray:
    """Text before a masked span, gap, text behind it, in `room` tokens at the most.

    Each side keeps what is nearest to the span: half of what the gap leaves of the room (the left side has the odd
    token), and more where the other side does not need its half.
    """
    end = position.index + position.length
    if not position.length:
        raise InputError(
            "prompt.template has a gap and asks what is missing in a text, not what follows: use --positions.target "
            "masked_span, or another template"
        )
    room -= len(gap)
    left = min(position.index, max(room - room // 2, room - (len(tokens_T) - end)))
    return np.concatenate([tokens_T[position.index - left : position.index], gap, tokens_T[end : end + room - left]])


def truth(
    token_bytes: Sequence[bytes], tokens_T: np.ndarray, position: Position, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """What really follows, as `continuation` has it; only to the end of the target where the position gives its length.

    Raises InputError for a target of more than `width` bytes.
    """
    if not position.length:
        return continuation(token_bytes, tokens_T[position.index :], width)
    tokens = tokens_T[position.index : position.index + position.length].tolist()
    size = sum(len(token_bytes[token]) for token in tokens)
    if size > width:
        raise InputError(
            f"the target at token {position.index} of document {position.document} has {size} bytes, more than "
            f"prompt.truth_bytes={width}: raise that, or lower positions.longest_target"
        )
    return continuation(token_bytes, tokens, width)


def continuation(token_bytes: Sequence[bytes], tokens_T: Sequence[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """What follows a position: its first `width` bytes, and which of them end a token.

    truth_X uint8, padded with 0; boundaries_X bool, [i] says that the first i + 1 bytes are whole tokens (i + 1 is
    in B of Eq. 3). A token without bytes (a control token) ends where the one before it did, so it adds nothing, and
    nothing at 0. After the end of the document, or past `width`, there is no boundary.
    """
    text, ends = b"", []
    for token in tokens_T:
        piece = token_bytes[token]
        if len(text) + len(piece) > width:
            text = (text + piece)[:width]
            break
        text += piece
        if text:
            ends.append(len(text) - 1)
    boundaries_X = np.zeros(width, bool)
    boundaries_X[ends] = True
    return np.frombuffer(text.ljust(width, b"\0"), np.uint8), boundaries_X
