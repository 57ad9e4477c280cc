"""Learning rates of the quickstart's controls, and how far more plain text moves the base's arg-max.

    .venv/bin/python experiments/quickstart_controls.py --run runs/quickstart_default_0

Reads the base and the annotated texts of a finished from-scratch run and spends the FLOPs of its RPT again for each
control and rate, and on plain texts alone. Judged on 260 texts of the training side with a seed of their own, never on
the evaluation texts. Hardware: one CPU core. Time: about 2 minutes a row. Rows are added to
results/quickstart_controls.csv. Not run yet.
"""

import csv
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from rpt_jax.corpus import arithmetic
from rpt_jax.corpus.positions import open_annotated, select_positions
from rpt_jax.learning.checkpoints import load_policy
from rpt_jax.study import quickstart
from rpt_jax.study.base import Mixture, mixture_batches

RESULTS = Path(__file__).parent / "results" / "quickstart_controls.csv"
TUNING_SEED = 777
ONLY_PLAIN = Mixture(plain=1.0, lazy=0.0, careful=0.0)


@dataclass(frozen=True)
class Settings:
    """Which run, which rates."""

    run: Path = Path("runs/quickstart_default_0")
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)


def main(settings: Settings) -> None:
    """A row for each control and rate."""
    config = quickstart.QuickstartConfig()
    policy = load_policy(settings.run / "base")
    tokenizer = policy[2]
    budget = json.loads((settings.run / "results.json").read_text())["flops"]
    annotated = open_annotated(settings.run / "annotated", tokenizer)
    positions = select_positions(annotated, quickstart.position_config(config), config.seed)
    rng = np.random.default_rng(TUNING_SEED)
    drawn = [arithmetic.draw_problem(kind, False, rng) for _ in range(20) for kind in arithmetic.KINDS]
    exam = list({problem.text: problem for problem in drawn}.values())
    with tempfile.TemporaryDirectory() as folder:
        examined = quickstart.annotate_texts(policy, exam, Path(folder) / "texts")
        splits = quickstart.evaluation_splits(examined, exam, tokenizer, config.base)

        def judge(control: str, rate: float, trained) -> None:
            figures = quickstart.examine(config, trained, examined, {"hard": splits["hard"]}).summary()["hard"]
            names = ("argmax", "reasoning", "format_rate", "positions")
            append_row({"control": control, "rate": rate} | {name: round(figures[name], 4) for name in names})

        judge("base", 0.0, policy)
        for rate in settings.rates:
            tuned = replace(config, next_token_learning_rate=rate, sft_learning_rate=rate)
            judge(
                "next_token",
                rate,
                quickstart.next_token_control(tuned, policy, annotated, positions, budget, print_line),
            )
            judge("sft", rate, quickstart.sft_control(tuned, policy, annotated, positions, budget, print_line))
            batches = mixture_batches(tokenizer, config.base, ONLY_PLAIN, 64, TUNING_SEED)
            more = quickstart.spend(config, policy, batches, budget, rate, "plain texts", print_line)
            judge("plain_only", rate, (policy[0], more, tokenizer))


def print_line(text: str, **_) -> None:
    """Progress."""
    print(text, flush=True)


def append_row(row: dict) -> None:
    """Adds a row to the table."""
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
