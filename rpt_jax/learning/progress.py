"""A run while it runs: when it is over, and its figures: a live display on a terminal, plain lines elsewhere."""

import contextlib
import math
from collections.abc import Callable, Iterator

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rpt_jax.config import Config

# Heading, key of the row, how it is shown.
SHOWN = (
    ("reward", "reward", "{:.3f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("format", "format_rate", "{:.3f}"),
    ("length", "length", "{:.1f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("zero variance", "zero_variance_share", "{:.2f}"),
    ("mismatch", "mismatch_max", "{:.1e}"),
)
ALL_AGREE = (
    "step {step}: the rollouts of every prompt earned the same, so advantages are 0 and the rollouts taught nothing; "
    "format rate {format_rate:.2f}, accuracy {accuracy:.2f}"
)


def is_over(config: Config, done: int, spent: float) -> bool:
    """Whether a run ends after `done` updates and `spent` FLOPs (of sampling, rewards and updates)."""
    return done >= config.steps or 0 < config.flops <= spent


@contextlib.contextmanager
def display(
    config: Config,
    done: int,
    spent: float,
    report: Callable[[dict], None] | None = None,
    console: Console | None = None,
) -> Iterator[Callable[[dict], None]]:
    """Gives a function that shows a row of metrics.jsonl: `report` if given, and nothing in processes other than 0.

    `done` updates were made before with `spent` FLOPs.
    """
    console = console or Console(stderr=True)
    if jax.process_index() != 0:
        yield lambda row: None
    elif report is not None:
        yield report
    elif not console.is_terminal:
        yield lambda row: console.print(line(row, config), markup=False, highlight=False, soft_wrap=True)
    else:
        bar = Progress(
            TextColumn(config.name, markup=False),
            BarColumn(),
            TextColumn("{task.fields[reached]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        task = bar.add_task("", total=1.0, completed=share(config, done, spent), reached=reached(config, done, spent))
        with Live(bar, console=console, refresh_per_second=4) as live:

            def show(row):
                at = config, row["step"], row["flops_spent"]
                bar.update(task, completed=share(*at), reached=reached(*at))
                if notice(row):
                    console.print(notice(row), markup=False, highlight=False)
                live.update(Group(bar, table(row)))

            yield show


def share(config: Config, done: int, spent: float) -> float:
    """How much of a run is behind it, by updates or by FLOPs, whichever ends it first."""
    return max(done / config.steps, spent / config.flops if config.flops else 0.0)


def reached(config: Config, done: int, spent: float) -> str:
    """Updates of how many, or the share of the FLOPs where these end the run first."""
    if config.flops and spent / config.flops >= done / config.steps:
        return f"{done} ({spent / config.flops:.0%} of {config.flops:g} FLOPs)"
    return f"{done}/{config.steps}"


def line(row: dict, config: Config) -> str:
    """A row on one line, with what is odd about it on a second."""
    figures = "  ".join(f"{heading} {_shown(row, key, form)}" for heading, key, form in SHOWN)
    at = reached(config, row["step"], row["flops_spent"])
    notes = [f"step {at}  {figures}", *([notice(row)] if notice(row) else [])]
    return "\n".join(notes)


def notice(row: dict) -> str:
    """What a newcomer would stumble over in a row; empty for most."""
    return ALL_AGREE.format(**row) if row["zero_variance_share"] == 1 else ""


def table(row: dict) -> Table:
    """Headings over figures."""
    shown = Table(box=None, pad_edge=False)
    for heading, _, _ in SHOWN:
        shown.add_column(heading, justify="right")
    shown.add_row(*(_shown(row, key, form) for _, key, form in SHOWN))
    return shown


def _shown(row, key, form):
    value = row[key]
    return form.format(value) if math.isfinite(value) else str(value)
