"""Training state on disk.

A checkpoint (Orbax, one folder per step, there as a whole or not at all) holds the parameters, the optimizer state with
the step (and in a run that has one the average of parameters), and as JSON what the host needs to go on exactly: the
state of the position stream and the dynamic-sampling queue; and fingerprints of all of it, by which one is known that
was damaged but still reads.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import socket
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rpt_jax.agreement import HostTrouble, found_by_first, in_first_process, of_first, together
from rpt_jax.config import CheckpointConfig, Config
from rpt_jax.learning.update import TrainState
from rpt_jax.policy.fingerprint import fingerprint
from rpt_jax.records import InputError, Params

log = logging.getLogger(__name__)
MARK = ".seen_by_all."  # how the names of files begin by which hosts see that they share a folder
SEEN_SECONDS = 10  # in which a shared folder shows on all hosts what one has written
Manager = ocp.CheckpointManager
# Raised as they are, also by policy_folder.py: memory, access or another host failed, which says nothing of the files.
NOT_OF_THE_FILES = (jax.errors.JaxRuntimeError, MemoryError, PermissionError, ConnectionError, TimeoutError)


def newest_step(folder: str | Path) -> int | None:
    """The step of the newest whole checkpoint in a folder, None where there is none; process 0 looks for all."""

    def newest():
        return max(ocp.utils.checkpoint_steps(folder) if epath.Path(folder).is_dir() else [], default=-1)

    step = int(found_by_first(newest, np.array(-1)))
    return None if step < 0 else step


def require_shared(folder: str | Path) -> None:
    """Raises InputError, in all processes, where one does not see what process 0 writes to the folder. A collective.

    Each process saves its own part of what is spread over them: on disks of their own no host would have it all.
    """
    if jax.process_count() == 1:
        return
    mark = epath.Path(folder) / f"{MARK}{of_first(np.frombuffer(os.urandom(8), np.uint8)).tobytes().hex()}"

    def write():
        mark.parent.mkdir(parents=True, exist_ok=True)
        for left in mark.parent.glob(f"{MARK}*"):  # by a start that was killed
            left.unlink(missing_ok=True)
        mark.write_text("")

    in_first_process(write)
    try:
        with together():
            _await(mark)
    finally:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # one that stays does no harm
                mark.unlink(missing_ok=True)


def _await(mark: epath.Path) -> None:
    for second in range(SEEN_SECONDS + 1):
        time.sleep(min(second, 1))
        if mark.exists():
            return
    raise InputError(
        f"host {socket.gethostname()!r} does not see what process 0 writes to {mark.parent}: name a folder that all "
        "hosts share, --checkpoint.folder gs://BUCKET/FOLDER or on a shared disk"
    )


def folder_of(config: Config) -> epath.Path:
    """Where a run's checkpoints are: on this machine, or on Google Cloud Storage (gs://..., extra `gcs`)."""
    return epath.Path(config.checkpoint.folder or epath.Path(config.run_folder) / "checkpoints")


def open_checkpoints(folder: str | Path, keep: int, read_only: bool = False) -> Manager:
    """The checkpoints of a run, saved in the background; the newest `keep` are kept. Close it to wait for the last.

    read_only: each process reads for itself. Orbax would let the others wait for one that cannot.
    """
    own = {"primary_host": jax.process_index(), "active_processes": {jax.process_index()}}
    folder = epath.Path(folder)
    where = folder if "://" in str(folder) else folder.resolve()  # which would make gs://bucket a local folder
    with _without_warnings() if read_only else contextlib.nullcontext():
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            enable_async_checkpointing=not read_only,
            read_only=read_only,
            multiprocessing_options=ocp.options.MultiprocessingOptions(**own if read_only else {}),
        )
        return ocp.CheckpointManager(where, options=options)


