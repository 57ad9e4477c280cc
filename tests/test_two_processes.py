"""Two processes of two devices each, joined by gloo, against one with the same mesh; and hosts that differ."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from rpt_jax.config import CheckpointConfig, DynamicSamplingConfig, EvaluateConfig, MeshConfig
from rpt_jax.learning import run_folder, train
from rpt_jax.mesh import make_mesh

STEPS = 5
PROGRAM = """
import dataclasses, sys
sys.path.insert(0, {tests!r})
import jax
jax.config.update("jax_num_cpu_devices", 2)
from rpt_jax.mesh import start_distributed, to_host
import numpy as np
import test_two_processes as test
from rpt_jax.learning import train
process, port, folder, seed = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
config = test.settings(folder, seed=seed)
mesh = dataclasses.replace(config.mesh, coordinator="localhost:" + port, processes=2, process=process)
config = dataclasses.replace(config, mesh=mesh)
start_distributed(config.mesh)
state = train.train(config, **test.arguments())
params = to_host(state.params)
if process == 0:
    np.savez(folder + "/params.npz", **test.flat(params))
"""


def settings(folder, **options):
    """Dynamic sampling and an evaluation within few steps."""
    changes = {
        "seed": 4,
        "steps": STEPS,
        "mesh": MeshConfig(data=2, fsdp=2),
        "dynamic_sampling": DynamicSamplingConfig(from_step=2, max_rounds=1),
        "checkpoint": CheckpointConfig(every=2, keep=2),
        "evaluate": EvaluateConfig(every=3),
    }
    return toy.config(folder, **changes | options)


def arguments():
    return toy.arguments(evaluate=lambda params, step: {"weight": float(params["head"].sum())})


def flat(params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True): np.asarray(leaf) for path, leaf in leaves}


def start(folder, seeds=(4, 4)) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, str(process), port, str(folder), str(seed)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process, seed in enumerate(seeds)
    ]


def test_two_processes_make_the_run_of_one(tmp_path):
    """Every rollout shown and every count to the letter; what five steps have moved to a hundredth.

    AdamW makes a whole step of a gradient that is hardly more than rounding, too: single parameters differ by more.
    """
    both = start(tmp_path / "two")
    alone = settings(tmp_path / "one")
    state = train.train(alone, **arguments() | {"mesh": make_mesh(alone.mesh, jax.devices()[:4])})
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    found = np.load(tmp_path / "two" / "params.npz")
    first = flat(toy.params())
    for name, expected in flat(jax.device_get(state.params)).items():
        assert np.linalg.norm(found[name] - expected) < 1e-2 * np.linalg.norm(expected - first[name]), name
    for stream in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
        rows = [run_folder.read_rows(tmp_path / side / stream) for side in ("two", "one")]
        assert len(rows[0]) == len(rows[1]) > 0
        for ours, theirs in zip(*rows, strict=True):
            for name in (
                name for name in ours if not name.startswith(("seconds", "programs")) and "second" not in name
            ):
                if isinstance(ours[name], float):
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
                else:
                    assert ours[name] == theirs[name], name


def test_hosts_that_differ_are_named(tmp_path):
    """Another seed on the second: both end, and say which."""
    both = start(tmp_path / "two", seeds=(4, 5))
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 1
        assert "process 1 on host" in errors and "has another set of settings than process 0" in errors
    assert not (tmp_path / "two").exists()
