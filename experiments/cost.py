"""What makes a step cost more: `rpt bench step` over rollouts per prompt, positions per document, vocabulary, lengths.

    .venv/bin/python experiments/cost.py                        # about 8 minutes on two cores
    .venv/bin/python experiments/cost.py --cores 1              # on one core of a machine that others use
    .venv/bin/python experiments/cost.py --series group --again # measures these rows anew

Each point is measured in a process of its own: the median of five calls (three of a rollout), wall seconds and CPU
seconds of all threads. Rows go to results/cost.csv; rows that exist are skipped. Prints the fits, draws
results/cost.png. The model has float32 weights, D 256, and few layers, so that it is quick.

Sizes lie on rungs of the ladder to which a stream is rounded (16, 24, 32, 48, 64, ...), but for one: 20 rollouts, which
cost as many tokens as 24. Where others use the machine too, --clock cpu_s draws CPU seconds. Measured result: see
LOG.md.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import tyro
from rows import append_row, change_rows, read_rows

from rpt_jax.bench.step import StepBench, bench_step
from rpt_jax.bench.workload import Workload
from rpt_jax.study.plots import Curve, Panel, curves, fitted_line

RESULTS = Path(__file__).parent / "results" / "cost.csv"
PICTURE = RESULTS.with_suffix(".png")

CLOCKS = {"s": "seconds", "cpu_s": "CPU seconds"}  # medians of both are kept
Series = Literal["group", "documents", "vocabulary", "lengths"]
SMALL = Workload(vocabulary=2048, layers=2)
UPDATE = StepBench(replace(SMALL, prompts=8, prompt=192, group=4, tokens=32), phases=("update",))
ROLLOUT = StepBench(replace(SMALL, layers=1, prompts=32, prompt=32), phases=("rollout",), slots=64, repeats=3, warmup=0)
BETWEEN_RUNGS = 20  # rollouts per prompt
# Limit -> mean of the geometric distribution that has the mean 64 when cut there; 0: all as long as the limit.
MEAN_LENGTHS = {64: 0.0, 128: 80.0, 256: 65.3, 512: 64.0}


@dataclass(frozen=True)
class Settings:
    """What to measure, and where."""

    series: tuple[Series, ...] = ("group", "documents", "vocabulary", "lengths")
    cores: str = ""  # CPUs to run on, e.g. 1; "": those of this process
    again: bool = False  # deletes the rows of these series first
    clock: Literal["s", "cpu_s"] = "s"  # drawn: wall seconds, or where others use the machine CPU seconds


def points(series: Series) -> list[tuple[float, StepBench]]:
    """(place on the x axis, what is measured there)."""
    if series == "group":
        return [(G, _with(UPDATE, group=G)) for G in (2, 4, 8, 16, BETWEEN_RUNGS, 32)]
    if series == "documents":
        return [(k, _with(UPDATE, prompts=16, tokens=16, positions_per_document=k)) for k in (1, 2, 4, 8, 16)]
    if series == "vocabulary":
        return [(V, _with(UPDATE, prompt=64, tokens=16, vocabulary=V)) for V in (2048, 8192, 16384, 32768, 65536)]
    found = []
    for limit, mean in MEAN_LENGTHS.items():
        lengths = {"lengths": "geometric", "mean_length": mean} if mean else {}
        for refill in (True, False):
            found.append((limit / 64, replace(_with(ROLLOUT, tokens=limit, **lengths), refill=refill)))
    return found


def _with(bench: StepBench, **sizes) -> StepBench:
    return replace(bench, workload=replace(bench.workload, **sizes))


def measured(series: Series, at: float, bench: StepBench) -> dict:
    """The row of one point."""
    figures = bench_step(bench)
    (phase,) = bench.phases
    of_phase = figures[phase]
    row = {"series": series, "at": f"{at:g}", "refill": bench.refill} | asdict(bench.workload)
    row |= {"slots": bench.slots, "cores": len(figures["cores"] or ()), "repeats": bench.repeats}
    for clock in CLOCKS:
        row |= {f"{clock}.{name}": round(of_phase[clock][name], 4) for name in ("median", "min", "max")}
    row |= {"gflops": round(of_phase["flops"] / 1e9, 2), "share_of_peak": round(of_phase["share_of_matmul_peak"], 3)}
    counts = ("stream_tokens", "stream_places", "tokens", "slot_steps")
    row |= {f"made.{name}": of_phase[name] for name in counts if name in of_phase}
    return row | {"jax": jax.__version__}


def _key(row: dict) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("series", "at", "refill"))


def measure_all(settings: Settings) -> None:
    """A row for each point that has none."""
    if settings.again:
        change_rows(RESULTS, lambda rows: [row for row in rows if row["series"] not in settings.series])
    there = {_key(row) for row in read_rows(RESULTS)}
    for series in settings.series:
        for at, bench in points(series):
            if _key({"series": series, "at": f"{at:g}", "refill": bench.refill}) not in there:
                append_row(RESULTS, measured(series, at, replace(bench, cores=settings.cores)))


def column(rows: Sequence[dict], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def of_groups(rows: Sequence[dict], clock: str) -> Panel:
    """Seconds against G beside the line a (P + G R) + b, and beside G (P + R) from the first point."""
    rungs = [row for row in rows if int(row["group"]) != BETWEEN_RUNGS]
    between = [row for row in rows if int(row["group"]) == BETWEEN_RUNGS]
    P, R = int(rows[0]["prompt"]), int(rows[0]["tokens"])
    groups, seconds = column(rungs, "group"), column(rungs, f"{clock}.median")
    shared = [P + G * R for G in groups]
    a, b, fit = fitted_line(shared, seconds)
    _say("G", groups, rungs, shared)
    apart = [seconds[0] * G / groups[0] for G in groups]
    return Panel(
        f"Update: a prompt of {P} tokens runs once",
        f"rollouts per prompt (G), of R = {R} tokens",
        CLOCKS[clock],
        [
            Curve("measured", groups, seconds, "points"),
            Curve("rounded up to 24", column(between, "group"), column(between, f"{clock}.median"), "points", 1),
            Curve(f"a (P + G R) + b, R² = {fit:.3f}", groups, [a * tokens + b for tokens in shared], "line"),
            Curve("G (P + R), scaled", groups, apart, "dashes"),
        ],
        top=1.5 * max(seconds),
    )


def of_documents(rows: Sequence[dict], clock: str) -> Panel:
    """Seconds against the positions that share a document, beside a line in distinct tokens, and beside FLOPs."""
    positions, seconds = column(rows, "positions_per_document"), column(rows, f"{clock}.median")
    tokens, work = column(rows, "made.stream_tokens"), column(rows, "gflops")
    a, b, fit = fitted_line(tokens, seconds)
    _say("positions", positions, rows, tokens)
    print(f"  distinct tokens, last over first {tokens[-1] / tokens[0]:.2f}, FLOPs {work[-1] / work[0]:.2f}")
    return Panel(
        f"Update: {rows[0]['prompts']} positions from fewer documents",
        "positions per document",
        CLOCKS[clock],
        [
            Curve("measured", positions, seconds, "points"),
            Curve(f"a (distinct tokens) + b, R² = {fit:.3f}", positions, [a * t + b for t in tokens], "line"),
            Curve("FLOPs, scaled", positions, [seconds[0] * w / work[0] for w in work], "dashes"),
        ],
        doublings=True,
    )


def of_vocabularies(rows: Sequence[dict], clock: str) -> Panel:
    """Seconds against V beside a line."""
    sizes, seconds = column(rows, "vocabulary"), column(rows, f"{clock}.median")
    a, b, fit = fitted_line(sizes, seconds)
    _say("V", sizes, rows, sizes)
    thousands = [V / 1024 for V in sizes]
    return Panel(
        "Update: the vocabulary",
        "vocabulary (1024 tokens)",
        CLOCKS[clock],
        [
            Curve("measured", thousands, seconds, "points"),
            Curve(f"a V + b, R² = {fit:.3f}", thousands, [a * V + b for V in sizes], "line"),
        ],
    )


def of_lengths(rows: Sequence[dict], clock: str) -> Panel:
    """Slot steps and seconds a token against the longest length over the mean, with and without refill."""
    found = []
    even = float(rows[0][f"{clock}.median"]) / float(rows[0]["made.tokens"])  # seconds a token where all are as long
    for colour, (refill, name) in enumerate((("True", "refill"), ("False", "wait for the longest"))):
        own = [row for row in rows if row["refill"] == refill]
        at, tokens, steps = column(own, "at"), column(own, "made.tokens"), column(own, "made.slot_steps")
        work = [step / made for step, made in zip(steps, tokens, strict=True)]
        times = [s / made / even for s, made in zip(column(own, f"{clock}.median"), tokens, strict=True)]
        print(f"{name}, limit over mean {', '.join(f'{each:g}' for each in at)}")
        print("  slot steps a token: " + ", ".join(f"{each:.3f}" for each in work))
        for each_clock in CLOCKS:
            print(f"  {each_clock}: " + ", ".join(f"{each:.3f}" for each in column(own, f"{each_clock}.median")))
        found.append(Curve(f"{name}: slot steps per token", at, work, "joined", 2 * colour))
        found.append(Curve(f"{name}: seconds per token", at, times, "joined", 2 * colour + 1))
    return Panel(
        "Rollout: lengths of mean 64",
        "response limit over the mean length",
        "relative to responses of even length",
        found,
        doublings=True,
        top=1.35 * max(max(curve.y) for curve in found),
    )


def _say(name: str, at: Sequence[float], rows: Sequence[dict], x: Sequence[float]) -> None:
    """Prints the points of a series and how well a line in x fits both clocks."""
    print(f"{name}: " + ", ".join(f"{each:g}" for each in at))
    for clock in CLOCKS:
        seconds = column(rows, f"{clock}.median")
        slope, intercept, fit = fitted_line(x, seconds)
        line = f"{slope:.3g} x + {intercept:.3g}, R^2 {fit:.4f}, last over first {seconds[-1] / seconds[0]:.2f}"
        print(f"  {clock}: " + ", ".join(f"{each:.3f}" for each in seconds) + f"; {line}")


PANELS = {"group": of_groups, "documents": of_documents, "vocabulary": of_vocabularies, "lengths": of_lengths}


def main(settings: Settings) -> None:
    measure_all(settings)
    order = {
        _key({"series": name, "at": f"{at:g}", "refill": b.refill}): b for name in PANELS for at, b in points(name)
    }
    rows = {_key(row): row for row in read_rows(RESULTS)}
    panels = []
    for series, panel in PANELS.items():
        own = [rows[key] for key in order if key in rows and key[0] == series]
        if len(own) == sum(key[0] == series for key in order):
            panels.append(panel(own, settings.clock))
    curves(panels, PICTURE, title="What a step costs")


if __name__ == "__main__":
    main(tyro.cli(Settings))
