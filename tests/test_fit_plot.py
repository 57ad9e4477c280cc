"""Claims: points are means over seeds with the errors of such means, a law is drawn only where there is one, every
split has its panel and every size its colour."""

import numpy as np
import pytest
import test_fit
from test_plots import figures, line_of, panels_of  # noqa: F401

from rpt_jax.scaling import fit, fit_plot
from rpt_jax.study import plots


@pytest.fixture(scope="module")
def fitted():
    """A law and a flat curve, two sizes, two splits."""
    shapes = {("s", "easy"): "law", ("s", "hard"): "flat", ("m", "easy"): "flat", ("m", "hard"): "law"}
    curves, found = [], {}
    for (size, split), shape in shapes.items():
        made = test_fit.curve(test_fit.SHAPES[shape][0])
        curves.append(fit.Curve(size, split, made.cells, made.accuracy_N, made.steps_N))
        found.setdefault(size, {})[split] = fit.fit_curve(curves[-1], 100, 0)
    return curves, found


def test_points_are_means_and_lines_are_laws(tmp_path, figures, fitted):  # noqa: F811
    curves, found = fitted
    assert fit_plot.draw(curves, found, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    panels = panels_of(figures[0])
    assert list(panels) == ["easy positions", "hard positions"]
    for axis, with_law, flat in ((panels["easy positions"], "s", "m"), (panels["hard positions"], "m", "s")):
        labels = [text.get_text() for text in axis.get_legend().get_texts()]
        assert f"{flat}: constant" in labels and any(label.startswith(f"{with_law}: P* 0.9") for label in labels)
        (line,) = [each for each in axis.lines if len(each.get_xdata()) == 100]
        assert line.get_color() == plots.COLOURS[("s", "m").index(with_law)]
        split = axis.get_title(loc="left").split()[0]
        law = found[with_law][split]
        np.testing.assert_allclose(line.get_ydata(), law["A"] / line.get_xdata() ** law["alpha"] + law["P_star"])
        assert axis.get_xscale() == "log"
        (own,) = [curve for curve in curves if (curve.size, curve.split) == (flat, split)]
        x, y = line_of(axis, f"{flat}: constant")
        np.testing.assert_allclose(y, own.accuracy_N.reshape(5, 3).mean(axis=1))
        np.testing.assert_allclose(x, own.cells.compute_N.reshape(5, 3).mean(axis=1))


def test_whiskers_are_those_of_means_over_seeds(fitted):
    """p = .5: 1.96 (.25 / 500 + scatter^2)^(1/2) / 3^(1/2)."""
    curves, found = fitted
    (points,) = fit_plot._drawn(curves[1], found["s"]["hard"], 0)
    scatter = found["s"]["hard"]["scatter"]
    np.testing.assert_allclose(points.errors, 1.96 * ((0.25 / 500 + scatter**2) / 3) ** 0.5, rtol=0.02)


def test_the_table_claims_figures_for_laws_alone(fitted):
    _, found = fitted
    rows = fit_plot.table(found)
    assert list(rows) == ["s easy", "s hard", "m easy", "m hard"]
    assert rows["s hard"]["verdict"] == "constant" and rows["s hard"]["alpha"] == "" == rows["s hard"]["A"]
    low, high = found["s"]["easy"]["intervals"]["alpha"]
    assert rows["s easy"]["alpha"] == f"{found['s']['easy']['alpha']:.3g} [{low:.3g}, {high:.3g}]"
    undecided = {
        "m": {"hard": found["m"]["hard"] | {"intervals": {"A": [None, -1.0], "alpha": [1, None], "P_star": [0, 1]}}}
    }
    assert fit_plot.table(undecided)["m hard"]["alpha"].endswith("[1, open]")
