"""Files of questions with answers -> documents with one position each: where the answer begins.

In: JSONL and what else text_files.py reads (GSM8K, Omni-MATH, MATH-500, or any with a field for the question and one
for the answer). Out: `Questions`, which stands where annotated documents stand in RPT: a document is the tokens of the
question and behind them those of the answer, so that prompts, sampling and the loop know nothing of questions; the
truth behind the position is the reference answer [RPT, arXiv 2506.08007, its table on RL fine-tuning].
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rpt_jax.config import Config, PromptConfig, QuestionConfig
from rpt_jax.corpus.documents import digest, read_fields, require_utf8, seeded_order
from rpt_jax.corpus.positions import AnnotatedDocuments, Positions, open_annotated, select_positions
from rpt_jax.corpus.prompts import frame
from rpt_jax.corpus.templates import load_template
from rpt_jax.corpus.text_files import TextFile, matching_files, open_file, scan
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.records import InputError

REMEDY = "mend it, or leave such questions out with --questions.on-bad-record skip"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    name: str  # "file:line", as of documents
    text: str
    answer: str  # the reference, as it would stand in the box


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions as documents, numbered from 0; `documents`, `names` and `answers` have one entry per question."""

    header: dict  # tokenizer and vocab_size, as of annotated documents
    documents: tuple[np.ndarray, ...]  # int32, tokens of the question and behind them those of the answer
    names: tuple[str, ...]
    answers: tuple[str, ...]
    train: Positions  # entropies are 0: no proxy looked at them
    held_out: Positions
    skipped: tuple[str, ...] = ()  # what was wrong with each record left out


def to_learn_from(config: Config, tokenizer: Tokenizer) -> tuple[AnnotatedDocuments | Questions, Positions]:
    """What a config trains on: its questions if it names files of them, else the chosen positions of annotated text.

    Raises InputError as open_questions, open_annotated and select_positions do, and where all questions are held out.
    """
    if config.questions.files:
        questions = open_questions(config.questions, config.prompt, tokenizer, config.seed)
        if not len(questions.train):
            raise InputError(
                f"all of questions.files are among the {len(questions.held_out)} questions of "
                "questions.evaluate_files: name files with others to train on"
            )
        return questions, questions.train
    annotated = open_annotated(config.positions.annotated, tokenizer)
    return annotated, select_positions(annotated, config.positions, config.seed)


def open_questions(config: QuestionConfig, prompt: PromptConfig, tokenizer: Tokenizer, seed: int) -> Questions:
    """Reads, checks and splits the questions of config.files and config.evaluate_files; either may be empty, not both.

    Of questions with the same text the first counts. Which are held out, and which of the others are trained on,
    depends on the seed and the texts alone; a question of config.evaluate_files is never trained on. Raises InputError,
    naming file and line, for a record that is no question, an answer of more than prompt.truth_bytes bytes or with a
    U+0000 in it, a question that does not fit into prompt.max_tokens, and text that the tokenizer cannot represent;
    on_bad_record "skip" leaves it out.
    """
    if config.holdout and config.evaluate_files:
        raise InputError(
            f"questions.holdout={config.holdout} and questions.evaluate_files: evaluation is on one of them, drop one"
        )
    template = load_template(prompt.template, prompt.chat)
    head, _, tail = frame(tokenizer, template, prompt.max_tokens)
    room = prompt.max_tokens - len(head) - len(tail)
    problem_of = functools.partial(_problem, tokenizer=tokenizer, room=room, truth_bytes=prompt.truth_bytes)
    skipped = []
    held_out = _read(config, "evaluate_files", problem_of, skipped) if config.evaluate_files else []
    known = {question.text for question in held_out}
    pool = _read(config, "files", problem_of, skipped) if config.files or not held_out else []
    pool = [question for question in pool if question.text not in known]
    if skipped:
        log.warning("skipped %d questions; the first: %s", len(skipped), skipped[0])
    if pool:
        pool, kept_out = _split(pool, config, seed)
        held_out = held_out or kept_out
    return make_questions(tokenizer, pool, held_out, tuple(skipped))


