"""Learning rates of the quickstart's controls, and how far more plain text moves the base's arg-max.

    .venv/bin/python experiments/quickstart_controls.py --run runs/quickstart_default_0
    .venv/bin/python experiments/quickstart_controls.py --run runs/quickstart_default_0 --controls sft --rates 3e-3

Reads base, annotated texts and results of a finished from-scratch run and spends the FLOPs of its RPT again for each
control and rate, and on plain texts alone. Judged on 260 texts of the training side with a seed of their own, none of
them among those that RPT and the SFT control learn from, never on the evaluation texts. Hardware: one CPU core. Time:
about 80 seconds a row. Rows of results/quickstart_controls.csv that exist are skipped. Measured result: see LOG.md.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rows import append_row, read_rows

from rpt_jax.corpus import arithmetic
from rpt_jax.corpus.positions import AnnotatedDocuments, open_annotated, select_positions
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.learning.policy_folder import load_policy
from rpt_jax.study import controls, quickstart
from rpt_jax.study.base import Mixture, mixture_batches

RESULTS = Path(__file__).parent / "results" / "quickstart_controls.csv"
TUNING_SEED = 777
ONLY_PLAIN = Mixture(plain=1.0)
CONTROL = Literal["next_token", "sft", "plain_only"]


@dataclass(frozen=True)
class Settings:
    """Which run, which controls at which rates."""

    run: Path = Path("runs/quickstart_default_0")
    controls: tuple[CONTROL, ...] = ("next_token", "sft", "plain_only")
    rates: tuple[float, ...] = (3e-4, 1e-3)


def main(settings: Settings) -> None:
    """A row for the base, and one for each control and rate."""
    config = quickstart.QuickstartConfig()
    policy = load_policy(settings.run / "base")
    tokenizer = policy[2]
    budget = json.loads((settings.run / "results.json").read_text())["flops"]
    annotated = open_annotated(settings.run / "annotated", tokenizer)
    exam = tuning_texts(annotated, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        examined = quickstart.annotate_texts(policy, exam, Path(folder) / "texts")
        splits = quickstart.evaluation_splits(examined, exam, tokenizer, config.base)
        tried = [("base", 0.0), *((control, rate) for control in settings.controls for rate in settings.rates)]
        for control, rate in tried:
            name = {"run": settings.run.name, "control": control, "rate": f"{rate:g}"}
            if any(name.items() <= row.items() for row in read_rows(RESULTS)):
                print(f"{name}: has a row already")
                continue
            trained = policy if control == "base" else train_control(control, rate, policy, annotated, budget)
            figures = quickstart.examine(config, trained, examined, {"hard": splits["hard"]}).summary()["hard"]
            figures |= {"argmax_standard_error": figures["standard_errors"]["argmax"]}
            kept = ("argmax", "argmax_standard_error", "reasoning", "standard_error", "format_rate", "positions")
            spent = {"flops": f"{budget if rate else 0:.3g}"}
            append_row(RESULTS, name | spent | {key: round(figures[key], 4) for key in kept})


def tuning_texts(annotated: AnnotatedDocuments, tokenizer: Tokenizer) -> list[arithmetic.Problem]:
    """Texts of the training side that are not among the annotated ones, all different."""
    seen = {tokenizer.bytes_of(document.tokens_T.tolist()) for document in annotated}
    rng = np.random.default_rng(TUNING_SEED)
    drawn = [arithmetic.draw_problem(kind, False, rng) for _ in range(20) for kind in arithmetic.KINDS]
    return list({problem.text: problem for problem in drawn if problem.text.encode() not in seen}.values())


def train_control(
    control: CONTROL, rate: float, policy: quickstart.POLICY, annotated: AnnotatedDocuments, budget: float
) -> quickstart.POLICY:
    """The base after `budget` FLOPs of a control at a learning rate."""
    config = quickstart.QuickstartConfig(next_token_learning_rate=rate, sft_learning_rate=rate)
    if control == "plain_only":
        batches = mixture_batches(policy[2], config.base, ONLY_PLAIN, 64, TUNING_SEED)
        return controls.spend(policy, batches, budget, rate, "plain texts", print_line).policy
    positions = select_positions(annotated, quickstart.position_config(config), config.seed)
    return quickstart.train_control(control, config, policy, annotated, positions, budget, print_line).policy


def print_line(text: str, **_) -> None:
    """Progress."""
    print(text, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
