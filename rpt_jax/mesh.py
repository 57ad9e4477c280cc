"""The device mesh: how parameters and batches lie on it, and how arrays pass between host and devices.

In: MeshConfig, trees of logical axis names (decoder.logical_axes), host arrays. Out: a Mesh with the axes "data",
"fsdp" and "tensor", NamedShardings, global arrays, numpy arrays. Everything works alike in one process and in many;
with many, every process calls the same functions in the same order. The paper (arXiv 2506.08007) says nothing of it.
"""

import logging
import math
import os
import threading
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rpt_jax.config import MeshConfig
from rpt_jax.records import InputError, Params

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
HEARTBEAT_SECONDS = 30  # without a sign of life from a process, until the others end (JAX: 100)
JOIN_SECONDS = 300  # for all processes to have joined; XLA ends a process, with a stack trace, that waits longer
JOIN_NOTED = 20  # seconds of waiting after which it is said what for

# Which mesh axes each logical axis of an array is split over. With this table the matrices of a layer are split over
# `fsdp` along the width and gathered when used, and over `tensor` along heads, hidden width or vocabulary.
RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH,
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),  # replicated where `tensor` does not divide it: several chips then share a kv head
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "norm": (),
    "channels": (),
}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Mesh with the axes ("data", "fsdp", "tensor") over all devices, or those given.

    One size may be -1 and takes what is left. On TPUs the order of the devices follows the interconnect, and over
    several slices only `data` runs across them. Raises InputError when the sizes do not multiply to the device count.
    """
    devices = jax.devices() if devices is None else devices
    shape = _mesh_shape(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise InputError(
            f"mesh: data={shape[0]} does not divide over {slices} TPU slices, which only `data` may span: "
            f"use a multiple of {slices}"
        )
    # jax.make_mesh refuses several slices, and sizes that split a torus axis such as tensor=8 on v5p:4x4x4.
    if slices == 1:
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        within = (shape[0] // slices, *shape[1:])
        laid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _mesh_shape(config: MeshConfig, count: int) -> tuple[int, ...]:
    sizes = {name: getattr(config, name) for name in AXES}
    shown = " x ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise InputError(f"mesh: {shown}: sizes are 1 or more, and at most one is -1 (it takes what is left)")
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
        if count % known:
            fixed = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != -1)
            raise InputError(f"mesh: {fixed} = {known} does not divide {count} devices: use sizes that do")
        sizes = {name: count // known if size == -1 else size for name, size in sizes.items()}
    elif known != count:
        raise InputError(
            f"mesh: {shown} = {known}, but there are {count} devices: set one size to -1, "
            f"or choose sizes whose product is {count}"
        )
    return tuple(sizes.values())


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, name: str = "array"):
    """PartitionSpec of one array from its logical axis names, by RULES; None stands for an axis that is not split.

    A size that does not divide over its mesh axes is replicated for kv_heads and an InputError for any other.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name}: {len(axes)} logical axes {axes} for an array of shape {shape}")
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        over = () if axis is None else RULES[axis]
        parts = _parts(over, mesh)
        if size % parts:
            if axis != "kv_heads":
                raise InputError(
                    f"{name}: {axis}={size} does not divide over {_shown(over, mesh)}: "
                    f"use a size of {' x '.join(over)} that divides {size}"
                )
            over = ()
        entries.append(over or None)
    return PartitionSpec(*entries)


def copies_of_heads(kv_heads: int) -> int:
    """How often a cache holds each key/value head, so that jax.set_mesh's `tensor` splits it; 1 without a mesh.

    Up to the least common multiple, of which the query heads are one (partition_spec). Eight heads over sixteen devices
    are held once by each that needs them; of six over four a device holds three, two of them the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    tensor = 1 if mesh.empty or AxisType.Manual in mesh.axis_types else mesh.shape.get("tensor", 1)
    return tensor // math.gcd(tensor, kv_heads)


def param_shardings(mesh: Mesh, logical_axes: Params, params: Params) -> Params:
    """The tree of NamedShardings for params (arrays or anything with .shape) and their logical axes."""

    def sharding(path, axes, leaf):
        return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh, jax.tree_util.keystr(path)))

    return jax.tree_util.tree_map_with_path(sharding, logical_axes, params, is_leaf=lambda x: isinstance(x, tuple))


def mesh_of(tree: Params) -> Mesh | None:
    """The mesh that the first array lies on; None for one that was put on a device without."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and "data" in sharding.mesh.shape else None


