"""One cell of a sweep: a run of `rpt train` with its own settings, and the row that comes of it.

An experiment file of a sweep defines

    cells(folder) -> [Cell, ...]        all runs; folder is where the sweep keeps its files
    prepare(stage, folder)              makes in `folder` what the cells that need `stage` start from

A cell's or stage's folder, and its result beside it as NAME.json (there as a whole or not at all), are

    FOLDER/cells/NAME/     the run folder
    FOLDER/stages/NAME/    what prepare has made; it is emptied before
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import jax

from rpt_jax import commands, compilation, host_memory
from rpt_jax.config import Config
from rpt_jax.config_dict import from_dict, to_dict
from rpt_jax.experiment_file import called, load_module
from rpt_jax.json_file import read_object, write_json
from rpt_jax.learning import identity, run_folder, run_rows, train
from rpt_jax.learning.inputs import Inputs
from rpt_jax.ranges import require_in_range
from rpt_jax.records import InputError
from rpt_jax.scaling import claims

EVALUATION_SEED = 0  # of all cells: their accuracies are about one choice of held-out positions (bootstrap.py)
Kind = Literal["cells", "stages"]
FIGURES = ("argmax", "reasoning", "format_rate", "response_length", "positions", "standard_error")
# Settings that say where files are, and not what is computed.
PLACES = ("name", "run_folder", "policy", "mesh", "checkpoint", "corpus", "rollouts_logged", "wandb", "profile")
# Settings that came after the first recorded rows ("update.x"): at their defaults they leave a fingerprint as it was.
SINCE = (
    "flops",
    "questions",
    "positions.target",
    "positions.shortest_target",
    "positions.longest_target",
    "positions.order",
    "positions.stages",
    "positions.start",
    "reward.judge",
    "update.next_token_share",
    "update.next_token_sequences",
    "update.next_token_length",
)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: a model size, a compute budget, a seed."""

    name: str  # of its row and folder: letters, digits, '.', '_' and '-'
    size: str  # which model, for the fit
    seed: int  # cells of one seed may share a base; the run's own seed is config.seed
    config: Config  # config.steps is the budget; the sweep sets run_folder
    needs: str = ""  # stage that makes what the run starts from; empty: it is there


def load_sweep(path: str, folder: Path) -> tuple[ModuleType, list[Cell]]:
    """(the experiment file as a module, its cells); raises InputError for what is no sweep."""
    module = load_module(path)
    made = called(path, module.cells, folder) if callable(getattr(module, "cells", None)) else None
    # By name: in the process of a cell this module is __main__, and its Cell another class.
    if not isinstance(made, (list, tuple)) or not all(type(cell).__name__ == Cell.__name__ for cell in made):
        raise InputError(f"{path}: the experiment file of a sweep defines cells(folder), a list of Cell")
    for cell in made:
        from_dict(Cell, called(path, to_dict, cell), f"{path}: cell")  # dataclasses check no types
        require_in_range(cell, f"{path}: cell")
    cells = [_placed(cell, folder) for cell in made]
    for cell in cells:
        for name in filter(None, (cell.name, cell.needs)):
            if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII):
                raise InputError(f"{path}: cell or stage {name!r}: use letters, digits, '.', '_' and '-'")
        if cell.config.questions.files and not cell.config.questions.evaluate_files:
            raise InputError(
                f"{path}: cell {cell.name!r} learns from questions: name others that all cells are measured on, "
                "questions.evaluate_files (those of questions.holdout are other ones for each seed)"
            )
    names = [cell.name for cell in cells]
    if not cells or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), "none")
        raise InputError(f"{path}: {len(cells)} cells, of one name: {twice}; give at least one, each a name of its own")
    if any(cell.needs for cell in cells) and not hasattr(module, "prepare"):
        raise InputError(f"{path}: cells need stages, so define prepare(stage, folder)")
    return module, cells


def _placed(cell: Cell, folder: Path) -> Cell:
    config = dataclasses.replace(cell.config, name=cell.name, run_folder=str(place(folder, "cells", cell.name)))
    return dataclasses.replace(cell, config=config)


def place(folder: Path, kind: Kind, name: str) -> Path:
    """Folder of a cell or stage."""
    return Path(folder) / kind / name


def result_file(folder: Path, kind: Kind, name: str) -> Path:
    return place(folder, kind, name).with_name(f"{name}.json")


def read_result(folder: Path, kind: Kind, name: str) -> dict | None:
    """What a finished cell or stage left, {"status": "done" | "failed", ...}; None for one that has not ended.

    Raises InputError for a file that is no result.
    """
    path = result_file(folder, kind, name)
    if not path.is_file():
        return None
    result = read_object(path, remedy=f"delete it to run {name} again")
    if result.get("status") not in ("done", "failed"):
        raise InputError(f"{path} is no result of a sweep: delete it to run {name} again")
    return result


