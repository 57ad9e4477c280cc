"""Does a long run stay as it began, in memory and in speed?

    .venv/bin/python experiments/soak.py               # two hours
    .venv/bin/python experiments/soak.py --minutes 20

The quickstart's RPT on the shipped base, with evaluation, checkpoints and dynamic sampling, at a learning rate of 0:
all is computed, and the policy stays, so that each step is the same work. Writes a row to results/soak.csv: resident
memory without files' pages in each quarter (medians, MiB), its growth from the second quarter to the last, and the
median seconds of a step in each quarter and their change. Compilation and the allocator's first arenas are in the first
quarter. Hardware: two CPU cores with nothing else on them. Bars, for two hours: growth under 1 %, change within 3 %.
"""

import dataclasses
import os
import statistics
import tempfile
import time
from array import array
from dataclasses import dataclass
from pathlib import Path

# ruff: noqa: E402  (the arenas are bounded before the imports below start threads, as `rpt` does)
from rpt_jax import host_memory

host_memory.share_arenas()

import tyro
from rows import append_row, change_rows

from rpt_jax.config import CheckpointConfig, Config, DynamicSamplingConfig, EvaluateConfig, ModelConfig
from rpt_jax.corpus.positions import select_positions
from rpt_jax.learning import run_folder
from rpt_jax.learning.policy_folder import load_policy
from rpt_jax.learning.train import train
from rpt_jax.study import quickstart


@dataclass(frozen=True)
class Settings:
    """How long, and where the row goes."""

    minutes: float = 120
    results: Path = Path(__file__).parent / "results" / "soak.csv"
    readings: Path | None = None  # all steps: minute, seconds, MiB


class Enough(Exception):
    """The time is over."""


@dataclass(frozen=True)
class Reading:
    """What was seen after a step."""

    minute: float
    step_seconds: float
    memory_mib: float


def resident_mib() -> float:
    """Resident memory but for pages of files, which the system takes back and reads again as it likes."""
    _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - of_files) * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(folder: Path, minutes: float) -> list[Reading]:
    """A reading for each step of a run of so many minutes."""
    settings = quickstart.QuickstartConfig()
    policy = load_policy(quickstart.SHIPPED)
    texts, exam = quickstart.make_documents(settings)
    annotated = quickstart.annotate_texts(policy, texts, folder / "annotated")
    examined = quickstart.annotate_texts(policy, exam, folder / "evaluation")
    positions = select_positions(annotated, quickstart.position_config(settings), settings.seed)
    hard = {"hard": quickstart.evaluation_splits(examined, exam, policy[2], settings.base)["hard"]}
    began, readings = time.monotonic(), array("d")  # three numbers a step: objects would grow what is measured

    def note(row: dict) -> None:
        minute = (time.monotonic() - began) / 60
        readings.extend((minute, row["seconds"], resident_mib()))
        if len(readings) % 300 == 0:
            print(f"{minute:.0f} min, {readings[-1]:.0f} MiB, {row['seconds']:.2f} s", flush=True)
        if minute >= minutes:
            raise Enough

    def evaluate(params, step: int) -> dict:
        found = quickstart.examine(settings, (policy[0], params, policy[2]), examined, hard)
        return {"hard": found.figures(found.splits["hard"])}

    try:
        train(
            run_config(settings, policy[0], folder / "run"),
            policy,
            annotated=annotated,
            positions=positions,
            template=quickstart.BARE,
            evaluate=evaluate,
            report=note,
        )
    except Enough:
        return [Reading(*readings[i : i + 3]) for i in range(0, len(readings), 3)]
    raise AssertionError("a million steps were over before the time was")


def run_config(settings: quickstart.QuickstartConfig, model: ModelConfig, folder: Path) -> Config:
    """The quickstart's run at a learning rate of 0, with more steps than the time allows."""
    config = quickstart.rpt_config(settings, model, folder)
    return dataclasses.replace(
        config,
        steps=10**6,
        update=dataclasses.replace(config.update, learning_rate=0.0),
        dynamic_sampling=DynamicSamplingConfig(from_step=0, max_rounds=2),
        checkpoint=CheckpointConfig(every=50, keep=2),
        evaluate=EvaluateConfig(every=100),
    )


def row_of(readings: list[Reading], minutes: float) -> dict:
    """Medians by quarter, and what became of the second in the last."""
    quarters = [[each for each in readings if q <= 4 * each.minute / minutes < q + 1] for q in range(4)]
    memory = [statistics.median(each.memory_mib for each in quarter) for quarter in quarters]
    seconds = [statistics.median(each.step_seconds for each in quarter) for quarter in quarters]
    made_by = run_folder.provenance()
    return {
        "minutes": minutes,
        "steps": len(readings),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": " / ".join(f"{each:.0f}" for each in memory),
        "memory_growth": f"{memory[3] / memory[1] - 1:+.4f}",
        "step_seconds": " / ".join(f"{each:.3f}" for each in seconds),
        "step_change": f"{seconds[3] / seconds[1] - 1:+.4f}",
        "commit": made_by["commit"],
    }


def main(settings: Settings) -> None:
    """The run and its row."""
    with tempfile.TemporaryDirectory() as name:
        readings = soak(Path(name), settings.minutes)
    if settings.readings is not None:
        change_rows(settings.readings, lambda there: [dataclasses.asdict(each) for each in readings])
    append_row(settings.results, row_of(readings, settings.minutes))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
