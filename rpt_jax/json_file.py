"""JSON text and files -> plain values, and back; whatever keeps one from being used is a ValueError, of a file an
InputError, and files are written whole or not at all."""

import itertools
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

from rpt_jax.records import InputError

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


def read_object(path: Path, *keys: str, remedy: str = "make it again") -> dict:
    """The object in a JSON file; raises InputError that names it, the first of `keys` it lacks, and the remedy."""
    try:
        content = parsed_text(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"no file {path}: {remedy}") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}: {remedy}")
    for key in keys:
        if key not in content:
            raise InputError(f"{path} has no {key!r}: it is not what this program wrote, {remedy}")
    return content


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file whole or not at all, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all, also where others write it at the same time: the last one counts.

    What is there already and no file (/dev/stdout) is written to; a link is followed.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", newline="\n")
        return
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _depth(content: bytes | str) -> int:
    steps = (1 if bracket in "[{" else -1 for bracket in BRACKET.findall(STRING.sub("", _as_text(content))))
    return max(itertools.accumulate(steps, initial=0))


def _as_text(content: bytes | str) -> str:
    """As json.loads takes bytes: UTF-8, UTF-16 or UTF-32."""
    return content.decode(json.detect_encoding(content), "surrogatepass") if isinstance(content, bytes) else content
