"""Claims: simulated sets have the scatter of seeds, cells and positions that the residuals show; 95 % intervals hold
the planted parameters at least 90 times in 100, with and without bases that differ; where nothing limits a parameter,
its interval says so. The measured coverage of larger settings is in the docstring of bootstrap.py."""

import numpy as np
import pytest

from rpt_jax.scaling import bootstrap, power_law
from rpt_jax.scaling.power_law import Cells


def grid(budgets, seeds, positions):
    compute_N = np.repeat(np.geomspace(1e11, 4e12, budgets), seeds)
    places = np.repeat(np.arange(budgets), seeds), np.tile(np.arange(seeds), budgets)
    return Cells(compute_N, np.full(budgets * seeds, float(positions)), *places)


def observed(cells, fitted_N, of_seeds, of_cells, rng):
    offsets_N = of_seeds * rng.standard_normal(cells.seeds_N.max() + 1)[cells.seeds_N]
    chance_N = fitted_N + offsets_N + of_cells * rng.standard_normal(len(fitted_N))
    return rng.binomial(cells.positions_N.astype(int), np.clip(chance_N, 0, 1)) / cells.positions_N


def is_in(value, interval):
    low, high = interval
    return (low is None or low <= value) and (high is None or value <= high)


@pytest.mark.parametrize(
    ("truth", "of_seeds", "widest"), [((0.5, -0.6, 0.95), 0.0, 0.15), ((1.0, -0.4, 0.7), 0.05, 0.3)]
)
def test_intervals_hold_the_planted_parameters(truth, of_seeds, widest):
    """100 sweeps of 5 budgets x 3 seeds x 500 positions; the interval of P* is not wide for its own sake."""
    cells, rng = grid(5, 3, 500), np.random.default_rng(0)
    alpha, missing, ceiling = truth
    fitted_N = power_law.law_at(cells, *truth, cells.compute_N)
    planted = {"A": missing * cells.compute_N.min() ** alpha, "alpha": alpha, "P_star": ceiling}
    held, widths = dict.fromkeys(planted, 0), []
    for _ in range(100):
        y_N = observed(cells, fitted_N, of_seeds, 0.0, rng)
        found = bootstrap.intervals(cells, y_N, power_law.fit_law(cells, y_N[None]), 100, rng)
        for name, value in planted.items():
            held[name] += is_in(value, found[name])
        widths.append(found["P_star"][1] - found["P_star"][0])
    assert min(held.values()) >= 90, held
    assert np.median(widths) < widest


def test_intervals_shrink_with_more_data():
    truth, widths = (0.5, -0.6, 0.9), []
    for budgets, seeds, positions in ((5, 3, 200), (10, 6, 2000)):
        cells, rng = grid(budgets, seeds, positions), np.random.default_rng(1)
        y_N = observed(cells, power_law.law_at(cells, *truth, cells.compute_N), 0, 0, rng)
        found = bootstrap.intervals(cells, y_N, power_law.fit_law(cells, y_N[None]), 200, rng)
        widths.append([found[name][1] - found[name][0] for name in ("alpha", "P_star")])
    assert np.all(np.array(widths[1]) < np.array(widths[0]) / 3)


def test_bases_that_differ_widen_the_interval_of_the_ceiling():
    """The same scatter, once shared by all cells of a seed and once dealt out anew in each budget."""
    cells, rng = grid(6, 4, 1000), np.random.default_rng(0)
    fitted_N = power_law.law_at(cells, 1.0, -0.4, 0.7, cells.compute_N)
    offsets = np.array([-0.06, -0.02, 0.02, 0.06])
    dealt_N = np.concatenate([rng.permutation(offsets) for _ in range(6)])
    widths = []
    for offsets_N in (offsets[cells.seeds_N], dealt_N):
        y_N = fitted_N + offsets_N
        found = bootstrap.intervals(cells, y_N, power_law.fit_law(cells, y_N[None]), 200, rng)
        widths.append(found["P_star"][1] - found["P_star"][0])
    assert widths[0] > 1.4 * widths[1]


def test_a_rise_between_two_budgets_alone_leaves_alpha_without_limit():
    cells, rng = grid(5, 3, 500), np.random.default_rng(0)
    y_N = observed(cells, np.where(cells.budgets_N == 0, 0.3, 0.8), 0, 0, rng)
    found = bootstrap.intervals(cells, y_N, power_law.fit_law(cells, y_N[None]), 200, rng)
    assert found["alpha"][1] is None and found["A"][0] is None and found["alpha"][0] > 1
    assert 0.77 < found["P_star"][0] < found["P_star"][1] < 0.83


def test_simulated_sets_have_the_scatter_of_the_residuals():
    """Of those of the data themselves, which are near .02^2 + .25/400 within a seed, and that / 5 + .03^2 between."""
    cells, rng = grid(5, 40, 400), np.random.default_rng(0)
    flat_N = np.full(200, 0.5)
    y_N = observed(cells, flat_N, 0.03, 0.02, rng)
    order = np.lexsort((cells.budgets_N, cells.seeds_N))
    sets_MN = bootstrap.simulate(cells, y_N, flat_N, 300, rng)
    sets_MSB, own_SB = sets_MN[:, order].reshape(300, 40, 5), y_N[order].reshape(40, 5)
    within, between = own_SB.var(axis=1, ddof=1).mean(), own_SB.mean(axis=1).var(ddof=1)
    np.testing.assert_allclose(sets_MSB.var(axis=2, ddof=1).mean(), within, rtol=0.1)
    np.testing.assert_allclose(sets_MSB.mean(axis=2).var(axis=1, ddof=1).mean(), between, rtol=0.2)
    assert between > 2 * within / 5  # so seeds do differ


def test_three_seeds_leave_their_variance_uncertain_and_one_seed_unknown():
    cells, rng = grid(5, 3, 500), np.random.default_rng(0)
    flat_N = np.full(15, 0.5)
    y_N = observed(cells, flat_N, 0.05, 0.01, rng)
    of_seeds_M, _ = bootstrap.noise(cells, y_N, flat_N, 4000, rng)
    assert np.quantile(of_seeds_M, 0.95) > 5 * np.median(of_seeds_M) > 0
    one = grid(6, 1, 500)
    of_seeds_M, of_cells_M = bootstrap.noise(one, rng.uniform(0.4, 0.6, 6), np.full(6, 0.5), 100, rng)
    assert not of_seeds_M.any() and of_cells_M.any()


def test_chance_of_gain_by_hand():
    assert bootstrap.chance_of_gain(2.0, np.array([0.0, 1.0, 2.0, 3.0])) == 3 / 5
    assert bootstrap.chance_of_gain(9.0, np.array([0.0, 1.0, 2.0, 3.0])) == 1 / 5
