"""Claims: a law is claimed on data made by one, and on no flat, linear, S-shaped or falling data, nor on too few
budgets; the largest budget really is left out; figures are by size and split, from the table's own columns."""

import csv

import numpy as np
import pytest

from rpt_jax.records import InputError
from rpt_jax.scaling import fit, fit_plot, power_law
from rpt_jax.scaling.fit import Curve, FitSettings
from rpt_jax.scaling.power_law import Cells

STEPS = (5, 15, 40, 100, 200)


def curve(shape, steps=STEPS, seeds=3, positions=500, seed=0):
    """Accuracies shape(C / Cmin) with binomial noise and a base of its own for each seed."""
    rng = np.random.default_rng(seed)
    budgets_N, seeds_N = np.repeat(np.arange(len(steps)), seeds), np.tile(np.arange(seeds), len(steps))
    compute_N = 2e10 * np.array(steps, float)[budgets_N]
    p_N = shape(compute_N / compute_N.min()) + 0.01 * rng.standard_normal(seeds)[seeds_N]
    y_N = rng.binomial(positions, np.clip(p_N, 0, 1)) / positions
    cells = Cells(compute_N, np.full(len(y_N), float(positions)), budgets_N, seeds_N)
    return Curve("small", "hard", cells, y_N, np.array(steps)[budgets_N])


def law(ratio):
    return 0.95 - 0.6 * ratio**-0.5


