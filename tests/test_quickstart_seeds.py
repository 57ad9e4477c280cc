"""Claims: the picture's bars are means over seeds with their standard errors; README says what the rows do."""

from pathlib import Path

import pytest

from rpt_jax.experiment_file import load_module

ROOT = Path(__file__).resolve().parent.parent
experiment = load_module(str(ROOT / "experiments" / "quickstart_seeds.py"))


def row(**figures):
    columns = [f"hard.{column}" for modes in experiment.BARS.values() for column in modes.values()]
    same = dict.fromkeys([*columns, "hard.positions"], "0.5")
    return same | {f"hard.{name}": value for name, value in figures.items()}


def test_bars_are_means_with_standard_errors():
    bars = experiment.bars([row(reasoning_after="0.9"), row(reasoning_after="0.6"), row(reasoning_after="0.6")])
    assert bars["RPT"]["boxed answer"] == pytest.approx((0.7, 0.1))  # deviations .2, -.1, -.1: sqrt(.06 / 2 / 3)
    assert bars["RPT"]["arg-max"] == pytest.approx((0.5, 0.0))
    assert list(bars["base, made\ncareful"]) == ["boxed answer"]


def test_the_picture_is_drawn_from_rows(tmp_path):
    path = experiment.draw([row(), row(reasoning_after="0.9")], tmp_path / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_readme_says_what_the_rows_say():
    """Rows have four digits of right answers over positions, README three."""
    rows = [row for row in experiment.read_rows(experiment.RESULTS) if row["traces"] == "default"]
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    text = " ".join((ROOT / "README.md").read_text().split())
    for column in (column for modes in experiment.BARS.values() for column in modes.values()):
        positions = [int(row["hard.positions"]) for row in rows]
        right = [round(float(row[f"hard.{column}"]) * n) for row, n in zip(rows, positions, strict=True)]
        assert " / ".join(f"{100 * k / n:.1f}" for k, n in zip(right, positions, strict=True)) in text, column
