"""`rpt bench compare PEER.py`: our step beside another implementation's, on the same workload, machine and cores.

The peer's script draws the workload from the same seeds (workload.py), takes --workload, --repeats, --warmup,
--phases and --cores, and ends with one JSON object on a line: `checks.score_mean`, and for each phase `s` and
`peak_rss_mib`, for the rollout also `tokens_per_s`.
"""

import logging
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rpt_jax.bench.step import Phase, StepBench, bench_step, run_for_json
from rpt_jax.bench.workload import WORKLOADS
from rpt_jax.records import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompareBench:
    """Our step and a peer's, one after the other, each in a process of its own, and the ratios."""

    workload: Literal["W1", "tiny"] = "W1"  # sizes, by the name that the peer's script knows
    phases: tuple[Phase, ...] = ("rollout", "score", "update", "e2e")
    repeats: int = 5  # timed calls of each phase
    warmup: int = 1  # calls before them, after the first, which compiles
    cores: str = ""  # CPUs to run on, e.g. 0,1; "": those of this process
    devices: int = 1  # ours: that prompts are split over; a CPU is made into so many
    microbatches: int = 1  # ours: of an update
    remat: Literal["none", "layer", "dots"] = "dots"  # ours: kept for the backward pass
    seed: int = 0  # of our sampling
    peer_python: str = ""  # interpreter that has the peer's packages; "": this one
    peer_path: str = ""  # PYTHONPATH of the peer, e.g. a checkout; "": as inherited
    peer_arguments: str = ""  # more of them, written with an equals sign: --peer-arguments='--logps-chunk 64'


def compare(peer: str, config: CompareBench) -> dict:
    """{workload, ours, peer, ratios, score_mean_difference}: both sets of figures and what they come to.

    `ratios` holds for each phase that both measured: `speed` = the peer's median seconds / ours, `memory` = our peak of
    host memory / the peer's, and for the rollout `tokens_per_s` = our median / the peer's.

    Raises InputError for a script or interpreter that is not there, and for one of the two that could not be measured.
    """
    shared = ("phases", "repeats", "warmup", "cores", "devices", "microbatches", "remat", "seed")
    step = StepBench(workload=WORKLOADS[config.workload], **{name: getattr(config, name) for name in shared})
    step.check()
    if not Path(peer).is_file():
        raise InputError(f"bench: no script {peer!r}: name the peer's, rpt bench compare PEER.py")
    python = config.peer_python or sys.executable
    if shutil.which(python) is None:
        raise InputError(f"bench: peer_python={python!r} is no program: give the path of the peer's interpreter")
    ours = bench_step(step)
    log.info("bench: measuring %s", peer)
    theirs = run_for_json([python, peer, *_arguments(config)], peer, _environment(config))
    means = [each.get("checks", {}).get("score_mean") for each in (ours, theirs)]
    return {
        "workload": config.workload,
        "ours": ours,
        "peer": theirs,
        "ratios": {phase: _ratios(ours[phase], theirs[phase]) for phase in config.phases if phase in theirs},
        "score_mean_difference": None if None in means else means[0] - means[1],
    }


def _arguments(config: CompareBench) -> list[str]:
    given = {
        "--workload": config.workload,
        "--repeats": str(config.repeats),
        "--warmup": str(config.warmup),
        "--phases": ",".join(config.phases),
        "--cores": config.cores,
    }
    return [word for pair in given.items() for word in pair] + shlex.split(config.peer_arguments)


def _environment(config: CompareBench) -> dict[str, str]:
    return os.environ | ({"PYTHONPATH": config.peer_path} if config.peer_path else {})


def _ratios(ours: dict, theirs: dict) -> dict:
    found = {"speed": theirs["s"]["median"] / ours["s"]["median"]}
    if "tokens_per_s" in ours and "tokens_per_s" in theirs:
        found["tokens_per_s"] = ours["tokens_per_s"]["median"] / theirs["tokens_per_s"]["median"]
    if ours["peak_rss_mib"] and theirs.get("peak_rss_mib"):
        found["memory"] = ours["peak_rss_mib"] / theirs["peak_rss_mib"]
    return found
