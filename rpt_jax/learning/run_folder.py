"""What a run writes: config.json first, then a row a step, at the end results.json.

    config.json       the resolved config, facts about its inputs, the run's id, commit, package versions, devices
    tokenizer/        the policy's, so that the folder can be used as a policy
    metrics.jsonl     one row a step; rollouts.jsonl a few rollouts of it; evaluations.jsonl a row an evaluation
    checkpoints/      see checkpoints.py
    tensorboard/      the numbers of metrics.jsonl and evaluations.jsonl; Weights & Biases gets the same where asked for
    results.json      final figures

Where checkpoint.folder is set, checkpoints are there, and copies of the rest in its folder run/.

Process 0 writes; the others call alike and write nothing.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from tensorboardX.event_file_writer import EventsWriter

from rpt_jax.agreement import in_first_process, of_first
from rpt_jax.config import Config
from rpt_jax.config_dict import from_dict, to_dict
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.json_file import read_object, write_json, write_whole
from rpt_jax.learning import checkpoints, tensorboard
from rpt_jax.learning.run_rows import flat, read_rows
from rpt_jax.ranges import require_in_range
from rpt_jax.records import InputError, words_of

KEPT = "run"  # folder beside the checkpoints, where those have one of their own
STREAMS = ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")
PACKAGES = ("rpt_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")
# A run continues with other values of these: they change no update beyond rounding.
FREE = ("name", "run_folder", "mesh", "checkpoint", "evaluate", "rollouts_logged", "wandb", "profile")
FREE_INSIDE = {
    "sample": ("tokens_per_call", "slots"),
    "update": ("microbatches", "token_chunk", "check_shared_prefix"),
    "model": ("remat",),
    "questions": ("workers", "evaluate_files"),
}


@dataclass(frozen=True)
class RunLog:
    """An open run folder."""

    folder: Path
    tensorboard: EventsWriter | None  # None in processes that write nothing
    wandb: Any = None  # the run of Weights & Biases, if asked for


@contextlib.contextmanager
def open_run(config: Config, tokenizer: Tokenizer, start: int | None, identity: dict) -> Iterator[RunLog]:
    """Writes config.json and cuts what was written here after the checkpoint at `start`; None: begins anew.

    identity: facts about the inputs that a continued run has to share; see require_same_run.
    """
    folder = Path(config.run_folder)
    if jax.process_index() != 0:
        yield RunLog(folder, None)
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    run_id = None if start is None else read_object(path).get("id")
    run_id = run_id or uuid.uuid4().hex[:8]
    described = {"config": to_dict(config), "identity": identity, "id": run_id} | provenance()
    write_json(path, described)
    if start is None:  # another run may have left files of its tokenizer, which would count
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    tokenizer.save(folder / "tokenizer")
    (folder / "results.json").unlink(missing_ok=True)
    for stream in STREAMS:
        _cut(folder / stream, start)
    if start is None:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    log = RunLog(folder, tensorboard.open_events(folder / "tensorboard", start), _wandb(config, run_id))
    try:
        yield log
    finally:
        log.tensorboard.close()
        if log.wandb:
            log.wandb.finish()


def find(config: Config, identity: dict) -> int | None:
    """Updates made at the newest checkpoint of this run, None where there is none; see require_same_run.

    Where checkpoints have a folder of their own, the run's small files beside them are brought here: another machine
    may have written them. Raises InputError where the run folder's own checkpoints are in another folder than
    config says: the run would begin anew over its rows; and where hosts do not see the same folder of checkpoints.
    """
    folder, here = checkpoints.folder_of(config), Path(config.run_folder)
    start = checkpoints.newest_step(folder)

    def check():
        if start is None:
            _require_no_other_checkpoints(here, folder)
            return
        if config.checkpoint.folder:
            require_same_run(config, identity, start, folder / KEPT)
        if (here / "config.json").is_file() or not config.checkpoint.folder:
            require_same_run(config, identity, start, here)
        if config.checkpoint.folder:
            _copy(folder / KEPT, epath.Path(here))

    in_first_process(check)
    checkpoints.require_shared(folder)
    return start


def _require_no_other_checkpoints(here: Path, folder: epath.Path) -> None:
    if not (here / "config.json").is_file():
        return
    before = checkpoints.folder_of(dataclasses.replace(read_config(here), run_folder=str(here)))
    steps = ocp.utils.checkpoint_steps(before) if before != folder and before.is_dir() else []
    if steps:
        raise InputError(
            f"{here} holds a run whose checkpoints are in {before} (newest: {max(steps)}), and {folder} has none: give "
            "the same --checkpoint.folder to continue it, or choose another --run-folder"
        )


def keep_copy(log: RunLog, config: Config) -> None:
    """Copies the run's small files beside its checkpoints, where those have a folder of their own."""
    if log.tensorboard is None or not config.checkpoint.folder:
        return
    there = checkpoints.folder_of(config) / KEPT
    for name in (*STREAMS, "config.json", "results.json", "tokenizer", "tensorboard"):
        if (log.folder / name).exists():
            _copy(epath.Path(log.folder / name), there / name)


def provenance() -> dict:
    """Commit (None outside a checkout), whether files differ from it, package versions, devices."""
    here = Path(__file__).resolve().parent

    def git(*command):
        try:
            done = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    tracked = git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may lie in a foreign checkout
    return {
        "commit": (git("rev-parse", "HEAD") or None) if tracked else None,
        "changed_since_commit": bool(git("status", "--porcelain", "--untracked-files=no")) if tracked else None,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
    }


