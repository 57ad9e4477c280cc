"""Files of text to their records, at random: JSONL, JSONL.gz, Parquet, plain text and ArrayRecord.

In: paths and globs. Out: `scan`, every record of a file once, with a place by which `fetch` finds it again, and
`fields_of`, its fields. JSONL, plain text and ArrayRecord (JSON records) stay on disk; a JSONL.gz is held unpacked in
memory, and of a Parquet file the columns that are asked for. A plain text file is one record whose field is `text`.
"""

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import pyarrow
import pyarrow.parquet

from rpt_jax.json_file import parsed
from rpt_jax.records import InputError, words_of

KINDS = {
    ".jsonl": "lines",
    ".jsonl.gz": "lines",
    ".parquet": "parquet",
    ".txt": "text",
    ".arrayrecord": "records",
    ".array_record": "records",
}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextFile:
    """An opened file; opening checks that it is what its suffix says."""

    path: str
    kind: str  # a value of KINDS
    content: Any  # unpacked bytes of a .gz, table of a .parquet, source of an .arrayrecord; None: read from disk


def matching_files(patterns: tuple[str, ...], setting: str = "corpus.files") -> list[str]:
    """Paths in the order of the patterns, each glob sorted, none twice; `setting` is what messages call them.

    Raises InputError for no patterns, one without a file, and a folder.
    """
    if not patterns:
        raise InputError(f"{setting} is empty: give paths or globs, for example --{setting} data/*.jsonl")
    paths = []
    for pattern in patterns:
        found = [] if "\0" in pattern else _found(os.path.expanduser(pattern))  # a zero byte is a ValueError there
        if not found:
            raise InputError(f"{setting}: no file matches {pattern!r} (looked from {os.getcwd()}); check the path")
        paths.extend(found)
    for path in paths:
        if os.path.isdir(path):
            raise InputError(f"{setting}: {path} is a folder; name the files in it, for example {path}/*.jsonl")
    by_file = {os.path.realpath(path): path for path in reversed(paths)}  # the first way to name each
    return [path for path in dict.fromkeys(paths) if by_file[os.path.realpath(path)] == path]


def _found(pattern: str) -> list[str]:
    return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))


def open_file(path: str, fields: tuple[str, ...], setting: str = "corpus.template") -> TextFile:
    """Opens by suffix.

    Raises InputError for an unknown one, an unreadable file, and Parquet that lacks one of the fields or has it twice.
    """
    suffix = next((suffix for suffix in KINDS if path.endswith(suffix)), None)
    if suffix is None:
        raise InputError(f"{path}: unknown suffix; corpus files end in {', '.join(KINDS)}")
    kind, content = KINDS[suffix], None
    try:
        if suffix == ".jsonl.gz":
            content = gzip.decompress(Path(path).read_bytes())
        elif kind == "parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                require_fields(path, fields, file.schema_arrow.names, setting)
                require_once(path, fields, file.schema_arrow.names)
                content = file.read(columns=list(fields))
        elif kind == "records":
            content = grain.sources.ArrayRecordDataSource(path)
        else:
            open(path, "rb").close()
    except InputError:
        raise
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException, RuntimeError, ValueError) as error:
        raise InputError(
            f"{path}: not a readable {suffix} file ({words_of(error)}); write it again, or name it rightly"
        ) from error
    return TextFile(path, kind, content)


def scan(file: TextFile) -> Iterator[tuple[int, int, Any]]:
    """(number from 1, place, raw record) of every record of a file, in order."""
    if file.kind == "lines":
        yield from _scan_lines(file)
        return
    for place in range(1 if file.kind == "text" else len(file.content)):
        yield place + 1, place, fetch(file, place)


def _scan_lines(file: TextFile) -> Iterator[tuple[int, int, bytes]]:
    with open(file.path, "rb") if file.content is None else io.BytesIO(file.content) as stream:
        place = 0
        for number, line in enumerate(stream, 1):
            mark = len(BYTE_ORDER_MARK) if number == 1 and line.startswith(BYTE_ORDER_MARK) else 0
            if line[mark:].strip():
                yield number, place + mark, line[mark:]
            place += len(line)


def fetch(file: TextFile, place: int) -> Any:
    """The raw record at a place: the bytes of a line, text file or ArrayRecord record, or the number of a row.

    Raises InputError for a damaged ArrayRecord.
    """
    if file.kind == "parquet":
        return place
    if file.kind == "records":
        try:
            return file.content[place]
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(
                f"{file.path}:{place + 1}: damaged ArrayRecord ({words_of(error)}); write it again"
            ) from error
    if file.content is not None:
        end = file.content.find(b"\n", place)
        return file.content[place : end if end >= 0 else None]
    with open(file.path, "rb") as stream:
        stream.seek(place)
        return stream.read() if file.kind == "text" else stream.readline()


def fields_of(file: TextFile, raw: Any, fields: tuple[str, ...]) -> Any:
    """A raw record as a dict by field, or what else its JSON is; raises ValueError for what cannot be read.

    That is wrong JSON or UTF-8, and a value of Parquet that Python has no like of, such as a date in the year 90000.
    """
    if file.kind == "text":
        return {"text": raw.removeprefix(BYTE_ORDER_MARK).decode()}
    if file.kind == "parquet":
        try:
            return {field: file.content.column(field)[raw].as_py() for field in fields}
        except (OverflowError, pyarrow.ArrowException) as error:
            raise ValueError(words_of(error)) from error
    return parsed(raw.decode())


def require_fields(name: str, wanted: tuple[str, ...], there: list[str], setting: str = "corpus.template") -> None:
    """Raises InputError, starting with `name` (file or file:line), unless all wanted fields are there."""
    missing = [field for field in wanted if field not in there]
    if missing:
        raise InputError(
            f"{name}: no field {missing[0]!r}, which {setting} names; there are {', '.join(map(repr, there))}"
        )


def require_once(path: str, fields: tuple[str, ...], there: list[str]) -> None:
    """Raises InputError for a field that several columns of a Parquet file have as their name."""
    twice = [field for field in fields if there.count(field) > 1]
    if twice:
        raise InputError(f"{path}: {there.count(twice[0])} columns are called {twice[0]!r}: rename all but one")
