"""Cycles of the kernel and its rivals on a TPU that is not there: libtpu compiles, schedules and counts.

`python -m rpt_jax.bench.simulate JOB` prints {"cycles", "blocks"} of one program as JSON; kernel.py runs it as a
process of its own, since libtpu reads its flags when it is loaded and a program that is too large can take all memory.
The figure is that of the compiler's static profile: the scheduled instructions and a model of the memory, the same
every time.
"""

import dataclasses
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

MEMORY_LIMIT = 22 << 30  # bytes of address space; a grid that is too fine is killed instead of the machine
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # whole hosts; v4 cannot be simulated
PEAK_FLOPS = {"v5e": 131_072, "v5p": 262_144, "v6e": 524_288}  # a cycle and chip, bfloat16


def cycles(chip: str, program: str, T: int, D: int, V: int) -> tuple[int, list]:
    """(cycles, blocks) of a program on one chip.

    program: "forward", "one_pass", "hidden_pass", "head_pass" of the Pallas kernels; "full_logits" and "chunked N",
    value and gradient by plain JAX with all logits and with N tokens at a time.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with tempfile.TemporaryDirectory() as dump:
        blocks = _compile(chip, program, T, D, V, Path(dump))
        return sum(_profiled(path.read_text()) for path in Path(dump, "profile").iterdir()), blocks


def _compile(chip, program, T, D, V, dump):
    """Leaves a profile of every operation in dump/profile; returns the blocks."""
    (dump / "profile").mkdir()
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_static_llo_profile_to={dump}/profile"
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": flags,
    }
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    mesh = Mesh(np.array(devices[:1]), ("data",))
    here = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        function, shapes, blocks = _program(program, T, D, V)
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in shapes]
        jax.jit(function).lower(*arguments).compile()
    return blocks


def _profiled(profile: str) -> int:
    """Cycles of one operation, times how often the program has it."""
    figures = {}
    for line in profile.splitlines():
        name, _, value = line.strip().partition(": ")
        figures.setdefault(name, value)
    return int(figures.get("estimated_cycles", 0)) * int(figures.get("num_equivalent_hlos", 1))


def _program(program, T, D, V):
    """(function, [(shape, dtype)], blocks); token tiles are counted beforehand, as the profile needs fixed loops."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas import tpu as pltpu

    from rpt_jax.kernels import grouped_logprob_tpu as kernels
    from rpt_jax.kernels.grouped_logprob_blocks import choose_blocks

    hidden, head = ((T, D), jnp.bfloat16), ((D, V), jnp.bfloat16)
    rows, row, one = ((T,), jnp.int32), ((T,), jnp.float32), ((), jnp.float32)
    if program == "full_logits":
        return _plain(T), [hidden, head, rows, one, row], []
    if program.startswith("chunked "):
        return _plain(int(program.split()[1])), [hidden, head, rows, one, row], []
    chip = pltpu.get_tpu_info()
    if chip.num_cores == 1:  # with the profile's flags the compiler sets the kernel's limit aside once more
        chip = dataclasses.replace(chip, vmem_capacity_bytes=chip.vmem_capacity_bytes // 2)
    blocks = choose_blocks(chip, D, T, 2, one_pass=program in ("forward", "one_pass"))
    plan = kernels.make_plan(blocks, jax.ShapeDtypeStruct(*head), False, None, True, False)
    if program == "forward":
        return (
            lambda h, w, y, scale: kernels.forward(plan, h, w, y, T, V, scale),
            [hidden, head, rows, one],
            blocks.forward,
        )
    run, t = getattr(kernels, program), blocks.backward[0]
    scalars = [((1, 1), jnp.float32), ((1, 1), jnp.int32)]
    return (
        lambda scale, columns, h, w, rows: run(plan, -(-T // t), scale, columns, h, w, rows),
        [*scalars, hidden, head, ((T, 8), jnp.float32)],
        blocks.backward,
    )


def _plain(chunk):
    """Value and gradient of GRPO's sum of weighted log-probs, entropy beside it, by autodiff; chunks recomputed.

    The target is found by comparison: a gather cannot be profiled, and is slower on a TPU.
    """
    import jax
    import jax.numpy as jnp

    def outputs(hidden, head, targets, scale):
        logprobs = jax.nn.log_softmax(jnp.dot(hidden, head, preferred_element_type=jnp.float32) * scale)
        columns = jax.lax.broadcasted_iota(jnp.int32, logprobs.shape, 1)
        hit = jnp.sum(jnp.where(columns == targets[:, None], logprobs, 0.0), axis=1)
        return hit, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=1)

    def step(hidden, head, targets, scale, weights):
        def loss(hidden, head):
            T = hidden.shape[0]
            one = outputs if chunk >= T else jax.checkpoint(outputs)
            parts = [slice(start, start + chunk) for start in range(0, T, chunk)]
            found = [one(hidden[part], head, targets[part], scale) for part in parts]
            return sum(jnp.vdot(weights[part], f[0]) for part, f in zip(parts, found, strict=True)), found

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)

    return step


if __name__ == "__main__":
    count, used = cycles(*json.loads(sys.argv[1]))
    print(json.dumps({"cycles": count, "blocks": used}))
