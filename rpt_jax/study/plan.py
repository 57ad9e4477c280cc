"""`rpt plan`: does an experiment fit on a TPU slice, and how long would it take? Before a chip is rented.

In: an experiment and the name of a slice. Out: memory of each phase on one chip, as libtpu compiles it here without a
TPU (plan_phases.py), and an estimate of the seconds: the slowest of arithmetic, memory and interconnect at their
peaks, which no run reaches. Every prompt and response is taken as long as it may be, unless --response-tokens says how
long responses are on average; memory is always that of the longest.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
import time
from dataclasses import dataclass, field

from rpt_jax.config import Config, MeshConfig, ModelConfig, PromptConfig, SampleConfig, UpdateConfig, parts_of_groups
from rpt_jax.policy import flops
from rpt_jax.policy.slots import first_seating
from rpt_jax.records import InputError

log = logging.getLogger(__name__)

GIB = 1 << 30
HEADROOM = 0.95  # share of the memory that programs may take: the runtime keeps some


@dataclass(frozen=True)
class Chip:
    """What a chip has, by Google's published tables [cloud.google.com/tpu/docs, system architecture]."""

    hbm_gib: float
    flops: float  # a second, bfloat16
    hbm: float  # bytes a second
    ici: float  # bytes a second, out of a chip


CHIPS = {
    "v4": Chip(32, 275e12, 1228e9, 300e9),
    "v5e": Chip(16, 197e12, 819e9, 200e9),
    "v5p": Chip(95, 459e12, 2765e9, 600e9),
    "v6e": Chip(32, 918e12, 1640e9, 448e9),
}


@dataclass(frozen=True)
class PlanRun:
    """Memory and seconds of each phase of a step on a TPU slice, without one."""

    topology: str = "v5e:4x4"  # chip:sizes of the slice; whole hosts: v5e:2x2 is the smallest
    choose_mesh: bool = False  # or --mesh auto: the fastest mesh that fits, by estimate
    response_tokens: int = 0  # of a response on average, for seconds; 0: sample.max_tokens
    steps: int = 1000  # updates of the run
    batch_size: int = 256  # N, prompts a step
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)


def plan(config: PlanRun) -> dict:
    """{topology, mesh, fits, hbm_gib, phases, step_s_estimate, chip_hours_estimate}; memory is in GiB a chip.

    Where it does not fit also {remedy, largest_gib}.

    Raises InputError for a slice that libtpu does not know and for settings that do not divide over it.
    """
    chip = chip_of(config.topology)
    devices = _devices(config.topology)
    Config(batch_size=config.batch_size, model=config.model, sample=config.sample, update=config.update).check()
    meshes = candidates(config, len(devices)) if config.choose_mesh else [config.mesh]
    with _without_cache():
        for mesh in meshes:
            figures = _planned(dataclasses.replace(config, mesh=mesh), chip, devices, whole=mesh is meshes[-1])
            if figures["fits"]:
                break
    return figures


@contextlib.contextmanager
def _without_cache():
    """JAX's persistent cache off: a program for an absent chip cannot be read back."""
    import jax

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def shown(figures: dict) -> str:
    """The same for people."""
    lines = [f"{'':10}{'arguments':>11}{'temporary':>11}{'in all':>9}{'of it cache':>13}{'seconds at peak':>17}"]
    for name, row in figures["phases"].items():
        gib = (row["argument_gib"], row["temp_gib"], row["total_gib"], row["cache_gib"])
        seconds = f"{row['roofline_s']:17.1f}" if "roofline_s" in row else ""
        lines.append("{:10}{:11.1f}{:11.1f}{:9.1f}{:13.1f}".format(name, *gib) + seconds)
    axes = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    most = max(row["total_gib"] for row in figures["phases"].values())
    verdict = "fits" if figures["fits"] else "does not fit"
    lines = [f"{figures['topology']} as {axes}, GiB a chip:", *lines, ""]
    lines.append(f"{verdict}: {most:.1f} of {figures['hbm_gib']:g} GiB a chip at most")
    for name, size in list(figures.get("largest_gib", {}).items())[:4]:
        lines.append(f"  {name}: {size:.1f} GiB")
    if "remedy" in figures:
        lines.append(figures["remedy"])
    step, hours = figures["step_s_estimate"], figures["chip_hours_estimate"]
    return "\n".join([*lines, f"estimate: {step:.0f} s a step and {hours:.0f} chip-hours at least, all at peak speed"])