def make_questions(
    tokenizer: Tokenizer, train: Sequence[Question], held_out: Sequence[Question], skipped: tuple[str, ...] = ()
) -> Questions:
    """Questions from texts at hand; those to train on have the first numbers. Raises what tokenizer.encode does."""
    both = [*train, *held_out]
    texts = [np.array(tokenizer.encode(question.text), np.int32) for question in both]
    answers = [np.array(tokenizer.encode(question.answer), np.int32) for question in both]
    starts_N = np.array([len(tokens_T) for tokens_T in texts], np.int32)
    positions = Positions(np.arange(len(both), dtype=np.int32), starts_N, np.zeros(len(both), np.float32))
    return Questions(
        header={"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        documents=tuple(np.concatenate(parts) for parts in zip(texts, answers, strict=True)),
        names=tuple(question.name for question in both),
        answers=tuple(question.answer for question in both),
        train=positions[: len(train)],
        held_out=positions[len(train) :],
        skipped=skipped,
    )


def read_questions(config: QuestionConfig, files: Sequence[str], skipped: list[str]) -> Iterator[Question]:
    """The questions of some files, in order; raises InputError for a bad record, or adds what is wrong to `skipped`."""
    fields = (config.question, config.answer)
    for path in files:
        file = open_file(path, fields, "questions")
        for number, _, raw in scan(file):
            name = f"{path}:{number}"
            try:
                yield _question(name, file, raw, config)
            except InputError as error:
                _stop_or_skip(config, str(error), skipped)


def _read(
    config: QuestionConfig, which: str, problem_of: Callable[[Question], str], skipped: list[str]
) -> list[Question]:
    """Questions of config.files or config.evaluate_files that can be used, each text once."""
    files = matching_files(getattr(config, which), f"questions.{which}")
    found: dict[str, Question] = {}
    skipped_before = len(skipped)
    for question in read_questions(config, files, skipped):
        problem = problem_of(question)
        if problem:
            _stop_or_skip(config, f"{question.name}: {problem}", skipped)
        else:
            found.setdefault(question.text, question)
    if not found:
        own = skipped[skipped_before:]
        more = f", the first is {own[0]}" if own else "; name files with records"
        raise InputError(f"questions.{which}: no question left in {', '.join(files)}, {len(own)} were skipped{more}")
    return list(found.values())


def _question(name: str, file: TextFile, raw: Any, config: QuestionConfig) -> Question:
    """The question of one raw record; raises InputError that starts with its name."""
    values = read_fields(name, file, raw, (config.question, config.answer), "questions")
    text, answer = values[config.question], values[config.answer]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    for field, value in ((config.question, text), (config.answer, answer)):
        if not isinstance(value, str):
            raise InputError(f"{name}: field {field!r} is {type(value).__name__}, not text")
        require_utf8(name, value)
    if config.answer_after:
        _, mark, answer = answer.rpartition(config.answer_after)
        if not mark:
            raise InputError(f"{name}: no {config.answer_after!r} (questions.answer_after) in field {config.answer!r}")
    text, answer = text.strip(), answer.strip()
    for field, value in ((config.question, text), (config.answer, answer)):
        if not value:
            raise InputError(f"{name}: nothing but white space in field {field!r}")
    return Question(name, text, answer)


def _problem(question: Question, tokenizer: Tokenizer, room: int, truth_bytes: int) -> str:
    """What keeps a question from being used; empty: nothing."""
    size = len(question.answer.encode())
    if size > truth_bytes:
        return f"its answer has {size} bytes, prompt.truth_bytes={truth_bytes} are kept: raise it"
    zero = question.answer.find("\0")
    if zero >= 0:
        return f"character {zero + 1} of its answer is U+0000, which pads answers: take it out"
    try:
        tokens = len(tokenizer.encode(question.text))
        tokenizer.encode(question.answer)
    except InputError as error:
        return str(error)
    if tokens > room:
        return f"it has {tokens} tokens, and prompt.max_tokens leaves room for {room} beside the template: raise it"
    return ""


def _stop_or_skip(config: QuestionConfig, problem: str, skipped: list[str]) -> None:
    if config.on_bad_record == "stop":
        raise InputError(f"{problem}; {REMEDY}")
    skipped.append(problem)


def _split(pool: list[Question], config: QuestionConfig, seed: int) -> tuple[list[Question], list[Question]]:
    """(to train on, held out), each in the order of the files: the first and the last of a seeded order of texts."""
    left = len(pool) - config.holdout
    if config.holdout < 0 or not 0 <= config.train <= left or left < 1:
        raise InputError(
            f"questions.train={config.train} and questions.holdout={config.holdout} of {len(pool)} questions (those of "
            "the same text count once): together they may be as many as there are, and some must be left to train on"
        )
    order = seeded_order(np.array([digest(question.text) for question in pool], np.uint64), seed)
    train, held_out = order[: config.train or left], order[left:]
    return [pool[i] for i in np.sort(train)], [pool[i] for i in np.sort(held_out)]
