"""`rpt sweep EXPERIMENT.py`: model sizes x compute budgets x seeds, a separately trained run and a row each.

In: an experiment file (sweep_cell.py says what it defines). Out: a csv table with a row for each cell, which `rpt fit`
reads, and under --folder everything the runs have written.

- A cell that has a row is not run again. A cell that was broken off goes on from its newest checkpoint.
- Each cell or stage runs in a process of its own. One that fails leaves a row with its error, and the rest go on;
  --retry-failed runs such cells again.
- Workers side by side (--workers, each with its share of the cores) and on several hosts (the same command on each,
  with a --folder that all of them see) take cells by claims (claims.py): each cell is run once, and that of a worker
  that died is taken over, at once on its host, elsewhere after ten minutes without a sign of life.
- Ctrl-C or SIGTERM: runs save and end, the table is written, and the same command goes on; exit status 128 + signal.
"""

import csv
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jax

from rpt_jax.learning import identity
from rpt_jax.records import InputError
from rpt_jax.scaling import claims, sweep_cell, sweep_xpk, table
from rpt_jax.scaling.sweep_cell import Cell, Kind

log = logging.getLogger(__name__)

POLL = 2.0  # seconds between looks where everything that is left is in other hands
STOPPED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit statuses: not done yet


@dataclass(frozen=True)
class SweepSettings:
    """All cells of a sweep, or one."""

    folder: str = ""  # runs, claims and results; on several hosts one that all see; empty: runs/NAME of the file
    results: str = ""  # the table; empty: results/NAME.csv beside the file
    workers: int = 1  # processes side by side here; on a machine with accelerators use 1
    pin: bool = True  # each worker has its share of this process's cores, where there is one for each
    only: tuple[str, ...] = ()  # names of cells; empty: all
    stages_only: bool = False  # makes the stages of the cells, and runs no cell
    retry_failed: bool = False  # runs cells again whose row says that they failed
    cell: str = ""  # runs this one here and now, without claims: for a launcher that runs one command a cell
    print_xpk: bool = False  # prints a command a cell for TPU slices, and runs nothing
    xpk: sweep_xpk.Xpk = field(default_factory=sweep_xpk.Xpk)


def sweep(experiment: str, settings: SweepSettings) -> dict:
    """Runs what is left; returns {cells, done, failed, left, seconds, results}, of cells or, with stages_only, stages.

    Also `signal`, its number, where one has told the sweep to stop; of print_xpk {commands} alone, of `cell` its row.
    Raises InputError for an experiment file, results or a table that cannot be used, and a cell that is not there.
    """
    if not experiment:
        raise InputError("sweep: name the experiment file, rpt sweep EXPERIMENT.py")
    if settings.workers < 1:
        raise InputError(f"sweep: workers={settings.workers}: use 1 or more")
    folder = Path(settings.folder or Path("runs") / Path(experiment).stem)
    results = Path(settings.results or Path(experiment).parent / "results" / f"{Path(experiment).stem}.csv")
    _, cells = sweep_cell.load_sweep(experiment, folder)
    unknown = sorted({*settings.only, *filter(None, [settings.cell])} - {cell.name for cell in cells})
    if unknown:
        raise InputError(f"sweep: no cell {unknown[0]!r} in {experiment}; there are {', '.join(c.name for c in cells)}")
    chosen = [cell for cell in cells if not settings.only or cell.name in settings.only]
    if settings.print_xpk:
        return {"commands": sweep_xpk.commands(experiment, chosen, settings.xpk, settings.folder, settings.results)}
    if settings.cell:
        return run_here(experiment, next(cell for cell in cells if cell.name == settings.cell), folder, results, cells)
    state = Sweep(experiment, folder, results, cells, chosen, settings)
    check_rows(state)
    if settings.retry_failed:
        forget_failures(state)
    began = time.perf_counter()
    told = run_all(state)
    if settings.stages_only:
        stages = dict.fromkeys(cell.needs for cell in chosen if cell.needs)
        kind, rows = "stages", [sweep_cell.read_result(folder, "stages", name) for name in stages]
    else:
        kind, rows = "cells", [row_of(state, cell) for cell in chosen]
    counts = {status: sum(row is not None and row["status"] == status for row in rows) for status in STATUSES}
    figures = {kind: len(rows)} | counts | {"left": rows.count(None), "seconds": round(time.perf_counter() - began, 1)}
    return figures | {"results": str(results)} | ({"signal": told} if told else {})


