"""The Pallas kernels as a TPU would have them: compiled ahead of time for real chips, and interpreted with races seen.

Compilation needs libtpu, not a TPU. It runs in a process of its own for each chip: libtpu reads its environment when
it is loaded, and what it logs is not ours.
"""

import importlib.util
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from rpt_jax.kernels import grouped_logprob_tpu
from rpt_jax.kernels.grouped_logprob_blocks import Blocks

# The sizes of DeepSeek-R1-Distill-Qwen-14B's head; 4096 tokens a device.
T, D, V = 4096, 5120, 152064

PROGRAM = """
import json, math, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rpt_jax.kernels.grouped_logprob import grouped_logprob

topology, options, tensor, tied, dtype, (T, D, V) = *json.loads(sys.argv[1]),
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
mesh = Mesh(np.array(devices[:tensor]).reshape(1, 1, tensor), ("data", "fsdp", "tensor"))

def spec(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

def loss(hidden, head, targets, mask, temperature):
    out = grouped_logprob(hidden, head, targets, mask, temperature, tied=tied)
    return jnp.sum(out.logprob + out.entropy), out.lse

shape, axes = ((V, D), ("tensor", None)) if tied else ((D, V), (None, "tensor"))
arrays = (
    spec((T, D), dtype, ("data", "fsdp")), spec(shape, dtype, *axes),
    spec((T,), jnp.int32, ("data", "fsdp")), spec((T,), jnp.bool_, ("data", "fsdp")), spec((), jnp.float32),
)
with jax.set_mesh(mesh):
    lowered = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(*arrays)
kernels = lowered.as_text().count("tpu_custom_call")
written = set(re.findall(r"\\b(f32|bf16|s32)[[]([0-9,]+)[]]", lowered.compile().as_text()))
sizes = {tuple(map(int, shape.split(","))): 2 if kind == "bf16" else 4 for kind, shape in written}
shard = tuple(size // tensor if size == V else size for size in shape)
held = max(math.prod(each) * size for each, size in sizes.items() if each != shard)
print(json.dumps({"kernels": kernels, "largest": held}))
"""


TOPOLOGIES = {
    "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
}
LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")


def compile_for(chip, dtype, sizes, tensor=1, tied=False):
    """{kernels: how many, largest: bytes of the largest array but the head} of value and gradient on a chip."""
    job = json.dumps([*TOPOLOGIES[chip], tensor, tied, dtype, sizes])
    extra = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, job], env=os.environ | extra, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@LIBTPU
@pytest.mark.parametrize(("tensor", "tied"), [(1, False), (4, True)])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_forward_and_backward_compile_without_logits(chip, tensor, tied):
    """At full size, alone and split over tensor=4.

    Of all arrays of the compiled program but the head and its gradient, the largest, f32 dh, is no more than a
    twentieth of [tokens, vocab] in float32.
    """
    found = compile_for(chip, "bfloat16", (T, D, V), tensor, tied)
    assert found["kernels"] == (3 if chip == "v4" else 2)  # forward and backward; v4 has two backward kernels
    assert found["largest"] <= T * V * 4 / 20


@LIBTPU
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_float32_compiles_without_logits(chip):
    """Full multiplication takes VMEM of its own, and inputs are twice as large."""
    found = compile_for(chip, "float32", (T, D, V))
    assert found["kernels"] == 2 and found["largest"] <= T * V * 4 / 20


@LIBTPU
def test_a_vocabulary_smaller_than_any_tile_compiles():
    """The sizes of the quickstart's policy."""
    assert compile_for("v5e", "float32", (T, 128, 116))["kernels"] == 2


@pytest.mark.parametrize("tokens", [16, 32, 48])
def test_dh_on_its_way_to_memory_and_back_races_with_nothing(tokens, capfd):
    """One, two and three token tiles on the interpreter that follows every copy; what nobody wrote is nan there."""
    random = np.random.default_rng(0)
    blocks = Blocks(forward=(16, 128), backward=(16, 128), one_pass=True, cores=2, vmem_bytes=1 << 24)
    head = jnp.asarray(random.normal(size=(128, 600)), jnp.float32)
    hidden = jnp.asarray(random.normal(size=(tokens, 128)) / 8, jnp.float32)
    targets = jnp.asarray(random.integers(0, 600, tokens), jnp.int32)
    watched = pltpu.InterpretParams(detect_races=True)
    got = {}
    for interpret in (True, watched):
        plan = grouped_logprob_tpu.make_plan(blocks, head, False, None, True, interpret)
        _, _, top, log_sum = grouped_logprob_tpu.forward(plan, hidden, head, targets, tokens, 600, 1.0)
        rows = top, log_sum, -jnp.ones(tokens), jnp.ones(tokens), jnp.zeros(tokens)
        got[interpret is watched] = grouped_logprob_tpu.backward(plan, hidden, head, targets, tokens, 600, 1.0, *rows)
    for a, b in zip(got[True], got[False], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert "RACE" not in capfd.readouterr().out