@contextlib.contextmanager
def _without_warnings():
    """Orbax warns three times of a manager that only reads, which is what was asked for."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def save(manager: Manager, step: int, state: TrainState, host: dict) -> None:
    """Starts saving under `step` (updates made); state may be donated as soon as this returns.

    A step that is there already is left alone: a run is a function of its step, so it holds the same.
    """
    if of_first(np.array(step in manager.all_steps())):
        return
    rest = _rest(state)
    found = {"params": fingerprint(state.params), "rest": fingerprint(rest), "host": _digest(host)}
    host = host | {"fingerprints": found}
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(state.params), rest=ocp.args.StandardSave(rest), host=ocp.args.JsonSave(host)
    )
    manager.save(step, args=items)


def restore(manager: Manager, like: TrainState, step: int) -> tuple[TrainState, dict]:
    """(state, host) saved under `step`, laid out as `like`: arrays or ShapeDtypeStructs with shardings, of any mesh.

    Raises InputError naming a checkpoint that is missing, damaged, or of another model.
    """
    abstract = abstract_state(like)
    items = ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract.params),
        rest=ocp.args.StandardRestore(_rest(abstract)),
        host=ocp.args.JsonRestore(),
    )
    found, host = _restore(manager, step, items)
    return TrainState(found.params, **found.rest), host


def _rest(state: TrainState) -> dict:
    """All but the parameters, which are read without it where only the policy is wanted."""
    average = {} if state.average is None else {"average": state.average}
    return {"optimizer_state": state.optimizer_state, "step": state.step} | average


def restore_newest(folder: str | Path, like: TrainState, config: CheckpointConfig) -> tuple[TrainState, dict, int]:
    """(state, host, step) of the newest whole checkpoint, see restore.

    With config.on_damaged="previous" a damaged one gets the ending .damaged and the one before it is read, if any. One
    that a host does not see, or cannot read, is not called damaged.
    """
    while True:
        step = newest_step(folder)
        with contextlib.closing(open_checkpoints(folder, config.keep, read_only=True)) as manager:
            try:
                return *restore(manager, like, step), step
            except HostTrouble:
                raise
            except InputError as error:
                if config.on_damaged == "stop" or of_first(np.array(len(manager.all_steps()) < 2)):
                    raise
                log.warning("%s; going on from the one before", error)
        there = epath.Path(folder) / str(step)
        in_first_process(functools.partial(there.rename, there.with_name(f"{step}.damaged")))


def newest_params(folder: str | Path, like: Params) -> Params | None:
    """The parameters of the newest whole checkpoint, laid out as `like`; None where there is none. See restore."""
    if newest_step(folder) is None:
        return None
    with contextlib.closing(open_checkpoints(folder, 0, read_only=True)) as manager:
        step = int(of_first(np.array(manager.latest_step())))  # the run may be saving
        items = ocp.args.Composite(params=ocp.args.StandardRestore(like), host=ocp.args.JsonRestore())
        found, _ = _restore(manager, step, items)
        return found.params


def abstract_state(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, which may then be freed before another one is read."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _restore(manager, step, items):
    """(what `items` ask for, host without the fingerprints), compared with these."""
    with together():
        folder, there = manager.directory / str(step), sorted(manager.all_steps())
        if step not in there:
            kind = HostTrouble if jax.process_count() > 1 else InputError  # another host may see it already
            raise kind(f"no checkpoint {folder}; whole ones in {folder.parent}: {', '.join(map(str, there)) or 'none'}")
        try:
            found = manager.restore(step, args=items)
        except NOT_OF_THE_FILES:
            raise
        except Exception as error:  # Orbax raises this very class for a file that is cut short
            raise _damaged(manager, step, first_line(error)) from error
    if not isinstance(found.host, dict):
        raise _damaged(manager, step, f"host is {type(found.host).__name__} instead of a JSON object")
    host = dict(found.host)
    for name, wanted in host.pop("fingerprints", {}).items():  # earlier checkpoints have none, or not all
        if name in found and (_digest(host) if name == "host" else fingerprint(found[name])) != wanted:
            raise _damaged(manager, step, f"{name} differs from what was saved")
    return found, host


def _digest(host: dict) -> str:
    """Of JSON, whatever the order of its names."""
    return hashlib.blake2b(json.dumps(host, sort_keys=True).encode(), digest_size=8).hexdigest()


def _damaged(manager: Manager, step: int, how: str) -> InputError:
    others = sorted(set(manager.all_steps()) - {step})
    before = f"--checkpoint.on-damaged previous continues from step {others[-1]}" if others else ""
    return InputError(
        f"checkpoint {manager.directory / str(step)} cannot be read: {how}; if it belongs to this model it is damaged: "
        f"{before or 'start the run anew'}"
    )


def first_line(error) -> str:
    """Of the error at the bottom of it, without the settings of tensorstore, which are pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(" [tensorstore_spec")[0]