def whole_over_fsdp(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The sharding of an array that is no longer split over fsdp; the very same one if it never was."""
    if not isinstance(sharding, NamedSharding) or sharding.mesh.shape.get("fsdp", 1) == 1:
        return sharding
    left = [tuple(a for a in ((e,) if isinstance(e, str) else e or ()) if a != "fsdp") for e in sharding.spec]
    spec = PartitionSpec(*(axes or None for axes in left))
    return sharding if spec == sharding.spec else NamedSharding(sharding.mesh, spec)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis over data and fsdp, the others whole; fits arrays that have that axis and more."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return _parts(BATCH, mesh)


def laid_out(array, *axes: str | None):
    """The array over jax.set_mesh's mesh: axes by their logical names as RULES have them, None and the rest whole.

    Said where the compiler would otherwise spread activations as it does the matrix that made them. What does not
    divide is left whole; without a mesh, and inside shard_map, nothing is said.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return array
    entries = []
    for axis, size in zip(axes, array.shape, strict=False):
        over = tuple(each for each in RULES[axis] if each in mesh.shape) if axis else ()
        entries.append(over if over and size % _parts(over, mesh) == 0 else None)
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*entries))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree: Params, shardings) -> Params:
    """Copies a tree that every process holds whole onto the devices; the original survives a later donation.

    shardings: one sharding for all leaves, or a tree of them.
    """

    def put(leaf, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding, may_alias=False)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def batch_rows(batch: int, mesh: Mesh) -> np.ndarray:
    """Indices of the rows of a global batch that lie on this process's devices; all of them in a single process.

    Ascending but not always neighbours: a mesh that follows the interconnect interleaves the hosts. Processes that
    share rows (`tensor` spans them) get the same ones.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    spans = sorted({index[0].indices(batch)[:2] for index in indices})
    return np.concatenate([np.arange(start, stop) for start, stop in spans])


def all_rows(tree, rows: np.ndarray, count: int):
    """Host arrays of all `count` rows from those that each process has made of its own `rows`. A collective of several.

    Rows that several processes have made are the same in all of them.
    """
    if jax.process_count() == 1:
        return tree
    rows_n, made = multihost_utils.process_allgather((rows, tree), tiled=True)

    def whole(leaf):
        filled = np.zeros((count, *leaf.shape[1:]), leaf.dtype)
        filled[rows_n] = leaf
        return filled

    return jax.tree.map(whole, made)


def to_host(tree):
    """Whole numpy arrays in every process from global arrays (a collective where processes hold parts)."""

    def fetch(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def check_batch_divides(batch: int, mesh: Mesh, what: str = "prompts") -> None:
    """Raises InputError, with the nearest sizes that work, for a batch that does not divide over data and fsdp."""
    parts = batch_parts(mesh)
    if batch < 1 or batch % parts:
        below, above = batch // parts * parts, -(-max(batch, 1) // parts) * parts
        remedy = f"{below} or {above}" if below > 0 else f"{above}"
        raise InputError(f"batch of {batch} {what} does not divide over {_shown(BATCH, mesh)}: use {remedy}")


def start_distributed(config: MeshConfig) -> None:
    """Joins the processes of a multi-host run; does nothing in a single process or when called again.

    Comes before anything that touches a device. See distributed_settings for where the addresses come from.
    """
    if jax.distributed.is_initialized():
        return
    settings = distributed_settings(config, os.environ, jax.config.jax_platforms or "")
    if settings is None:
        return
    # JAX would note SIGTERM in a handler of its own, and nobody would hear of it before the run's own stands.
    jax.config.update("jax_enable_preemption_service", False)
    waiting = threading.Timer(JOIN_NOTED, log.warning, (_waits_for(settings),))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            **settings, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    finally:
        waiting.cancel()
    log.info("process %d of %d, %d devices", jax.process_index(), jax.process_count(), jax.device_count())


def _waits_for(settings: dict) -> str:
    text, remedy = "the other processes that Slurm or the TPU lists", "each has to be started"
    if settings:
        text = "the others of {num_processes}, at {coordinator_address}, as process {process_id}".format(**settings)
        remedy += ", with the same address, and reach process 0 there"
    return f"still waiting for {text}: {remedy}; without them this process ends after {JOIN_SECONDS} s"


def distributed_settings(config: MeshConfig, environ: Mapping[str, str], platforms: str) -> dict | None:
    """Arguments for jax.distributed.initialize, {} to let it ask Slurm or the TPU, None for a single process.

    In this order: mesh.coordinator with mesh.processes and mesh.process; the environment variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; a Slurm step of several tasks; a Cloud TPU VM.
    mesh.coordinator="none" keeps a single process whatever the environment says. Raises InputError for processes that
    are half given.
    """
    if config.coordinator == "none":
        return None
    explicit = config.coordinator != "auto"
    address = config.coordinator if explicit else environ.get("JAX_COORDINATOR_ADDRESS", "")
    if address:
        processes = config.processes or _number(environ, "JAX_NUM_PROCESSES", 0)
        process = config.process if config.process >= 0 else _number(environ, "JAX_PROCESS_ID", -1)
        if ":" not in address or not 0 <= process < processes:
            raise InputError(
                f"mesh: coordinator={address!r} with processes={processes} and process={process}: give host:port, "
                "the number of processes, and this process's number from 0 "
                "(--mesh.coordinator --mesh.processes --mesh.process)"
            )
        return {"coordinator_address": address, "num_processes": processes, "process_id": process}
    if config.processes or config.process >= 0:
        raise InputError(
            f"mesh: processes={config.processes} and process={config.process} without a coordinator: "
            "add --mesh.coordinator host:port of process 0"
        )
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # what a step started by srun has
    if _number(environ, "SLURM_NTASKS", 1) > 1 and all(name in environ for name in slurm):
        return {}
    # On a Cloud TPU VM importing jax puts "tpu" first; without TPU chips it sets TPU_SKIP_MDS_QUERY. A host that is
    # alone lists itself or nobody in the worker variables.
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if platforms.startswith("tpu"):
        several = len(workers.split(",")) > 1 if workers else "TPU_SKIP_MDS_QUERY" not in environ
        several = several or _number(environ, "MEGASCALE_NUM_SLICES", 1) > 1  # each of which lists its own hosts
        return {} if several else None
    return None


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise InputError(f"mesh: {name}={text!r}: set it to a whole number, or unset it") from None


def _parts(axes: tuple[str, ...], mesh: Mesh) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))


def _shown(axes: tuple[str, ...], mesh: Mesh) -> str:
    """ "data=8 devices", or "data=4 x fsdp=2 = 8 devices" where more than one axis is split."""
    used = [axis for axis in axes if mesh.shape[axis] > 1] or list(axes[:1])
    product = "" if len(used) == 1 else f" = {_parts(axes, mesh)}"
    return " x ".join(f"{axis}={mesh.shape[axis]}" for axis in used) + product + " devices"
