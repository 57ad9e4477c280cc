"""Host memory while a sharded checkpoint is read: what is held beyond the parameters, in tensors of the checkpoint.

    python experiments/weights_memory.py         four rows in results/weights_memory.csv, two minutes on two cores

A random Llama of about 1 GiB is written as files of 256 MiB into a temporary folder, in bfloat16 and in float32, and
read in a fresh process that has one CPU device or eight. CPU devices keep their arrays in host memory, so the target is
the parameters once. Memory is RssAnon, sampled from outside every millisecond: pages of the files that are mapped while
they are read are no copies, and the kernel takes them back at will (they are in the column `file`). What XLA compiles
meanwhile counts. Measured result, on one device / on eight, in largest tensors: .34 / .23 in bfloat16, .22 / .11 in
float32; at most 1.2 was aimed at.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from rows import append_row

from rpt_jax.config import MeshConfig, ModelConfig
from rpt_jax.mesh import make_mesh, param_shardings
from rpt_jax.policy import decoder
from rpt_jax.policy.weights import load_weights, save_weights

RESULTS = Path(__file__).parent / "results" / "weights_memory.csv"
MIB = 2**20
# The largest tensors are those of the layers' MLPs and the embedding, 2048 x 8192 each.
WIDE = ModelConfig(vocab_size=8192, width=2048, heads=16, kv_heads=4, head_channels=128, hidden=8192, context=4096)
MODELS = {
    "bfloat16": dataclasses.replace(WIDE, layers=9, param_dtype="bfloat16"),
    "float32": dataclasses.replace(WIDE, layers=4),
}


def write(folder: Path, model: ModelConfig) -> None:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32).astype(x.dtype), decoder.shapes(model))
    save_weights(folder, model, params, file_bytes=256 * MIB)


def read(folder: str, dtype: str) -> None:
    """What the fresh process does: says when it begins and when it has read."""
    model, sharding = MODELS[dtype], None
    if jax.device_count() > 1:
        mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
        sharding = param_shardings(mesh, decoder.logical_axes(model), decoder.shapes(model))
    jax.block_until_ready(jax.numpy.zeros(1))
    print("begin", flush=True)
    sys.stdin.readline()
    params = jax.block_until_ready(load_weights(folder, model, sharding))
    print("done", flush=True)
    sys.stdin.readline()
    del params


def measure(folder: Path, dtype: str, devices: int) -> dict:
    """A row: sizes in MiB, and the memory beyond the parameters in largest tensors, too."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": ""}
    command = [sys.executable, __file__, "read", str(folder), dtype]
    leaves = jax.tree.leaves(decoder.shapes(MODELS[dtype]))
    target = sum(x.size * x.dtype.itemsize for x in leaves) / MIB
    largest = max(x.size * x.dtype.itemsize // (x.shape[0] if x.ndim > 2 else 1) for x in leaves) / MIB
    row = {"stored": dtype, "devices": devices, "parameters": target, "largest_tensor": largest}
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout.readline() == "begin\n"
        before, began = memory(process.pid), time.perf_counter()
        most = sample(process)
        row["seconds"] = time.perf_counter() - began
        row["beyond"] = most["RssAnon"] - before["RssAnon"] - target
        row["tensors_beyond"] = row["beyond"] / largest
        row["file"] = most["RssFile"] - before["RssFile"]
    return {name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()}


def memory(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}


def sample(process: subprocess.Popen) -> dict[str, float]:
    """The most of each kind of memory until the process says that it has read."""
    most: dict[str, float] = {}
    os.set_blocking(process.stdout.fileno(), False)
    print(file=process.stdin, flush=True)
    while (line := process.stdout.readline()) == "" and process.poll() is None:
        most = {name: max(size, most.get(name, 0.0)) for name, size in memory(process.pid).items()}
        time.sleep(0.001)
    os.set_blocking(process.stdout.fileno(), True)
    assert line == "done\n", line
    print(file=process.stdin, flush=True)
    return most


def main() -> None:
    for dtype, model in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), model)
            for devices in (1, 8):
                append_row(RESULTS, measure(Path(folder), dtype, devices) | {"jax": jax.__version__})


if __name__ == "__main__":
    read(*sys.argv[2:]) if sys.argv[1:2] == ["read"] else main()
