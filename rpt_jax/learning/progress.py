"""The figures of a run while it runs: a live display on a terminal, plain lines elsewhere."""

import contextlib
import math
from collections.abc import Callable, Iterator

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

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
    "step {step}: the rollouts of every prompt earned the same, so advantages and loss are 0 and nothing was learnt; "
    "format rate {format_rate:.2f}, accuracy {accuracy:.2f}"
)


@contextlib.contextmanager
def display(
    name: str,
    start: int,
    steps: int,
    report: Callable[[dict], None] | None = None,
    console: Console | None = None,
) -> Iterator[Callable[[dict], None]]:
    """Gives a function that shows a row of metrics.jsonl: `report` if given, and nothing in processes other than 0.

    steps count updates, `start` of them made before.
    """
    console = console or Console(stderr=True)
    if jax.process_index() != 0:
        yield lambda row: None
    elif report is not None:
        yield report
    elif not console.is_terminal:
        yield lambda row: console.print(line(row, steps), markup=False, highlight=False, soft_wrap=True)
    else:
        bar = Progress(
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        task = bar.add_task(name, total=steps, completed=start)
        with Live(bar, console=console, refresh_per_second=4) as live:

            def show(row):
                bar.update(task, completed=row["step"])
                if notice(row):
                    console.print(notice(row), markup=False, highlight=False)
                live.update(Group(bar, table(row)))

            yield show


def line(row: dict, steps: int) -> str:
    """A row on one line, with what is odd about it on a second."""
    figures = "  ".join(f"{heading} {_shown(row, key, form)}" for heading, key, form in SHOWN)
    notes = [f"step {row['step']}/{steps}  {figures}", *([notice(row)] if notice(row) else [])]
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
