"""Kills runs of the toy at chosen phases and random moments, restarts them, and compares them with one left alone.

    python tests/fault_campaign.py --kills 20 --processes 1 2 --results experiments/results/faults.csv

A row a run: what it was doing when the signal came (saving goes on behind the next steps), where it went on, and
whether parameters, optimizer state and all rows of metrics, rollouts and evaluations are bitwise those of the run left
alone. SIGKILL takes all processes, as the loss of a machine does; SIGTERM reaches one of them, and all must save and
end. About 20 s a run and process on two cores.
"""

import argparse
import contextlib
import csv
import itertools
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import toy
import toy_run

from rpt_jax.learning import checkpoints, run_folder

COLUMNS = ("processes", "fault", "aimed_at", "phase", "step", "continued_from", "restarts", "same", "seconds", "said")


def start(folder: Path, processes: int):
    return toy_run.start(folder, processes, devices=1, mesh=(processes, 1, 1))


def whole(folder: Path, processes: int) -> None:
    """Runs to the end."""
    running = start(folder, processes)
    errors = toy_run.finish(running)
    assert not any(process.returncode for process in running), errors[0][-3000:]


def rows(folder: Path) -> list[dict]:
    """All that the run wrote, without times."""
    return [row | {"stream": name} for name in run_folder.STREAMS for row in toy.rows_of(folder, name)]


def same(folder: Path, other: Path) -> bool:
    """Bitwise, in parameters, optimizer state and rows."""
    ours, theirs = (np.load(each / "state.npz") for each in (folder, other))
    equal = all(np.array_equal(ours[name], theirs[name]) for name in theirs.files)
    return ours.files == theirs.files and equal and rows(folder) == rows(other)


def wait_for(running, folder: Path, wanted: str, left: int) -> None:
    """Until process 0 has come into the wanted phase so many times, or has ended."""
    phase_file, before = Path(f"{folder}.phase0"), ""
    while left and running[0].poll() is None:
        phase = phase_file.read_text() if phase_file.exists() else ""
        left -= phase == wanted != before
        before = phase
        time.sleep(0.0005)


def strike(running, folder: Path, number: int, wanted: str, randomly: random.Random) -> str:
    """Sends the signal once the run is in the wanted phase, in one of its later occurrences; says the phase it met."""
    wait_for(running, folder, wanted, randomly.randint(1, 6))
    time.sleep(randomly.random() * 0.02)
    met = Path(f"{folder}.phase0").read_text()
    for process in running if number == signal.SIGKILL else [randomly.choice(running)]:
        process.send_signal(number)
    return met


def one_fault(folder: Path, alone: Path, processes: int, number: int, wanted: str, randomly: random.Random) -> dict:
    """The row of one run that was struck and restarted."""
    began = time.time()
    Path(f"{folder}.phase0").unlink(missing_ok=True)
    running = start(folder, processes)
    met = strike(running, folder, number, wanted, randomly)
    errors = toy_run.finish(running)
    codes = {process.returncode for process in running}
    came_late = codes == {0}  # the run had ended, or was about to
    expected = {-signal.SIGKILL} if number == signal.SIGKILL else {128 + signal.SIGTERM}
    assert came_late or codes == expected, (codes, errors[0][-3000:])
    written = rows(folder)
    step = max((row["step"] for row in written if row["stream"] == "metrics.jsonl"), default=0)
    saved = checkpoints.newest_step(folder / "checkpoints")
    if not came_late:
        whole(folder, processes)
    return {
        "processes": processes,
        "fault": signal.Signals(number).name,
        "aimed_at": wanted,
        "phase": met,
        "step": step,
        "continued_from": "" if saved is None else saved,
        "restarts": int(not came_late),
        "same": same(folder, alone),
        "seconds": round(time.time() - began, 1),
    }


def keep_compiled(folder: Path) -> None:
    """Processes started from now on share what they compile."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def strike_and_compare(folder: Path, processes: int, number: int, phase: str, seed: int) -> dict:
    """The row of one run in `folder`, where the one left alone is made first."""
    alone, struck = folder / f"alone_{processes}", folder / f"struck_{processes}_{number}_{phase}_{seed}"
    if not (alone / "state.npz").exists():
        whole(alone, processes)
    row = one_fault(struck, alone, processes, number, phase, random.Random(seed))
    shutil.rmtree(struck)
    return row


@contextlib.contextmanager
def table(path: Path) -> Iterator[Callable[[dict], None]]:
    """Gives what adds a row to the table of faults, at once, and prints it."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()

        def write(row: dict) -> None:
            writer.writerow(row)
            file.flush()
            print(row, flush=True)

        yield write


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each signal")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--phases", nargs="+", choices=toy_run.PHASES, default=toy_run.PHASES, help="aimed at in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", default="experiments/results/faults.csv")
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder, table(Path(given.results)) as write:
        keep_compiled(Path(folder))
        every = itertools.product(given.processes, range(given.kills), (signal.SIGKILL, signal.SIGTERM))
        for processes, index, number in every:
            phase = given.phases[index % len(given.phases)]
            found.append(strike_and_compare(Path(folder), processes, number, phase, given.seed + index))
            write(found[-1])
    lost = [row for row in found if not row["same"]]
    print(f"{len(found)} runs struck, {len(found) - len(lost)} the same to the bit, {len(lost)} not")
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
