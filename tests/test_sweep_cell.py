"""Claims: a sweep of real runs gives rows whose accuracies are the evaluation's and whose FLOPs are those of
metrics.jsonl; a cell broken off in the middle ends as one that was not; a run that cannot start is a row."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy

from rpt_jax import commands
from rpt_jax.config import Config, EvaluateConfig, MeshConfig, PositionConfig, SampleConfig
from rpt_jax.experiment_file import load_module
from rpt_jax.learning.inputs import Inputs
from rpt_jax.mesh import make_mesh
from rpt_jax.scaling import claims, sweep, sweep_cell
from rpt_jax.scaling.sweep import SweepSettings
from rpt_jax.scaling.sweep_cell import Cell
from rpt_jax.study.evaluate import choose_positions

EXPERIMENT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from dataclasses import replace
from pathlib import Path
import toy
from rpt_jax.config import CheckpointConfig, EvaluateConfig, PositionConfig
from rpt_jax.learning.policy_folder import save_policy
from rpt_jax.scaling.sweep_cell import Cell

def cells(folder):
    base = Path(folder) / "stages" / "base"
    settings = dict(
        policy=str(base / "policy"),
        positions=PositionConfig(annotated=str(base / "annotated")),
        evaluate=EvaluateConfig(annotated=str(base / "annotated"), every=0, batch_size=8),
        checkpoint=CheckpointConfig(every=1),
    )
    made = [Cell(f"toy-{{steps}}", "toy", 0, toy.config("", steps=steps, **settings), "base") for steps in (2, 12)]
    return [*made, replace(made[0], name="broken", config=replace(made[0].config, policy="nowhere"))]

def prepare(stage, folder):
    save_policy(folder / "policy", toy.model(), toy.params(), toy.tokenizer(), {{}})
    toy.annotate(folder / "annotated")
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "toys.py"
    path.write_text(EXPERIMENT)
    return path


def settings_in(tmp_path, name, **options):
    return SweepSettings(folder=str(tmp_path / name), results=str(tmp_path / f"{name}.csv"), **options)


def rows_of(settings):
    with Path(settings.results).open() as file:
        return {row["cell"]: row for row in csv.DictReader(file)}


def test_cells_that_learn_from_questions_are_measured_on_the_same_ones(tmp_path):
    """By their seeds they would hold out others, and evaluation has one seed: on questions that were learnt from."""
    path = tmp_path / "asking.py"
    code = "from rpt_jax.config import Config, QuestionConfig\nfrom rpt_jax.scaling.sweep_cell import Cell\n\n"
    code += "def cells(folder):\n    asked = QuestionConfig(('x.jsonl',), {})\n"
    code += "    return [Cell('a', 'toy', 7, Config(questions=asked))]\n"
    path.write_text(code.format("holdout=9"))
    with pytest.raises(sweep_cell.InputError, match="cell 'a' learns from questions: .*questions.evaluate_files"):
        sweep_cell.load_sweep(str(path), tmp_path)
    path.write_text(code.format("evaluate_files=('y.jsonl',)"))
    assert sweep_cell.load_sweep(str(path), tmp_path)[1]


def test_rows_are_what_the_runs_measured(experiment, tmp_path):
    settings = settings_in(tmp_path, "a", only=("toy-2", "broken"), workers=2)
    figures = sweep.sweep(str(experiment), settings)
    assert (figures["done"], figures["failed"], figures["left"]) == (1, 1, 0)
    rows = rows_of(settings)
    assert "InputError: no policy in 'nowhere'" in rows["broken"]["error"]
    run, row = tmp_path / "a" / "cells" / "toy-2", rows["toy-2"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for part in ("flops_sample", "flops_update", "seconds"):
        assert float(row[part]) == pytest.approx(sum(each[part] for each in metrics), rel=1e-6, abs=0.05)
    assert len(metrics) == 2 and float(row["flops_update"]) > float(row["flops_sample"]) > 0
    evaluation = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert evaluation["step"] == 2
    for split in ("easy", "medium", "hard"):
        for figure in ("argmax", "reasoning", "positions", "standard_error", "format_rate"):
            assert float(row[f"{split}.{figure}"]) == pytest.approx(evaluation[split][figure], abs=1e-5)
    assert row["commit"] == json.loads((run / "config.json").read_text())["commit"]
    assert (row["size"], row["seed"], row["steps"], row["status"]) == ("toy", "0", "2", "done")


def test_a_cell_broken_off_goes_on_where_it_was(experiment, tmp_path):
    """SIGTERM to the command after some updates; the same command continues, and no update is made twice."""
    settings = settings_in(tmp_path, "b", only=("toy-12",))
    words = ["sweep", str(experiment), "--folder", settings.folder, "--results", settings.results, "--only", "toy-12"]
    run = tmp_path / "b" / "cells" / "toy-12"
    metrics = run / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-m", "rpt_jax.cli", *words]) as process:
        while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    made = metrics.read_text().count("\n")
    assert 3 <= made < 12 and not Path(settings.results).exists()
    assert sweep.sweep(str(experiment), settings)["done"] == 1
    log = run.with_name("toy-12.log").read_text()
    assert f"saved after update {made}/12" in log and f"continuing {run} after {made} updates" in log
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    spent = sum(row["flops_update"] for row in rows)
    assert float(rows_of(settings)["toy-12"]["flops_update"]) == pytest.approx(spent)


def test_one_cell_here_and_now(experiment, tmp_path, monkeypatch):
    """As a launcher starts it: the stage too, a row, no claims. The run itself is a stand-in."""

    def run_cell(cell, folder):
        assert (Path(cell.config.policy) / "policy.json").is_file()
        row = sweep_cell.head_of_row(cell, "done")
        sweep_cell.write_result(folder, "cells", cell.name, row)
        return row

    monkeypatch.setattr(sweep_cell, "run_cell", run_cell)
    settings = settings_in(tmp_path, "d", cell="toy-2")
    assert sweep.sweep(str(experiment), settings)["status"] == "done"
    assert rows_of(settings)["toy-2"]["steps"] == "2" and not (tmp_path / "d" / "claims").exists()


def test_cells_of_all_seeds_are_evaluated_on_one_choice_of_positions(tmp_path, monkeypatch):
    """Of 64 positions the same 5, though the runs draw theirs by seeds of their own."""
    toy.annotate(tmp_path / "annotated")
    chosen = []

    def evaluate(params, model, tokenizer, template, documents, splits, *, config, seed, **_):
        chosen.append(choose_positions(splits, config.positions, seed)[0])
        return SimpleNamespace(summary=dict)

    monkeypatch.setattr(commands.study, "evaluate", evaluate)
    for seed in (0, 1012):
        held_out = EvaluateConfig(annotated=str(tmp_path / "annotated"), positions=5, batch_size=8)
        config = toy.config(tmp_path / "run", seed=seed, evaluate=held_out)
        policy = (toy.model(), None, toy.tokenizer())
        inputs = Inputs(config, policy, annotated=None, positions=None, template=None, mesh=make_mesh(MeshConfig()))
        sweep_cell.held_out_evaluation(inputs)(None, 0)
    assert len(chosen[0]) and chosen[0].documents.tolist() == chosen[1].documents.tolist()


def test_settings_are_told_apart_and_places_are_not():
    config = Config()
    one = sweep_cell.fingerprint(config)
    for same in ({"policy": "x"}, {"run_folder": "y"}, {"evaluate": EvaluateConfig(annotated="z")}, {"wandb": True}):
        assert sweep_cell.fingerprint(dataclasses.replace(config, **same)) == one
    for other in ({"steps": 7}, {"sample": SampleConfig(top_k=3)}, {"positions": PositionConfig(threshold=1.0)}):
        assert sweep_cell.fingerprint(dataclasses.replace(config, **other)) != one


def test_rows_of_before_a_setting_was_there_still_count():
    """The digits that the table of scaling_tiny.py was begun with; a budget is told apart."""
    experiment = Path(__file__).parent.parent / "experiments" / "scaling_tiny.py"
    cell = load_module(str(experiment)).cell(Path("x"), "64x4", 0, 12)
    assert sweep_cell.fingerprint(cell.config) == "d9149313"
    assert sweep_cell.fingerprint(dataclasses.replace(cell.config, flops=1e9)) != "d9149313"


def test_a_stage_begins_in_an_empty_folder(tmp_path):
    left = sweep_cell.place(tmp_path, "stages", "base") / "left"
    left.mkdir(parents=True)

    class Experiment:
        def prepare(stage, folder):
            assert (stage, list(folder.iterdir())) == ("base", [])
            (folder / "made").touch()

    sweep_cell.run_stage(Experiment, "base", tmp_path)
    assert (left.parent / "made").exists() and sweep_cell.read_result(tmp_path, "stages", "base")["status"] == "done"


def test_a_run_without_evaluation_is_no_cell(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"evaluation": {}}))
    with pytest.raises(sweep_cell.InputError, match="set evaluate.annotated"):
        sweep_cell.row_of_run(Cell("a", "s", 0, Config(run_folder=str(tmp_path))))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen on this system")
def test_a_process_runs_on_its_cores(tmp_path):
    core = min(os.sched_getaffinity(0))
    path = tmp_path / "e.py"
    path.write_text("import os\ndef cells(folder): return []\n")
    words = [str(path), str(tmp_path), "cells", "none", "--claim", "0", "--cores", str(core)]
    claims.take(tmp_path / "claims" / "cells", "none")
    code = (
        "import os; from rpt_jax.scaling import sweep_cell as s\n"
        f"s.load_sweep = lambda *_: print(os.sched_getaffinity(0)) or 1 / 0\ns.main({words!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{{{core}}}\n"
