"""JSON text -> plain values; whatever keeps it from being used is a ValueError, so that readers catch that alone."""

import itertools
import json
import re
from typing import Any

DEEPEST = 100  # brackets within brackets: what walks through the values calls itself once for each
STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
BRACKET = re.compile(r"[\[\]{}]")
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # begins an escape of a surrogate, alone or one of a pair


def parsed(content: bytes | str) -> Any:
    """The value of JSON text; raises ValueError for what is none, or nests deeper than DEEPEST.

    json.loads raises RecursionError for the latter, or leaves it to those who walk through the value.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(f"brackets nest deeper than {DEEPEST}") from None
    brackets = (b"[", b"{") if isinstance(content, bytes) else ("[", "{")
    if sum(map(content.count, brackets)) > DEEPEST and _depth(content) > DEEPEST:
        raise ValueError(f"brackets nest deeper than {DEEPEST}")
    return value


def parsed_text(content: bytes | str) -> Any:
    """As `parsed`, and ValueError too for half of a surrogate pair, for texts that are written or encoded later."""
    value = parsed(content)
    if HALF.search(_as_text(content)):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _depth(content: bytes | str) -> int:
    steps = (1 if bracket in "[{" else -1 for bracket in BRACKET.findall(STRING.sub("", _as_text(content))))
    return max(itertools.accumulate(steps, initial=0))


def _as_text(content: bytes | str) -> str:
    """As json.loads takes bytes: UTF-8, UTF-16 or UTF-32."""
    return content.decode(json.detect_encoding(content), "surrogatepass") if isinstance(content, bytes) else content
