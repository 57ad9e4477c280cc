"""Does RPT make a better start for RL on questions? The paper's table on RL fine-tuning, on the generated corpus.

    .venv/bin/python experiments/question_tuning.py                          # seeds 0, 1, 2, policies and all
    .venv/bin/python experiments/question_tuning.py --base 'runs/comparison/base-{seed}/base' \\
        --next-token 'runs/comparison/next_token-{seed}' --rpt 'runs/comparison/prefix-{seed}' --seeds 0

A question is a text of corpus/arithmetic.py up to its answer, of the kinds about which the base has seen few thoughts
or none; the reference is the digit. 256 questions are trained on and 200 others, whose computations no training text
has, are the exam: 60 updates of 64 prompts, which is 15 epochs, at temperature 0.6 (paper: the same). Three policies
are tuned alike: the base; the base after next-token training on its own last mixture with the FLOPs of RPT; and the
base after RPT.

Each exam has 8 rollouts a question at 0.6 under the same noise, before and after. Policies come from the folders
named (policy or run folders, {seed} in them is the seed), or are made as the quickstart makes them and kept under
--runs; rows of results/question_tuning.csv that exist are skipped. Hardware: one CPU core. Time: 23 to 39 minutes a
seed, more where the policies are made.

Measured result, % of held-out questions right before -> after, seeds 0 / 1 / 2: base 21.5 / 19.6 / 19.8 ->
96.4 / 89.6 / 92.4; next-token training 20.1 / 19.8 / 19.4 -> 96.4 / 90.5 / 91.6;
RPT 96.6 / 86.6 / 93.6 -> 98.2 / 93.2 / 95.2. LOG.md has the intervals.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from rows import append_row, read_rows

from rpt_jax.config import CheckpointConfig, Config, EvaluateConfig, QuestionConfig, RewardConfig, UpdateConfig
from rpt_jax.corpus import arithmetic
from rpt_jax.corpus.positions import select_positions
from rpt_jax.corpus.questions import Question, Questions, make_questions
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.learning import run_rows
from rpt_jax.learning.collect import end_ids
from rpt_jax.learning.policy_folder import load_policy, save_policy
from rpt_jax.learning.train import train
from rpt_jax.records import InputError
from rpt_jax.study import quickstart
from rpt_jax.study.base import END
from rpt_jax.study.question_evaluation import SPLIT, evaluate_questions
from rpt_jax.study.quickstart import QuickstartConfig

RESULTS = Path(__file__).parent / "results" / "question_tuning.csv"
KINDS = (("permuted", 4), ("permuted", 5), ("total", 4), ("total", 5))
POLICIES = ("base", "next_token", "rpt")
EXAM_SEED = 20251123  # of the held-out questions, the same in all rows


@dataclass(frozen=True)
class Settings:
    """Which policies to tune, on how many questions."""

    seeds: tuple[int, ...] = (0, 1, 2)
    traces: Literal["default", "short"] = "default"  # of a base that is made here; short: fewer kinds have thoughts
    base: str = ""  # folder of the base; empty: made here
    next_token: str = ""  # folder of the base after next-token training; empty: made here
    rpt: str = ""  # folder of the policy after RPT; empty: made here
    runs: Path = Path("runs")
    results: Path = RESULTS
    questions: int = 256  # trained on (paper: 256)
    exam: int = 200  # held out (paper: 200)
    batch_size: int = 64  # prompts a step (paper: 64)
    group_size: int = 8
    updates: int = 60  # 15 epochs of 256 questions (paper: 15 epochs)
    temperature: float = 0.6  # of rollouts and exams (paper: 0.6)
    learning_rate: float = 1e-4  # as the quickstart's RPT; not tuned
    quickstart: QuickstartConfig = QuickstartConfig(from_scratch=True, dynamic_from=20)


def main(settings: Settings) -> None:
    """A row for each seed and policy."""
    for seed in settings.seeds:
        folder = settings.runs / f"question_tuning_{settings.traces}_{seed}"
        for name in POLICIES:
            row = {"traces": settings.traces, "seed": str(seed), "policy": name, "updates": str(settings.updates)}
            if any(row.items() <= there.items() for there in read_rows(settings.results)):
                print(f"{row}: has a row already")
                continue
            policy = policy_of(name, settings, seed, folder)
            append_row(settings.results, row | tune(settings, seed, policy, folder / f"tuned_{name}"))


def tune(settings: Settings, seed: int, policy: quickstart.POLICY, folder: Path) -> dict:
    """Trains a policy on the questions; figures of the exam before and after."""
    began, (model, _, tokenizer) = time.perf_counter(), policy
    asked = draw_questions(settings, seed, tokenizer)
    config = tuning_config(settings, seed, policy, folder)
    figures = {"before": examine(config, policy, asked)}
    state = train(config, policy, annotated=asked, positions=asked.train, template=quickstart.BARE)
    figures["after"] = examine(config, (model, jax.device_get(state.params), tokenizer), asked)
    rows = run_rows.read_rows(folder / "metrics.jsonl")
    flat = {"questions": len(asked.train), "exam": len(asked.held_out), "temperature": settings.temperature}
    for when, found in figures.items():
        flat |= {f"{when}.accuracy": round(found["reasoning"], 4)}
        kept = ("standard_error", "pass_at_k", "format_rate", "response_length")
        flat |= {f"{when}.{name}": round(found[name], 4) for name in kept}
    flat["judge_stopped"] = sum(row["judge_timeouts"] + row["judge_crashes"] for row in rows)
    flat["flops"] = f"{quickstart.rpt_flops(rows):.4g}"
    return flat | {"seconds": round(time.perf_counter() - began)}


def draw_questions(settings: Settings, seed: int, tokenizer: Tokenizer) -> Questions:
    """Different texts of all KINDS in turn: the exam from the held-out side and a seed of its own."""

    def draw(count: int, held_out: bool, rng: np.random.Generator) -> list[Question]:
        drawn: dict[str, Question] = {}
        for turn in range(100 * count):
            if len(drawn) == count:
                return list(drawn.values())
            problem = arithmetic.draw_problem(KINDS[turn % len(KINDS)], held_out, rng)
            name = f"{problem.family}_{problem.steps}"
            drawn.setdefault(problem.context, Question(name, problem.context, problem.answer))
        raise InputError(f"{count} different questions cannot be drawn: ask for fewer")

    learnt = draw(settings.questions, False, np.random.default_rng(50_000 + seed))
    return make_questions(tokenizer, learnt, draw(settings.exam, True, np.random.default_rng(EXAM_SEED)))


def tuning_config(settings: Settings, seed: int, policy: quickstart.POLICY, folder: Path) -> Config:
    """The quickstart's RPT run, but on questions and with the paper's sizes."""
    like = quickstart.rpt_config(settings.quickstart, policy[0], folder)
    sample = dataclasses.replace(like.sample, group_size=settings.group_size, temperature=settings.temperature)
    return dataclasses.replace(
        like,
        name="question_tuning",
        seed=seed,
        steps=settings.updates,
        batch_size=settings.batch_size,
        run_folder=str(folder),
        sample=sample,
        reward=RewardConfig("verified"),
        questions=QuestionConfig(workers=1),  # digits are compared without asking it
        update=UpdateConfig(learning_rate=settings.learning_rate, weight_decay=0.0),
        dynamic_sampling=dataclasses.replace(like.dynamic_sampling, from_step=-1),
        checkpoint=CheckpointConfig(every=settings.updates, keep=1),
    )


def examine(config: Config, policy: quickstart.POLICY, asked: Questions) -> dict:
    """Figures of the held-out questions; the noise is the same for all policies and seeds."""
    model, params, tokenizer = policy
    return evaluate_questions(
        params,
        model,
        tokenizer,
        quickstart.BARE,
        asked,
        limits=config.questions,
        prompt=config.prompt,
        sample=config.sample,
        config=EvaluateConfig(positions=0, group_size=8, temperature=config.sample.temperature, batch_size=40),
        seed=EXAM_SEED,
        end_ids=end_ids(tokenizer, (END,)),
    )[SPLIT]


def policy_of(name: str, settings: Settings, seed: int, folder: Path) -> quickstart.POLICY:
    """The policy from the folder that is named for it, or else made as the quickstart does and kept."""
    named, made = getattr(settings, name).format(seed=seed), folder / {"rpt": "policy"}.get(name, name)
    if named:
        return load_policy(named)
    if (made / "policy.json").is_file():
        return load_policy(made)
    folder.mkdir(parents=True, exist_ok=True)
    base = dataclasses.replace(settings.quickstart.base, traces=settings.traces)
    config = dataclasses.replace(settings.quickstart, seed=seed, base=base)
    if name == "base":
        return quickstart.load_base(config, folder, print_line)
    policy = policy_of("base", settings, seed, folder)
    if name == "next_token":
        spent = flops_of_rpt(settings, seed, folder)
        trained = quickstart.train_control("next_token", config, policy, None, None, spent, print_line)
        model, params, tokenizer = trained.policy
        save_policy(made, model, params, tokenizer, {"made_by": "experiments/question_tuning.py", "seed": seed})
        return model, params, tokenizer
    texts, _ = quickstart.make_documents(config)
    annotated = quickstart.annotate_texts(policy, texts, folder / "annotated")
    positions = select_positions(annotated, quickstart.position_config(config), seed)
    return quickstart.run_rpt(config, policy, annotated, positions, folder)


def flops_of_rpt(settings: Settings, seed: int, folder: Path) -> float:
    """What RPT spent: read from the folder named for it, which then has to be a run's, or from the run made here."""
    named = settings.rpt.format(seed=seed)
    rows = Path(named or folder / "rpt") / "metrics.jsonl"
    if not named:
        policy_of("rpt", settings, seed, folder)
    if not rows.is_file():
        raise InputError(
            f"{rows.parent} has no metrics.jsonl to say what RPT spent: name a run folder, or --next-token"
        )
    return quickstart.rpt_flops(run_rows.read_rows(rows))


def print_line(text: str, **_) -> None:
    """Progress."""
    print(text, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
