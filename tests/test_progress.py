"""Claims: the display names every figure a newcomer should watch, in plain lines where nothing can be redrawn, and says
what a loss of 0 means."""

import io
import math

import pytest
from rich.console import Console

from rpt_jax.config import Config
from rpt_jax.learning.progress import display

ROW = {
    "step": 7,
    "flops_spent": 2.5e8,
    "reward": 0.28125,
    "accuracy": 0.25,
    "format_rate": 0.75,
    "length": 12.34,
    "entropy": 0.4321,
    "tokens_per_second": 12345.6,
    "zero_variance_share": 0.5,
    "mismatch_max": 1.23e-6,
}
LINE = (
    "step 7/40  reward 0.281  accuracy 0.250  format 0.750  length 12.3  entropy 0.432  tokens/s 12,346  "
    "zero variance 0.50  mismatch 1.2e-06\n"
)


def shown(row, flops=0.0, **options):
    console = Console(file=io.StringIO(), width=100, **options)
    with display(Config(name="run [x]", steps=40, flops=flops), 5, 1e8, console=console) as show:
        show(row)
    return console.file.getvalue()


def test_plain_lines_where_the_output_is_no_terminal():
    assert shown(ROW) == LINE


def test_a_terminal_gets_a_bar_and_a_table():
    output = shown(ROW, force_terminal=True, color_system=None)
    assert "7/40" in output and "12,346" in output
    for heading in ("reward", "accuracy", "format", "length", "entropy", "tokens/s", "zero variance", "mismatch"):
        assert heading in output


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_run_that_flops_end_says_how_many_are_spent(is_terminal):
    output = shown(ROW, flops=1e9, force_terminal=is_terminal, color_system=None)
    assert "7 (25% of 1e+09 FLOPs)" in output and "7/40" in shown(ROW, flops=1e12)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_loss_of_zero_is_explained(is_terminal):
    output = shown(ROW | {"zero_variance_share": 1.0}, force_terminal=is_terminal, color_system=None)
    assert "taught nothing" in " ".join(output.split()) and "taught nothing" not in shown(ROW)


def test_a_figure_that_is_not_finite_is_shown():
    assert "reward nan" in shown(ROW | {"reward": math.nan})


def test_a_callback_takes_the_place_of_the_display():
    rows = []
    with display(Config(steps=40), 0, 0.0, rows.append) as show:
        show(ROW)
    assert rows == [ROW]