SHAPES = {
    "law": (law, fit.LAW),
    "flat": (lambda ratio: 0.5 + 0 * ratio, fit.CONSTANT),
    "line in C": (lambda ratio: 0.3 + 0.6 * ratio / 40, "line in C"),
    "line in log C": (lambda ratio: 0.3 + 0.15 * np.log(ratio), "line in log C"),
    "falling": (lambda ratio: 0.8 - 0.1 * np.log(ratio), fit.FALLS),
    "S": (lambda ratio: 0.3 + 0.65 / (1 + np.exp(-3 * (np.log(ratio) - 2))), fit.NONE_FITS),
    "step": (lambda ratio: np.where(ratio < 2, 0.3, 0.8), fit.UNDECIDED),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_verdict_names_what_made_the_data(name):
    shape, verdict = SHAPES[name]
    got = [fit.fit_curve(curve(shape, seed=seed), 200, seed)["verdict"] for seed in range(5)]
    assert got.count(verdict) >= 4, got
    assert name == "law" or fit.LAW not in got


def test_a_law_comes_with_its_figures():
    made = curve(law)
    found = fit.fit_curve(made, 300, 0)
    planted = {"A": -0.6 * made.cells.compute_N.min() ** 0.5, "alpha": 0.5, "P_star": 0.95}
    for key, value in planted.items():
        low, high = found["intervals"][key]
        assert low < found[key] < high and low < value < high
    fitted_N = found["A"] / made.cells.compute_N ** found["alpha"] + found["P_star"]
    by_hand = 1 - ((made.accuracy_N - fitted_N) ** 2).sum() / ((made.accuracy_N - made.accuracy_N.mean()) ** 2).sum()
    assert found["r2"] == pytest.approx(by_hand) and found["r2_of_means"] > found["r2"] > 0.95
    assert (found["cells"], found["budgets"], found["seeds"]) == (15, 5, 3)


@pytest.mark.parametrize("steps", [(5, 100), (5, 40, 200)])
def test_two_or_three_budgets_are_refused_with_a_reason(steps):
    """Whatever the number of seeds."""
    found = fit.fit_curve(curve(law, steps=steps, seeds=9), 200, 0)
    assert found["verdict"] == fit.TOO_FEW and f"{len(steps)} budgets" in found["reason"]
    assert found["A"] is found["alpha"] is found["P_star"] is found["intervals"] is None


def test_four_cells_are_too_few():
    """One seed of four budgets: the law's AICc would be infinite, and a law could never be found."""
    found = fit.fit_curve(curve(law, steps=(5, 15, 40, 100), seeds=1), 200, 0)
    assert found["verdict"] == fit.TOO_FEW and found["reason"].startswith("4 cells: ") and found["A"] is None
    for made in (curve(law, steps=(5, 15, 40, 100), seeds=2), curve(law, seeds=1)):
        assert fit.fit_curve(made, 100, 0)["verdict"] != fit.TOO_FEW


def test_perfect_and_equal_accuracies_are_no_accident():
    for value in (0.0, 0.5, 1.0):
        made = curve(lambda ratio, value=value: value + 0 * ratio)
        found = fit.fit_curve(Curve("s", "hard", made.cells, np.full(15, value), made.steps_N), 100, 0)
        assert found["verdict"] == fit.CONSTANT, (value, found)


def test_the_largest_budget_is_left_out_and_predicted():
    """Changing its accuracies changes no prediction; a law made without noise is predicted, lines are off."""
    made = curve(law)
    y_N = law(made.cells.ratios_N)
    found = fit.held_out(made.cells, y_N)
    last_N = made.steps_N == 200
    assert found["observed"] == pytest.approx(y_N[last_N].mean()) == pytest.approx(found["predicted"]["law"], abs=2e-3)
    assert found["predicted"]["line in C"] > 1.1 and found["predicted"]["line in log C"] > found["observed"] + 0.02
    slope, intercept = np.polyfit(np.log(made.cells.compute_N[~last_N]), y_N[~last_N], 1)
    by_hand = (intercept + slope * np.log(made.cells.compute_N[last_N])).mean()
    assert found["predicted"]["line in log C"] == pytest.approx(by_hand, abs=0.02)  # by hand without weights
    changed = fit.held_out(made.cells, np.where(last_N, 0.1, y_N))
    assert changed["predicted"] == found["predicted"] and changed["observed"] == pytest.approx(0.1)


def test_aicc_by_hand():
    """k = 3, N = 15: Q + 6 + 24 / 11; k = 2: Q + 4 + 12 / 12; N = 4 leaves the law none."""
    got = fit.aicc({"law": 10.0, "line in C": 20.0}, 15)
    assert got == {"law": pytest.approx(16 + 24 / 11), "line in C": pytest.approx(25.0)}
    assert fit.aicc({"law": 0.1}, 4) == {"law": None}


def test_misfit_is_an_f_test():
    """Means of 5 budgets, 15 cells: with a line (k = 2) the F(3, 10) of 3.708 is chance .05."""
    made = curve(law)
    rng = np.random.default_rng(0)
    means_N = rng.uniform(0.2, 0.8, 5)[made.cells.budgets_N]
    y_N = means_N + 0.01 * np.tile([-1, 0, 1], 5)  # within: 5 (1 + 1) .0001 = .001
    Q = 0.001 * (1 + 3 / 10 * 3.708)
    found = fit.misfit(made.cells, y_N, np.ones(15), {"line in C": Q}, rng)
    assert found["line in C"] == pytest.approx(0.05, abs=0.006)
    single = curve(law, seeds=1)
    squares = {"line in C": 1.0}
    assert fit.misfit(single.cells, single.accuracy_N, np.ones(5), squares, rng) == {"line in C": None}


def table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(size, seeds=2):
    return [
        {
            "size": size, "seed": seed, "steps": steps, "status": "done", "flops_sample": 1e9 * steps,
            "flops_update": 3e9 * steps, "hard.reasoning": 0.5, "hard.positions": 400, "hard.standard_error": 0.0125,
            "hard.argmax": 0.1, "easy.reasoning": 0.75, "easy.positions": 100, "easy.standard_error": "",
        }
        for steps in STEPS for seed in range(seeds)
    ]  # fmt: skip


def test_the_table_is_read_by_size_and_split(tmp_path):
    rows = [*rows_of("small"), *rows_of("large")]
    rows[12]["flops_sample"] += 1e9
    rows[0] |= {"status": "failed", "hard.reasoning": "", "easy.reasoning": ""}
    curves = fit.read_curves(table(tmp_path / "a.csv", rows), FitSettings())
    assert [(c.size, c.split) for c in curves] == [(s, p) for s in ("small", "large") for p in ("easy", "hard")]
    assert [len(c.accuracy_N) for c in curves] == [9, 9, 10, 10]
    hard = curves[3]
    means = 4e9 * np.array(STEPS)
    means[1] += 0.5e9  # one of its two seeds has spent 1e9 more
    np.testing.assert_array_equal(np.unique(hard.cells.compute_N), means)
    np.testing.assert_allclose(hard.cells.positions_N, 0.25 / 0.0125**2)  # four rollouts each, say: by its error
    np.testing.assert_array_equal(curves[2].cells.positions_N, 100)  # no error there: binomial
    (arg_max,) = fit.read_curves(tmp_path / "a.csv", FitSettings(figure="argmax", splits=("hard",)))[1:]
    assert set(arg_max.accuracy_N) == {0.1} and set(arg_max.cells.positions_N) == {400}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "failed"}, "none of them is done"),
        ({"flops_sample": "0", "flops_update": "0"}, r":2: flops 0"),
        ({"hard.reasoning": "1.5"}, ":2: .*1.5"),
        ({"flops_update": "much"}, r":2: .*'much'"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        fit.read_curves(table(tmp_path / "a.csv", [row | change for row in rows_of("small")]), FitSettings())


def test_missing_tables_and_columns_are_named(tmp_path):
    with pytest.raises(InputError, match="no table"):
        fit.read_curves(tmp_path / "none.csv", FitSettings())
    rows = [{key: value for key, value in row.items() if key != "flops_update"} for row in rows_of("small")]
    with pytest.raises(InputError, match="no column flops_update"):
        fit.read_curves(table(tmp_path / "a.csv", rows), FitSettings())
    with pytest.raises(InputError, match="no column odd.reasoning"):
        fit.read_curves(table(tmp_path / "b.csv", rows_of("small")), FitSettings(splits=("odd",)))


def test_fit_gives_figures_by_size_and_split_and_hands_them_to_the_picture(tmp_path):
    path = table(tmp_path / "a.csv", rows_of("small"))
    seen = []
    found = fit.fit(path, FitSettings(sets=100), lambda *all_of_it: seen.append(all_of_it) or tmp_path)
    assert {size: set(splits) for size, splits in found.items()} == {"small": {"easy", "hard"}}
    assert found["small"]["hard"]["verdict"] == fit.CONSTANT
    assert seen[0][1] is found and seen[0][2] == tmp_path / "a.png" and len(seen[0][0]) == 2
    again = fit.fit(path, FitSettings(sets=100, plot="none"), lambda *_: seen.append(1))
    assert again == found and len(seen) == 1  # the same seed gives the same figures
    with pytest.raises(InputError, match="sets=10"):
        fit.fit(path, FitSettings(sets=10))


def test_cells_can_be_chosen():
    cells = curve(law).cells
    kept = cells[cells.budgets_N > 0]
    assert kept.ratios_N.min() == 1 and len(kept.compute_N) == 12
    np.testing.assert_allclose(power_law.law_at(kept, 0.0, -0.5, 0.9, kept.compute_N), 0.4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hard.standard_error": "1e-200"}, ":2: hard cannot be read"),
        ({"flops_sample": "1e308", "flops_update": "1e308"}, ":2: flops inf"),
        ({"hard.positions": "inf"}, ":2: .*positions inf"),
        ({"steps": "nan"}, ":2: "),
        ({"hard.reasoning": "nan"}, ":2: "),
    ],
)
def test_numbers_that_cannot_be_computed_with(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        fit.read_curves(table(tmp_path / "a.csv", [row | change for row in rows_of("small")]), FitSettings())


def test_names_that_look_like_formulas(tmp_path):
    path = table(tmp_path / "a.csv", [row | {"size": r"$\frac{$"} for row in rows_of("small")])
    found = fit.fit(path, FitSettings(sets=100), fit_plot.draw)
    assert set(found) == {r"$\frac{$"} and (tmp_path / "a.png").is_file()
