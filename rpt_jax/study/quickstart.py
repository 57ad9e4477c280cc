"""The whole method on a laptop: a base, the entropy filter, RPT, and what the same compute buys otherwise.

In: nothing but a seed; the corpus is generated (corpus/arithmetic.py). Out: a run folder with the policy, metrics,
rollouts, results.json and plots, and on the terminal a table and three thoughts.

The base (study/base.py) plays the part of the distilled reasoning model that the paper starts from: it knows the texts
and has been shown thoughts that take one step at a time, and at last mostly lazy ones. RPT trains it on
positions that its own entropy picked. The controls spend the same FLOPs on next-token training (thoughts kept in) and
on supervised answers to the very positions RPT learns from. All figures are computed in the run; the evaluation texts
have their own seed and come from the side of the split that nothing is trained on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape

from rpt_jax.config import (
    CheckpointConfig,
    Config,
    DynamicSamplingConfig,
    EvaluateConfig,
    ModelConfig,
    PositionConfig,
    PromptConfig,
    SampleConfig,
    UpdateConfig,
)
from rpt_jax.config_dict import to_dict
from rpt_jax.corpus import arithmetic
from rpt_jax.corpus.positions import AnnotatedDocuments, Positions, difficulty_splits, open_annotated, select_positions
from rpt_jax.corpus.templates import load_template
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.json_file import write_json
from rpt_jax.learning import run_rows
from rpt_jax.learning.collect import end_ids
from rpt_jax.learning.policy_folder import load_policy, save_policy
from rpt_jax.learning.train import train
from rpt_jax.policy.proxy import annotate
from rpt_jax.records import InputError, Params
from rpt_jax.study import controls
from rpt_jax.study.base import END, BaseConfig, traced, train_base
from rpt_jax.study.evaluate import Evaluation, evaluate
from rpt_jax.study.quickstart_results import collect_results, show_table, show_thoughts, write_plots

EVALUATION_SEED = 20251122  # of the evaluation texts; every tuning used texts of the training side
BARE = load_template("bare")
SHIPPED = Path(str(resources.files("rpt_jax.study") / "base_policy"))
POLICY = tuple[ModelConfig, Params, Tokenizer]


@dataclass(frozen=True)
class QuickstartConfig:
    """Settings of the demonstration; those of the base are in study/base.py."""

    seed: int = 0
    from_scratch: bool = False  # train the base too, rather than take the one that ships with the package
    run_folder: str = ""  # empty: runs/quickstart, or the next free runs/quickstart-2, -3, ...
    documents: int = 2048  # texts that the entropy filter looks at
    evaluation_documents: int = 560  # held-out texts; up to the same number of each family and length
    base: BaseConfig = field(default_factory=BaseConfig)
    steps: int = 120  # updates of RPT
    batch_size: int = 16  # prompts a step
    group_size: int = 8
    temperature: float = 1.2  # of the rollouts that RPT learns from: the base is too sure of itself to explore at 0.8
    learning_rate: float = 1e-4
    advantage: Literal["std", "mean", "leave_one_out"] = "std"
    dynamic_from: int = -1  # first step with dynamic sampling; -1: never, to stay within minutes
    threshold: float = 1.5  # nats
    next_token_learning_rate: float = 3e-4  # of the control; 1e-3 does as well (experiments/quickstart_controls.py)
    sft_learning_rate: float = 1e-3  # of the other; 3e-4 does as well

    def check(self) -> None:
        """Raises InputError for settings of a base that is not trained or cannot be, and for too few texts."""
        if self.base != BaseConfig() and not self.from_scratch:
            raise InputError(
                "--base settings need a base of its own: add --from-scratch (the one that ships is as it is)"
            )
        channels = self.base.width // self.base.heads
        if channels < 1 or channels % 2:
            raise InputError(
                f"base.width={self.base.width} over base.heads={self.base.heads} gives heads of {channels} channels, "
                f"which RoPE cannot rotate in pairs: use a --base.width that {2 * self.base.heads} divides"
            )
        if self.evaluation_documents < len(arithmetic.KINDS):
            raise InputError(
                f"evaluation_documents={self.evaluation_documents}: there are {len(arithmetic.KINDS)} kinds of texts, "
                "so use as many or more"
            )


class Clock:
    """Seconds of each phase, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    def run(self, phase: str, work: Callable, *args):
        began = time.perf_counter()
        result = work(*args)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
        return result

    def total(self) -> dict[str, float]:
        return {"total": time.perf_counter() - self.start} | self.seconds


