"""How accuracy grows with RL compute: the law P(C) = A / C^alpha + P*  [RPT, arXiv 2506.08007, section 4.2].

In: rows of a sweep, a separately trained run each (size, seed, steps, FLOPs really spent, accuracy by split). Out, for
each size and split: A < 0, alpha > 0 and 0 <= P* <= 1 by least squares (power_law.py), R^2, 95 % intervals
(bootstrap.py), and a verdict, which says whether these data support the law at all. C is the FLOPs of sampling and
updates, averaged over the seeds of a budget; what a base costs is not in it, nor is evaluation.

A law has to beat a constant, a line in C and a line in log C:
- by AICc = Q + 2 k + 2 k (k + 1) / (N - k - 1), k parameters, Q weighted squares in units of the noise;
- by a gain in Q which data made by the other curve reach in fewer than 5 of 100 simulated sets;
- where the largest budget is left out and predicted from the others: no line may come nearer.
And where budgets have several seeds, the means of budgets have to lie on the curve as well as the scatter between seeds
lets expect (F test for lack of fit): an S-shaped rise is neither a law nor a line.
R^2 is reported and decides nothing: on five points that rise, a line has a high one, too.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rpt_jax.json_file import write_whole
from rpt_jax.records import InputError
from rpt_jax.scaling import bootstrap, power_law
from rpt_jax.scaling.power_law import Cells, Law
from rpt_jax.scaling.table import read_rows

log = logging.getLogger(__name__)

SPLITS = ("easy", "medium", "hard")
LAW, FALLS, CONSTANT, UNDECIDED, TOO_FEW = "law", "falls", "constant", "undecided", "too few budgets"
NONE_FITS = "no curve fits"
LINES = {"line in C": np.array, "line in log C": np.log}  # verdict -> x of compute
FEWEST = 4  # budgets: parameters + 1
FEWEST_CELLS = 5  # or the law's AICc is infinite
PARAMETERS = {LAW: 3, CONSTANT: 1} | dict.fromkeys(LINES, 2)
REJECTED = 0.05  # chance of a gain below which the other curve is out
MISFIT = 0.01  # chance of a lack of fit below which a curve is out
MOST = 1e60  # FLOPs or outcomes that can be computed with


@dataclass(frozen=True)
class FitSettings:
    """The scaling law, fitted to each model size and split of a sweep."""

    figure: Literal["reasoning", "argmax"] = "reasoning"  # the accuracy that is fitted
    splits: tuple[str, ...] = SPLITS  # those that the table has
    sets: int = 1000  # simulated data sets behind an interval or a test
    seed: int = 0  # of the simulation
    plot: str = ""  # PNG to write; empty: beside the table, none: no plot


@dataclass(frozen=True)
class Curve:
    """Accuracies of one size and split."""

    size: str
    split: str
    cells: Cells
    accuracy_N: np.ndarray
    steps_N: np.ndarray  # updates, the budget that was asked for


def read_curves(path: Path, settings: FitSettings) -> list[Curve]:
    """Curves by size and split from a sweep's table; rows that failed, or lack a split, are left out.

    Columns: size, seed, steps, flops_sample, flops_update, and for each split `SPLIT.reasoning` (or argmax),
    `SPLIT.positions`, `SPLIT.standard_error` (of reasoning, may be missing: binomial). Raises InputError.
    """
    if not Path(path).is_file():
        raise InputError(f"no table {str(path)!r}: give the csv file that `rpt sweep` has written")
    rows = read_rows(path)
    done = [(number, row) for number, row in enumerate(rows, 2) if row.get("status", "done") == "done"]
    if not done:
        raise InputError(f"{path} has {len(rows)} rows and none of them is done: let `rpt sweep` finish some cells")
    missing = {"size", "seed", "steps", "flops_sample", "flops_update"} - done[0][1].keys()
    if missing:
        raise InputError(f"{path} has no column {', '.join(sorted(missing))}: give the table of `rpt sweep`")
    splits = [split for split in settings.splits if f"{split}.{settings.figure}" in done[0][1]]
    if not splits:
        raise InputError(
            f"{path} has no column {settings.splits[0] if settings.splits else 'SPLIT'}.{settings.figure}: choose "
            "--splits and --figure that are there"
        )
    curves = []
    for size in dict.fromkeys(row["size"] for _, row in done):
        for split in splits:
            own = [(n, row) for n, row in done if row["size"] == size and row[f"{split}.{settings.figure}"]]
            if own:
                curves.append(_curve(path, size, split, own, settings.figure))
    return curves


def _curve(path: Path, size: str, split: str, rows: Sequence[tuple[int, dict]], figure: str) -> Curve:
    columns = []
    for number, row in rows:
        try:
            compute = float(row["flops_sample"]) + float(row["flops_update"])
            accuracy, positions = float(row[f"{split}.{figure}"]), float(row[f"{split}.positions"])
            standard_error = float(row.get(f"{split}.standard_error") or 0) if figure == "reasoning" else 0.0
            columns.append((compute, accuracy, draws(accuracy, positions, standard_error), float(row["steps"])))
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}:{number}: {split} cannot be read ({error}): mend or delete the row") from error
        are_numbers = all(0 <= each < MOST for each in (positions, *columns[-1]))
        if not (are_numbers and compute > 0 and accuracy <= 1 and positions > 0):
            raise InputError(
                f"{path}:{number}: flops {compute:g}, {split}.{figure} {accuracy:g}, positions {positions:g}: expected "
                "FLOPs and positions above 0 and an accuracy from 0 to 1"
            )
    compute_N, accuracy_N, draws_N, steps_N = np.array(columns).T
    budgets_N = np.unique(steps_N, return_inverse=True)[1]
    compute_N = _means(budgets_N, compute_N)[budgets_N]
    seeds_N = np.unique([row["seed"] for _, row in rows], return_inverse=True)[1]
    return Curve(size, split, Cells(compute_N, draws_N, budgets_N, seeds_N), accuracy_N, steps_N)


def draws(accuracy: float, positions: float, standard_error: float) -> float:
    """As many binomial outcomes as have this standard error; positions where there is none to go by."""
    variance = accuracy * (1 - accuracy)
    return variance / standard_error**2 if standard_error > 0 and variance > 0 else positions


def fit_curve(curve: Curve, sets: int, seed: int) -> dict:
    """Figures of one size and split; A, alpha and P_star are None where the data do not rise, or are too few."""
    cells, y_N = curve.cells, curve.accuracy_N
    budgets = len(np.unique(cells.budgets_N))
    about = {"cells": len(y_N), "budgets": budgets, "seeds": len(np.unique(cells.seeds_N))}
    empty = {"A": None, "alpha": None, "P_star": None, "r2": None, "r2_of_means": None, "intervals": None}
    if budgets < FEWEST:
        reason = f"{budgets} budgets: three parameters need {FEWEST} or more"
        return empty | {"verdict": TOO_FEW, "reason": reason} | about
    if len(y_N) < FEWEST_CELLS:
        reason = f"{len(y_N)} cells: to weigh three parameters takes {FEWEST_CELLS} or more: add a seed or a budget"
        return empty | {"verdict": TOO_FEW, "reason": reason} | about
    rng = np.random.default_rng(seed)
    law = power_law.fit_law(cells, y_N[None])
    tests = compare(cells, y_N, law, sets, rng)
    error_N = np.sqrt(1 / law.weights_MN[0])
    shown = about | tests | {"scatter": float(np.sqrt(np.maximum(error_N**2 - _by_positions(cells, y_N), 0).mean()))}
    if law.missing_M[0] >= 0:
        return empty | _judged(tests, None) | shown
    alpha, missing, ceiling = (float(part[0]) for part in (law.alpha_M, law.missing_M, law.ceiling_M))
    fitted_N = power_law.law_at(cells, alpha, missing, ceiling, cells.compute_N)
    ranges = bootstrap.intervals(cells, y_N, law, sets, rng)
    fitted = {
        "A": missing * float(cells.compute_N.min()) ** alpha,
        "alpha": alpha,
        "P_star": ceiling,
        "r2": r_squared(y_N, fitted_N),
        "r2_of_means": r_squared(_means(cells.budgets_N, y_N), _means(cells.budgets_N, fitted_N)),
        "intervals": {name: list(ends) for name, ends in ranges.items()},
    }
    return fitted | _judged(tests, ranges["alpha"]) | shown


def compare(cells: Cells, y_N: np.ndarray, law: Law, sets: int, rng: np.random.Generator) -> dict:
    """How the law and other curves stand.

    aicc by curve; chance, by curve other than the law, of the law's gain; misfit by curve, chance of its lack of fit;
    held_out, the largest budget predicted from the others; rises, whether the line in log C does.
    """
    squares = {LAW: float(law.squares_M[0])}
    chance, own = {}, law.weights_MN
    x_of = {CONSTANT: np.zeros_like(cells.compute_N)} | {name: x(cells.ratios_N) for name, x in LINES.items()}
    for name, x_N in x_of.items():
        intercept_M, slope_M, squares_M = power_law.fit_line(x_N, y_N[None], own)
        squares[name] = float(squares_M[0])
        fitted_N = np.clip(intercept_M + slope_M * x_N, 0, 1)

        def gains(y_MN: np.ndarray, name: str = name, x_N: np.ndarray = x_N) -> np.ndarray:
            refit = power_law.fit_law(cells, y_MN)
            best_M = refit.squares_M
            if name == CONSTANT:  # anything better than a constant counts, a line too
                best_M = np.minimum(best_M, _lines(cells, y_MN, refit.weights_MN).min(axis=0))
            return power_law.fit_line(x_N, y_MN, refit.weights_MN)[2] - best_M

        simulated_MN = bootstrap.simulate(cells, y_N, fitted_N, sets, rng)
        chance[name] = bootstrap.chance_of_gain(gains(y_N[None])[0], gains(simulated_MN))
    slope = power_law.fit_line(x_of["line in log C"], y_N[None], own)[1][0]
    return {
        "aicc": aicc(squares, len(y_N)),
        "chance": chance,
        "misfit": misfit(cells, y_N, own[0], squares, rng),
        "held_out": held_out(cells, y_N),
        "rises": bool(slope > 0),
    }


def _lines(cells: Cells, y_MN: np.ndarray, weights_MN: np.ndarray) -> np.ndarray:
    """Least squares of the straight lines, [lines, M]."""
    return np.array([power_law.fit_line(x(cells.ratios_N), y_MN, weights_MN)[2] for x in LINES.values()])


def aicc(squares: dict[str, float], count: int) -> dict[str, float | None]:
    """Akaike's criterion for small samples of each curve [Hurvich and Tsai, Biometrika 76, 1989]; None: infinite."""
    found = {}
    for name, Q in squares.items():
        k = PARAMETERS[name]
        found[name] = Q + 2 * k + 2 * k * (k + 1) / (count - k - 1) if count > k + 1 else None
    return found


