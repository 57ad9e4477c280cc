"""How sure a fitted law is: intervals and tests from data sets simulated with the noise of seeds, cells and positions.

In: cells, their accuracies, and the best law or line. Out: intervals of alpha, A and P*, and how often data made by a
line or a constant would look as much like a law as these do.

Resampled, parametrically: (1) an offset for each seed, shared by its cells (a base that is better or worse), (2) an
independent offset for each cell (one training run or another), (3) binomial noise of each cell's positions. Three seeds
are too few to draw from with replacement; and their variance is itself uncertain, so each simulated set draws the
variances of (1) and (2) first: mean squares of the residuals times their degrees of freedom over a chi-square, as in
generalised confidence intervals [Weerahandi, J. Am. Stat. Assoc. 88, 1993]. Not resampled: which positions are held
out, which is one choice for all cells (sweep_cell.EVALUATION_SEED), so that intervals are about these positions.

An interval has the values that the likelihood ratio does not reject: least squares with the value held, less the least
squares without, against the same statistic of sets simulated from the best law (never less than chi-square's quantile).
So an end may be open, which percentiles of refitted parameters never are.

Measured: per cent of 200 simulated sweeps whose 95 % intervals have the planted value (200 to 400 sets behind each;
laws of alpha, a = A / Cmin^alpha and P* over a factor of 40 in compute; offsets by their standard deviations):

    budgets x seeds x positions   alpha  a     P*    of seeds  of cells     A     alpha  P*
    5 x 3 x 500                   .5    -.6    .95   0         0            97.5  97.0   97.5
    5 x 3 x 500                   .2    -.6    .95   0         0            98.0  98.0   98.5
    5 x 3 x 500                   1     -.5    .9    0         0            93.0  93.0   98.0
    5 x 3 x 500                   .5    -.15   .45   0         0            96.0  96.0   96.0
    5 x 3 x 500                   .5    -.6    .995  0         0            95.5  96.0   97.0
    5 x 3 x 500                   .5    -.6    .95   .02       .01          98.5  98.5   97.5
    5 x 3 x 500                   .2    -.6    .95   .02       .01          98.0  99.0   99.0
    5 x 3 x 500                   1     -.5    .9    .02       .01          96.5  96.5   93.5
    5 x 3 x 500                   .5    -.15   .45   .02       .01          98.0  98.0   97.5
    5 x 3 x 500                   .5    -.6    .995  .02       .01          96.5  96.5   98.0
    5 x 3 x 500                   1     -.4    .7    .05       0            99.5  99.5   92.5
    10 x 3 x 2000                 .5    -.4    .7    .05       0            100   100    94.5

Percentiles of laws refitted to seeds drawn with replacement hold P* in 82 % of the last but one, where bases differ
most, and in 97 % of milder ones.

Axes as in power_law.py, and S seeds.
"""

import numpy as np

from rpt_jax.scaling import power_law
from rpt_jax.scaling.power_law import Cells, Law

CHI_SQUARE_95 = 3.841  # quantile .95 with one degree of freedom
CEILINGS_J = np.linspace(0, 1, 501)
LARGEST_OFFSET = 0.25  # standard deviation of a seed's or cell's offset, however uncertain it is
Interval = tuple[float | None, float | None]  # an end is None where the data set no limit


def noise(cells: Cells, y_N: np.ndarray, fitted_N: np.ndarray, M: int, rng: np.random.Generator):
    """(variances of seeds' offsets, of cells' offsets), [M] each: draws of what the residuals leave possible."""
    left_N = y_N - fitted_N
    seeds, place_N, count_S = np.unique(cells.seeds_N, return_inverse=True, return_counts=True)
    N, S = len(y_N), len(seeds)
    mean_S = np.bincount(place_N, left_N) / count_S
    binomial = power_law.position_variances(cells, y_N[None])[0].mean()
    free = max(N - S - 2, 1)
    within = ((left_N - mean_S[place_N]) ** 2).sum() / free
    within_M = within * free / rng.chisquare(free, M)
    if S > 1:
        between = (count_S * mean_S**2).sum() / (S - 1)
        between_M = between * (S - 1) / rng.chisquare(S - 1, M)
        seeds_M = np.maximum(between_M - within_M, 0) / count_S.mean()
    else:
        seeds_M = np.zeros(M)
    most = LARGEST_OFFSET**2
    return np.minimum(seeds_M, most), np.minimum(np.maximum(within_M - binomial, 0), most)