STATUSES = ("done", "failed")


@dataclass(frozen=True)
class Sweep:
    """What workers share."""

    experiment: str
    folder: Path
    results: Path
    cells: Sequence[Cell]
    chosen: Sequence[Cell]  # to run, of the cells
    settings: SweepSettings
    stop: threading.Event = field(default_factory=threading.Event)
    running: set = field(default_factory=set)  # processes
    lock: threading.Lock = field(default_factory=threading.Lock)  # of this process's writes of the table


def read_table(path: Path) -> dict[str, dict]:
    """Rows by cell; none if there is no table yet."""
    if not path.is_file():
        return {}
    rows = table.read_rows(path)
    missing = [name for name in ("cell", "status") if rows and name not in rows[0]]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}: it is no table of a sweep, choose another --results")
    return {row["cell"]: row for row in rows}


def row_of(state: Sweep, cell: Cell) -> dict | None:
    """The row of a cell that has ended: its result, or what the table has from an earlier sweep."""
    return sweep_cell.read_result(state.folder, "cells", cell.name) or read_table(state.results).get(cell.name)


def write_table(state: Sweep) -> None:
    """The table anew, whole or not at all, in the order of the cells; rows that are there and have no result stay.

    Hosts may write at one time: each writes all results that it sees, so that the last one has them all.
    """
    with state.lock:
        rows = read_table(state.results)
        for cell in state.cells:
            rows |= {cell.name: row} if (row := sweep_cell.read_result(state.folder, "cells", cell.name)) else {}
        order = [cell.name for cell in state.cells]
        ordered = [rows[name] for name in dict.fromkeys([*order, *rows]) if name in rows]
        if not ordered:
            return
        state.results.parent.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(name for row in sorted(ordered, key=len, reverse=True) for name in row))
        temporary = state.results.with_name(f".{state.results.name}.{uuid.uuid4().hex}")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(ordered)
        os.replace(temporary, state.results)


def check_rows(state: Sweep) -> None:
    """Raises InputError where a cell has a row that other settings have made."""
    for cell in state.cells:
        row, own = row_of(state, cell), sweep_cell.fingerprint(cell.config)
        if row is not None and row["status"] == "done" and row.get("settings") != own:
            raise InputError(
                f"{cell.name} has a row in {state.results} or a result in {state.folder} made with other settings "
                f"({row.get('settings')}, now {own}): delete them to run it anew, or choose another --folder and "
                "--results"
            )


def forget_failures(state: Sweep) -> None:
    """Cells and stages that failed count as not run."""
    failed = [("cells", cell.name) for cell in state.chosen] + [("stages", cell.needs) for cell in state.chosen]
    for kind, name in failed:
        result = sweep_cell.read_result(state.folder, kind, name) if name else None
        if result and result["status"] == "failed":
            sweep_cell.result_file(state.folder, kind, name).unlink(missing_ok=True)


def is_over(state: Sweep, cell: Cell) -> bool:
    """Nothing is left to do for a cell."""
    if state.settings.stages_only:
        return not cell.needs or sweep_cell.read_result(state.folder, "stages", cell.needs) is not None
    if sweep_cell.read_result(state.folder, "cells", cell.name):
        return True
    row = read_table(state.results).get(cell.name)
    return row is not None and (row["status"] == "done" or not state.settings.retry_failed)


def run_all(state: Sweep) -> int | None:
    """Workers until no cell is left, or a signal comes: then its number."""
    told = []

    def stop(number, frame):
        told.append(int(number))
        log.warning("sweep: told to stop; runs save and end")
        state.stop.set()
        for process in list(state.running):
            process.terminate()

    signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        with ThreadPoolExecutor(state.settings.workers) as pool:
            workers = [pool.submit(work, state, cores) for cores in shares_of_cores(state.settings)]
        for worker in workers:
            worker.result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        write_table(state)
    return told[0] if told else None


def shares_of_cores(settings: SweepSettings) -> list[str]:
    """For each worker the CPUs it is pinned to, "0,1"; "" where it is not."""
    known = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not settings.pin or len(known) < settings.workers or settings.workers == 1:
        return [""] * settings.workers
    each = len(known) // settings.workers
    return [",".join(map(str, known[i * each : (i + 1) * each])) for i in range(settings.workers)]


