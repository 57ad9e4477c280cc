r"""Files of multiple-choice questions -> questions, the same ones for every policy; the content of a box -> a choice.

In: JSONL(.gz) or Parquet in the format of MMLU-Pro, SuperGPQA or MMLU. Out: `Question`s in the order of the files,
each with the place where it stands, and `choose`, so many of each category by seed. Options keep the file's order.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.parquet

from rpt_jax.corpus.text_files import fields_of, matching_files, open_file, scan
from rpt_jax.records import InputError, words_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")
REMEDY = "mend it, or leave such records out with --on-bad-record skip"
FormatName = Literal["mmlu_pro", "supergpqa", "mmlu"]


@dataclass(frozen=True)
class Question:
    """A question with one right option."""

    text: str
    options: tuple[str, ...]
    answer: int  # index into options
    category: str
    where: str  # "file:line"; of Parquet the row; both counted from 1

    @property
    def identity(self) -> tuple[int, int]:
        """Two uint32 that depend on question and options alone: the same random keys wherever it is asked."""
        digest = _digest("", self)
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


@dataclass(frozen=True)
class Format:
    """Names of the fields of a record."""

    options: str
    answers: tuple[tuple[str, Literal["letter", "index", "text"]], ...]  # the first must be there, all must agree
    categories: tuple[str, ...]  # the first that is there


FORMATS = {
    "mmlu_pro": Format("options", (("answer", "letter"), ("answer_index", "index")), ("category",)),
    "supergpqa": Format("options", (("answer_letter", "letter"), ("answer", "text")), ("discipline",)),
    "mmlu": Format("choices", (("answer", "index"),), ("subject", "type")),
}


def read_questions(
    files: tuple[str, ...], format: FormatName, category: str = "", on_bad_record: Literal["stop", "skip"] = "stop"
) -> tuple[list[Question], list[str]]:
    """(questions of all files in order, what was wrong with each record left out).

    category: the field that names the category, in place of the format's own. Raises InputError that names file, line
    and field for a record that lacks one, whose options are fewer than 2 or more than 26, or whose answer is no option
    or is said in two ways that disagree; with on_bad_record "skip" it is left out and listed.
    """
    if format not in FORMATS:
        raise InputError(f"format={format!r}: choose from {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    categories = (category,) if category else chosen.categories
    fields = ("question", chosen.options, *(name for name, _ in chosen.answers), *categories)
    questions, skipped = [], []
    for path in matching_files(files, "files"):
        there = fields
        if path.endswith(".parquet"):
            there = tuple(name for name in fields if name in _columns(path))
        file = open_file(path, there)
        for number, _, raw in scan(file):
            where = f"{path}:{number}"
            try:
                questions.append(_question(where, _values(where, file, raw, there), chosen, categories))
            except InputError as error:
                if on_bad_record == "stop":
                    raise InputError(f"{error}; {REMEDY}") from error
                skipped.append(str(error))
    if not questions:
        more = f"; the first record left out: {skipped[0]}" if skipped else ""
        raise InputError(f"no question in {', '.join(files)}: name files with records{more}")
    return questions, skipped


def choose(questions: Sequence[Question], per_category: int, seed: int) -> list[Question]:
    """At most so many questions of each category (0: all), in the order given.

    Those that come first in an order drawn from seed, category, question and options alone, so that neither files nor
    their order nor the policy change the choice [paper: 200 a category, how they were drawn is not said].
    """
    lots: dict[str, list[tuple[bytes, int]]] = {}
    for number, question in enumerate(questions):
        lots.setdefault(question.category, []).append((_digest(f"{seed}", question), number))
    kept = (sorted(each)[: per_category or None] for each in lots.values())
    return [questions[number] for number in sorted(number for each in kept for _, number in each)]


def listed(options: Sequence[str]) -> str:
    """The options, one a line, each behind its letter."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def parse_choice(content: bytes, options: Sequence[str]) -> int | None:
    """Index of the option that the content of a box names; None where it names none, or not only one.

    Read strictly, white space around it aside: a capital letter, which may stand in parentheses or before a full stop
    or colon (`B`, `(B)`, `B.`, `B)`), or else the whole text of an option that no other has.
    """
    text = content.decode("utf-8", errors="replace").strip()
    found = LETTER.fullmatch(text)
    if found and LETTERS.index(found[1]) < len(options):
        return LETTERS.index(found[1])
    same = [index for index, option in enumerate(options) if option.strip() == text]
    return same[0] if len(same) == 1 else None


def _digest(salt: str, question: Question) -> bytes:
    parts = (salt, question.category if salt else "", question.text, *question.options)
    return hashlib.blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=8).digest()


def _columns(path: str) -> list[str]:
    try:
        return pyarrow.parquet.read_schema(path).names
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a readable .parquet file ({words_of(error)}); write it again") from error


def _values(where: str, file, raw: Any, fields: tuple[str, ...]) -> dict:
    try:
        values = fields_of(file, raw, fields)
    except ValueError as error:
        raise InputError(f"{where}: not a record of JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{where}: a record is an object with fields, this is a {type(values).__name__}")
    return values


def _question(where: str, values: dict, format: Format, categories: tuple[str, ...]) -> Question:
    """One record; raises InputError that begins with file, line and field."""
    text = _text(where, values, "question")
    options = values.get(format.options)
    if not isinstance(options, list) or not all(isinstance(each, str) and each.strip() for each in options):
        raise InputError(f"{where}: {format.options}: expected a list of texts, got {options!r}")
    if not 2 <= len(options) <= len(LETTERS):
        raise InputError(f"{where}: {format.options}: {len(options)} options, a question has 2 to {len(LETTERS)}")
    category = next((name for name in categories if name in values), categories[0])
    return Question(
        text, tuple(options), _answer(where, values, format, options), _text(where, values, category), where
    )


def _text(where: str, values: dict, field: str) -> str:
    if field not in values:
        raise InputError(f"{where}: {field}: no such field; there are {', '.join(map(repr, values))}")
    if not isinstance(values[field], str) or not values[field].strip():
        raise InputError(f"{where}: {field}: expected a text, got {values[field]!r}")
    return values[field]


def _answer(where: str, values: dict, format: Format, options: list[str]) -> int:
    """The option on which all fields that say the answer agree."""
    agreed = set(range(len(options)))
    for place, (field, kind) in enumerate(format.answers):
        if field not in values and place:
            continue
        value = values.get(field)
        if kind == "text":
            named = {
                i for i, option in enumerate(options) if isinstance(value, str) and option.strip() == value.strip()
            }
        elif kind == "letter":
            named = {i for i in range(len(options)) if LETTERS[i] == value}
        else:
            named = {i for i in range(len(options)) if type(value) is int and i == value}
        if not named:
            raise InputError(f"{where}: {field}: {value!r} names none of the {len(options)} options by {kind}")
        if not agreed & named:
            others = " and ".join(repr(name) for name, _ in format.answers[:place])
            raise InputError(f"{where}: {field}: {value!r} is another option than {others} says")
        agreed &= named
    return min(agreed)
