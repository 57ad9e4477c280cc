"""Settings that do not fit -> the nearest ones that do, for `rpt plan`.

In: settings, the phases that do not fit, and a function that says whether a phase of given settings fits (plan.py
compiles it). Out: the first settings of a short list that do. Nearest first: on the same mesh fewer slots for
sampling, and recomputed layers and more microbatches for the update; then other meshes of the slice; then larger
slices of the same chip, each with such settings where it needs them. What is known from shapes is not compiled.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence

from rpt_jax.config import MeshConfig
from rpt_jax.parts import parts_of_groups
from rpt_jax.planning.estimate import PlanRun, slots_of, step_seconds
from rpt_jax.records import InputError

log = logging.getLogger(__name__)

FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # of chips in two dimensions
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SLICES = {"v4": CUBES, "v5e": FLAT, "v5p": CUBES, "v6e": FLAT}  # that libtpu knows, ascending
GROUPS = (("prefill",), ("grow", "shrink", "refill", "decode"), ("update", "score"))  # the largest phase first
MESHES, LARGER = 3, 3  # other meshes of the slice, and larger slices, that are tried at most

Fits = Callable[[PlanRun, str], bool]


def nearest(config: PlanRun, failed: Sequence[str], fits: Fits, may_fit: Callable[[PlanRun], bool]) -> PlanRun | None:
    """The first settings that fit, None where none that is tried does.

    failed: phases that do not fit as things are; none, if that is known from shapes. may_fit: whether what stands
    between the phases leaves any room, by shapes.
    """
    if failed and (found := adapted(config, failed, fits)):
        return found
    every = [phase for group in GROUPS for phase in group]
    for start in starts(config, may_fit):
        log.info("trying %s", " ".join(overrides(config, start)) or "the same")
        if found := adapted(start, every, fits):
            return found
    return None


def adapted(config: PlanRun, failed: Sequence[str], fits: Fits) -> PlanRun | None:
    """With the first settings of each group of phases that fit; a group of which none failed stays as it is."""
    for phases, ladder in zip(GROUPS, (_same, fewer_slots, smaller_updates), strict=True):
        if set(phases) & set(failed):
            trials = (trial for trial in ladder(config) if all(fits(trial, phase) for phase in phases))
            config = next(trials, None)
            if config is None:
                return None
    return config


def _same(config: PlanRun) -> Iterator[PlanRun]:
    yield config


def fewer_slots(config: PlanRun) -> Iterator[PlanRun]:
    """As it is, then halves, down to one group of rollouts in every unit."""
    yield config
    group = config.mesh.data * config.mesh.fsdp * config.sample.group_size
    groups = slots_of(config) // group // 2
    while groups >= 1:
        yield dataclasses.replace(config, sample=dataclasses.replace(config.sample, slots=groups * group))
        groups //= 2


def smaller_updates(config: PlanRun) -> Iterator[PlanRun]:
    """As it is, then layers computed again in the backward pass, then more microbatches as far as groups divide."""
    yield config
    if config.model.remat != "layer":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="layer"))
        yield config
    while True:
        more = dataclasses.replace(config.update, microbatches=2 * config.update.microbatches)
        config = dataclasses.replace(config, update=more)
        if not _parts_divide(config):
            return
        yield config


def starts(config: PlanRun, may_fit: Callable[[PlanRun], bool]) -> Iterator[PlanRun]:
    """The same settings on other meshes, the fastest by estimate first, then on larger slices."""
    kind, _, size = config.topology.partition(":")
    tried = 0
    for mesh in _meshes(config, chips_of(config.topology)):
        trial = dataclasses.replace(config, mesh=mesh)
        if mesh != config.mesh and tried < MESHES and may_fit(trial):
            tried += 1
            yield trial
    tried = 0
    for larger in SLICES[kind]:
        topology = f"{kind}:{larger}"
        if chips_of(topology) <= chips_of(config.topology) or tried == LARGER:
            continue
        trials = (
            dataclasses.replace(config, topology=topology, mesh=mesh) for mesh in _meshes(config, chips_of(topology))
        )
        roomy = next(filter(may_fit, trials), None)
        if roomy is not None:
            tried += 1
            yield roomy


def chips_of(topology: str) -> int:
    """How many chips a slice has, by its name."""
    return math.prod(int(size) for size in topology.partition(":")[2].split("x"))


def _meshes(config: PlanRun, chips: int) -> list[MeshConfig]:
    """The candidates; none for a slice over which the settings do not divide."""
    try:
        return candidates(config, chips)
    except InputError:
        return []


def overrides(before: PlanRun, after: PlanRun) -> list[str]:
    """What turns one into the other on the command line."""
    words = []

    def compare(a, b, name):
        for each in dataclasses.fields(a):
            old, new = getattr(a, each.name), getattr(b, each.name)
            flag = f"{name}.{each.name}" if name else each.name
            if dataclasses.is_dataclass(old):
                compare(old, new, flag)
            elif old != new:
                words.extend([f"--{flag.replace('_', '-')}", str(new)])

    compare(before, after, "")
    return words


def candidates(config: PlanRun, chips: int) -> list[MeshConfig]:
    """Meshes that everything divides over, the fastest by estimate first; whether they fit is for the compiler.

    Raises InputError where there is none.
    """
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
    return model.width % units == 0 and _parts_divide(config)


def _parts_divide(config: PlanRun) -> bool:
    """Whether groups divide into the microbatches of all units."""
    bins = config.mesh.data * config.mesh.fsdp * config.update.microbatches
    try:
        parts_of_groups(config.batch_size, config.sample.group_size, bins)
    except InputError:
        return False
    return True
