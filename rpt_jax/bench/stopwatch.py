"""Measures a repeated call in this process: wall and CPU seconds, peak host memory, share of what a matmul reaches."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

SIDE = 2048  # of the square matrices whose product stands for the peak; larger ones were no faster on CPU


def measure(
    call: Callable[[int], object],
    warmup: int,
    repeats: int,
    flops: float,
    after: Callable[[int], object] = lambda index: None,
) -> dict:
    """Figures of call(0), call(1), ..., each of which must wait for its result; after(index) runs untimed.

    `s` and `cpu_s` (all threads) are of the last `repeats` calls; the first, which compiles, and `warmup` more come
    before. `peak_rss_mib` is the process's high-water mark over all of them, with what it held already; None where the
    system does not tell. `share_of_matmul_peak` holds `flops` of the median call against the fastest of several matrix
    products just before and just after, so that a machine that slows down meanwhile slows both.
    """
    peak = _matmul_rate()
    knows_memory = _reset_peak_memory()
    wall, cpu = [], []
    for index in range(1 + warmup + repeats):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        call(index)
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
        after(index)
    memory = _peak_memory_mib() if knows_memory else None
    peak = max(peak, _matmul_rate())
    return {
        "s": spread(wall[-repeats:]),
        "cpu_s": spread(cpu[-repeats:]),
        "first_call_s": wall[0],
        "peak_rss_mib": memory,
        "flops": flops,
        "share_of_matmul_peak": flops / float(np.median(wall[-repeats:])) / peak,
        "matmul_peak_flops_per_s": peak,
    }


def spread(values: Sequence[float]) -> dict:
    """Least, middle and largest of some figures, and how many there are."""
    return {"min": min(values), "median": float(np.median(values)), "max": max(values), "n": len(values)}


_multiply = jax.jit(jnp.matmul)


def _matmul_rate() -> float:
    """FLOPs a second of the fastest of three float32 matrix products, one on each device of jax.set_mesh's mesh."""
    mesh = jax.sharding.get_mesh()
    squares = np.random.default_rng(0).standard_normal((max(mesh.size, 1), SIDE, SIDE), dtype=np.float32)
    if not mesh.empty:
        squares = jax.device_put(squares, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    jax.block_until_ready(_multiply(squares, squares))
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(_multiply(squares, squares))
        taken.append(time.perf_counter() - start)
    return 2 * squares.size * SIDE / min(taken)


def _reset_peak_memory() -> bool:
    """Lowers the process's high-water mark to what it holds now; False where there is none (Linux has it)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _peak_memory_mib() is not None


def _peak_memory_mib() -> float | None:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
