"""Rows of results -> pictures: how a run learnt, accuracies before and after, curves. Reads plain numbers, no models.

Figures stand on matplotlib's Agg canvas alone, without pyplot and its global state; the same rows give the same file,
byte for byte, with one version of matplotlib. Colours are those of Okabe and Ito, which colour-blind readers can tell
apart; lines differ in marker, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rpt_jax.records import InputError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P")
INK, QUIET, FAINT = "#222222", "#666666", "#DDDDDD"  # what is read; axes; grid
DOTS_PER_INCH = 150

PANELS = {  # key of metrics.jsonl -> title, whether it is a share
    "reward": ("Reward", True),
    "accuracy": ("Right answers", True),
    "format_rate": ("Format rate", True),
    "length": ("Response length (tokens)", False),
}


def learning_curve(rows: Sequence[Mapping], path: str | Path, *, title: str = "Learning curve") -> Path:
    """Reward, right answers, format rate and response length of the rollouts over the updates, in a PNG.

    Faint lines are the steps, the strong line their running mean. A panel whose key no row has is left out, and so is
    the reward where it equals the accuracy, as with prefix matching.

    Args:
        rows: of metrics.jsonl, {"step": updates made, "reward": ..., ...}.

    Raises InputError where there is nothing to draw.
    """
    panels = [key for key in PANELS if any(row.get(key) is not None for row in rows)]
    if {"reward", "accuracy"} <= set(panels) and all(row.get("reward") == row.get("accuracy") for row in rows):
        panels.remove("reward")
    if not panels:
        raise InputError(f"{len(rows)} rows have none of {', '.join(PANELS)}: give the rows of metrics.jsonl")
    figure, axes = _figure(title, (3.6 * len(panels), 3.4), len(panels))
    for axis, key in zip(axes, panels, strict=True):
        name, is_share = PANELS[key]
        axis.set_title(name, fontsize=11, color=INK, loc="left")
        _draw_steps(axis, rows, key)
        axis.set_xlabel("updates", fontsize=10, color=INK)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if is_share:
            axis.set_ylim(-0.02, 1.02)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axis.set_ylim(bottom=0)
    return _save(figure, path)


def before_after(
    bars: Mapping[str, Mapping[str, tuple[float | None, float | None]]],
    path: str | Path,
    *,
    title: str,
    note: str = "",
) -> Path:
    """Accuracies of several policies, a bar for each mode, in a PNG.

    Args:
        bars: {"base": {"arg-max": (accuracy, standard error), "reasoning": ...}, "RPT": {...}, ...}; policies and modes
            in the order given. A mode may be missing, an accuracy None (no bar), an error None or 0 (no whisker).
        note: a line below the axis, such as the number of positions.

    Raises InputError where there is nothing to draw.
    """
    modes = list(dict.fromkeys(mode for of_policy in bars.values() for mode in of_policy))
    if not modes:
        raise InputError("no accuracy to draw: give at least one policy with one mode")
    figure, (axis,) = _figure(title, (max(6.0, 1.0 + 1.6 * len(bars)), 4.0), 1)
    width = 0.8 / len(modes)
    for place, of_policy in enumerate(bars.values()):
        there = [mode for mode in modes if of_policy.get(mode, (None, None))[0] is not None]
        for i, mode in enumerate(there):
            centre = place + (i - (len(there) - 1) / 2) * width
            _draw_bar(axis, centre, width, *of_policy[mode], COLOURS[modes.index(mode) % len(COLOURS)], mode)
    axis.set_xticks(range(len(bars)), list(bars), fontsize=11, color=INK)
    axis.set_xlim(-0.5, len(bars) - 0.5)
    axis.tick_params(axis="x", length=0)
    axis.set_ylim(0, 1.08)
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylabel("next-token accuracy", fontsize=11, color=INK)
    if note:
        axis.set_xlabel(note, fontsize=10, color=QUIET, labelpad=8)
    named = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    _legend(figure, {mode: named[mode] for mode in modes if mode in named})
    return _save(figure, path)


@dataclass(frozen=True)
class Curve:
    """Points of one kind in a panel."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    look: Literal["points", "joined", "line", "dashes"]  # measured, measured in order, a law that fits, another law
    colour: int = 0  # of COLOURS and MARKERS; dashes are grey
    errors: Sequence[float] | Sequence[tuple[float, float]] = ()  # whiskers: as far on both sides | (below, above)