def main(config: QuickstartConfig, console: Console | None = None) -> dict:
    """Runs everything; returns what results.json holds."""
    config.check()
    console = console or Console(stderr=True)
    say = console.print if console.is_terminal else Console(stderr=True, width=110).print
    folder, clock = new_folder(config.run_folder), Clock()
    say(f"[bold]1/5 base[/] {'trained from scratch' if config.from_scratch else 'as shipped with the package'}")
    policy = clock.run("base", load_base, config, folder, say)
    say("[bold]2/5 filter[/] entropy of every next token under the base; the hard ones are worth a thought")
    texts, exam = make_documents(config)
    annotated = clock.run("filter", annotate_texts, policy, texts, folder / "annotated")
    examined = clock.run("filter", annotate_texts, policy, exam, folder / "evaluation")
    positions = select_positions(annotated, position_config(config), config.seed)
    splits = evaluation_splits(examined, exam, policy[2], config.base)
    say(f"    {len(positions)} positions to learn from, {len(splits['hard'])} held-out hard ones")
    evaluations = {"base": clock.run("evaluate", examine, config, policy, examined, splits, True)}
    evaluations["careful"] = clock.run("evaluate", examine, config, policy, examined, splits, False, True)
    say(f"[bold]3/5 RPT[/] {config.steps} updates of {config.batch_size} prompts x {config.group_size} thoughts")
    trained = clock.run("rpt", run_rpt, config, policy, annotated, positions, folder)
    evaluations["rpt"] = clock.run("evaluate", examine, config, trained, examined, splits, True)
    rows = run_rows.read_rows(folder / "rpt" / "metrics.jsonl")
    spent = rpt_flops(rows)
    say(f"[bold]4/5 controls[/] the same {spent:.2e} FLOPs on next tokens, and on answers without thoughts")
    for name in ("next_token", "sft"):
        other = clock.run("controls", train_control, name, config, policy, annotated, positions, spent, say)
        evaluations[name] = clock.run("evaluate", examine, config, other.policy, examined, splits)
    say("[bold]5/5 results[/]")
    about = {"seed": config.seed, "from_scratch": config.from_scratch, "traces": config.base.traces, "flops": spent}
    results = about | {"seconds": clock.total()} | collect_results(evaluations, exam, policy[2])
    write_json(folder / "results.json", results)
    write_plots(folder, results, rows)
    show_table(results, say)
    show_thoughts(evaluations, exam, policy[2], say)
    say(f"everything is in {escape(str(folder))}: results.json, plots/, rpt/ (metrics, rollouts, policy)")
    return results