def write_result(folder: Path, kind: Kind, name: str, result: dict) -> None:
    write_json(result_file(folder, kind, name), result)


def fingerprint(config: Config) -> str:
    """Eight hex digits of all settings that make a result what it is; places of files are left out."""
    values, default = to_dict(config), to_dict(Config())
    for *rooms, name in (setting.split(".") for setting in SINCE):
        here, usual = (functools.reduce(dict.__getitem__, rooms, each) for each in (values, default))
        if here[name] == usual[name]:
            del here[name]
    values = {name: value for name, value in values.items() if name not in PLACES}
    for part in ("positions", "evaluate"):
        values[part] = {name: value for name, value in values[part].items() if name != "annotated"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def head_of_row(cell: Cell, status: str, error: str = "") -> dict:
    """What a row says of its cell, whatever came of it."""
    about = {"cell": cell.name, "size": cell.size, "seed": cell.seed, "steps": cell.config.steps}
    return about | {"status": status, "error": error, "settings": fingerprint(cell.config)}


def row_of_run(cell: Cell) -> dict:
    """The figures of a finished run: accuracies by split, FLOPs really spent, seconds, commit."""
    folder = Path(cell.config.run_folder)
    evaluation = run_folder.read_results(folder)["evaluation"]
    rows = run_rows.read_rows(folder / "metrics.jsonl")
    splits = {name: figures for name, figures in evaluation.items() if isinstance(figures, dict)}
    if not splits:
        raise InputError(f"{cell.name} was not evaluated: set evaluate.annotated to held-out documents")
    row = head_of_row(cell, "done")
    for split, figures in splits.items():
        row |= {f"{split}.{name}": _rounded(figures[name]) for name in FIGURES if name in figures}
    for part in ("flops_sample", "flops_update"):
        row[part] = sum(each[part] for each in rows)
    made_by = json.loads((folder / "config.json").read_text())
    row |= {"seconds": round(sum(each["seconds"] for each in rows), 1)}
    row |= {"seconds_evaluate": round(evaluation.get("seconds_evaluate", 0.0), 1)}
    about = {"commit": made_by["commit"], "changed_since_commit": made_by["changed_since_commit"]}
    return row | about | {"jax": jax.__version__, "devices": made_by["devices"]["kind"]}


def _rounded(value):
    return round(value, 5) if isinstance(value, float) else value


def held_out_evaluation(inputs: Inputs) -> train.Evaluate:
    """As `rpt train` evaluates, but on the positions that all cells share, whatever the seed of the run."""
    config = dataclasses.replace(inputs.config, seed=EVALUATION_SEED)
    return commands.held_out_evaluation(dataclasses.replace(inputs, config=config))


def run_cell(cell: Cell, folder: Path, claim: claims.Claim | None = None) -> dict:
    """Trains and evaluates, from the cell's newest checkpoint if there is one, and writes its result."""
    identity.start_together(cell.config)
    train.run(cell.config, held_out_evaluation)
    row = row_of_run(cell) if jax.process_index() == 0 else {}
    if row and (claim is None or claims.holds(claim)):
        write_result(folder, "cells", cell.name, row)
    return row


def run_stage(module: ModuleType, stage: str, folder: Path, claim: claims.Claim | None = None) -> None:
    """prepare, in an empty folder."""
    own, began = place(folder, "stages", stage), time.perf_counter()
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    module.prepare(stage, own)
    if claim is None or claims.holds(claim):
        seconds = round(time.perf_counter() - began, 1)
        write_result(folder, "stages", stage, {"status": "done", "stage": stage, "seconds": seconds})


def main(argv: list[str] | None = None) -> None:
    """A process of its own for one cell or stage, as sweep.py starts it."""
    parser = argparse.ArgumentParser()
    for name in ("experiment", "folder", "kind", "name"):
        parser.add_argument(name)
    parser.add_argument("--claim", type=int, required=True)
    parser.add_argument("--cores", default="")
    given = parser.parse_args(argv)
    host_memory.share_arenas()
    if given.cores:
        os.sched_setaffinity(0, [int(core) for core in given.cores.split(",")])  # before XLA counts them
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rpt_jax").setLevel(logging.INFO)
    compilation.keep_on_disk()
    folder = Path(given.folder)
    claim = claims.Claim(folder / "claims" / given.kind, given.name, given.claim)
    with claims.kept(claim):
        module, cells = load_sweep(given.experiment, folder)
        if given.kind == "stages":
            run_stage(module, given.name, folder, claim)
        else:
            run_cell(next(cell for cell in cells if cell.name == given.name), folder, claim)


if __name__ == "__main__":
    main()
