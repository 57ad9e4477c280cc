r"""Questions with options -> zero-shot accuracy of a policy in both modes [RPT, arXiv 2506.08007, section 4, Table 3].

In: a policy, and files in the format of MMLU-Pro, SuperGPQA or MMLU (corpus/choices.py). Out: accuracy and standard
error over all questions (micro), over categories (macro) and of each category.

    logprob     the options compete by their log-prob after "...Answer:", without a thought; of equal ones the first
    reasoning   a thought is sampled, and the letter in its last \boxed{} counts. No answer is wrong, and shows in the
                format rate

The paper gives no prompts; these are our own. It samples 12,288 tokens at temperature 0.8.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from rpt_jax import mesh as meshes
from rpt_jax.agreement import require_agreement
from rpt_jax.config import MeshConfig, ModelConfig, PromptConfig, SampleConfig
from rpt_jax.corpus.choices import LETTERS, FormatName, Question, choose, listed, parse_choice, read_questions
from rpt_jax.corpus.positions import Position
from rpt_jax.corpus.prompts import assemble, parse_answers
from rpt_jax.corpus.templates import CHATS, Template, load_template
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.json_file import write_json, write_whole
from rpt_jax.learning import identity, run_folder
from rpt_jax.learning.collect import end_ids
from rpt_jax.learning.policy_folder import load_policy
from rpt_jax.policy import decoder
from rpt_jax.policy.sampler import sample
from rpt_jax.records import InputError, Params, Prompts
from rpt_jax.study.continuations import cut_left, encode_pair, rows_of_batch, score_pairs
from rpt_jax.study.evaluate import KEY

log = logging.getLogger(__name__)

QUESTION = Template(
    "question",
    "Answer the following multiple-choice question. Think it through step by step, then finish with the letter of the "
    "one best option in \\boxed{}, for example \\boxed{A}.\n\nQuestion: ",
    "\n\n",
)


@dataclass(frozen=True)
class ChoicesRun:
    """Zero-shot accuracy on multiple-choice questions: by log-prob of the options, and by reasoning."""

    policy: str = ""  # a policy folder, or a run folder: its newest checkpoint
    files: tuple[str, ...] = ()  # .jsonl, .jsonl.gz, .parquet; globs allowed
    format: FormatName = "mmlu_pro"  # which fields a record has
    category: str = ""  # field that names the category; empty: category | discipline | subject, or else type
    on_bad_record: Literal["stop", "skip"] = "stop"  # skip counts and reports
    per_category: int = 200  # questions of each category, drawn by seed, the same for every policy; 0: all (paper: 200)
    mode: Literal["both", "logprob", "reasoning"] = "both"
    # logprob, letter: of " B" behind all options | text, text_per_byte: of an option's own text behind the question
    # alone, summed over its tokens, or that over its bytes
    score: Literal["letter", "text", "text_per_byte"] = "letter"
    start: str = ""  # logprob: piece put before the question, for models that expect one, e.g. <|begin_of_text|>
    seed: int = 0  # of the choice of questions and of the rollouts
    batch_size: int = 32  # questions
    results: str = ""  # JSON file to write; empty: none
    answers: str = ""  # JSONL file to write, a line a question; empty: none
    # reasoning: `question` or a file with {context} where question and options go; max_tokens counts in both modes
    prompt: PromptConfig = field(default_factory=lambda: PromptConfig(template="question"))
    # reasoning (paper: temperature 0.8, 12,288 tokens)
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(group_size=1, max_tokens=12288))
    mesh: MeshConfig = field(default_factory=MeshConfig)  # devices per axis; -1 (at most one) takes what is left

    def check(self) -> None:
        """Raises InputError for settings that clash."""
        self.sample.check()
        if self.per_category < 0 or self.batch_size < 1 or self.sample.group_size < 1:
            raise InputError(
                f"per_category={self.per_category}, batch_size={self.batch_size}, sample.group_size="
                f"{self.sample.group_size}: use 0 or more, 1 or more, and 1 or more"
            )
        if self.sample.temperature == 0 and self.sample.group_size > 1:
            raise InputError(
                f"sample.temperature=0 makes all sample.group_size={self.sample.group_size} rollouts of a question "
                "equal: use group_size 1"
            )


@dataclass(frozen=True)
class Answered:
    """What a policy made of N questions in one mode."""

    right_N: np.ndarray  # float64, share of its answers that are right
    formatted_N: np.ndarray  # float64, share that name an option
    cut_N: np.ndarray  # bool, the prompt was too long and lost its left end
    shown: list[dict]  # for the file of answers

    def figures(self, questions: Sequence[Question]) -> dict:
        """Accuracies, fit for JSON.

        accuracy: mean over questions, standard_error std / sqrt(N); macro: mean over categories, macro_standard_error
        sqrt(sum of squares of theirs) / categories; format_rate; cut (prompts); by_category.
        """
        of_category: dict[str, list[int]] = {}
        for n, question in enumerate(questions):
            of_category.setdefault(question.category, []).append(n)
        by_category = {name: _summary(self.right_N[rows]) for name, rows in of_category.items()}
        accuracies, errors = np.array([(row["accuracy"], row["standard_error"]) for row in by_category.values()]).T
        return _summary(self.right_N) | {
            "macro": float(accuracies.mean()),
            "macro_standard_error": float(np.sqrt((errors**2).sum()) / len(errors)),
            "format_rate": float(self.formatted_N.mean()),
            "cut": int(self.cut_N.sum()),
            "by_category": by_category,
        }


def settings_of(folder: str) -> ChoicesRun:
    """For a run folder its chat markers, end tokens and mesh; for a policy folder the defaults."""
    start = ChoicesRun(folder)
    if not (Path(folder) / "config.json").is_file():
        return start
    config = run_folder.read_config(folder)
    return replace(
        start,
        prompt=replace(start.prompt, chat=config.prompt.chat),
        sample=replace(start.sample, end_tokens=config.sample.end_tokens),
        mesh=config.mesh,
    )


def run(config: ChoicesRun) -> dict:
    """Reads questions and policy, answers in the modes asked for, writes results and answers; returns the figures."""
    config.check()
    if config.mode != "logprob":
        template_of(config.prompt)
    if not config.policy:
        raise InputError("no policy named: give a policy folder or the folder of a run, `rpt choices FOLDER`")
    identity.start_together(config)
    every, skipped = read_questions(config.files, config.format, config.category, config.on_bad_record)
    questions = choose(every, config.per_category, config.seed)
    require_agreement({"set of questions": repr(questions)})
    mesh = meshes.make_mesh(config.mesh)
    meshes.check_batch_divides(config.batch_size, mesh, "questions (batch_size)")
    model, params, tokenizer = load_policy(config.policy, mesh)
    questions, unfit = representable(questions, tokenizer, config.on_bad_record)
    figures, modes = describe(questions) | {"skipped_records": len(skipped) + len(unfit)}, {}
    if skipped or unfit:
        log.warning("%d records left out; the first: %s", len(skipped) + len(unfit), [*skipped, *unfit][0])
    policy = params, model, tokenizer, questions, config, mesh
    if config.mode != "reasoning":
        modes["logprob"] = by_logprob(*policy)
    if config.mode != "logprob":
        modes["reasoning"] = by_reasoning(*policy)
    figures |= {name: answered.figures(questions) for name, answered in modes.items()}
    if jax.process_index() == 0:
        _write(config, questions, modes, figures)
    return figures


def representable(
    questions: Sequence[Question], tokenizer: Tokenizer, on_bad_record: Literal["stop", "skip"] = "stop"
) -> tuple[list[Question], list[str]]:
    """(the questions that the tokenizer can represent, what is wrong with the others); raises InputError or skips."""
    fit, unfit = [], []
    for question in questions:
        try:
            tokenizer.encode("\n".join((question.text, *question.options)))
        except InputError as error:
            if on_bad_record == "stop":
                raise InputError(f"{question.where}: {error}, or use --on-bad-record skip") from error
            unfit.append(f"{question.where}: {error}")
            continue
        fit.append(question)
    if not fit:
        raise InputError(f"the tokenizer can represent none of {len(questions)} questions; the first: {unfit[0]}")
    return fit, unfit


def describe(questions: Sequence[Question]) -> dict:
    """How many questions and categories, and the accuracy of guessing (mean of 1 / options)."""
    chance = float(np.mean([1 / len(question.options) for question in questions]))
    return {"questions": len(questions), "categories": len({each.category for each in questions}), "chance": chance}


def by_logprob(
    params: Params,
    model: ModelConfig,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    config: ChoicesRun,
    mesh: Mesh | None = None,
) -> Answered:
    """The option with the highest score after the question; score as in ChoicesRun, nats (per byte)."""
    pairs, cut_N = [], np.zeros(len(questions), bool)
    start = tokenizer.start_ids(config.start, "start")
    tokenizer.warn_without_start(config.start, "start")
    for n, question in enumerate(questions):
        encoded = [encode_pair(tokenizer, *pair) for pair in pairs_of(question, config.score)]
        longest = max(len(continuation) for _, continuation in encoded)
        for context, continuation in encoded:
            whole = [*start, *context]
            kept = cut_left(whole, longest, config.prompt.max_tokens, "prompt.max_tokens")
            cut_N[n] |= len(kept) < len(whole)
            pairs.append((kept, continuation))
    progress = _progress("batches of questions scored")
    scored = iter(score_pairs(params, model, pairs, batch_size=config.batch_size, mesh=mesh, progress=progress))
    shown, right_N = [], np.zeros(len(questions))
    for n, question in enumerate(questions):
        scores = [next(scored).logprob for _ in question.options]
        if config.score == "text_per_byte":
            scores = [score / len(text.encode()) for score, text in zip(scores, question.options, strict=True)]
        chosen = int(np.argmax(scores))
        right_N[n] = chosen == question.answer
        shown.append({"choice": LETTERS[chosen], "scores": scores})
    return Answered(right_N, np.ones(len(questions)), cut_N, shown)


def pairs_of(question: Question, score: str) -> list[tuple[str, str]]:
    """(context, continuation) of each option, as text: its letter behind all options, or its text behind none."""
    if score == "letter":
        context = f"Question: {question.text}\nOptions:\n{listed(question.options)}\nAnswer:"
        return [(context, f" {letter}") for letter, _ in zip(LETTERS, question.options, strict=False)]
    return [(f"Question: {question.text}\nAnswer:", f" {option}") for option in question.options]


def by_reasoning(
    params: Params,
    model: ModelConfig,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    config: ChoicesRun,
    mesh: Mesh | None = None,
) -> Answered:
    """The option in the box behind each of sample.group_size thoughts; a thought's random keys are its question's."""
    template = template_of(config.prompt)
    ends = end_ids(tokenizer, config.sample.end_tokens)
    prompts, cut_N = prompts_of(questions, tokenizer, template, config.prompt)
    params = decoder.gathered(params, model)
    key = jax.random.fold_in(jax.random.key(config.seed), KEY)
    size = rows_of_batch(len(questions), config.batch_size, mesh)
    progress = _progress("batches of questions answered")
    right_N, formatted_N, shown = np.zeros(len(questions)), np.zeros(len(questions)), [{} for _ in questions]
    order = np.argsort(prompts.lengths_N, kind="stable")
    for begin in range(0, len(order), size):
        rows = order[begin : begin + size]
        filled = np.resize(rows, size)
        batch = jax.tree.map(lambda leaf, filled=filled: leaf[filled], prompts)
        rollouts = sample(params, model, config.sample, batch, key, ends)
        boxes = parse_answers(tokenizer, rollouts.tokens_NGR, rollouts.lengths_NG, rollouts.finished_NG)
        for n, row in enumerate(rows):
            question = questions[row]
            chosen = [None if box is None else parse_choice(box, question.options) for box in boxes[n]]
            right_N[row] = np.mean([choice == question.answer for choice in chosen])
            formatted_N[row] = np.mean([choice is not None for choice in chosen])
            shown[row] = {
                "choices": [None if choice is None else LETTERS[choice] for choice in chosen],
                "tokens": rollouts.lengths_NG[n].tolist(),
                "responses": [
                    tokenizer.bytes_of(tokens_R[:length].tolist()).decode("utf-8", errors="replace")
                    for tokens_R, length in zip(rollouts.tokens_NGR[n], rollouts.lengths_NG[n], strict=True)
                ],
            }
        progress(begin // size + 1, -(-len(order) // size))
    return Answered(right_N, formatted_N, cut_N, shown)


def template_of(config: PromptConfig) -> Template:
    """The project's own words for `question`, otherwise as load_template has it."""
    if config.template == QUESTION.name:
        return replace(QUESTION, chat=CHATS[config.chat])
    return load_template(config.template, config.chat)