def simulate(cells: Cells, y_N: np.ndarray, fitted_N: np.ndarray, M: int, rng: np.random.Generator) -> np.ndarray:
    """M data sets of accuracies at the same cells, scattered around a fitted curve; [M, N]."""
    of_seeds_M, of_cells_M = noise(cells, y_N, fitted_N, M, rng)
    _, place_N = np.unique(cells.seeds_N, return_inverse=True)
    seed_MS = np.sqrt(of_seeds_M)[:, None] * rng.standard_normal((M, place_N.max() + 1))
    cell_MN = np.sqrt(of_cells_M)[:, None] * rng.standard_normal((M, len(y_N)))
    chance_MN = np.clip(fitted_N + seed_MS[:, place_N] + cell_MN, 0.001, 0.999)
    n_N = np.maximum(np.round(cells.positions_N), 1).astype(int)
    return rng.binomial(n_N, chance_MN) / n_N


def intervals(cells: Cells, y_N: np.ndarray, law: Law, sets: int, rng: np.random.Generator) -> dict[str, Interval]:
    """95 % intervals of A, alpha and P*; an end is None where the data set none, of P* then 0 or 1."""
    alpha, missing, ceiling = (float(part[0]) for part in (law.alpha_M, law.missing_M, law.ceiling_M))
    fitted_N = power_law.law_at(cells, alpha, missing, ceiling, cells.compute_N)
    y_MN = simulate(cells, y_N, fitted_N, sets, rng)
    refit = power_law.fit_law(cells, y_MN)
    weights_MN, squares_M = refit.weights_MN, refit.squares_M

    def limit(held_M: np.ndarray) -> float:
        return max(CHI_SQUARE_95, float(np.quantile(held_M - squares_M, 0.95)))

    own, least, Cmin = law.weights_MN, law.squares_M[0], cells.compute_N.min()
    found = {}
    trial_J = power_law.ALPHAS_J
    held_J = power_law.squares_at_alpha(cells, y_N[None], own, trial_J)[0]
    most = limit(power_law.squares_at_alpha(cells, y_MN, weights_MN, np.array([alpha]))[:, 0])
    found["alpha"] = _accepted(trial_J, held_J - least <= most, alpha)
    held_J = np.array([power_law.squares_at_ceiling(cells, y_N[None], own, each)[0] for each in CEILINGS_J])
    most = limit(power_law.squares_at_ceiling(cells, y_MN, weights_MN, ceiling))
    low, high = _accepted(CEILINGS_J, held_J - least <= most, ceiling)
    found["P_star"] = (0.0 if low is None else low, 1.0 if high is None else high)
    center = np.log(-missing) + alpha * np.log(Cmin)
    most = limit(power_law.squares_at_coefficient(cells, y_MN, weights_MN, center))
    ends = [edge if end is None else end for end, edge in zip(found["alpha"], power_law.ALPHAS_J[[0, -1]], strict=True)]
    reach = 3 + 1.5 * np.log(Cmin) * max(ends[1] - alpha, alpha - ends[0])  # alpha nearly alone makes A large
    log_J = np.linspace(center - reach, center + reach, 151)
    held_J = np.array([power_law.squares_at_coefficient(cells, y_N[None], own, each)[0] for each in log_J])
    low, high = _accepted(log_J, held_J - least <= most, center)
    open_low, open_high = (end is None for end in found["alpha"])
    found["A"] = (
        None if high is None or open_high else float(-np.exp(high)),
        None if low is None or open_low else float(-np.exp(low)),
    )
    return {name: found[name] for name in ("A", "alpha", "P_star")}


def _accepted(trial_J: np.ndarray, accepted_J: np.ndarray, best: float) -> Interval:
    """The ends of what is accepted, half a step wider than the trials; None for an end of all trials."""
    kept = np.flatnonzero(accepted_J)
    if not len(kept):
        return best, best
    first, last = kept[0], kept[-1]
    low = None if first == 0 else float(min(best, (trial_J[first - 1] + trial_J[first]) / 2))
    high = None if last == len(trial_J) - 1 else float(max(best, (trial_J[last] + trial_J[last + 1]) / 2))
    return low, high


def chance_of_gain(gain: float, gains_M: np.ndarray) -> float:
    """Share of simulated sets whose gain is as large; one set is added to both counts, so that it is never 0."""
    return float((1 + (gains_M >= gain).sum()) / (1 + len(gains_M)))
