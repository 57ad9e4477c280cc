"""Commands that start the cells of a sweep on TPU slices of a GKE cluster by xpk, one workload a cell. Nothing is run.

Each runs `rpt sweep EXPERIMENT --cell NAME` on all hosts of its slices. Stages have to be there (--stages-only), and
the folder has to be one that all hosts see.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from rpt_jax.records import InputError
from rpt_jax.scaling.sweep_cell import Cell

LONGEST_NAME = 40  # characters of a workload


@dataclass(frozen=True)
class Xpk:
    """Where --print-xpk would run the cells."""

    cluster: str = ""
    tpu_type: str = ""  # e.g. v5litepod-16
    slices: int = 1  # of each cell
    image: str = ""  # container image with this project installed
    restarts: int = 20  # of a workload whose nodes are taken away, at most
    project: str = ""  # of Google Cloud; empty: as gcloud has it
    zone: str = ""  # likewise


def commands(experiment: str, cells: Sequence[Cell], xpk: Xpk, folder: str, results: str = "") -> list[str]:
    """A command a cell that starts it on TPU slices; nothing is run.

    Raises InputError for what xpk would refuse: a cluster or TPU type that is missing, and names that are no labels.
    """
    if not xpk.cluster or not xpk.tpu_type:
        raise InputError("sweep: --print-xpk needs --xpk.cluster and --xpk.tpu-type (e.g. v5litepod-16)")
    if not folder:
        raise InputError("sweep: --print-xpk needs --folder, a place that all slices see")
    made, names = [], set()
    for cell in cells:
        name = re.sub(r"[^a-z0-9-]", "-", cell.name.lower()).strip("-")
        if len(name) > LONGEST_NAME or not name[:1].isalpha():
            raise InputError(
                f"sweep: {cell.name!r} cannot name a workload: begin with a letter, {LONGEST_NAME} characters at most"
            )
        if name in names:
            raise InputError(f"sweep: {cell.name!r} and another give one workload name: let letters and digits differ")
        names.add(name)
        own = ["rpt", "sweep", experiment, "--cell", cell.name, "--folder", folder]
        own += ["--results", results] if results else []
        words = ["xpk", "workload", "create", "--cluster", xpk.cluster, "--workload", name]
        words += ["--tpu-type", xpk.tpu_type, "--num-slices", str(xpk.slices), "--max-restarts", str(xpk.restarts)]
        for flag, value in (("--docker-image", xpk.image), ("--project", xpk.project), ("--zone", xpk.zone)):
            words += [flag, value] if value else []
        made.append(shlex.join([*words, "--command", shlex.join(own)]))
    return made