def prompts_of(
    questions: Sequence[Question], tokenizer: Tokenizer, template: Template, config: PromptConfig
) -> tuple[Prompts, np.ndarray]:
    """(prompts with question and options as their context, bool [N]: it was too long and lost its left end)."""
    documents = [np.array(tokenizer.encode(f"{q.text}\n\n{listed(q.options)}"), np.int32) for q in questions]
    # A position is where a next token stands: one that is never read is put behind the text.
    ends = [Position(n, len(tokens_T), float("nan")) for n, tokens_T in enumerate(documents)]
    longer = [np.append(tokens_T, tokens_T[-1]) for tokens_T in documents]
    prompts = assemble(tokenizer, template, config, longer, ends)
    frame = sum(len(tokenizer.encode_markup(part)) for part in (template.before, template.after))
    cut_N = prompts.lengths_N < np.array([len(tokens_T) + frame for tokens_T in documents])
    return prompts.replace(ids_N2=np.array([q.identity for q in questions], np.uint32)), cut_N


def _summary(right_N: np.ndarray) -> dict:
    error = float(np.std(right_N) / len(right_N) ** 0.5)
    return {"accuracy": float(np.mean(right_N)), "standard_error": error, "questions": len(right_N)}


def _progress(what: str) -> Callable[[int, int], None]:
    return lambda done, total: log.info("%d of %d %s", done, total, what)


def _write(config: ChoicesRun, questions: Sequence[Question], modes: dict[str, Answered], figures: dict) -> None:
    if config.results:
        write_json(Path(config.results), figures)
    if config.answers:
        Path(config.answers).parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for n, question in enumerate(questions):
            row = {"where": question.where, "category": question.category, "answer": LETTERS[question.answer]}
            lines.append(json.dumps(row | {name: each.shown[n] for name, each in modes.items()}) + "\n")
        write_whole(Path(config.answers), "".join(lines))
