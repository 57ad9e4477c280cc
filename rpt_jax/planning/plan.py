"""`rpt plan`: does an experiment fit on a TPU slice, and how long would it take? Before a chip is rented.

In: an experiment and the name of a slice. Out: memory of each phase on one chip, as libtpu compiles it here without a
TPU (phases.py), and an estimate of the seconds (estimate.py). Where it does not fit, also the nearest settings that do
(search.py).
"""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import time
from collections.abc import Callable

import jax
from jax.experimental import topologies

from rpt_jax.config import Config, MeshConfig
from rpt_jax.learning.inputs import check_divides
from rpt_jax.mesh import make_mesh
from rpt_jax.planning import phases, search
from rpt_jax.planning.estimate import (
    PHASES,
    PlanRun,
    chip_of,
    collective_bytes,
    model_flops,
    seconds,
    step_seconds,
)
from rpt_jax.records import InputError

log = logging.getLogger(__name__)

GIB = 1 << 30
HEADROOM = 0.95  # share of the memory that programs may take: the runtime keeps some
MOST = 20  # compilations of a search for what fits; each takes 5 to 90 s at 14B


def plan(config: PlanRun) -> dict:
    """{topology, mesh, fits, hbm_gib, phases, step_s_estimate, chip_hours_estimate}; memory is in GiB a chip.

    Where it does not fit also {largest_gib, nearest, tried, remedy}: the largest groups of arrays; {overrides,
    largest_gib}, the flags with which it would fit, or None where nothing that was tried does; what was; and the same
    in words. What shapes alone rule out is not compiled: `phases` is then empty, and `mesh` where none would do.

    Raises InputError for a slice that libtpu does not know and for settings that do not divide over it.
    """
    chips = len(_devices(config.topology))
    Config(batch_size=config.batch_size, model=config.model, sample=config.sample, update=config.update).check()
    measure = _measuring()
    with _without_cache():
        if least_gib(config) > room(config):
            figures = _figures(config, {})
        else:
            if not config.choose_mesh:
                meshes = [_resolved(config)]
                _require_dividing(meshes[0])
            else:
                every = [dataclasses.replace(config, mesh=mesh) for mesh in search.candidates(config, chips)]
                meshes = [trial for trial in every if may_fit(trial)] or every[:1]
            for trial in meshes:
                figures = _planned(trial, measure, whole=trial is meshes[-1])
                if figures["fits"]:
                    break
            config = trial
        return figures if figures["fits"] else figures | _nearest(config, figures, measure)


def room(config: PlanRun) -> float:
    """GiB of a chip that programs may take."""
    return chip_of(config.topology).hbm_gib * HEADROOM


def least_gib(config: PlanRun) -> float:
    """Of parameters, optimizer state and average on a chip, if they were split evenly over all: no mesh needs less."""
    return phases.state_bytes(config.model, config.update, config.averaged) / search.chips_of(config.topology) / GIB


def may_fit(config: PlanRun) -> bool:
    """Whether what lies on a chip while it samples, by shapes alone and with one group of rollouts a unit, fits."""
    if least_gib(config) > room(config):
        return False
    fewest = config.mesh.data * config.mesh.fsdp * config.sample.group_size
    job = _job(dataclasses.replace(config, sample=dataclasses.replace(config.sample, slots=fewest)))
    lies = phases.train_state(job), phases.sampling_params(job)
    if phases.bytes_on_chip(lies) / GIB > room(config):
        return False
    lies = *lies, phases.prefilled(job), phases.decode_state(job, job.sample.max_tokens)
    return phases.bytes_on_chip(lies) / GIB <= room(config)


@contextlib.contextmanager
def _without_cache():
    """JAX's persistent cache off: a program for an absent chip cannot be read back."""
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
    lines = [f"{figures['topology']} as {axes}, GiB a chip:", *lines, ""]
    if figures["phases"]:
        most = max(row["total_gib"] for row in figures["phases"].values())
        verdict = "fits" if figures["fits"] else "does not fit"
        lines.append(f"{verdict}: {most:.1f} of {figures['hbm_gib']:g} GiB a chip at most")
    else:
        lines = [
            f"{figures['topology']} does not fit, by the shapes of arrays on a chip of {figures['hbm_gib']:g} GiB:"
        ]
    for name, size in list(figures.get("largest_gib", {}).items())[:4]:
        lines.append(f"  {name}: {size:.1f} GiB")
    if "remedy" in figures:
        lines.append(figures["remedy"])
    if "step_s_estimate" in figures:
        step, hours = figures["step_s_estimate"], figures["chip_hours_estimate"]
        lines.append(f"estimate: {step:.0f} s a step and {hours:.0f} chip-hours at least, all at peak speed")
    return "\n".join(lines)


def _devices(topology: str) -> list:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("plan: compiling for a TPU needs libtpu: install the extra tpu, pip install -e '.[tpu]'")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # or libtpu says that it has looked for them
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    more = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        raise InputError(f"topology={topology!r}: libtpu knows no such slice ({first}): use whole hosts") from error
    return list(found.devices)


def _resolved(config: PlanRun) -> PlanRun:
    """With the sizes of the mesh as they are on this slice."""
    shape = make_mesh(config.mesh, _devices(config.topology)).shape
    return dataclasses.replace(config, mesh=MeshConfig(**shape))