def new_folder(asked: str) -> Path:
    """An empty folder for the run; raises InputError if the one that was asked for is not empty."""
    folder = Path(asked or "runs/quickstart")
    if asked and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: remove it or choose another --run-folder")
    count = 1
    while not asked and folder.exists():
        count += 1
        folder = Path(f"runs/quickstart-{count}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_base(config: QuickstartConfig, folder: Path, say: Callable) -> POLICY:
    """The shipped base, or one trained now and saved in the run folder."""
    if not config.from_scratch:
        return load_policy(SHIPPED)

    def report(step, metrics):
        say(f"    step {step}/{config.base.pretrain.steps}  loss {metrics['loss']:.3f}", highlight=False)

    model, params, tokenizer = train_base(config.base, config.seed, folder / "base_tokenizer", report)
    provenance = {"made_by": "rpt quickstart --from-scratch", "seed": config.seed, "base": to_dict(config.base)}
    save_policy(folder / "base", model, params, tokenizer, provenance)
    return model, params, tokenizer


def prepare(config: QuickstartConfig, folder: Path, say: Callable) -> None:
    """What runs on this base share: folder/base, and its annotations of all texts in annotated/ and held_out/."""
    policy = load_base(config, folder, say)
    texts, exam = make_documents(config)
    annotate_texts(policy, texts, folder / "annotated")
    annotate_texts(policy, exam, folder / "held_out")


def make_documents(config: QuickstartConfig) -> tuple[list[arithmetic.Problem], list[arithmetic.Problem]]:
    """(texts to train on, texts to evaluate on); the latter are the same in every run and all different."""
    rng = np.random.default_rng(10_000 + config.seed)
    kinds = arithmetic.KINDS
    texts = [arithmetic.draw_problem(kinds[i % len(kinds)], False, rng) for i in range(config.documents)]
    rng, exam = np.random.default_rng(EVALUATION_SEED), {}
    for kind in kinds:
        drawn: dict[str, arithmetic.Problem] = {}
        misses = 0
        while len(drawn) < config.evaluation_documents // len(kinds) and misses < 100:
            problem = arithmetic.draw_problem(kind, True, rng)
            misses += problem.text in drawn  # totals of two steps have few different texts
            drawn.setdefault(problem.text, problem)
        exam |= drawn
    return texts, list(exam.values())


def position_config(config: QuickstartConfig) -> PositionConfig:
    return PositionConfig(threshold=config.threshold, minimum_context=4)


def marks(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that are no text: never a candidate for the next one."""
    return tuple(tokenizer.id_of(piece) for piece in (BARE.head, BARE.thought, "</think>", "\\boxed{"))


def annotate_texts(policy: POLICY, problems: Sequence[arithmetic.Problem], folder: Path) -> AnnotatedDocuments:
    """Entropy and arg-max of every token under the base."""
    model, params, tokenizer = policy
    documents = [(i, p.text, np.array(tokenizer.encode_markup(p.text + END), np.int32)) for i, p in enumerate(problems)]
    annotate(params, model, tokenizer, documents, folder, PositionConfig(), proxy="base", banned_ids=marks(tokenizer))
    return open_annotated(folder, tokenizer)


def evaluation_splits(
    examined: AnnotatedDocuments, exam: Sequence[arithmetic.Problem], tokenizer: Tokenizer, base: BaseConfig
) -> dict[str, Positions]:
    """Named sets of held-out positions: hard and medium (nested), and parts of hard by what stands there."""
    nested = difficulty_splits(examined, PositionConfig(minimum_context=4))
    hard = nested["hard"]
    problems = [exam[document] for document in hard.documents]
    answer_at = np.array([len(tokenizer.encode(problem.context)) for problem in problems])
    is_answer = hard.indices == answer_at
    untraced = np.array([(p.family, p.steps) not in traced(base) for p in problems])
    sensitive = np.array([p.family == "permuted" and p.naive != p.answer for p in problems])
    splits = {
        "hard": hard,
        "medium": nested["medium"],
        "answers": hard[is_answer],
        "untraced": hard[is_answer & untraced],
        "order_sensitive": hard[is_answer & sensitive],
    }
    for family in arithmetic.FAMILIES:
        splits[family] = hard[is_answer & np.array([p.family == family for p in problems])]
    for kind in arithmetic.KINDS:
        name = f"{kind[0]}_{kind[1]}"
        splits[name] = hard[is_answer & np.array([(p.family, p.steps) == kind for p in problems])]
    if not is_answer.any():
        raise InputError("no held-out answer is hard (above 1.5 nats) for this base: train it on more texts")
    return {name: positions for name, positions in splits.items() if len(positions)}


def rpt_config(config: QuickstartConfig, model: ModelConfig, folder: Path) -> Config:
    """The RPT run as any other experiment would state it."""
    return Config(
        name="quickstart",
        seed=config.seed,
        steps=config.steps,
        batch_size=config.batch_size,
        run_folder=str(folder),
        model=model,
        positions=position_config(config),
        prompt=PromptConfig(template="bare", max_tokens=96, truth_bytes=16),
        sample=SampleConfig(
            group_size=config.group_size,
            temperature=config.temperature,
            max_tokens=48,
            tokens_per_call=48,
            end_tokens=(END,),
        ),
        update=UpdateConfig(learning_rate=config.learning_rate, weight_decay=0.0, advantage=config.advantage),
        dynamic_sampling=DynamicSamplingConfig(from_step=config.dynamic_from, max_rounds=2),
        checkpoint=CheckpointConfig(every=config.steps, keep=1),
        evaluate=EvaluateConfig(every=0),
    )


def run_rpt(
    config: QuickstartConfig, policy: POLICY, annotated: AnnotatedDocuments, positions: Positions, folder: Path
) -> POLICY:
    """RPT itself; returns the trained policy, saved in the run folder too."""
    model, _, tokenizer = policy
    settings = rpt_config(config, model, folder / "rpt")
    state = train(settings, policy, annotated=annotated, positions=positions, template=BARE)
    params = jax.device_get(state.params)
    save_policy(folder / "policy", model, params, tokenizer, {"made_by": "rpt quickstart", "seed": config.seed})
    return model, params, tokenizer


def rpt_flops(rows: Sequence[dict]) -> float:
    """What RPT spent, from metrics.jsonl: sampling all groups, also those dropped, and updating on those kept."""
    return sum(row["flops_sample"] + row["flops_update"] for row in rows)


def train_control(
    name: str, config: QuickstartConfig, policy: POLICY, annotated, positions: Positions, budget: float, say
) -> controls.Trained:
    """The control of that name, at its learning rate."""
    if name == "next_token":
        rate = config.next_token_learning_rate
        return controls.next_token_control(policy, config.base, budget, rate, config.seed, say)
    length, rate = config.base.pretrain.sequence_length, config.sft_learning_rate
    return controls.sft_control(policy, annotated, positions, BARE, length, budget, rate, config.seed, say)


def examine(
    config: QuickstartConfig, policy: POLICY, examined, splits, greedy: bool = False, careful: bool = False
) -> Evaluation:
    """Both modes on the held-out positions; `careful` forces the first word of a careful thought."""
    model, params, tokenizer = policy
    settings = rpt_config(config, model, Path("unused"))
    return evaluate(
        params,
        model,
        tokenizer,
        BARE,
        examined.documents,
        splits,
        prompt=settings.prompt,
        sample=settings.sample,
        config=EvaluateConfig(positions=640, group_size=1, temperature=0.8, batch_size=128, greedy=greedy),
        seed=EVALUATION_SEED,
        end_ids=end_ids(tokenizer, (END,)),
        banned_ids=marks(tokenizer),
        prefill=tokenizer.encode(arithmetic.OPENING) if careful else (),
    )
