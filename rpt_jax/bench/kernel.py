"""`rpt bench kernel`: speed and memory of the grouped log-prob as ratios within one run, and correctness beside them.

In: sizes. Out: figures on this machine's backend, or with --target those that libtpu simulates for a TPU (simulate.py).
"""

import functools
import importlib.util
import json
import logging
import sys
import time
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.bench import simulate
from rpt_jax.bench.step import run_for_json
from rpt_jax.kernels.grouped_logprob import grouped_logprob, resolve
from rpt_jax.records import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelBench:
    """Log-prob and entropy of targets: time and peak memory, forward and backward, against plain JAX."""

    target: str = ""  # v5e, v5p or v6e: simulated there (needs libtpu, not the TPU); "": this machine's backend
    tokens: int = 2048
    width: int = 256  # D; the 14B policy of the paper has 5120
    vocabulary: int = 32768  # V; and 152064
    dtype: Literal["float32", "bfloat16"] = "float32"  # of hidden states and head; with --target always bfloat16
    chunk: int = 512  # tokens of the chunked rival (256 with --target); the kernel chooses for itself
    repeats: int = 7  # of each, in turn; medians are reported
    seed: int = 0  # of the random hidden states, head and targets
    baselines: bool = True  # with --target: simulate plain JAX too (minutes and several GiB)


def bench_kernel(config: KernelBench) -> dict:
    """{target, implementation, shape, forward, backward, baselines, ...}: seconds here, or cycles on the target.

    `share_of_peak` counts useful matmuls alone where it is measured: one forward and two backward. Simulated rows count
    all that their program makes; the backward kernel, which computes logits again, three.

    Raises InputError for sizes or a target that cannot be measured.
    """
    return _simulated(config) if config.target else _measured(config)


def _measured(config):
    T, D, V = config.tokens, config.width, config.vocabulary
    if T % config.chunk:
        raise InputError(f"bench: tokens={T} does not divide into chunks of chunk={config.chunk}: use a divisor")
    arguments, square = _random_arrays(config)
    kernel = resolve("auto")
    functions = {
        kernel: functools.partial(grouped_logprob, temperature=0.7),
        "full_logits": functools.partial(grouped_logprob, temperature=0.7, implementation="reference"),
        "chunked": functools.partial(_chunked, config.chunk),
    }
    steps = {}
    for name, function in functions.items():
        steps[name, "forward"] = jax.jit(functools.partial(_value, function)).lower(*arguments).compile()
        steps[name, "both"] = jax.jit(functools.partial(_value_and_gradient, function)).lower(*arguments).compile()
    multiply = jax.jit(jnp.dot).lower(square, square).compile()
    results, taken = _in_turn(steps | {"peak": lambda *_: multiply(square, square)}, arguments, config.repeats)
    peak = 2 * square.shape[0] ** 3 / min(taken["peak"])  # flops a second in this process
    ideal = 2 * T * D * V / peak  # seconds of one matmul over all tokens
    own, *others = (_row(name, steps, taken, ideal) for name in functions)
    baselines = dict(zip(list(functions)[1:], others, strict=True))
    fastest = min(each["seconds"] for each in others)
    held = own["backward"]["peak_bytes"] / baselines["full_logits"]["backward"]["peak_bytes"]
    found, exact = (jax.tree.leaves(results[name, "both"]) for name in (kernel, "full_logits"))
    return {
        "target": jax.default_backend(),
        "implementation": kernel,
        "shape": {"tokens": T, "width": D, "vocabulary": V, "dtype": config.dtype},
        **own,
        "baselines": baselines,
        "speed_over_fastest_baseline": fastest / own["seconds"],
        "memory_over_full_logits": held,
        "max_relative_error": max(_distance(a, b) for a, b in zip(found, exact, strict=True)),
    }


def _random_arrays(config):
    """((hidden, head, targets, weights), a square matrix for the peak)."""
    T, D, V = config.tokens, config.width, config.vocabulary
    random = np.random.default_rng(config.seed)
    dtype = jnp.dtype(config.dtype)
    hidden = jnp.asarray(random.normal(size=(T, D)) / D**0.5, dtype)
    head = jnp.asarray(random.normal(size=(D, V)), dtype)
    targets, weights = (jnp.asarray(a) for a in (random.integers(0, V, T), random.normal(size=T).astype(np.float32)))
    return (hidden, head, targets, weights), jnp.asarray(random.normal(size=(2048, 2048)), dtype)


def _in_turn(steps, arguments, repeats):
    """({name: result}, {name: seconds of each repeat}) of steps that take turns, so that all see the same machine."""
    results = {name: step(*arguments) for name, step in steps.items()}
    taken = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            taken[name].append(time.perf_counter() - start)
    return results, taken