def _require_dividing(config: PlanRun) -> None:
    """Raises InputError for a batch that the mesh cannot split, as `rpt train` would."""
    shared = {"batch_size": config.batch_size, "sample": config.sample, "update": config.update}
    check_divides(Config(model=config.model, **shared), make_mesh(config.mesh, _devices(config.topology)))


def _job(config: PlanRun) -> phases.Job:
    mesh = make_mesh(config.mesh, _devices(config.topology))
    own = config.model, config.batch_size, config.prompt, config.sample, config.update
    return phases.Job(*own, mesh, config.averaged)


def _measuring() -> Callable:
    """measure(config, phase) -> its Memory, None for a phase that these settings do not have; compiled once.

    Settings that a phase does not look at make no difference.
    """
    compiled = {}

    def compile_one(config, phase):
        found = phases.phases(_job(config))
        if phase not in found:
            return None
        began = time.perf_counter()
        memory = found[phase]()
        verdict = "" if memory.total / GIB <= room(config) else f" of {room(config):.1f}: does not fit"
        took = time.perf_counter() - began
        log.info("%s: %.1f GiB a chip%s, compiled in %.0f s", phase, memory.total / GIB, verdict, took)
        return memory

    def what_matters(config, phase):
        if phase in ("prefill", "update", "score"):
            config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, slots=0))
        if phase not in ("update", "score"):
            update = dataclasses.replace(config.update, microbatches=1)
            config = dataclasses.replace(config, update=update, model=dataclasses.replace(config.model, remat="none"))
        return config, phase

    def measure(config, phase):
        which = what_matters(config, phase)
        if which not in compiled:
            compiled[which] = compile_one(*which)
        return compiled[which]

    measure.compiled = lambda: len(compiled)
    measure.is_known = lambda config, phase: what_matters(config, phase) in compiled
    return measure


def _planned(config: PlanRun, measure: Callable, whole: bool) -> dict:
    """Figures of one mesh; unless `whole`, phases behind one that does not fit are left out."""
    if not may_fit(config):
        return _figures(config, {})
    peaks = {}
    for name in phases.phases(_job(config)):
        peaks[name] = measure(config, name)
        if not whole and peaks[name].total / GIB > room(config):
            break
    return _figures(config, peaks)


def _figures(config: PlanRun, peaks: dict) -> dict:
    """What `plan` returns, from the Memory of each phase; of none where shapes have said enough."""
    rows = {}
    for name, memory in peaks.items():
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
    fits = bool(rows) and all(row["total_gib"] <= room(config) for row in rows.values())
    split = least_gib(config) <= room(config)  # or no mesh has been looked at
    figures = {
        "topology": config.topology,
        "mesh": {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor")} if split else {},
        "fits": fits,
        "hbm_gib": chip_of(config.topology).hbm_gib,
        "phases": rows,
    }
    if split:
        step, chips = step_seconds(config), search.chips_of(config.topology)
        figures |= {"step_s_estimate": step, "chip_hours_estimate": step * config.steps * chips / 3600}
    if not fits:
        whole = "parameters and optimizer state" + (" with an average" if config.averaged else "")
        figures["largest_gib"] = _largest(_job(config)) if split else {whole: least_gib(config)}
    return figures


def _nearest(config: PlanRun, figures: dict, measure: Callable) -> dict:
    """{nearest, tried, remedy} after a search of MOST compilations at most."""
    asked, before, tried = dataclasses.replace(config, choose_mesh=False), measure.compiled(), {}

    def fits(trial, phase):
        if measure.compiled() - before >= MOST and not measure.is_known(trial, phase):
            return False
        tried[" ".join(search.overrides(asked, trial))] = True
        memory = measure(trial, phase)
        return memory is None or memory.total / GIB <= room(trial)

    failed = [name for name, row in figures["phases"].items() if row["total_gib"] > room(config)]
    log.info("does not fit: looking for settings that do, with %d compilations at most", MOST)
    found = search.nearest(asked, failed, fits, may_fit)
    tried = [words for words in tried if words]
    if found is None:
        number = (
            f"none of the {len(tried)} settings that were tried fits" if tried else "no setting that may fit is known"
        )
        return {"nearest": None, "tried": tried, "remedy": f"{number}: a smaller model, or another kind of chip"}
    words = search.overrides(asked, found)
    largest = max(measure(found, phase).total for phase in phases.phases(_job(found))) / GIB
    remedy = f"it would fit, {largest:.1f} GiB a chip at most, with: {' '.join(words)}"
    return {"nearest": {"overrides": words, "largest_gib": largest}, "tried": tried, "remedy": remedy}


def _largest(job) -> dict[str, float]:
    """The largest groups of arrays on a chip, GiB."""
    state = phases.train_state(job)
    decode = phases.decode_state(job, job.sample.max_tokens)
    groups = {
        "parameters": state.params,
        "optimizer state": state.optimizer_state,
        "parameters for sampling": phases.sampling_params(job),
        "cache of responses": decode.cache,
        "cache of prompts, by slot": decode.prompt,
        "prefilled prompts": phases.prefilled(job),
        "average of policies": state.average,
    }
    sizes = {name: phases.bytes_on_chip(tree) / GIB for name, tree in groups.items()}
    return dict(sorted(((name, size) for name, size in sizes.items() if size), key=lambda each: -each[1]))
