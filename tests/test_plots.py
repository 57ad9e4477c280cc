"""Claims: what is drawn are the rows' own numbers, at their steps, with their errors, labelled; the same rows give the
same file; nothing of matplotlib's global state is touched. The canvas is looked at by its artists, not its pixels."""

import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from rpt_jax.records import InputError
from rpt_jax.study import plots

ROWS = [
    {"step": step, "reward": step / 100, "accuracy": step / 100, "format_rate": 0.9, "length": 30.0 - step}
    for step in range(1, 16)
]
BARS = {
    "base": {"arg-max": (0.12, 0.01), "reasoning": (0.4, 0.02), "careful": (0.8, None)},
    "RPT": {"arg-max": (0.13, 0.01), "reasoning": (0.95, 0.03)},
    "control": {"arg-max": (None, None), "reasoning": (0.2, 0.0)},
}


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures that are saved."""
    seen, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: seen.append(figure) or save(figure, path))
    return seen


def panels_of(figure):
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def line_of(axis, label):
    """(x, y) of the line or error bar with a label."""
    for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
        if name == label:
            line = handle if hasattr(handle, "get_xdata") else handle.lines[0]
            return np.asarray(line.get_xdata(), float).tolist(), np.asarray(line.get_ydata(), float).tolist()
    return None


def test_learning_curve_draws_its_rows(tmp_path, figures):
    path = plots.learning_curve(ROWS, tmp_path / "plots" / "a.png", title="A run")
    assert path.read_bytes().startswith(b"\x89PNG")
    panels = panels_of(figures[0])
    assert list(panels) == ["Right answers", "Format rate", "Response length (tokens)"]  # the reward is the accuracy
    steps = [row["step"] for row in ROWS]
    for title, key in zip(panels, ("accuracy", "format_rate", "length"), strict=True):
        (line,) = panels[title].lines
        assert (list(line.get_xdata()), list(line.get_ydata())) == (steps, [row[key] for row in ROWS])
        assert panels[title].get_xlabel() == "updates"
    assert figures[0].get_suptitle() == "A run"


def test_rewards_that_are_no_shares_of_right_answers_get_their_panel(tmp_path, figures):
    rows = [row | {"reward": row["reward"] / 2} for row in ROWS]
    plots.learning_curve(rows, tmp_path / "a.png")
    assert list(panels_of(figures[0]))[:2] == ["Reward", "Right answers"]


def test_many_steps_are_smoothed_and_still_shown(tmp_path, figures):
    random = np.random.default_rng(0)
    rows = [{"step": step, "accuracy": float(random.uniform())} for step in range(1, 101)]
    rows[50]["accuracy"] = None
    plots.learning_curve(rows, tmp_path / "a.png")
    raw, mean = (np.asarray(line.get_ydata(), float) for line in panels_of(figures[0])["Right answers"].lines)
    values = np.array([np.nan if row["accuracy"] is None else row["accuracy"] for row in rows])
    np.testing.assert_array_equal(raw, values)
    np.testing.assert_allclose(mean[10], values[8:13].mean())
    np.testing.assert_allclose(mean[50], values[[48, 49, 51, 52]].mean())
    np.testing.assert_allclose(mean[99], values[97:].mean())


def test_running_mean_by_hand():
    assert plots.running_mean(np.array([1.0, 2.0, 6.0, 0.0]), 3).tolist() == [1.5, 3.0, 8 / 3, 3.0]
    got = plots.running_mean(np.array([1.0, np.nan, np.nan, np.nan]), 3)
    np.testing.assert_array_equal(got, [1.0, 1.0, np.nan, np.nan])


def test_bars_are_the_accuracies(tmp_path, figures):
    plots.before_after(BARS, tmp_path / "a.png", title="Hard positions", note="640 positions")
    (axis,) = figures[0].axes
    colours = dict(zip(("arg-max", "reasoning", "careful"), plots.COLOURS, strict=False))
    drawn = {
        (round(bar.get_x() + bar.get_width() / 2), to_hex(bar.get_facecolor()).upper(), round(bar.get_height(), 6))
        for bar in axis.patches
    }
    expected = {
        (place, colours[mode], value)
        for place, modes in enumerate(BARS.values())
        for mode, (value, _) in modes.items()
        if value is not None
    }
    assert drawn == expected and len(axis.patches) == 6
    assert [label.get_text() for label in axis.get_xticklabels()] == ["base", "RPT", "control"]
    middles = np.array([bar.get_x() + bar.get_width() / 2 for bar in axis.patches])
    np.testing.assert_allclose([middles[:3].mean(), middles[3:5].mean(), middles[5]], [0, 1, 2], atol=1e-9)
    assert np.all(np.diff(middles) > axis.patches[0].get_width())  # apart, in the order of the modes
    assert [text.get_text() for text in axis.texts] == ["12", "40", "80", "13", "95", "20"]
    whiskers = [bars.lines[2][0].get_segments()[0][:, 1] for bars in axis.containers if hasattr(bars, "has_yerr")]
    np.testing.assert_allclose(whiskers, [[0.11, 0.13], [0.38, 0.42], [0.12, 0.14], [0.92, 0.98]])
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["arg-max", "reasoning", "careful"]
    assert (figures[0].get_suptitle(), axis.get_ylabel()) == ("Hard positions", "next-token accuracy")
    assert axis.get_xlabel() == "640 positions"


PANEL = plots.Panel(
    "Cost",
    "size",
    "seconds",
    [
        plots.Curve("measured", [1, 2, 8], [1.0, 1.5, 4.5], "points", 1),
        plots.Curve("a line", [1, 8], [1.0, 4.5], "line"),
        plots.Curve("other", [1, 8], [1.0, 8.0], "dashes"),
    ],
    top=5.0,
)


def test_curves_are_drawn_in_their_panels(tmp_path, figures):
    doubled = replace(PANEL, title="Doubled", doublings=True, top=None)
    path = plots.curves([PANEL, doubled, replace(PANEL, title="Third")], tmp_path / "a.png", title="Costs")
    assert path.read_bytes().startswith(b"\x89PNG")
    panels = panels_of(figures[0])
    assert list(panels) == ["Cost", "Doubled", "Third"] and figures[0].get_suptitle() == "Costs"
    for axis in panels.values():
        for curve in PANEL.curves:
            assert line_of(axis, curve.label) == (curve.x, curve.y)
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("size", "seconds")
        assert [text.get_text() for text in axis.get_legend().get_texts()] == ["measured", "a line", "other"]
        points, line, dashes = axis.lines
        assert points.get_linestyle() == "None" and points.get_color() == plots.COLOURS[1]
        assert line.get_linestyle() == "-" and dashes.get_linestyle() == "--"
    assert panels["Cost"].get_ylim() == (0, 5) and panels["Cost"].get_xscale() == "linear"
    assert panels["Doubled"].get_ylim()[0] == 0 and panels["Doubled"].get_ylim()[1] > 8
    assert [label.get_text() for label in panels["Doubled"].get_xticklabels()] == ["1", "2", "8"]
    tops = [round(axis.get_subplotspec().rowspan.start) for axis in panels.values()]
    assert tops == [0, 0, 1]  # two in a row


def test_whiskers_decades_and_shares(tmp_path, figures):
    even = plots.Curve("even", [1e9, 1e12], [0.5, 0.9], "points", errors=[0.1, 0.05])
    uneven = plots.Curve("uneven", [1e9], [0.4], "points", 1, errors=[(0.3, 0.2)])
    panel = plots.Panel("Law", "FLOPs", "accuracy", [even, uneven], decades=True, shares=True, top=1.0)
    plots.curves([panel], tmp_path / "a.png", title="Scaling")
    (axis,) = figures[0].axes
    whiskers = [bars.lines[2][0].get_segments() for bars in axis.containers]
    np.testing.assert_allclose(whiskers[0], [[[1e9, 0.4], [1e9, 0.6]], [[1e12, 0.85], [1e12, 0.95]]])
    np.testing.assert_allclose(whiskers[1], [[[1e9, 0.1], [1e9, 0.6]]])
    assert line_of(axis, "even") == ([1e9, 1e12], [0.5, 0.9])
    assert axis.get_xscale() == "log" and axis.get_ylim() == (0, 1)
    assert axis.yaxis.get_major_formatter()(0.5) == "50%"


def test_fitted_line_by_hand():
    """y = 2 x + 1 exactly; and (0, 0), (1, 0), (2, 3): slope 3/2, intercept -1/2; 1.5 of 6 is left."""
    np.testing.assert_allclose(plots.fitted_line([1, 2, 5], [3, 5, 11]), (2, 1, 1))
    np.testing.assert_allclose(plots.fitted_line([0, 1, 2], [0, 0, 3]), (1.5, -0.5, 1 - 1.5 / 6))


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for draw in (
        lambda path: plots.learning_curve(ROWS, path),
        lambda path: plots.before_after(BARS, path, title="Hard positions"),
        lambda path: plots.curves([PANEL], path, title="Costs"),
    ):
        first, second = (draw(tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
        assert first == second and b"matplotlib" not in first.lower()


def test_global_state_stays_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.before_after(BARS, tmp_path / "a.png", title="Hard positions")
    assert dict(matplotlib.rcParams) == before
    assert "pyplot" not in vars(plots) and not any(
        figure for figure in getattr(sys.modules.get("matplotlib._pylab_helpers"), "Gcf", type).__dict__.get("figs", ())
    )


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(InputError, match="2 rows have none of reward, accuracy"):
        plots.learning_curve([{"step": 1}, {"step": 2, "accuracy": None}], tmp_path / "a.png")
    with pytest.raises(InputError, match="no accuracy to draw"):
        plots.before_after({"base": {}}, tmp_path / "a.png", title="Hard positions")
    with pytest.raises(InputError, match="no points in 1 panels"):
        plots.curves([replace(PANEL, curves=[])], tmp_path / "a.png", title="Costs")
    assert not list(tmp_path.iterdir())
