r"""Text files to documents, those that a tokenizer can use, and some of them held out.

In: the files of text_files.py and a template such as "{problem}\n\n{solution}" that makes a document of a record's
fields. Out: `Documents`, a random-access source, and `Corpus`, which of them are for training and which held out.

Every record is read once at the start, so that a bad one stops the run before anything is compiled, or is skipped and
counted. After that a document costs 36 bytes of index.
"""

import hashlib
import json
import logging
import string
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from rpt_jax.config import CorpusConfig
from rpt_jax.corpus.text_files import TextFile, fetch, fields_of, matching_files, open_file, require_fields, scan
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.records import InputError

REMEDY = "mend it, or leave such records out with --corpus.on-bad-record skip"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    name: str  # "file:line"; of Parquet the row, of ArrayRecord the record, all counted from 1
    text: str


@dataclass(frozen=True)
class Template:
    """Literal texts and field names in turn."""

    parts: tuple[tuple[str, str | None], ...]  # (literal, the field after it)

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(field for _, field in self.parts if field is not None))

    def fill(self, values: dict[str, Any]) -> str:
        return "".join(literal + ("" if field is None else values[field]) for literal, field in self.parts)


@dataclass(frozen=True, eq=False)
class Documents:
    """Random access to the documents of some files. The arrays have one entry per document."""

    files: tuple[TextFile, ...]
    template: Template
    file_of: np.ndarray  # int32, index into files
    number_of: np.ndarray  # int64, line, row or record, from 1
    place_of: np.ndarray  # int64, byte offset of the line, or index of the row or record
    bytes_of: np.ndarray  # int64, length of the document's UTF-8
    digest_of: np.ndarray  # uint64, hash of its text
    skipped: tuple[str, ...]  # what was wrong with each record left out

    def __len__(self) -> int:
        return len(self.file_of)

    def __getitem__(self, index: int) -> Document:
        file, name = self.files[self.file_of[index]], self.name(index)
        text = _document(name, file, fetch(file, int(self.place_of[index])), self.template)
        if digest(text) != self.digest_of[index]:
            raise InputError(f"{name}: the file changed while it was in use; start again")
        return Document(name, text)

    def name(self, index: int) -> str:
        return f"{self.files[self.file_of[index]].path}:{self.number_of[index]}"


def read_documents(config: CorpusConfig) -> Documents:
    """Opens the files and checks every record; raises InputError naming file, line and remedy for a bad one.

    Bad are: malformed JSON, wrong UTF-8, a field that is missing or no text, an empty document. With on_bad_record
    "skip" they are left out and listed in `skipped`. Blank lines of JSONL are no records.
    """
    template = parse_template(config.template)
    files = tuple(open_file(path, template.fields) for path in matching_files(config.files))
    table = tuple(array(code) for code in "iqqqQ")
    skipped = []
    for f, file in enumerate(files):
        found = False
        for number, place, raw in scan(file):
            found = True
            try:
                text = _document(f"{file.path}:{number}", file, raw, template)
            except InputError as error:
                if config.on_bad_record == "stop":
                    raise InputError(f"{error}; {REMEDY}") from error
                skipped.append(str(error))
                continue
            for column, value in zip(table, (f, number, place, len(text.encode()), digest(text)), strict=True):
                column.append(value)
        if not found:
            raise InputError(f"{file.path}: no record in it; take the file out of corpus.files")
    if not len(table[0]):
        raise InputError(f"no document left: all {len(skipped)} records were skipped, the first is {skipped[0]}")
    return Documents(files, template, *(np.array(column) for column in table), skipped=tuple(skipped))


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents that a tokenizer can use, split; train and holdout are int64 indexes into documents, ascending."""

    documents: Documents
    train: np.ndarray
    holdout: np.ndarray
    skipped: tuple[str, ...]  # what was wrong with each record left out


def open_corpus(config: CorpusConfig, tokenizer: Tokenizer, seed: int) -> Corpus:
    """Reads the documents, leaves out what the tokenizer cannot use, and splits off `config.holdout` documents.

    Which are held out depends on the seed and the texts alone, not on files, order or processes. A training document
    with the same text as one held out is dropped. Raises InputError for a document shorter than minimum_tokens or with
    text that the tokenizer cannot represent (or skips it), and if the holdout leaves nothing to train on.
    """
    documents = read_documents(config)
    usable, skipped = _usable(documents, tokenizer, config)
    skipped = documents.skipped + skipped
    if skipped:
        log.warning("skipped %d of %d records; the first: %s", len(skipped), len(usable) + len(skipped), skipped[0])
    train, holdout = _split(documents.digest_of, usable, config.holdout, seed)
    return Corpus(documents, train, holdout, skipped)


def _usable(documents: Documents, tokenizer: Tokenizer, config: CorpusConfig) -> tuple[np.ndarray, tuple[str, ...]]:
    """Indexes of the documents that the tokenizer represents in minimum_tokens or more, and what is wrong with others.

    A document with more than (minimum_tokens - 1) * longest_token bytes need not be encoded to know that it is long
    enough, so that with the usual small minimum this costs next to nothing.
    """
    is_suspect = documents.bytes_of <= (config.minimum_tokens - 1) * tokenizer.longest_token
    if not tokenizer.represents_all:
        is_suspect[:] = True
    is_usable, skipped = np.ones(len(documents), bool), []
    for i in np.flatnonzero(is_suspect):
        document = documents[i]
        try:
            tokens = len(tokenizer.encode(document.text))
            if tokens >= config.minimum_tokens:
                continue
            problem = f"{tokens} tokens are fewer than corpus.minimum_tokens={config.minimum_tokens}"
        except InputError as error:
            problem = str(error)
        if config.on_bad_record == "stop":
            raise InputError(f"{document.name}: {problem}; {REMEDY}")
        is_usable[i] = False
        skipped.append(f"{document.name}: {problem}")
    if not is_usable.any():
        raise InputError(f"no document left: the tokenizer can use none of {len(documents)}, the first is {skipped[0]}")
    return np.flatnonzero(is_usable), tuple(skipped)


def _split(digest_of: np.ndarray, usable: np.ndarray, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out indexes: the `holdout` distinct texts that come last in the order of a seeded hash."""
    digests, first = np.unique(digest_of[usable], return_index=True)
    if not 0 <= holdout < len(digests):
        raise InputError(
            f"corpus.holdout={holdout} of {len(digests)} distinct documents: use 0 to {len(digests) - 1}, so that "
            "something is left to train on"
        )
    last = seeded_order(digests, seed)[len(digests) - holdout :]
    return usable[~np.isin(digest_of[usable], digests[last])], np.sort(usable[first[last]])


