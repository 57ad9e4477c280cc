"""Kills the quickstart's RPT at random instants until it gets through, and compares it with a run left alone.

    python tests/quickstart_kills.py --processes 1 2 --results experiments/results/faults.csv

The whole run of the demonstration (120 updates, as `rpt train` from a file), with evaluations every 30 updates and a
checkpoint every 10. Kills come after random seconds, also while the run starts: SIGKILL for all processes and SIGTERM
for one of them in turn, the latter not before an update, since processes that have not met yet cannot agree to stop.
Then the same command again. A row each number of processes, in the table of fault_campaign.py: `restarts` counts the
kills, and `same` compares the parameters, the fingerprints of all arrays and the rest of the last checkpoint, and all
rows of metrics, rollouts and evaluations. About 15 minutes on two cores.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fault_campaign
import jax
import numpy as np
import orbax.checkpoint as ocp
import toy_run

from rpt_jax.learning import checkpoints
from rpt_jax.learning.policy_folder import load_policy
from rpt_jax.study import quickstart

LONGEST = 400  # seconds that a run told to stop may take: a checkpoint, and what agrees on it
EXPERIMENT = """
from dataclasses import replace
from pathlib import Path

from rpt_jax.config import CheckpointConfig, EvaluateConfig, ModelConfig
from rpt_jax.study import quickstart

HERE = Path(__file__).parent


def config():
    settings = quickstart.QuickstartConfig(steps={steps})
    common = quickstart.rpt_config(settings, ModelConfig(), HERE / "unused")
    return replace(
        common,
        policy=str(quickstart.SHIPPED),
        positions=replace(common.positions, annotated=str(HERE / "annotated")),
        evaluate=EvaluateConfig(annotated=str(HERE / "held_out"), every=30, positions=128, batch_size=64),
        checkpoint=CheckpointConfig(every=10, keep=2),
    )
"""


def start(experiment: Path, folder: Path, processes: int) -> list[subprocess.Popen]:
    """`rpt train` in each process; process P writes what it says to FOLDER.saidP."""
    command = [Path(sys.executable).with_name("rpt"), "train", experiment, "--run-folder", folder]
    if processes > 1:
        command += ["--mesh.coordinator", f"localhost:{toy_run.free_port()}"]
        command += ["--mesh.processes", processes, "--mesh.data", processes]
    return [
        subprocess.Popen(
            [*map(str, command), *(["--mesh.process", str(process)] if processes > 1 else [])],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=Path(f"{folder}.said{process}").open("w"),
        )
        for process in range(processes)
    ]


def ended(running: list[subprocess.Popen], seconds: float | None = None) -> bool:
    """Whether all end within so many seconds."""
    until = None if seconds is None else time.monotonic() + seconds
    with contextlib.suppress(subprocess.TimeoutExpired):
        for process in running:
            process.wait(None if until is None else max(until - time.monotonic(), 0))
        return True
    return False


def said(folder: Path, processes: int) -> str:
    return "\n".join(Path(f"{folder}.said{process}").read_text()[-3000:] for process in range(processes))


def whole(experiment: Path, folder: Path, processes: int) -> None:
    running = start(experiment, folder, processes)
    ended(running)
    assert not any(process.returncode for process in running), said(folder, processes)


def killed(experiment: Path, folder: Path, processes: int, between: float, randomly: random.Random) -> int:
    """Runs to the end through kills, `between` seconds apart in the mean; returns their number."""
    kills = 0
    while True:
        rows = lines_of(folder)
        running = start(experiment, folder, processes)
        number, seconds = (signal.SIGKILL, signal.SIGTERM)[kills % 2], randomly.uniform(0, 2 * between)
        if ended(running, seconds) or (number == signal.SIGTERM and not updated(running, folder, rows)):
            assert not any(process.returncode for process in running), said(folder, processes)
            return kills
        for process in running if number == signal.SIGKILL else [randomly.choice(running)]:
            process.send_signal(number)
        began = time.monotonic()
        if not ended(running, LONGEST):
            for process in running:
                process.kill()
            raise AssertionError(f"not ended {LONGEST} s after {number.name}:\n{said(folder, processes)}")
        codes, kills = {process.returncode for process in running}, kills + 1
        print(number.name, codes, f"{time.monotonic() - began:.1f} s until all had ended", flush=True)
        allowed = {-signal.SIGKILL} if number == signal.SIGKILL else {128 + signal.SIGTERM, -signal.SIGTERM}
        assert codes <= allowed | {0}, (codes, said(folder, processes))


def updated(running: list[subprocess.Popen], folder: Path, rows: int) -> bool:
    """Waits until more rows than before are there; False where the run ends before."""
    while lines_of(folder) <= rows:
        if ended(running, 0.05):
            return False
    return True


def lines_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def last_checkpoint(folder: Path) -> dict:
    """Step, fingerprints of all arrays, and what else the newest checkpoint holds of the host."""
    with contextlib.closing(checkpoints.open_checkpoints(folder / "checkpoints", 0, read_only=True)) as manager:
        step = manager.latest_step()
        return {"step": step, "host": manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore())).host}


def row(folder: Path, experiment: Path, processes: int, between: float, seed: int) -> dict:
    """Both runs, and the row of what came out."""
    alone, struck = (folder / f"{name}_{processes}" for name in ("alone", "struck"))
    whole(experiment, alone, processes)
    began = time.time()
    kills = killed(experiment, struck, processes, between, random.Random(seed))
    last = last_checkpoint(alone)
    theirs, ours = (jax.tree.leaves(load_policy(each)[1]) for each in (alone, struck))
    equal = all(map(np.array_equal, ours, theirs)) and last_checkpoint(struck) == last
    same = equal and fault_campaign.rows(struck) == fault_campaign.rows(alone)
    return {
        "processes": processes,
        "fault": "SIGKILL and SIGTERM in turn",
        "aimed_at": "the quickstart's RPT, any instant",
        "step": last["step"],
        "restarts": kills,
        "same": same,
        "seconds": round(time.time() - began, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--between", type=float, default=25.0, help="seconds from a start to its kill, in the mean")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", default="experiments/results/faults.csv")
    given = parser.parse_args()
    lost = 0
    with tempfile.TemporaryDirectory() as name, fault_campaign.table(Path(given.results)) as write:
        folder = Path(name)
        fault_campaign.keep_compiled(folder)
        quickstart.prepare(quickstart.QuickstartConfig(), folder, print)
        experiment = folder / "experiment.py"
        experiment.write_text(EXPERIMENT.format(steps=given.steps))
        for processes in given.processes:
            found = row(folder, experiment, processes, given.between, given.seed)
            lost += not found["same"]
            write(found)
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