def read_config(folder: Path) -> Config:
    """The resolved config of a run; raises InputError where the folder holds none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"no run in {str(folder)!r} (no config.json): give the folder that `rpt train` wrote")
    return settings_in(path, read_object(path, "config"))


def settings_in(path: Path, described: dict) -> Config:
    """The settings in what stands in config.json; raises InputError for wrong ones, and a wrong identity."""
    config = from_dict(Config, described["config"], f"{path}: config")
    require_in_range(config, f"{path}: config")
    if not isinstance(described.get("identity", {}), dict):
        raise InputError(f"{path}: identity is no object: it is not what this program wrote, make it again")
    return config


def require_same_run(config: Config, identity: dict, start: int, folder: Path | epath.Path | None = None) -> None:
    """Raises InputError, with both values, where a folder holds the rows of another run than that of the checkpoints.

    start: the newest checkpoint. folder: config's run folder where none is given.

    What may differ: FREE, FREE_INSIDE, and `steps` where neither schedule nor order of positions depend on it.
    """
    folder = Path(config.run_folder) if folder is None else folder
    remedy = "put back the one that the run wrote, or choose another --run-folder"
    there = read_object(folder / "config.json", "config", "identity", remedy=remedy)
    before = settings_in(folder / "config.json", there)  # settings since added: defaults
    old, new = _bound(to_dict(before)), _bound(to_dict(config))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise InputError(
                f"{folder} holds a run with {name}={old.get(name)!r}, this one has {new.get(name)!r}: choose another "
                "--run-folder, or give the same settings to continue it"
            )
    for name in identity:
        was, now = there["identity"].get(name), identity[name]
        if was != now:
            raise InputError(
                f"{folder} holds a run with another {name.replace('_', ' ')} ({words_of(was)}, now {words_of(now)}): "
                "choose another --run-folder, or give the same to continue it"
            )
    if start > config.steps:
        raise InputError(
            f"{folder} has made {start} updates already, steps={config.steps}: choose another --run-folder"
        )


def write_step(log: RunLog, row: dict, rollouts: list[dict]) -> None:
    """Appends the row of a step, {"step": updates made, ...}, and the rollouts shown of it."""
    if log.tensorboard is None:
        return
    _append(log.folder / "metrics.jsonl", [row])
    _append(log.folder / "rollouts.jsonl", rollouts)
    _write_scalars(log, row, row["step"])


def write_evaluation(log: RunLog, row: dict) -> None:
    """Appends the row of an evaluation, {"step": updates made, ...}, which may be nested."""
    if log.tensorboard is None:
        return
    _append(log.folder / "evaluations.jsonl", [row])
    _write_scalars(log, {f"evaluate/{name}": value for name, value in flat(row).items()}, row["step"])


def last_evaluation(log: RunLog) -> int:
    """Updates made at the last evaluation on disk, -1 for none; the same answer in every process."""
    rows = read_rows(log.folder / "evaluations.jsonl") if log.tensorboard else []
    return int(of_first(np.array(rows[-1]["step"] if rows else -1)))


def write_results(log: RunLog, config: Config) -> dict:
    """Writes results.json from the rows on disk and returns it, in process 0 only."""
    if log.tensorboard is None:
        return {}
    rows, evaluations = (read_rows(log.folder / name) for name in ("metrics.jsonl", "evaluations.jsonl"))
    results = {
        "name": config.name,
        "steps": rows[-1]["step"] if rows else 0,
        "seconds": sum(row["seconds"] for row in rows),
        "last_step": rows[-1] if rows else {},
        "evaluation": evaluations[-1] if evaluations else {},
        "evaluations": evaluations,
    }
    write_json(log.folder / "results.json", results)
    return results


def read_results(folder: Path) -> dict:
    """What write_results wrote; {} in processes other than 0, which may not see the folder."""
    return read_object(Path(folder) / "results.json") if jax.process_index() == 0 else {}


def require_wandb(config: Config) -> None:
    """Raises InputError if Weights & Biases is asked for and not installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError(
            "wandb=True, but Weights & Biases is not installed: pip install 'rpt_jax[wandb]', or --no-wandb"
        )


def _wandb(config, run_id):
    if not config.wandb:
        return None
    import wandb

    return wandb.init(
        project="rpt_jax", name=config.name, id=run_id, resume="allow", dir=config.run_folder, config=to_dict(config)
    )


def _write_scalars(log, row, step):
    numbers = {k: v for k, v in flat(row).items() if isinstance(v, (int, float)) and k.split("/")[-1] != "step"}
    tensorboard.write_scalars(log.tensorboard, numbers, step)
    if log.wandb:
        log.wandb.log(numbers, step=step)


def _bound(values: dict) -> dict:
    """The settings, flat, that a continued run has to share."""
    kept = {name: value for name, value in values.items() if name not in FREE}
    for name, inside in FREE_INSIDE.items():
        kept[name] = {key: value for key, value in kept[name].items() if key not in inside}
    if values["update"]["schedule"] == "constant" and values["positions"]["order"] == "shuffled":
        del kept["steps"]
    return json.loads(json.dumps(flat(kept)))  # tuples as lists, as they come back from disk


def _append(path: Path, rows: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(rows))


def _cut(path: Path, step: int | None) -> None:
    """Keeps the rows up to `step` updates; None: none."""
    if path.is_file():
        rows = [] if step is None else [row for row in read_rows(path) if row["step"] <= step]
        write_whole(path, _lines(rows))


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _copy(source: epath.Path, target: epath.Path) -> None:
    """A file, or a folder with all in it, whole files or none; on any file system that epath knows."""
    if source.is_dir():
        for each in source.iterdir():
            _copy(each, target / each.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target if "://" in str(target) else target.with_name(target.name + ".tmp")  # a bucket's objects are whole
    part.write_bytes(source.read_bytes())
    if part != target:
        part.replace(target)
