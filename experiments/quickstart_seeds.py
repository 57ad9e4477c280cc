"""Three seeds of the quickstart, each with its own base from scratch, and a harder setting.

    .venv/bin/python experiments/quickstart_seeds.py                       # seeds 0, 1, 2
    .venv/bin/python experiments/quickstart_seeds.py --traces short --seeds 0
    .venv/bin/python experiments/quickstart_seeds.py --plot              # the picture in README, from the rows

Hardware: one CPU core a run. Time: 10 to 13 minutes a seed. Writes results/quickstart.csv; rows that exist are skipped.
The evaluation texts are the same in all rows (their own seed, the side of the split that nothing is trained on). In the
harder setting the cold start shows permuted texts of two steps and totals of three at the most.
Measured result: see LOG.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rows import append_row, read_rows

from rpt_jax.study import plots
from rpt_jax.study.quickstart import QuickstartConfig
from rpt_jax.study.quickstart import main as quickstart

RESULTS = Path(__file__).parent / "results" / "quickstart.csv"
PICTURE = Path(__file__).parent.parent / "rpt_jax" / "docs" / "quickstart.png"
BARS = {  # policy -> mode -> column of the split
    "base": {"arg-max": "argmax_base", "boxed answer": "reasoning_before"},
    "base, made\ncareful": {"boxed answer": "forced_careful_base"},
    "RPT": {"arg-max": "argmax_after", "boxed answer": "reasoning_after"},
    "next-token\ncontrol": {"arg-max": "control_next_token.argmax", "boxed answer": "control_next_token.reasoning"},
    "boxed answers\ncontrol": {"arg-max": "control_sft.argmax", "boxed answer": "control_sft.reasoning"},
}
PARTS = (
    "chain",
    "permuted",
    "total",
    "untraced",
    "order_sensitive",
    "permuted_3",
    "permuted_4",
    "permuted_5",
    "total_5",
)


@dataclass(frozen=True)
class Settings:
    """Which runs to make."""

    seeds: tuple[int, ...] = (0, 1, 2)
    traces: Literal["default", "short"] = "default"
    plot: bool = False  # draws the rows that are there, and runs nothing
    runs: Path = Path("runs")  # a folder a run
    quickstart: QuickstartConfig = QuickstartConfig(from_scratch=True, dynamic_from=20)


def main(settings: Settings) -> None:
    """One run a seed, a row each."""
    if settings.plot:
        print(draw([row for row in read_rows(RESULTS) if row["traces"] == settings.traces], PICTURE))
        return
    for seed in settings.seeds:
        if (settings.traces, str(seed)) in {(row["traces"], row["seed"]) for row in read_rows(RESULTS)}:
            print(f"seed {seed}, {settings.traces} traces: has a row already")
            continue
        folder = settings.runs / f"quickstart_{settings.traces}_{seed}"
        base = replace(settings.quickstart.base, traces=settings.traces)
        config = replace(settings.quickstart, seed=seed, base=base, from_scratch=True, run_folder=str(folder))
        append_row(RESULTS, row_of(quickstart(config)))


def row_of(results: dict) -> dict:
    """The figures of a run, flat."""
    row = {"traces": results["traces"], "seed": results["seed"], "flops": f"{results['flops']:.4g}"}
    splits = {"hard": results["hard"], "medium": results["medium"]}
    splits |= {part: results["parts_of_hard"][part] for part in PARTS if part in results["parts_of_hard"]}
    for split, table in splits.items():
        for key, value in table.items():
            if isinstance(value, dict):
                row |= {f"{split}.{key}.{mode}": round(accuracy, 4) for mode, accuracy in value.items()}
            else:
                row[f"{split}.{key}"] = round(value, 4)
    row |= {f"format_rate.{when}": round(value, 4) for when, value in results["format_rate"].items()}
    exact = results["right_steps_given_right"]
    row |= {f"right_steps.{family}": "" if value is None else round(value, 4) for family, value in exact.items()}
    return row | {f"seconds.{phase}": round(value) for phase, value in results["seconds"].items()}


def bars(rows: Sequence[Mapping[str, str]], split: str = "hard") -> dict[str, dict[str, tuple[float, float]]]:
    """For each policy and mode (mean over the rows, standard error of that mean)."""

    def of(column: str) -> tuple[float, float]:
        values = np.array([float(row[f"{split}.{column}"]) for row in rows])
        return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)

    return {policy: {mode: of(column) for mode, column in modes.items()} for policy, modes in BARS.items()}


def draw(rows: Sequence[Mapping[str, str]], path: Path) -> Path:
    """The bars as a picture; rows: two seeds or more of one setting."""
    positions = ", ".join(row["hard.positions"] for row in rows)
    note = f"{len(rows)} seeds, whiskers: their standard error; {positions} positions; controls spend the FLOPs of RPT"
    return plots.before_after(bars(rows), path, title="Hard next tokens predicted right, generated text", note=note)


if __name__ == "__main__":
    main(tyro.cli(Settings))