def _row(name, steps, taken, ideal):
    """Shares of the peak count one matmul forward and two backward: recomputing logits is no useful work."""
    forward, both = (float(np.median(taken[name, part])) for part in ("forward", "both"))
    return {
        "forward": _figures(forward, ideal, steps[name, "forward"]),
        "backward": _figures(both - forward, 2 * ideal, steps[name, "both"]),
        "seconds": both,
    }


def _figures(seconds, ideal, step):
    memory = step.memory_analysis()
    return {
        "seconds": seconds,
        "share_of_peak": ideal / seconds,
        "peak_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
    }


def _value(function, hidden, head, targets, weights):
    out = function(hidden, head, targets, jnp.ones(targets.shape, bool))
    return jnp.vdot(weights, out.logprob), out.entropy


def _value_and_gradient(function, hidden, head, targets, weights):
    def loss(hidden, head):
        return _value(function, hidden, head, targets, weights)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)


def _chunked(chunk, hidden, head, targets, mask):
    """What one writes without a kernel: jax.checkpoint of a chunk of tokens, in lax.map."""

    @jax.checkpoint
    def one(part):
        return grouped_logprob(part[0], head, part[1], part[2], 0.7, implementation="reference")

    out = jax.lax.map(one, tuple(a.reshape(-1, chunk, *a.shape[1:]) for a in (hidden, targets, mask)))
    return jax.tree.map(jnp.ravel, out)


def _distance(a, b):
    """Relative L2."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


# Tokens, and two widths of the vocabulary: the difference has no start-up in it. Plain JAX gets fewer tokens, since its
# logits fill the simulator's memory. Cut like this they fit into VMEM, where those of a whole vocabulary do not, which
# should favour plain JAX. Our cycles are .82 of those of chunks of 256 tokens here, and .96 of those of chunks of 512
# at V 2048 -> 4096: chunk and V both differ, so neither alone is known to make the difference.
GRIDS = {
    "forward": (2048, 2048, 4096),
    "one_pass": (2048, 3072, 6144),
    "hidden_pass": (2048, 3072, 6144),
    "head_pass": (2048, 3072, 6144),
    "full_logits": (1024, 2048, 4096),
    "chunked": (512, 8192, 16384),
}


def _simulated(config):
    chip = config.target
    if chip not in simulate.TOPOLOGIES:
        raise InputError(
            f"bench: target={chip!r} is none of {', '.join(simulate.TOPOLOGIES)}; '' measures this machine"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("bench: simulating a TPU needs libtpu: install the extra tpu, pip install -e '.[tpu]'")
    D, V = config.width, config.vocabulary
    unit = 2 * config.tokens * D * V / simulate.PEAK_FLOPS[chip]  # cycles of one matmul at peak

    def row(program, matmuls):
        tokens, low, high = GRIDS[program.split()[0]]
        found = [_simulate(chip, program, tokens, D, columns) for columns in (low, high)]
        slope = (found[1]["cycles"] - found[0]["cycles"]) / (high - low) / tokens  # a token and column
        whole = slope * config.tokens * V
        return {"cycles": round(whole), "share_of_peak": matmuls * unit / whole, "blocks": found[0]["blocks"]}

    forward, backward = row("forward", 1), row("one_pass", 3)
    hidden, head = row("hidden_pass", 2), row("head_pass", 2)
    two_pass = {"cycles": hidden["cycles"] + head["cycles"], "hidden": hidden, "head": head}
    figures = {
        "target": chip,
        "implementation": "pallas",
        "shape": {"tokens": config.tokens, "width": D, "vocabulary": V, "dtype": "bfloat16"},
        "forward": forward,
        "backward": backward,
        "baselines": {"two_pass_backward": two_pass},
        "backward_over_two_pass": backward["cycles"] / two_pass["cycles"],
    }
    if config.baselines:
        own = forward["cycles"] + backward["cycles"]
        for name, program, matmuls in (("full_logits", "full_logits", 3), ("chunked", "chunked 256", 4)):
            figures["baselines"][name] = row(program, matmuls)
            figures[f"both_over_{name}"] = own / figures["baselines"][name]["cycles"]
    return figures


def _simulate(chip, program, T, D, V):
    log.info("simulating %s on %s: %d tokens, D %d, V %d", program, chip, T, D, V)
    job = json.dumps([chip, program, T, D, V])
    return run_for_json([sys.executable, "-m", "rpt_jax.bench.simulate", job], f"{program} on {chip}")
