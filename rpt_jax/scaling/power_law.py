"""Least squares of accuracy against compute: the law P(C) = A / C^alpha + P*, lines and a constant, many sets at once.

In: accuracies of M data sets at the same N cells (separately trained runs). Out: the best curve of each kind, and how
much worse the best law with a given alpha, A or P* is, from which intervals are made (bootstrap.py).

Given alpha, the law is linear in a = A / Cmin^alpha, the rise that is still missing at the smallest compute, and P*, so
the best of both within a <= 0 and 0 <= P* <= 1 has a closed form [variable projection: Golub and Pereyra, SIAM J.
Numer. Anal. 10, 1973]. What is left is one dimension, alpha, and all of it is tried: 300 starts, LOWEST to HIGHEST.

Axes here: N cells, M data sets, J trial curves.
"""

from dataclasses import dataclass

import numpy as np

LOWEST, HIGHEST = 0.02, 8.0  # of alpha: nearly a line in log C; all of the rise between the first two budgets
ALPHAS_J = np.geomspace(LOWEST, HIGHEST, 300)


@dataclass(frozen=True)
class Cells:
    """What does not change from one simulated data set to the next."""

    compute_N: np.ndarray  # FLOPs
    positions_N: np.ndarray  # outcomes behind an accuracy, as many binomial draws as have its standard error
    budgets_N: np.ndarray  # int, cells of one number have one budget
    seeds_N: np.ndarray  # int, cells of one number share a seed

    @property
    def ratios_N(self) -> np.ndarray:
        """C / Cmin."""
        return self.compute_N / self.compute_N.min()

    def __getitem__(self, kept_N) -> "Cells":
        parts = (self.compute_N, self.positions_N, self.budgets_N, self.seeds_N)
        return Cells(*(part[kept_N] for part in parts))


@dataclass(frozen=True)
class Law:
    """The best law of each data set."""

    alpha_M: np.ndarray
    missing_M: np.ndarray  # a = A / Cmin^alpha, at most 0
    ceiling_M: np.ndarray  # P*
    squares_M: np.ndarray  # weighted sum of squares that is left
    weights_MN: np.ndarray  # 1 / (variance by positions + scatter)


def law_at(cells: Cells, alpha: float, missing: float, ceiling: float, compute_X: np.ndarray) -> np.ndarray:
    """P(C) at some computes."""
    return ceiling + missing * (compute_X / cells.compute_N.min()) ** -alpha


def position_variances(cells: Cells, y_MN: np.ndarray) -> np.ndarray:
    """Binomial variance p (1 - p) / n, p the mean of the cells of a budget with one success and one failure more.

    By the budget and not the cell, so that a cell that came out high by chance gets no more weight for it.
    """
    same_NN = cells.budgets_N[:, None] == cells.budgets_N[None, :]
    n_N = cells.positions_N
    pooled_N = same_NN @ n_N
    p_MN = ((y_MN * n_N) @ same_NN + 1) / (pooled_N + 2)
    return p_MN * (1 - p_MN) / n_N


def fit_law(cells: Cells, y_MN: np.ndarray) -> Law:
    """Weighted least squares in two rounds: by positions alone, then with the scatter that the first round finds.

    The scatter of cells beyond their positions is DerSimonian and Laird's moment estimate [Control. Clin. Trials 7,
    1986] with three fitted parameters: max(0, (Q - (N - 3)) / ((1 - 3 / N) sum w)).
    """
    variances_MN = position_variances(cells, y_MN)
    first = best_law(cells, y_MN, 1 / variances_MN)
    N = y_MN.shape[1]
    free = max(N - 3, 1)
    excess_M = (first.squares_M - free) / (free / N * first.weights_MN.sum(axis=1))
    return best_law(cells, y_MN, 1 / (variances_MN + np.maximum(excess_M, 0)[:, None]))


def best_law(cells: Cells, y_MN: np.ndarray, weights_MN: np.ndarray) -> Law:
    """The law with the least weighted squares: over all trial alphas, then over a finer grid around the best one."""
    squares_MJ, _, _ = _given_shape(y_MN, weights_MN, _shapes(cells, ALPHAS_J))
    best_M = squares_MJ.argmin(axis=1)
    steps = np.log(ALPHAS_J[1] / ALPHAS_J[0]) * np.linspace(-1, 1, 41)
    alpha_MJ = np.clip(ALPHAS_J[best_M][:, None] * np.exp(steps), LOWEST, HIGHEST)
    x_MJN = cells.ratios_N ** -alpha_MJ[:, :, None]
    squares_MJ, missing_MJ, ceiling_MJ = _given_shape(y_MN, weights_MN, x_MJN)
    at = (np.arange(len(y_MN)), squares_MJ.argmin(axis=1))
    return Law(alpha_MJ[at], missing_MJ[at], ceiling_MJ[at], squares_MJ[at], weights_MN)


def squares_at_alpha(cells: Cells, y_MN: np.ndarray, weights_MN: np.ndarray, alpha_J: np.ndarray) -> np.ndarray:
    """Least weighted squares of laws with each alpha; [M, J]."""
    return _given_shape(y_MN, weights_MN, _shapes(cells, alpha_J))[0]


def squares_at_ceiling(cells: Cells, y_MN: np.ndarray, weights_MN: np.ndarray, ceiling: float) -> np.ndarray:
    """Least weighted squares of laws with this P*; [M]."""
    x_JN = _shapes(cells, ALPHAS_J)
    left_MN = weights_MN * (y_MN - ceiling)
    xx_MJ, xy_MJ = weights_MN @ (x_JN**2).T, left_MN @ x_JN.T
    missing_MJ = np.minimum(xy_MJ / xx_MJ, 0)
    base_M1 = (left_MN * (y_MN - ceiling)).sum(axis=1, keepdims=True)
    return (base_M1 - 2 * missing_MJ * xy_MJ + missing_MJ**2 * xx_MJ).min(axis=1)


