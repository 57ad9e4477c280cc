"""What makes a run the same run: on all of its hosts, and when it is continued.

In: what the loop was given. Out: facts to compare, for run_folder.require_same_run and agreement.require_agreement.
"""

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np

from rpt_jax.config import Config
from rpt_jax.corpus.positions import Positions
from rpt_jax.learning import run_folder
from rpt_jax.learning.collect import Source
from rpt_jax.policy.fingerprint import fingerprint
from rpt_jax.records import Params


def of_inputs(source: Source, params: Params, positions: Positions) -> dict:
    """What a continued run has to share with the one it continues, beyond the settings."""
    digest = hashlib.blake2b(digest_size=8)
    lengths = [] if positions.lengths is None else [positions.lengths]
    for column in (positions.documents, positions.indices, *lengths):
        digest.update(np.ascontiguousarray(column).tobytes())
    judge, file = {}, source.config.reward.judge.rpartition(":")[0]
    if file:
        judge = {"judge": hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()}
    gap = [] if source.template.gap is None else [source.template.gap]
    found = {
        "starting_policy": fingerprint(params),
        "tokenizer": source.tokenizer.fingerprint,
        "set_of_positions": digest.hexdigest(),
        "template": [source.template.before, source.template.after, *gap],
        **judge,
    }
    if source.config.reward.kind == "verified":  # their positions say little of questions
        found["set_of_questions"] = _digest_of_texts(source, positions)
    return found


def _digest_of_texts(source: Source, positions: Positions) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for document in positions.documents:
        digest.update(np.asarray(source.documents[document], "<i4").tobytes() + b"\xff")
    return digest.hexdigest()


def of_host(config: Config, inputs: dict) -> dict[str, str]:
    """What all hosts have in common; `inputs` from of_inputs. For agreement.require_agreement."""
    code = run_folder.provenance()
    settings = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, process=-1))
    return {
        "set of settings": repr(settings),
        "version of rpt_jax or its packages": repr((code["commit"], code["changed_since_commit"], code["versions"])),
        "number of devices": str(jax.local_device_count()),
        **{name.replace("_", " "): repr(value) for name, value in inputs.items()},
    }