def misfit(
    cells: Cells, y_N: np.ndarray, weights_N: np.ndarray, squares: dict[str, float], rng: np.random.Generator
) -> dict[str, float | None]:
    """Chance of as large a lack of fit, by curve; None where no budget has two cells or no degree of freedom is left.

    F = [(Q - Q_within) / (B - k)] / [Q_within / (N - B)], Q_within around the weighted mean of each of B budgets.
    """
    N, B = len(y_N), len(np.unique(cells.budgets_N))
    total_B = np.bincount(cells.budgets_N, weights_N)
    mean_N = (np.bincount(cells.budgets_N, weights_N * y_N) / total_B)[cells.budgets_N]
    within = float((weights_N * (y_N - mean_N) ** 2).sum())
    found = {}
    for name, Q in squares.items():
        free = B - PARAMETERS[name]
        if N == B or free < 1 or within == 0:
            found[name] = None
            continue
        F = (Q - within) / free / (within / (N - B))
        drawn_M = rng.chisquare(free, 20_000) / free / (rng.chisquare(N - B, 20_000) / (N - B))
        found[name] = float((1 + (drawn_M >= F).sum()) / 20_001)
    return found


def held_out(cells: Cells, y_N: np.ndarray) -> dict:
    """Mean accuracy of the largest budget, and what each curve predicts for it from the other budgets."""
    last_N = cells.budgets_N == cells.budgets_N[cells.compute_N.argmax()]
    rest, before = cells[~last_N], y_N[None, ~last_N]
    law = power_law.fit_law(rest, before)
    parts = (float(part[0]) for part in (law.alpha_M, law.missing_M, law.ceiling_M))
    predicted = {LAW: float(power_law.law_at(rest, *parts, cells.compute_N[last_N]).mean())}
    smallest = rest.compute_N.min()
    for name, x in LINES.items():
        intercept_M, slope_M, _ = power_law.fit_line(x(rest.ratios_N), before, law.weights_MN)
        predicted[name] = float((intercept_M + slope_M * x(cells.compute_N[last_N] / smallest)).mean())
    return {"observed": float(y_N[last_N].mean()), "predicted": predicted}


