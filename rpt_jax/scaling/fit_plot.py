"""`rpt fit`: the fitted scaling laws as a table and a picture.

In: curves and what fit.py makes of them. Out: lines for a terminal, and a PNG with a panel for each split.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rpt_jax.scaling import power_law
from rpt_jax.scaling.fit import LAW, Curve
from rpt_jax.study import plots

NORMAL_95 = 1.96
NAMES = {"A": "A", "alpha": "alpha", "P_star": "P*"}


def table(found: Mapping[str, Mapping[str, Mapping]]) -> dict[str, dict]:
    """A row for each size and split, for people: figures with their intervals where there is a law, and the verdict."""
    rows = {}
    for size, splits in found.items():
        for split, figures in splits.items():
            is_law = figures["verdict"] == LAW
            row = {shown: _with_interval(figures, key) if is_law else "" for key, shown in NAMES.items()}
            row["R^2"] = "" if figures["r2"] is None else f"{figures['r2']:.3f}"
            rows[f"{size} {split}"] = row | {"verdict": figures["verdict"], "because": figures["reason"]}
    return rows


def _with_interval(figures: Mapping, key: str) -> str:
    low, high = ("open" if end is None else f"{end:.3g}" for end in figures["intervals"][key])
    return f"{figures[key]:.3g} [{low}, {high}]"


def draw(curves: Sequence[Curve], found: Mapping[str, Mapping[str, Mapping]], path: Path) -> Path:
    """A panel for each split: means over seeds with 95 % intervals, and the law of each size that has one."""
    sizes = list(dict.fromkeys(curve.size for curve in curves))
    panels = []
    for split in dict.fromkeys(curve.split for curve in curves):
        own = [curve for curve in curves if curve.split == split]
        drawn = [each for curve in own for each in _drawn(curve, found[curve.size][split], sizes.index(curve.size))]
        highest = max(max(np.add(each.y, np.transpose(each.errors)[-1] if each.errors else 0)) for each in drawn)
        panels.append(
            plots.Panel(
                f"{_plain(split)} positions",
                "compute of RPT (FLOPs)",
                "next-token accuracy",
                drawn,
                decades=True,
                shares=True,
                top=min(1.02, 1.35 * highest),
            )
        )
    title = "Accuracy and compute: separately trained runs, means over seeds with 95 % intervals"
    return plots.curves(panels, path, title=title)


def _plain(name: str) -> str:
    """A name from the table as it stands: between dollars matplotlib would look for a formula."""
    return name.replace("$", r"\$")


def _drawn(curve: Curve, figures: Mapping, colour: int) -> list[plots.Curve]:
    """Points of one size, and its law over the measured compute."""
    cells, y_N = curve.cells, curve.accuracy_N
    numbers = np.unique(cells.budgets_N)
    variances_N = power_law.position_variances(cells, y_N[None])[0] + figures.get("scatter", 0.0) ** 2
    points = []
    for number in numbers:
        own_N = cells.budgets_N == number
        error = NORMAL_95 * variances_N[own_N].sum() ** 0.5 / own_N.sum()
        points.append((cells.compute_N[own_N].mean(), y_N[own_N].mean(), error))
    x, y, errors = (list(map(float, column)) for column in zip(*points, strict=True))
    is_law = figures["verdict"] == LAW
    label = f"{_plain(curve.size)}: " + (
        f"P* {figures['P_star']:.2f}, R² {figures['r2']:.3f}" if is_law else figures["verdict"]
    )
    drawn = [plots.Curve(label, x, y, "points", colour, errors=errors)]
    if is_law:
        along = np.geomspace(min(x), max(x), 100)
        fitted = figures["A"] / along ** figures["alpha"] + figures["P_star"]
        drawn.append(plots.Curve("", along.tolist(), fitted.tolist(), "line", colour))
    return drawn
