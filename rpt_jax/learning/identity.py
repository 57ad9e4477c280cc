"""What makes a run, or another command, the same on all of its hosts; and a run the same when it is continued.

In: settings, and what the loop was given. Out: facts to compare, for run_folder.require_same_run and
agreement.require_agreement.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from rpt_jax.agreement import require_agreement
from rpt_jax.corpus.positions import Positions
from rpt_jax.learning import run_folder
from rpt_jax.learning.collect import Source
from rpt_jax.mesh import start_distributed
from rpt_jax.policy.fingerprint import fingerprint
from rpt_jax.records import InputError, Params


def start_together(config) -> None:
    """Joins the processes of a multi-host command; raises InputError where they have other settings, code or devices.

    config: its settings, a dataclass with .mesh. Comes before anything that touches a device, and so before the first
    program of all: hosts that differ would run different ones, and wait for each other in vain.
    """
    start_distributed(config.mesh)
    require_same_settings(config)


def require_same_settings(config) -> None:
    """Raises InputError where processes have other settings, code or devices than process 0. A collective."""
    if jax.process_count() == 1:
        return
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:  # known to all, and the collective below would fail for it
        numbers = ", ".join(f"{devices[process]} in process {process}" for process in sorted(devices))
        raise InputError(f"processes have different numbers of devices ({numbers}): give all the same")
    code = run_folder.provenance()
    require_agreement(
        {
            "set of settings": repr(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, process=-1))),
            "version of rpt_jax or its packages": repr(
                (code["commit"], code["changed_since_commit"], code["versions"])
            ),
        }
    )


def digest(columns: Iterable[np.ndarray | None]) -> str:
    """Of what lies in arrays; None is passed over."""
    found = hashlib.blake2b(digest_size=8)
    for column in columns:
        if column is not None:
            found.update(np.ascontiguousarray(column).tobytes())
    return found.hexdigest()


def of_inputs(source: Source, params: Params, positions: Positions) -> dict:
    """What a continued run has to share with the one it continues, beyond the settings."""
    judge, file = {}, source.config.reward.judge.rpartition(":")[0]
    if file:
        judge = {"judge": hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()}
    gap = [] if source.template.gap is None else [source.template.gap]
    found = {
        "starting_policy": fingerprint(params),
        "tokenizer": source.tokenizer.fingerprint,
        "set_of_positions": digest((positions.documents, positions.indices, positions.lengths)),
        "template": [source.template.before, source.template.after, *gap],
        **judge,
    }
    if source.config.reward.kind == "verified":  # their positions say little of questions
        found["set_of_questions"] = digest_of_texts(source.documents[document] for document in positions.documents)
    return found


def digest_of_texts(documents: Iterable[np.ndarray]) -> str:
    """Of the tokens of each document."""
    found = hashlib.blake2b(digest_size=8)
    for tokens_T in documents:
        found.update(np.asarray(tokens_T, "<i4").tobytes() + b"\xff")
    return found.hexdigest()