def squares_at_coefficient(
    cells: Cells, y_MN: np.ndarray, weights_MN: np.ndarray, log_coefficient: float
) -> np.ndarray:
    """Least weighted squares of laws with this ln(-A); [M].

    A changes by many powers of ten with alpha, so the trial curves go by a: alpha = ln(A / a) / ln Cmin.
    """
    missing_J = np.geomspace(1e-3, 2.0, 500)  # a law below P* - 2 at Cmin would be far below 0 there
    alpha_J = (log_coefficient - np.log(missing_J)) / np.log(cells.compute_N.min())
    possible_J = (alpha_J >= LOWEST) & (alpha_J <= HIGHEST)
    if not possible_J.any():
        return np.full(len(y_MN), np.inf)
    part_JN = -missing_J[possible_J][:, None] * _shapes(cells, alpha_J[possible_J])
    total_M1 = weights_MN.sum(axis=1, keepdims=True)
    wy_MN = weights_MN * y_MN
    yy_M1, pp_MJ, py_MJ = (wy_MN * y_MN).sum(axis=1, keepdims=True), weights_MN @ (part_JN**2).T, wy_MN @ part_JN.T
    y_M1, p_MJ = wy_MN.sum(axis=1, keepdims=True), weights_MN @ part_JN.T
    ceiling_MJ = np.clip((y_M1 - p_MJ) / total_M1, 0, 1)
    squares_MJ = yy_M1 - 2 * py_MJ + pp_MJ - 2 * ceiling_MJ * (y_M1 - p_MJ) + ceiling_MJ**2 * total_M1
    return squares_MJ.min(axis=1)


def fit_line(x_N: np.ndarray, y_MN: np.ndarray, weights_MN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(intercepts, slopes, least weighted squares) of straight lines in x; a constant where all x are equal."""
    total_M1 = weights_MN.sum(axis=1, keepdims=True)
    dx_MN = x_N - (weights_MN @ x_N)[:, None] / total_M1
    mean_M1 = (weights_MN * y_MN).sum(axis=1, keepdims=True) / total_M1
    xx_M = (weights_MN * dx_MN**2).sum(axis=1)
    slope_M = (weights_MN * dx_MN * (y_MN - mean_M1)).sum(axis=1) / np.where(xx_M > 0, xx_M, 1)
    left_MN = y_MN - mean_M1 - slope_M[:, None] * dx_MN
    intercept_M = mean_M1[:, 0] - slope_M * (weights_MN @ x_N) / total_M1[:, 0]
    return intercept_M, slope_M, (weights_MN * left_MN**2).sum(axis=1)


def _shapes(cells: Cells, alpha_J: np.ndarray) -> np.ndarray:
    """(C / Cmin)^-alpha, [J, N]."""
    return cells.ratios_N ** -np.asarray(alpha_J)[:, None]


def _given_shape(y_MN: np.ndarray, weights_MN: np.ndarray, x: np.ndarray):
    """(squares, a, P*), each [M, J], of the best P* + a x with a <= 0 and 0 <= P* <= 1; x is [J, N] or [M, J, N].

    A convex problem: its solution is that without bounds if it keeps them, or else the best point of a bound.
    """
    wy_MN = weights_MN * y_MN
    if x.ndim == 2:
        x_MJ, xx_MJ, xy_MJ = weights_MN @ x.T, weights_MN @ (x**2).T, wy_MN @ x.T
    else:
        x_MJ, xx_MJ, xy_MJ = (
            np.einsum("mn,mjn->mj", w_MN, of_MJN) for w_MN, of_MJN in ((weights_MN, x), (weights_MN, x**2), (wy_MN, x))
        )
    total_M1, y_M1 = weights_MN.sum(axis=1, keepdims=True), wy_MN.sum(axis=1, keepdims=True)
    yy_M1 = (wy_MN * y_MN).sum(axis=1, keepdims=True)

    def squares(a, ceiling):
        cross = ceiling * y_M1 + a * xy_MJ - a * ceiling * x_MJ
        return yy_M1 - 2 * cross + a**2 * xx_MJ + ceiling**2 * total_M1

    spread_MJ = np.maximum(total_M1 * xx_MJ - x_MJ**2, 1e-12 * total_M1 * xx_MJ)
    a_MJ = (total_M1 * xy_MJ - x_MJ * y_M1) / spread_MJ
    ceiling_MJ = (y_M1 - a_MJ * x_MJ) / total_M1
    inside_MJ = (a_MJ <= 0) & (ceiling_MJ >= 0) & (ceiling_MJ <= 1)
    found = (np.where(inside_MJ, squares(a_MJ, ceiling_MJ), np.inf), a_MJ, ceiling_MJ)
    flat_MJ = np.broadcast_to(np.clip(y_M1 / total_M1, 0, 1), a_MJ.shape)
    edges = [(np.zeros_like(a_MJ), flat_MJ)]
    edges += [(np.minimum((xy_MJ - edge * x_MJ) / xx_MJ, 0), np.full_like(a_MJ, edge)) for edge in (0.0, 1.0)]
    for a, ceiling in edges:
        tried_MJ = np.where(inside_MJ, np.inf, squares(a, ceiling))
        better_MJ = tried_MJ < found[0]
        found = tuple(np.where(better_MJ, new, old) for new, old in zip((tried_MJ, a, ceiling), found, strict=True))
    return found