def seeded_order(digests: np.ndarray, seed: int) -> np.ndarray:
    """Indexes of digests (uint64) in an order that looks random; which of two comes first depends on them and seed."""
    return np.argsort(_mix(digests ^ _mix(np.array([seed % 2**64], np.uint64))), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a fixed bijection of uint64 in which every bit depends on every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def parse_template(template: str) -> Template:
    r"""Reads "{problem}\n\n{solution}"; backslash n, t and backslash are taken as in Python, {{ and }} are braces.

    So a template typed on a command line may have \n for a newline. Raises InputError for what is no plain {field}.
    """
    unescaped, escapes = [], {"n": "\n", "t": "\t", "\\": "\\"}
    characters = iter(template)
    for character in characters:
        following = next(characters, "") if character == "\\" else ""
        unescaped.append(escapes.get(following, character + following))
    try:
        parsed = list(string.Formatter().parse("".join(unescaped)))
    except ValueError as error:
        raise InputError(f"corpus.template={template!r}: {error}; write a brace of the text itself twice") from error
    for _, field, spec, conversion in parsed:
        if field == "" or spec or conversion:
            raise InputError(f"corpus.template={template!r}: only plain {{field}} can be used, no format and no number")
    if all(field is None for _, field, _, _ in parsed):
        raise InputError(f'corpus.template={template!r} names no field; for example "{{text}}"')
    return Template(tuple((literal, field) for literal, field, _, _ in parsed))


def read_fields(
    name: str, file: TextFile, raw: Any, fields: tuple[str, ...], setting: str = "corpus.template"
) -> dict[str, Any]:
    """The fields of a raw record; raises InputError that starts with its name, file:line, for one that has them not."""
    try:
        values = fields_of(file, raw, fields)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: wrong UTF-8 at byte {error.start + 1} of the record ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{name}: malformed JSON: {error.msg} (character {error.pos + 1} of the line)") from error
    except ValueError as error:  # a number of thousands of digits, brackets nested too deep, a date beyond Python's
        what = "a value" if file.kind == "parquet" else "JSON"
        raise InputError(f"{name}: {what} that cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{name}: expected a JSON object with fields, found {type(values).__name__}")
    require_fields(name, fields, list(values), setting)
    return values


def _document(name: str, file: TextFile, raw: Any, template: Template) -> str:
    """The document of one raw record; raises InputError that starts with its name, file:line."""
    values = read_fields(name, file, raw, template.fields)
    for field in template.fields:
        if not isinstance(values[field], str):
            kind = type(values[field]).__name__
            raise InputError(f"{name}: field {field!r} is {kind}, not text; use text fields only in corpus.template")
    text = template.fill(values)
    if not any(values[field].strip() for field in template.fields):
        raise InputError(f"{name}: empty document: nothing but white space in {', '.join(template.fields)}")
    require_utf8(name, text)
    return text


def require_utf8(name: str, text: str) -> None:
    """Raises InputError, starting with the name of a document, for half of a surrogate pair, which JSON can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: wrong UTF-8: character {error.start + 1} of the document is half of a surrogate pair"
        ) from error


def digest(text: str) -> int:
    """Eight bytes of a hash: the same text has the same number everywhere."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