def chip_of(topology: str) -> Chip:
    """The chip that a slice is made of."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise InputError(f"topology={topology!r}: name a slice of {', '.join(CHIPS)}, such as v5p:4x4x4")
    return CHIPS[name]


def _devices(topology: str) -> list:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("plan: compiling for a TPU needs libtpu: install the extra tpu, pip install -e '.[tpu]'")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # or libtpu says that it has looked for them
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    import jax
    from jax.experimental import topologies

    more = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        raise InputError(f"topology={topology!r}: libtpu knows no such slice ({first}): use whole hosts") from error
    return list(found.devices)


def candidates(config: PlanRun, chips: int) -> list[MeshConfig]:
    """Meshes that everything divides over, the fastest by estimate first; whether they fit is for the compiler."""
    found = []
    for tensor in (size for size in range(1, config.model.heads + 1) if chips % size == 0):
        mesh = MeshConfig(data=1, fsdp=chips // tensor, tensor=tensor)
        trial = dataclasses.replace(config, mesh=mesh)
        if _divides(trial):
            found.append((step_seconds(trial), tensor, mesh))
    if not found:
        raise InputError(
            f"mesh: no split of {chips} chips divides batch_size={config.batch_size} and the model: use a batch_size "
            f"that {chips} divides"
        )
    return [mesh for _, _, mesh in sorted(found, key=lambda each: each[:2])]


def _divides(config: PlanRun) -> bool:
    model, units, tensor = config.model, config.mesh.fsdp, config.mesh.tensor
    if config.batch_size % units or any(size % tensor for size in (model.heads, model.hidden, model.vocab_size)):
        return False
    if model.kv_heads % tensor and tensor % model.kv_heads or model.width % units:
        return False
    try:
        parts_of_groups(config.batch_size, config.sample.group_size, units * config.update.microbatches)
    except InputError:
        return False
    return True


def _planned(config: PlanRun, chip: Chip, devices: list, whole: bool) -> dict:
    """Figures of one mesh; unless `whole`, phases behind one that does not fit are left out."""
    from rpt_jax.mesh import make_mesh
    from rpt_jax.study import plan_phases

    mesh = make_mesh(config.mesh, devices)
    shape = dict(mesh.shape)
    config = dataclasses.replace(config, mesh=MeshConfig(**shape))
    job = plan_phases.Job(config.model, config.batch_size, config.prompt, config.sample, config.update, mesh)
    rows, peaks = {}, {}
    for name, compiled in plan_phases.phases(job).items():
        began = time.perf_counter()
        memory = compiled()
        peaks[name] = memory
        rows[name] = {
            "argument_gib": (memory.arguments + memory.resident) / GIB,
            "temp_gib": (memory.temporaries + memory.outputs) / GIB,
            "total_gib": memory.total / GIB,
            "cache_gib": memory.cache / GIB,
        }
        if name in PHASES:
            rows[name] |= {
                "collective_gib": collective_bytes(config, name) / GIB,
                "model_flops": model_flops(config, name),
                "roofline_s": seconds(config, name),
            }
        if not whole and memory.total / GIB > chip.hbm_gib * HEADROOM:
            log.info("%s does not fit on %s: the next mesh", name, shape)
            return {"fits": False}
        log.info("%s: %.1f GiB a chip, compiled in %.0f s", name, memory.total / GIB, time.perf_counter() - began)
    room = chip.hbm_gib * HEADROOM
    fits = all(memory.total / GIB <= room for memory in peaks.values())
    step = step_seconds(config)
    figures = {
        "topology": config.topology,
        "mesh": shape,
        "fits": fits,
        "hbm_gib": chip.hbm_gib,
        "phases": rows,
        "step_s_estimate": step,
        "chip_hours_estimate": step * config.steps * len(devices) / 3600,
    }
    if not fits:
        figures["remedy"] = remedy(config, {name: memory.total / GIB for name, memory in peaks.items()}, room)
        figures["largest_gib"] = _largest(job)
    return figures


def remedy(config: PlanRun, totals: dict[str, float], room: float) -> str:
    """What would make the phases that do not fit smaller."""
    found = []
    if max(totals.get(name, 0) for name in ("decode", "refill", "grow", "shrink")) > room:
        fewest = config.mesh.data * config.mesh.fsdp * config.sample.group_size  # a group in every unit
        fewer = f"sample.slots={max(fewest, _slots(config) // 2)} (rollouts decoded at one time), or "
        found.append(f"{fewer if _slots(config) > fewest else ''}more chips for `tensor`")
    if max(totals.get(name, 0) for name in ("score", "update")) > room:
        more = 2 * config.update.microbatches
        if config.batch_size * config.sample.group_size % (more * config.mesh.data * config.mesh.fsdp) == 0:
            found.append(f"update.microbatches={more}")
        if config.model.remat != "layer":
            found.append("model.remat=layer")
    if totals.get("prefill", 0) > room:
        found.append(f"batch_size={config.batch_size // 2}, or a shorter prompt.max_tokens")
    return "try " + "; ".join(found or ["a larger slice"]) + "; or a larger slice"


def _largest(job) -> dict[str, float]:
    """The largest groups of arrays on a chip, GiB."""
    from rpt_jax.study import plan_phases

    state = plan_phases.train_state(job)
    decode = plan_phases.decode_state(job, job.sample.max_tokens)
    groups = {
        "parameters": state.params,
        "optimizer state": state.optimizer_state,
        "parameters for sampling": plan_phases.sampling_params(job),
        "cache of responses": decode.cache,
        "cache of prompts, by slot": decode.prompt,
        "prefilled prompts": plan_phases.prefilled(job),
    }
    sizes = {name: plan_phases.bytes_on_chip(tree) / GIB for name, tree in groups.items()}
    return dict(sorted(sizes.items(), key=lambda each: -each[1]))


PHASES = ("prefill", "decode", "score", "update")  # those with an estimate of time


def _slots(config: PlanRun) -> int:
    """Rollouts decoded at one time: whole groups in every unit."""
    units = config.mesh.data * config.mesh.fsdp
    seating, _ = first_seating(config.batch_size // units, config.sample.group_size, units, config.sample.slots)
    return seating.rollouts_US.size


def _tokens(config: PlanRun) -> tuple[int, int, int, int]:
    """(prompts, their tokens, rollouts, their tokens) of a step."""
    N, G = config.batch_size, config.sample.group_size
    return N, N * config.prompt.max_tokens, N * G, N * G * (config.response_tokens or config.sample.max_tokens)


def model_flops(config: PlanRun, phase: str) -> float:
    """Useful FLOPs of a phase on the whole slice; nothing that is computed twice counts twice."""
    N, prompts, rollouts, responses = _tokens(config)
    both = flops.sampling(config.model, N, prompts, rollouts, responses)
    first = flops.forward(config.model, prompts, prompts / N / 2, N)
    return {"prefill": first, "decode": both - first, "score": both, "update": 3 * both}[phase]


@functools.cache
def _weights(model: ModelConfig) -> int:
    """Parameters that a pass reads: of an embedding that is not the head only a few rows."""
    D, H, K, C, F = model.width, model.heads, model.kv_heads, model.head_channels, model.hidden
    layers = model.layers * (D * C * (2 * H + 2 * K) + 3 * D * F)
    return layers + model.vocab_size * D


def collective_bytes(config: PlanRun, phase: str) -> float:
    """Bytes that a chip sends in a phase: weights gathered over fsdp, activations summed over tensor, gradients."""
    model, mesh = config.model, config.mesh
    size = 2 if model.dtype == "bfloat16" else 4
    N, prompts, _, responses = _tokens(config)
    units = mesh.data * mesh.fsdp
    weights = _weights(model) * size / mesh.tensor * (1 - 1 / mesh.fsdp)
    summed = 2 * model.layers * model.width * size * 2 * (1 - 1 / mesh.tensor) / units  # of a token, forward
    if phase == "prefill":
        return weights + prompts * summed
    if phase == "decode":
        return responses * summed
    passes = config.update.microbatches * weights
    if phase == "score":
        return passes + (prompts + responses) * summed
    gradients = _weights(model) * 4 / mesh.tensor * (1 - 1 / units) * config.update.microbatches
    return 2 * passes + gradients + 3 * (prompts + responses) * summed


def step_seconds(config: PlanRun) -> float:
    """Of all phases that each step has; the extra rounds of dynamic sampling are not among them."""
    phases = PHASES if config.update.kl_coefficient else [phase for phase in PHASES if phase != "score"]
    return sum(seconds(config, phase) for phase in phases)


def seconds(config: PlanRun, phase: str) -> float:
    """The slowest of arithmetic, memory and interconnect, each at its peak."""
    chip, mesh = chip_of(config.topology), config.mesh
    chips = mesh.data * mesh.fsdp * mesh.tensor
    size = 2 if config.model.dtype == "bfloat16" else 4
    passes = {"score": config.update.microbatches, "update": 3 * config.update.microbatches}.get(phase, 1)
    read = _weights(config.model) * size / mesh.tensor * passes
    if phase == "decode":
        _, _, rollouts, responses = _tokens(config)
        tokens = config.response_tokens or config.sample.max_tokens
        seen = config.prompt.max_tokens / (1 if config.sample.slots else config.sample.group_size) + tokens / 2
        cached = 2 * config.model.layers * config.model.kv_heads * config.model.head_channels * size
        copies = max(1, mesh.tensor // config.model.kv_heads)
        calls = tokens * rollouts / _slots(config)
        read = read * calls + responses * seen * cached * copies / chips
    return max(
        model_flops(config, phase) / chips / chip.flops,
        read / chip.hbm,
        collective_bytes(config, phase) / chip.ici,
    )
