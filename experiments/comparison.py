"""What learns best from the same FLOPs? RPT's rewards, RLP's, and what is no reinforcement, on the generated corpus.

    .venv/bin/python experiments/comparison.py                            # all rows that are missing
    .venv/bin/python experiments/comparison.py --methods dense --seeds 1  # one row, with all that it needs
    .venv/bin/python experiments/comparison.py --table                    # what came out, as markdown

The same command may run several times side by side: rows are shared out by claims. Hardware: a CPU core a process.
Time: 2 to 4 minutes a row, 5 more for each base. Writes results/comparison.csv, a row for each method and seed, and
under runs/comparison what is shared: base-SEED with the base, the annotated and the held-out texts, and prefix-SEED,
the run whose FLOPs are the budget of its seed. All else stops with the batch that reaches this budget.

    base               the quickstart's base from scratch, before any of it
    prefix             RPT as the quickstart has it, without dynamic sampling
    first_token, dense, conditional_dense     RPT with the other rewards of its appendix A
    information_gain   RPT on the same positions with RLP's reward and advantage; the next token is due in the box. The
                       average without a thought is the same for a whole group and drops out of the advantage
    random_positions   RPT on as many positions drawn at random
    next_token, sft    the quickstart's controls
    expert_iteration   supervised training on right rollouts (study/controls.py)
    no_cold_start      RPT from a base of the same making that has seen no thought, on the same positions

Texts, positions and the noise of evaluation are the same for all methods of a seed, so their differences are paired.

Measured result, hard positions right over three seeds, and the 95 % interval of the difference to prefix in points:

    base                28.5 %                        random_positions    72.8   [-65.5, +22.4]
    prefix              94.4                          expert_iteration    75.4   [-36.6,  -1.5]
    first_token         94.5   [-0.6, +0.7]           next_token          27.4   [-72.7, -61.3]
    information_gain    94.4   [-1.9, +1.9]           sft                  9.2   [-88.1, -82.4]
    dense               93.3   [-4.3, +2.1]           no_cold_start        0.0   (no thought ever earned anything)
    conditional_dense   93.5   [-2.2, +0.5]
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from rows import append_row, read_rows
from scipy import stats  # comes with jax

from rpt_jax import compilation
from rpt_jax.config import CheckpointConfig, Config, PositionConfig, RewardConfig
from rpt_jax.config_dict import to_dict
from rpt_jax.corpus.positions import AnnotatedDocuments, Positions, all_positions, open_annotated, select_positions
from rpt_jax.learning import run_folder, run_rows
from rpt_jax.learning.policy_folder import load_policy
from rpt_jax.learning.train import train
from rpt_jax.records import InputError
from rpt_jax.scaling import claims
from rpt_jax.study import controls, quickstart
from rpt_jax.study.quickstart import BARE, POLICY, QuickstartConfig

Method = Literal[
    "base",
    "prefix",
    "first_token",
    "information_gain",
    "dense",
    "conditional_dense",
    "random_positions",
    "next_token",
    "sft",
    "expert_iteration",
    "no_cold_start",
]
METHODS: tuple[Method, ...] = Method.__args__
SPLITS = ("hard", "medium", "untraced")
# Learning rates that are not the quickstart's for RPT; comparison_rates.py has what was tried.
RATES = {
    "base": 0.0,
    "next_token": QuickstartConfig().next_token_learning_rate,
    "sft": QuickstartConfig().sft_learning_rate,
    "expert_iteration": 3e-4,
}
POLL = 5.0  # seconds between looks where everything that is left is in other hands


@dataclass(frozen=True)
class Settings:
    """Which rows to make."""

    methods: tuple[Method, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    table: bool = False  # prints the table of the rows there are, and runs nothing
    runs: Path = Path("runs/comparison")
    results: Path = Path(__file__).parent / "results" / "comparison.csv"
    quickstart: QuickstartConfig = QuickstartConfig(from_scratch=True)
    expert: controls.ExpertConfig = controls.ExpertConfig()  # its learning rate is in RATES


@dataclass(frozen=True)
class Shared:
    """What the methods of a seed have in common."""

    config: QuickstartConfig
    policy: POLICY
    annotated: AnnotatedDocuments
    positions: Positions  # to learn from
    held_out: AnnotatedDocuments
    splits: dict[str, Positions]


def main(settings: Settings) -> None:
    """Makes the rows that are missing, in this process and in others that do the same; or prints the table."""
    if settings.table:
        print(table(read_rows(settings.results)))
        return
    settings.quickstart.check()
    compilation.keep_on_disk()
    wanted = [(method, seed) for seed in settings.seeds for method in settings.methods]
    if all(has_row(settings, *cell) for cell in wanted):
        print(f"all rows are in {settings.results}")
    while left := [cell for cell in wanted if not has_row(settings, *cell)]:
        if not any(run_if_free(settings, *needed(settings, *cell)) for cell in left):
            time.sleep(POLL)


def has_row(settings: Settings, method: str, seed: int) -> bool:
    return (method, str(seed)) in {(row["method"], row["seed"]) for row in read_rows(settings.results)}


def needed(settings: Settings, method: str, seed: int) -> tuple[str, int]:
    """What has to run next for a row: "prepare" (the base of the seed), the run that sets the budget, or itself."""
    if not is_done(settings, "prepare", seed):
        return "prepare", seed
    if method not in ("base", "prefix") and not is_done(settings, "prefix", seed):
        return "prefix", seed
    return method, seed


def is_done(settings: Settings, task: str, seed: int) -> bool:
    if task == "prepare":
        return (settings.runs / f"base-{seed}").exists()
    is_finished = task != "prefix" or (settings.runs / f"prefix-{seed}" / "results.json").exists()
    return is_finished and has_row(settings, task, seed)


def run_if_free(settings: Settings, task: str, seed: int) -> bool:
    """Runs a task that nobody else is at; False where somebody is."""
    claim = claims.take(settings.runs / "claims", f"{task}-{seed}")
    if claim is None:
        return False
    with claims.kept(claim):
        if not is_done(settings, task, seed):  # ended just before it was taken
            print(f"{task}, seed {seed}", flush=True)
            run(settings, task, seed)
    claims.give_back(claim)
    return True


def run(settings: Settings, task: str, seed: int) -> None:
    """The base of a seed, or a method, its evaluation and its row."""
    config = dataclasses.replace(settings.quickstart, seed=seed)
    if task == "prepare":
        part = settings.runs / f"base-{seed}.part"
        shutil.rmtree(part, ignore_errors=True)
        quickstart.prepare(config, part, say)
        part.rename(settings.runs / f"base-{seed}")
        return
    shared = open_shared(config, settings.runs / f"base-{seed}")
    if task == "no_cold_start":
        shared = dataclasses.replace(shared, policy=plain_base(config, settings.runs / f"plain-base-{seed}"))
    budget = 0.0 if task in ("base", "prefix") else spent(settings.runs / f"prefix-{seed}")
    rate, began = RATES.get(task, config.learning_rate), time.perf_counter()
    trained = train_method(task, shared, settings.expert, rate, budget, settings.runs / f"{task}-{seed}")
    row = {"method": task, "seed": seed, "learning_rate": f"{rate:g}", "updates": trained.updates}
    row |= {"flops": f"{trained.flops:.6g}", "budget": f"{budget or trained.flops:.6g}"}
    row |= {"seconds": round(time.perf_counter() - began), **figures(trained.policy, shared)}
    made_by = run_folder.provenance()
    row |= {"commit": made_by["commit"], "changed_since_commit": made_by["changed_since_commit"]}
    if not has_row(settings, task, seed):  # it may be there, and the run that sets the budget was not
        append_row(settings.results, row | {"jax": jax.__version__})


def open_shared(config: QuickstartConfig, folder: Path) -> Shared:
    """Base, annotated texts and splits; raises InputError for a base that was made with other settings."""
    made = json.loads((folder / "base" / "policy.json").read_text())["provenance"]
    asked = {"seed": config.seed, "base": json.loads(json.dumps(to_dict(config.base)))}
    if any(made.get(name) != value for name, value in asked.items()):
        raise InputError(f"{folder} holds a base made by {made}, asked for is {asked}: choose other --runs")
    policy = load_policy(folder / "base")
    annotated, held_out = (open_annotated(folder / name, policy[2]) for name in ("annotated", "held_out"))
    exam = quickstart.make_documents(config)[1]
    splits = quickstart.evaluation_splits(held_out, exam, policy[2], config.base)
    positions = select_positions(annotated, quickstart.position_config(config), config.seed)
    return Shared(
        config, policy, annotated, positions, held_out, {name: splits[name] for name in SPLITS if name in splits}
    )


def spent(folder: Path) -> float:
    """FLOPs of a finished run."""
    return run_rows.read_rows(folder / "metrics.jsonl")[-1]["flops_spent"]


def train_method(
    method: str, shared: Shared, expert: controls.ExpertConfig, rate: float, budget: float, folder: Path
) -> controls.Trained:
    """The policy after a method with `budget` FLOPs at a learning rate; prefix has its number of updates instead."""
    rates = {"learning_rate": rate, "next_token_learning_rate": rate, "sft_learning_rate": rate}
    config, policy, annotated = dataclasses.replace(shared.config, **rates), shared.policy, shared.annotated
    positions = shared.positions
    if method == "base":
        return controls.Trained(policy, 0, 0.0)
    if method in ("next_token", "sft"):
        return quickstart.train_control(method, config, policy, annotated, positions, budget, say)
    settled = run_config(method, config, policy, budget, folder)
    if method == "expert_iteration":
        expert = dataclasses.replace(expert, learning_rate=rate)
        return controls.expert_iteration(policy, settled, annotated, positions, BARE, budget, expert, say)
    if method == "random_positions":
        positions = random_positions(annotated, len(positions), config.seed)
    state = train(settled, policy, annotated=annotated, positions=positions, template=BARE)
    trained = policy[0], jax.device_get(state.params), policy[2]
    return controls.Trained(trained, int(state.step), spent(folder))


def run_config(method: str, config: QuickstartConfig, policy: POLICY, budget: float, folder: Path) -> Config:
    """The run of a method as `rpt train` would be told; with a budget it ends by FLOPs and not by steps."""
    common = quickstart.rpt_config(config, policy[0], folder)
    common = dataclasses.replace(common, name=method, checkpoint=CheckpointConfig(every=20, keep=1))
    if method == "prefix":
        return common
    common = dataclasses.replace(common, steps=100 * common.steps, flops=budget)
    if method == "information_gain":
        reward = RewardConfig("information_gain", ema_decay=0.999, opening="\\boxed{")
        update = dataclasses.replace(common.update, advantage="leave_one_out")
        return dataclasses.replace(common, reward=reward, update=update)
    if method in ("first_token", "dense", "conditional_dense"):
        return dataclasses.replace(common, reward=RewardConfig(method))
    return common


def random_positions(annotated: AnnotatedDocuments, count: int, seed: int) -> Positions:
    """`count` positions of any entropy, with as much context before them as the others."""
    context = quickstart.position_config(QuickstartConfig()).minimum_context
    share = count / len(all_positions(annotated, context))
    return select_positions(annotated, PositionConfig(select="random", share=share, minimum_context=context), seed)


def plain_base(config: QuickstartConfig, folder: Path) -> POLICY:
    """A base made as the others are, from plain texts alone; kept in a folder."""
    if not (folder / "base" / "policy.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        base = dataclasses.replace(config.base, traces="none")
        quickstart.load_base(dataclasses.replace(config, base=base), folder, say)
    return load_policy(folder / "base")


def figures(policy: POLICY, shared: Shared) -> dict:
    """Held-out accuracies: thoughts sampled at 0.8, the share of them with an answer, and arg-max; standard errors."""
    summary = quickstart.examine(shared.config, policy, shared.held_out, shared.splits).summary()
    row = {}
    for split, found in summary.items():
        errors = found["standard_errors"]
        row |= {f"{split}.{name}": round(found[name], 5) for name in ("reasoning", "argmax", "format_rate")}
        row |= {f"{split}.{name}_error": round(errors[name], 5) for name in ("reasoning", "argmax")}
        row[f"{split}.positions"] = found["positions"]
    return row


def say(line: str, **_) -> None:
    """Progress."""
    print(line, flush=True)


COLUMNS = {  # heading: column of the rows
    "hard, reasoning": "hard.reasoning",
    "format": "hard.format_rate",
    "hard, arg-max": "hard.argmax",
    "medium, reasoning": "medium.reasoning",
    "medium, arg-max": "medium.argmax",
    "untraced answers": "untraced.reasoning",
}


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: per cent, mean over seeds +- its standard error (in brackets the binomial one), and against prefix.

    The last column is the mean difference to prefix in hard reasoning, in points, over seeds that both have, with the
    95 % interval of Student's t; no interval for one seed.
    """
    lines = [f"| method | seeds | updates | {' | '.join(COLUMNS)} | less prefix |"]
    lines.append("|---" * (len(COLUMNS) + 4) + "|")
    by_method = {method: {row["seed"]: row for row in rows if row["method"] == method} for method in METHODS}
    for method, of_seeds in by_method.items():
        if of_seeds:
            shown = [cell(list(of_seeds.values()), column) for column in COLUMNS.values()]
            updates = f"{np.mean([int(row['updates']) for row in of_seeds.values()]):.0f}"
            against = difference(of_seeds, by_method["prefix"]) if method != "prefix" else ""
            lines.append(f"| {method} | {len(of_seeds)} | {updates} | {' | '.join(shown)} | {against} |")
    return "\n".join(lines)


def cell(rows: Sequence[dict[str, str]], column: str) -> str:
    """Mean of the seeds +- standard error (binomial standard error of the mean)."""
    values = 100 * np.array([float(row[column]) for row in rows])
    text = f"{values.mean():.1f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1) / len(values) ** 0.5:.1f}"
    if f"{column}_error" in rows[0]:
        errors = 100 * np.array([float(row[f"{column}_error"]) for row in rows])
        text += f" ({np.sqrt((errors**2).sum()) / len(errors):.1f})"
    return text


def difference(rows: dict[str, dict[str, str]], prefix: dict[str, dict[str, str]], column="hard.reasoning") -> str:
    """Mean of the seeds' differences in points, with the 95 % interval t(n - 1) sd / sqrt(n) on both sides."""
    gaps = [100 * (float(rows[seed][column]) - float(prefix[seed][column])) for seed in rows if seed in prefix]
    if len(gaps) < 2:
        return "".join(f"{gap:+.1f}" for gap in gaps)
    half = stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / len(gaps) ** 0.5
    return f"{np.mean(gaps):+.1f} [{np.mean(gaps) - half:+.1f}, {np.mean(gaps) + half:+.1f}]"


if __name__ == "__main__":
    main(tyro.cli(Settings))
