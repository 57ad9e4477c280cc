"""Kills the quickstart's RPT at random instants until it gets through, and compares it with a run left alone.

    python tests/quickstart_kills.py --processes 1 2 --results experiments/results/faults.csv

The whole run of the demonstration (120 updates, as `rpt train` from a file), with evaluations and a checkpoint every 10
updates. Kills come after random seconds, SIGKILL for all processes and SIGTERM for one of them in turn; then the same
command again. A row each number of processes, in the table of fault_campaign.py: `restarts` counts the kills, and
`same` compares the fingerprints of parameters and optimizer state, what else the last checkpoint holds, and all rows
of metrics, rollouts and evaluations. About 15 minutes on two cores.
"""

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fault_campaign
import orbax.checkpoint as ocp
import toy_run

from rpt_jax.learning import checkpoints
from rpt_jax.study import quickstart

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
        running = start(experiment, folder, processes)
        if ended(running, randomly.uniform(0.2, 1.8) * between):
            assert not any(process.returncode for process in running), said(folder, processes)
            return kills
        number = (signal.SIGKILL, signal.SIGTERM)[kills % 2]
        for process in running if number == signal.SIGKILL else [randomly.choice(running)]:
            process.send_signal(number)
        began = time.monotonic()
        ended(running)
        codes, kills = {process.returncode for process in running}, kills + 1
        print(number.name, codes, f"{time.monotonic() - began:.1f} s until all had ended", flush=True)
        allowed = {-signal.SIGKILL} if number == signal.SIGKILL else {128 + signal.SIGTERM, -signal.SIGTERM}
        assert codes <= allowed | {0}, (codes, said(folder, processes))


def last_checkpoint(folder: Path) -> dict:
    """Step, fingerprints of all arrays, and what else the newest checkpoint holds of the host."""
    with contextlib.closing(checkpoints.open_checkpoints(folder / "checkpoints", 0, read_only=True)) as manager:
        step = manager.latest_step()
        return {"step": step, "host": manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore())).host}


def row(folder: Path, experiment: Path, processes: int, between: float, seed: int) -> dict:
    """Both runs, and the row of what came out."""
    began = time.time()
    alone, struck = (folder / f"{name}_{processes}" for name in ("alone", "struck"))
    whole(experiment, alone, processes)
    kills = killed(experiment, struck, processes, between, random.Random(seed))
    last = last_checkpoint(alone)
    same = last_checkpoint(struck) == last and fault_campaign.rows(struck) == fault_campaign.rows(alone)
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
