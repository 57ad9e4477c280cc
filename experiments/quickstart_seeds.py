"""Three seeds of the quickstart, each with its own base from scratch, and a harder setting.

    .venv/bin/python experiments/quickstart_seeds.py                       # seeds 0, 1, 2
    .venv/bin/python experiments/quickstart_seeds.py --traces short --seeds 0

Hardware: one CPU core a run. Time: 10 to 13 minutes a seed. Writes results/quickstart.csv; rows that exist are skipped.
The evaluation texts are the same in all rows (their own seed, the side of the split that nothing is trained on). In the
harder setting the cold start shows permuted texts of two steps and totals of three at the most.
Measured result: see LOG.md.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rows import append_row, read_rows

from rpt_jax.study.quickstart import QuickstartConfig
from rpt_jax.study.quickstart import main as quickstart

RESULTS = Path(__file__).parent / "results" / "quickstart.csv"
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
    runs: Path = Path("runs")  # a folder a run
    quickstart: QuickstartConfig = QuickstartConfig(from_scratch=True, dynamic_from=20)


def main(settings: Settings) -> None:
    """One run a seed, a row each."""
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


if __name__ == "__main__":
    main(tyro.cli(Settings))
