"""Tokens of a response, with a number each -> pieces of text for people to read.

Byte-level tokens often split a character in two; shown one by one, each would come out as U+FFFD.
"""

import codecs
from collections.abc import Iterable, Sequence


def readable_pieces(contents: Iterable[bytes], numbers: Iterable[float]) -> list[tuple[str, float]]:
    """(text, number) of each token, those that share a character of UTF-8 as one piece with the sum of their numbers.

    The sum of log-probs is the log-prob of the tokens together. The texts joined are the decoded bytes; U+FFFD stands
    only for what is no UTF-8 in them. A token without bytes (a control piece) is a piece without text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces: list[tuple[str, float]] = []
    text, total = "", 0.0
    for content, number in zip(contents, numbers, strict=True):
        text, total = text + decoder.decode(content), total + float(number)
        if not decoder.getstate()[0]:  # no character is left open
            pieces.append((text, total))
            text, total = "", 0.0
    if decoder.getstate()[0]:
        pieces.append((text + decoder.decode(b"", final=True), total))
    return pieces


def number_within(contents: Sequence[bytes], numbers: Sequence[float], start: int, end: int) -> float:
    """The sum of the numbers of those tokens that have a byte in [start, end) of the joined bytes.

    An empty stretch counts the token that it lies within; between two tokens it counts none.
    """
    total, at = 0.0, 0
    for content, number in zip(contents, numbers, strict=True):
        if content and at < end and at + len(content) > start:
            total += float(number)
        at += len(content)
    return total