def work(state: Sweep, cores: str) -> None:
    """Takes one cell or stage after the other until all chosen cells are over, whoever ran them."""
    while not state.stop.is_set():
        left = [cell for cell in state.chosen if not is_over(state, cell)]
        if not left:
            return
        taken = next(takeable(state, left), None)
        if taken is None:
            state.stop.wait(POLL)
        else:
            run_taken(state, *taken, cores)


def takeable(state: Sweep, left: Sequence[Cell]) -> Iterator[tuple[Kind, Cell, claims.Claim]]:
    """Claims of cells that can run, or of stages that they need; taken when asked for."""
    for cell in left:
        kind, name = "cells", cell.name
        stage = sweep_cell.read_result(state.folder, "stages", cell.needs) if cell.needs else {"status": "done"}
        if stage is None:
            kind, name = "stages", cell.needs
        elif stage["status"] == "failed":
            fail(state, "cells", cell, f"its stage {cell.needs} failed: {stage.get('error')}")
            continue
        claim = claims.take(state.folder / "claims" / kind, name)
        if claim is None:
            continue
        if sweep_cell.read_result(state.folder, kind, name):  # ended just before it was taken
            claims.give_back(claim)
            continue
        yield kind, cell, claim


def run_taken(state: Sweep, kind: Kind, cell: Cell, claim: claims.Claim, cores: str) -> None:
    """A process for the cell or its stage; its failure becomes its result."""
    name, began = claim.name, time.perf_counter()
    own = sweep_cell.place(state.folder, kind, name)
    own.parent.mkdir(parents=True, exist_ok=True)
    output = own.with_name(f"{name}.log")
    command = command_of(state, kind, claim, cores)
    log.info("sweep: %s %s", "running" if kind == "cells" else "preparing", name)
    with output.open("a") as file:
        # A session of its own: Ctrl-C reaches the sweep alone, which ends its processes in order.
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        state.running.add(process)
        if state.stop.is_set():  # the signal came in between
            process.terminate()
        status = process.wait()
        state.running.discard(process)
    result = sweep_cell.read_result(state.folder, kind, name)
    is_stopped = status in STOPPED or state.stop.is_set()
    if result is None and not is_stopped and claims.holds(claim):
        fail(state, kind, cell, f"status {status}: {last_words(output)}")
        log.warning("sweep: %s failed, see %s", name, output)
    claims.give_back(claim)
    if result:
        log.info("sweep: %s done in %.0f s", name, time.perf_counter() - began)
    write_table(state)


def command_of(state: Sweep, kind: Kind, claim: claims.Claim, cores: str) -> list[str]:
    """The process of one cell or stage."""
    words = [sys.executable, "-m", "rpt_jax.scaling.sweep_cell", state.experiment, str(state.folder), kind, claim.name]
    return [*words, "--claim", str(claim.number), "--cores", cores]


def last_words(output: Path) -> str:
    """The last line of a process that failed, which names the error."""
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no output"


def fail(state: Sweep, kind: Kind, cell: Cell, error: str) -> None:
    """Records a failure as the result of the cell or of its stage."""
    if kind == "stages":
        sweep_cell.write_result(
            state.folder, kind, cell.needs, {"status": "failed", "stage": cell.needs, "error": error}
        )
    else:
        sweep_cell.write_result(state.folder, kind, cell.name, sweep_cell.head_of_row(cell, "failed", error))
        write_table(state)


def run_here(experiment: str, cell: Cell, folder: Path, results: Path, cells: Sequence[Cell]) -> dict:
    """One cell in this process, its stage first where that is missing; for a launcher that starts one a cell.

    On several hosts all of them call alike. Raises InputError there for a missing stage: one of them alone cannot make
    it on the devices of all.
    """
    state = Sweep(experiment, folder, results, cells, [cell], SweepSettings())
    check_rows(state)
    identity.start_together(cell.config)
    if cell.needs and (sweep_cell.read_result(folder, "stages", cell.needs) or {}).get("status") != "done":
        if jax.process_count() > 1:
            raise InputError(
                f"{cell.name} needs {cell.needs}, which is not in {folder}: make it first on one machine, "
                f"rpt sweep {experiment} --stages-only --folder {folder}"
            )
        module, _ = sweep_cell.load_sweep(experiment, folder)
        sweep_cell.run_stage(module, cell.needs, folder)
    row = sweep_cell.run_cell(cell, folder)
    if row:
        write_table(state)
    return row
