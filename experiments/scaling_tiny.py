"""Does accuracy on hard tokens follow a law in RL compute? Three sizes x five budgets x three seeds, on a laptop.

    rpt sweep experiments/scaling_tiny.py --workers 2
    rpt fit experiments/results/scaling_tiny.csv

Hardware: two CPU cores. Time: 105 minutes of runs, added up over the cells, much of it with other work beside them,
20 of evaluation, and the nine bases. Writes results/scaling_tiny.csv, a row a cell; rows that exist are skipped, and
what was broken off goes on. The second command draws scaling_tiny.png.

Nine bases, one for each size and seed, are shared by their budgets; each budget is a run of its own from the base, with
its own seed, and not a checkpoint of a longer run. Texts, filter and RPT are those of the quickstart, at twice its
learning rate. Held-out texts are the same everywhere; which of their positions are easy, medium and hard is for each
base to say. Settings were chosen by the rewards of training rollouts of another seed (7), never by held-out texts:
budgets begin where the rise has set in, for a law of this form has no slow start.

Measured result, hard positions right (512 of them) at a budget of 12 / 24 / 48 / 96 / 192 updates, mean of three seeds:

    64x4    48.2  68.6  80.5  85.5  86.8 %    rise 38.5 +- 5.9    P* .90 [.78, 1]
    96x4    55.6  73.8  85.6  89.9  90.2      rise 34.6 +- 5.9    P* .93 [.81, 1]
    128x4   64.1  85.5  93.7  95.7  96.0      rise 31.9 +- 1.6    P* .97 [.93, 1]

(rise: last less first budget, with the standard error of two independent means). The law is not rejected for hard
positions of each size: better than a constant and than lines in C and log C, the left-out last budget included; R^2
.83, .80, .97 over single runs, .995 or more over budgets' means. Intervals of A and alpha are wide (alpha .99 [.42,
2.2] at 64x4). No law is claimed for easy and medium positions, where thinking gains 1 to 3 points.
"""

from dataclasses import replace
from pathlib import Path

from rpt_jax.config import CheckpointConfig, Config, EvaluateConfig, ModelConfig
from rpt_jax.scaling.sweep_cell import Cell
from rpt_jax.study import quickstart
from rpt_jax.study.base import BaseConfig
from rpt_jax.study.quickstart import QuickstartConfig

SIZES = {"64x4": (64, 4), "96x4": (96, 4), "128x4": (128, 4)}  # width and layers
BUDGETS = (12, 24, 48, 96, 192)  # updates
SEEDS = (0, 1, 2)


def settings(size: str, seed: int) -> QuickstartConfig:
    """The quickstart's, with a base of this size."""
    width, layers = SIZES[size]
    base = BaseConfig(width=width, layers=layers)
    return QuickstartConfig(seed=seed, from_scratch=True, base=base, learning_rate=2e-4)


def cells(folder: Path) -> list[Cell]:
    """All runs; short ones first, so that a sweep that is stopped early has whole curves of few seeds."""
    return [cell(folder, size, seed, steps) for seed in SEEDS for size in SIZES for steps in BUDGETS]


def cell(folder: Path, size: str, seed: int, steps: int) -> Cell:
    stage = f"base-{size}-{seed}"
    base = Path(folder) / "stages" / stage
    common: Config = quickstart.rpt_config(settings(size, seed), ModelConfig(remat="dots"), base)
    config = replace(
        common,
        seed=1000 * seed + steps,  # of its own: with the base's, a short run would be the beginning of a long one
        steps=steps,
        policy=str(base / "base"),
        positions=replace(common.positions, annotated=str(base / "annotated")),
        evaluate=EvaluateConfig(annotated=str(base / "held_out"), every=0, positions=512, batch_size=128),
        checkpoint=CheckpointConfig(every=20, keep=1),
    )
    return Cell(f"w{size}-{steps}-{seed}", size, seed, config, needs=stage)


def prepare(stage: str, folder: Path) -> None:
    """A base, and the entropy of every token of the training and held-out texts under it."""
    _, size, seed = stage.split("-")
    config = settings(size, int(seed))
    quickstart.prepare(config, folder, lambda line, **_: print(line, flush=True))
