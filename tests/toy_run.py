"""One process of a run of the toy, for tests that need several or that kill them.

    python toy_run.py FOLDER --processes 2 --process 0 --port 4711 --devices 2 --mesh 2 1 2

Writes FOLDER/state.npz at the end. FOLDER.phase0, four bytes, says at any moment what process 0 is doing: SAMP(ling),
UPDA(te), SAVE, EVAL(uation), or ELSE; and so on for the others.
"""

import argparse
import contextlib
import dataclasses
import mmap
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fast_xla
import jax
import numpy as np
import toy

from rpt_jax import cli, preemption
from rpt_jax.config import CheckpointConfig, Config, DynamicSamplingConfig, EvaluateConfig, MeshConfig, SampleConfig
from rpt_jax.learning import checkpoints, train
from rpt_jax.mesh import make_mesh, start_distributed, to_host

PHASES = ("SAMP", "UPDA", "SAVE", "EVAL")
ELSE = "ELSE"
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": fast_xla.FLAGS}  # not the tests' 8 devices


def settings(folder, steps=20, mesh=(2, 1, 2), **options) -> Config:
    """Dynamic sampling, evaluations and several checkpoints within few steps."""
    changes = {
        "seed": 4,
        "steps": steps,
        "mesh": MeshConfig(*mesh),
        "sample": SampleConfig(group_size=4, temperature=1.0, max_tokens=8, tokens_per_call=2),
        "dynamic_sampling": DynamicSamplingConfig(from_step=2, max_rounds=1),
        "checkpoint": CheckpointConfig(every=3, keep=2),
        "evaluate": EvaluateConfig(every=4),
    }
    return toy.config(folder, **changes | options)


def run(config: Config, **options):
    """(parameters and optimizer state, whole, on the host) after the run."""
    state = train.train(config, **toy.arguments(evaluate=evaluate) | options)
    return to_host((state.params, state.optimizer_state))


def evaluate(params, step):
    """Figures of the parameters; takes a moment, and batches between which several processes may stop."""
    for _ in range(20):
        preemption.passing()
        time.sleep(0.001)
        weight = float(params["head"].sum())
    return {"weight": weight}


def flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(
    folder, processes=2, devices=2, mesh=(2, 1, 2), seeds=None, steps=20, flags=fast_xla.FLAGS, **options
) -> list[subprocess.Popen]:
    """Starts the processes of one run, compiled with XLA's flags."""
    shared = [f"--processes={processes}", f"--port={free_port()}", f"--devices={devices}", f"--steps={steps}"]
    shared += ["--mesh", *map(str, mesh)]
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), f"--process={process}", f"--seed={seeds[process] if seeds else 4}"]
            + shared,
            env=os.environ | ENVIRONMENT | {"XLA_FLAGS": flags},
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for process in range(processes)
    ]


def finish(processes) -> list[str]:
    """What they wrote to stderr, once all have ended; read side by side, so that no pipe fills up."""
    with ThreadPoolExecutor(len(processes)) as readers:
        return [said for _, said in readers.map(subprocess.Popen.communicate, processes)]


@contextlib.contextmanager
def marked(path: Path):
    """Inside, the file at `path` says which phase it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(ELSE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), len(ELSE)) as phase:

        def marking(module, name, mark):
            function = getattr(module, name)

            def marked(*args, **options):
                phase[:] = mark.encode()
                try:
                    return function(*args, **options)
                finally:
                    phase[:] = ELSE.encode()

            setattr(module, name, marked)

        for place, mark in zip(
            ((train, "collect"), (train, "_update"), (checkpoints, "save"), (sys.modules[__name__], "evaluate")),
            PHASES,
            strict=True,
        ):
            marking(*place, mark)
        yield


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    for name in ("processes", "process", "port", "devices", "seed", "steps"):
        parser.add_argument(f"--{name}", type=int, default={"seed": 4, "steps": 20}.get(name))
    parser.add_argument("--mesh", type=int, nargs=3)
    given = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", given.devices)
    config = settings(given.folder, given.steps, given.mesh, seed=given.seed)
    if given.processes > 1:
        there = {"coordinator": f"localhost:{given.port}", "processes": given.processes, "process": given.process}
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **there))
        start_distributed(config.mesh)
    with marked(Path(f"{given.folder}.phase{given.process}")):
        try:
            state = run(config, mesh=make_mesh(config.mesh))
        except Exception as error:
            sys.exit(cli.failed(error))
    if given.process == 0:
        np.savez(Path(given.folder) / "state.npz", **flat(state))


if __name__ == "__main__":
    main()