def _judged(tests: dict, alpha: bootstrap.Interval | None) -> dict:
    """verdict and reason."""
    criterion = {name: np.inf if value is None else value for name, value in tests["aicc"].items()}
    chance, ahead = tests["chance"], tests["held_out"]
    if chance[CONSTANT] >= REJECTED:
        return _because(CONSTANT, f"chance alone gives as much of a trend in {chance[CONSTANT]:.0%} of sets")
    if not tests["rises"]:
        return _because(FALLS, "accuracy falls as compute grows")
    line = min(LINES, key=criterion.get)
    best = line if criterion[line] <= criterion[LAW] else LAW
    if (misfit_of := tests["misfit"][best]) is not None and misfit_of < MISFIT:
        return _because(NONE_FITS, f"budgets' means are off the best curve, a {best} (chance {misfit_of:.1%})")
    if criterion[line] <= criterion[LAW]:
        return _because(line, f"AICc {criterion[line]:.1f} against {criterion[LAW]:.1f} of the law")
    possible = [name for name in LINES if chance[name] >= REJECTED]
    if possible:
        return _because(UNDECIDED, f"a {possible[0]} gives such a gain in {chance[possible[0]]:.0%} of sets")
    errors = {name: abs(value - ahead["observed"]) for name, value in ahead["predicted"].items()}
    nearer = [name for name in LINES if errors[name] < errors[LAW]]
    if nearer:
        return _because(
            UNDECIDED,
            f"left out, the largest budget is predicted better by a {nearer[0]} (off by {errors[nearer[0]]:.3f}, the "
            f"law by {errors[LAW]:.3f})",
        )
    if alpha is None or None in alpha:
        return _because(UNDECIDED, "alpha has no limit: the rise may lie between two budgets alone")
    return _because(LAW, "better than a constant and both lines, the left-out budget included")