@dataclass(frozen=True)
class Panel:
    """One pair of axes and what is drawn between them; y begins at 0."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    doublings: bool = False  # the x axis goes by factors of two, a tick at each x
    decades: bool = False  # the x axis goes by factors of ten
    shares: bool = False  # y is a share, shown in per cent
    top: float | None = None  # where y ends, for curves that leave the panel; None: above all of them


def curves(panels: Sequence[Panel], path: str | Path, *, title: str) -> Path:
    """Panels, two in a row, each with its own legend, in a PNG; raises InputError where there is nothing to draw."""
    if not any(len(curve.x) for panel in panels for curve in panel.curves):
        raise InputError(f"no points in {len(panels)} panels: measure at least one")
    rows = -(-len(panels) // 2)
    figure, axes = _figure(title, (9.6, 0.5 + 3.6 * rows), min(2, len(panels)), rows)
    for axis, panel in zip(axes, panels, strict=False):
        for order, curve in enumerate(panel.curves):
            _draw_curve(axis, curve, order)
        axis.set_title(panel.title, fontsize=11, color=INK, loc="left")
        axis.set_xlabel(panel.x, fontsize=10, color=INK)
        axis.set_ylabel(panel.y, fontsize=10, color=INK)
        if panel.doublings:
            places = sorted({x for curve in panel.curves for x in curve.x})
            axis.set_xscale("log", base=2)
            axis.set_xticks(places, [f"{x:.3g}" for x in places])
            axis.set_xticks([], minor=True)
        if panel.decades:
            axis.set_xscale("log")
        if panel.shares:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_ylim(0, panel.top)
        axis.legend(loc="best", fontsize=9, frameon=False, labelcolor=INK)
    for axis in axes[len(panels) :]:
        axis.remove()
    return _save(figure, path)


def _draw_curve(axis: Axes, curve: Curve, order: int) -> None:
    colour, marker = COLOURS[curve.colour % len(COLOURS)], MARKERS[curve.colour % len(MARKERS)]
    looks = {
        "points": {"color": colour, "marker": marker, "linestyle": "none"},
        "joined": {"color": colour, "marker": marker, "linewidth": 1.4},
        "line": {"color": colour, "linewidth": 1.2},
        "dashes": {"color": QUIET, "linewidth": 1.2, "linestyle": (0, (4, 3))},
    }
    if len(curve.errors):
        style = {"fmt": "none", "ecolor": colour, "elinewidth": 1.0, "capsize": 2}
        axis.errorbar(curve.x, curve.y, np.transpose(curve.errors), **style, zorder=2 + order)
    axis.plot(curve.x, curve.y, **looks[curve.look], markersize=5, label=curve.label, zorder=2 + order)


def fitted_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """(slope, intercept, R^2) of the least-squares line; R^2 = 1 - residual / total sum of squares."""
    slope, intercept = np.polyfit(x, y, 1)
    residuals = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return float(slope), float(intercept), float(1 - (residuals**2).sum() / ((y - np.mean(y)) ** 2).sum())


def _draw_bar(axis: Axes, centre: float, width: float, value: float, error: float | None, colour: str, mode: str):
    """A bar with its whisker, the value in per cent above both."""
    axis.bar(centre, value, 0.92 * width, color=colour, label=mode, zorder=2)
    if error:
        axis.errorbar(centre, value, error, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3, zorder=3)
    above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    axis.annotate(f"{100 * value:.0f}", (centre, value + (error or 0)), **above, fontsize=10, color=INK)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and those up to window // 2 before and behind it, fewer at the ends; nan is left out."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.nan if np.isnan(part).all() else np.nanmean(part) for part in parts])


def _draw_steps(axis: Axes, rows: Sequence[Mapping], key: str) -> None:
    """Rollouts of training: every step faintly, the running mean over a twentieth of them."""
    steps = np.array([row["step"] for row in rows])
    values = np.array([np.nan if row.get(key) is None else row[key] for row in rows], float)
    window = len(rows) // 20
    if window >= 2:
        axis.plot(steps, values, color="#BBBBBB", linewidth=0.8, zorder=1)
        values = running_mean(values, window)
    axis.plot(steps, values, color=INK, linewidth=1.6, zorder=2)


def _figure(title: str, inches: tuple[float, float], columns: int, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=inches, dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, color=INK, x=0.01, ha="left")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_facecolor("white")
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(QUIET)
        axis.grid(axis="y", color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=10, colors=INK, color=QUIET)
    return figure, axes


def _legend(figure: Figure, handles: Mapping) -> None:
    if len(handles) > 1:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(len(handles), 4),
            fontsize=10,
            frameon=False,
            labelcolor=INK,
        )


def _save(figure: Figure, path: str | Path) -> Path:
    """Writes the PNG without the version and date that matplotlib would put into it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path
