"""Claims: the best law is the one that a general optimizer finds from many starts, within the same bounds; squares with
a parameter held are least squares; weights come from positions and scatter."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from rpt_jax.scaling import power_law
from rpt_jax.scaling.power_law import Cells

BUDGETS, SEEDS = 5, 3
COMPUTE_N = np.repeat(np.geomspace(1e11, 4e12, BUDGETS), SEEDS)
CELLS = Cells(
    COMPUTE_N,
    np.full(BUDGETS * SEEDS, 500.0),
    np.repeat(np.arange(BUDGETS), SEEDS),
    np.tile(np.arange(SEEDS), BUDGETS),
)


def drawn(alpha, missing, ceiling, M, seed=0):
    rng = np.random.default_rng(seed)
    p_N = power_law.law_at(CELLS, alpha, missing, ceiling, COMPUTE_N)
    return rng.binomial(500, p_N, (M, len(p_N))) / 500


@pytest.mark.parametrize(
    ("alpha", "missing", "ceiling"), [(0.5, -0.6, 0.95), (1.5, -0.3, 0.6), (0.3, -0.65, 0.999), (0.5, -0.02, 0.5)]
)
def test_no_other_start_finds_a_better_law(alpha, missing, ceiling):
    """scipy's bounded least squares from 12 starts, on data in the middle of the bounds and on their edge."""
    y_MN = drawn(alpha, missing, ceiling, 6)
    law = power_law.fit_law(CELLS, y_MN)
    bounds = ([power_law.LOWEST, -60, 0], [power_law.HIGHEST, 0, 1])
    starts = [[a, m, c] for a in (0.05, 0.5, 3) for m in (-0.1, -0.9) for c in (0.4, 0.9)]
    for m, y_N in enumerate(y_MN):
        root_N = np.sqrt(law.weights_MN[m])

        def left(theta, root_N=root_N, y_N=y_N):
            return root_N * (theta[2] + theta[1] * CELLS.ratios_N ** -theta[0] - y_N)

        best = min(2 * least_squares(left, start, bounds=bounds).cost for start in starts)
        assert law.squares_M[m] <= best * 1.0005 + 1e-9
        theta = (law.alpha_M[m], law.missing_M[m], law.ceiling_M[m])
        np.testing.assert_allclose((left(theta) ** 2).sum(), law.squares_M[m], rtol=1e-6)
        assert theta[1] <= 0 <= theta[2] <= 1


def test_planted_parameters_come_back_from_exact_data():
    y_MN = power_law.law_at(CELLS, 0.7, -0.4, 0.8, COMPUTE_N)[None]
    law = power_law.fit_law(CELLS, y_MN)
    got = (law.alpha_M[0], law.missing_M[0], law.ceiling_M[0])
    np.testing.assert_allclose(got, (0.7, -0.4, 0.8), rtol=2e-3)
    A = law.missing_M[0] * COMPUTE_N.min() ** law.alpha_M[0]
    np.testing.assert_allclose(A / COMPUTE_N ** law.alpha_M[0] + law.ceiling_M[0], y_MN[0], atol=1e-3)


def test_falling_and_too_high_data_stay_within_bounds():
    falling = np.linspace(0.9, 0.2, 15)
    rising = np.linspace(0.1, 0.999, 15)  # unbounded, a line in log C would go on above 1
    law = power_law.fit_law(CELLS, np.array([falling, rising]))
    assert law.missing_M[0] == 0 and law.missing_M[1] < 0 and law.ceiling_M[1] == 1


def test_squares_with_a_parameter_held_touch_the_least_at_the_best_value_and_nowhere_lie_below():
    y_MN = drawn(0.5, -0.6, 0.95, 3)
    law = power_law.fit_law(CELLS, y_MN)
    log_Cmin = np.log(COMPUTE_N.min())
    for m in range(3):
        y, weights, least = y_MN[m : m + 1], law.weights_MN[m : m + 1], law.squares_M[m]
        log_A = np.log(-law.missing_M[m]) + law.alpha_M[m] * log_Cmin

        def held(name, value, y=y, weights=weights):
            if name == "alpha":
                return power_law.squares_at_alpha(CELLS, y, weights, np.array([value]))[0, 0]
            by = {"ceiling": power_law.squares_at_ceiling, "A": power_law.squares_at_coefficient}
            return by[name](CELLS, y, weights, value)[0]

        for name, best, step in (("alpha", law.alpha_M[m], 0.2), ("ceiling", law.ceiling_M[m], 0.04), ("A", log_A, 5)):
            assert least - 1e-6 <= held(name, best) <= least + 0.1  # trial alphas are 2 % apart
            assert held(name, best - step) > least + 0.5
        held_by_hand = min(
            (weights[0] * (y[0] - 0.9 - min(slope, 0) * x_N) ** 2).sum()
            for x_N in (CELLS.ratios_N**-a for a in power_law.ALPHAS_J)
            for slope in [(weights[0] * x_N * (y[0] - 0.9)).sum() / (weights[0] * x_N**2).sum()]
        )
        np.testing.assert_allclose(held("ceiling", 0.9), held_by_hand, rtol=1e-9)


def test_lines_are_those_of_polyfit():
    y_MN, weights_MN = drawn(0.5, -0.6, 0.95, 2), np.random.default_rng(1).uniform(1, 5, (2, 15))
    x_N = np.log(CELLS.ratios_N)
    intercept_M, slope_M, squares_M = power_law.fit_line(x_N, y_MN, weights_MN)
    for m in range(2):
        slope, intercept = np.polyfit(x_N, y_MN[m], 1, w=np.sqrt(weights_MN[m]))
        np.testing.assert_allclose((slope_M[m], intercept_M[m]), (slope, intercept))
        np.testing.assert_allclose(squares_M[m], (weights_MN[m] * (y_MN[m] - slope * x_N - intercept) ** 2).sum())
    mean = power_law.fit_line(np.zeros(15), y_MN, np.ones((2, 15)))
    np.testing.assert_allclose(mean[0], y_MN.mean(axis=1))
    np.testing.assert_allclose(mean[2], 15 * y_MN.var(axis=1))


def test_variances_by_hand():
    """Two cells of one budget, 8 of 10 and 6 of 10 right: p = 15/22 for both; the other budget has 9 of 10: 10/12."""
    cells = Cells(np.array([1e9, 1e9, 2e9]), np.full(3, 10.0), np.array([0, 0, 1]), np.array([0, 1, 0]))
    p, q = 15 / 22, 10 / 12
    expected = [p * (1 - p) / 10, p * (1 - p) / 10, q * (1 - q) / 10]
    np.testing.assert_allclose(power_law.position_variances(cells, np.array([[0.8, 0.6, 0.9]])), [expected])


def test_scatter_of_cells_lowers_their_weights():
    """Offsets of .05 on top of .5 (1 - .5) / 500 = .0005: 1 / weight is near .003, and without them near .0005."""
    rng = np.random.default_rng(0)
    p_N = power_law.law_at(CELLS, 1.0, -0.1, 0.55, COMPUTE_N)
    y_MN = rng.binomial(500, np.tile(p_N, (400, 1))) / 500
    alone = np.mean(1 / power_law.fit_law(CELLS, y_MN).weights_MN)
    more = np.mean(1 / power_law.fit_law(CELLS, y_MN + 0.05 * rng.standard_normal(y_MN.shape)).weights_MN)
    assert 0.0005 <= alone < 0.0007 and 0.0026 < more < 0.0034