def _because(verdict: str, reason: str) -> dict:
    return {"verdict": verdict, "reason": reason}


def _by_positions(cells: Cells, y_N: np.ndarray) -> np.ndarray:
    return power_law.position_variances(cells, y_N[None])[0]


def _means(budgets_N: np.ndarray, values_N: np.ndarray) -> np.ndarray:
    """Mean over the cells of each budget."""
    return np.bincount(budgets_N, values_N) / np.bincount(budgets_N)


def r_squared(y_N: np.ndarray, fitted_N: np.ndarray) -> float | None:
    """1 - residual / total sum of squares, every point alike; None where all are equal."""
    total = ((y_N - y_N.mean()) ** 2).sum()
    return float(1 - ((y_N - fitted_N) ** 2).sum() / total) if total > 0 else None


def fit(path: str, settings: FitSettings, draw: Callable[[Sequence[Curve], dict, Path], Path] | None = None) -> dict:
    """{size: {split: figures of fit_curve}}; draws the picture with `draw` (fit_plot.py).

    Writes the figures, too, as NAME.fit.json beside the picture, or the table where none is drawn, for `rpt report`.
    """
    if settings.sets < 100:
        raise InputError(f"sets={settings.sets}: an interval of 95 % needs 100 simulated sets or more (default: 1000)")
    curves = read_curves(Path(path), settings)
    found: dict[str, dict] = {}
    for curve in curves:
        found.setdefault(curve.size, {})[curve.split] = fit_curve(curve, settings.sets, settings.seed)
    picture = Path(path).with_suffix(".png") if settings.plot in ("", "none") else Path(settings.plot)
    if draw and settings.plot != "none":
        log.info("drew %s", draw(curves, found, picture))
    figures = picture.with_suffix(".fit.json")
    figures.parent.mkdir(parents=True, exist_ok=True)
    write_whole(figures, json.dumps(found) + "\n")
    log.info("wrote %s", figures)
    return found
