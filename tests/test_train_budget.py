"""Claims: FLOPs are those that were spent, a run with a budget ends with the update that reaches it, and one that
continues remembers what it has spent."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import toy
from test_train import assert_same_run, assert_same_state, evaluate, finished, run, settings
from toy import Stop, rows_of, stop_at

from rpt_jax.config import EvaluateConfig
from rpt_jax.learning import checkpoints, run_folder, run_rows
from rpt_jax.policy import flops
from rpt_jax.records import InputError


def test_flops_are_those_of_all_rounds_and_of_the_batch():
    """By hand for a step of two rounds: every prompt has 4 tokens."""
    row = next(row for row in rows_of(finished()[0]) if row["rounds"] == 2)
    model, tokens = toy.model(), row["response_tokens"]
    assert (row["sampled_prompts"], row["sampled_rollouts"], row["sampled_prompt_tokens"]) == (16, 128, 64)
    assert row["flops_sample"] == flops.sampling(model, 16, 64, 128, row["sampled_tokens"])
    assert row["flops_update"] == flops.update(model, 8, 32, 64, tokens) and tokens < row["sampled_tokens"]


def test_the_reference_of_a_kl_is_counted_too(tmp_path):
    """A forward pass over the batch: a third of what the update itself takes."""
    config = settings(tmp_path / "run", steps=1, evaluate=EvaluateConfig(every=0))
    run(dataclasses.replace(config, update=dataclasses.replace(config.update, kl_coefficient=0.1)), evaluate=None)
    (row,) = rows_of(tmp_path / "run")
    assert row["flops_update"] == 4 / 3 * flops.update(toy.model(), 8, 32, 64, row["response_tokens"])


@functools.cache
def budgeted():
    """(run folder, last state) of a run that ends by its FLOPs: in the middle of the eleventh update of `finished`."""
    spent = np.cumsum([row["flops_sample"] + row["flops_update"] for row in rows_of(finished()[0])])
    folder = Path(tempfile.mkdtemp()) / "run"
    return folder, run(settings(folder, flops=float(spent[9] + spent[10]) / 2))


def test_a_run_ends_with_the_update_that_reaches_its_flops():
    """It is the run of `steps` up to there, its last checkpoint and evaluation included."""
    (folder, state), (whole, _) = budgeted(), finished()
    assert int(state.step) == 11
    assert rows_of(folder) == rows_of(whole)[:11] and rows_of(folder, "evaluations.jsonl")[-1]["step"] == 11
    assert rows_of(folder, "evaluations.jsonl")[-1]["weight"] == evaluate(state.params, 11)["weight"]
    assert checkpoints.newest_step(folder / "checkpoints") == 11
    assert json.loads((folder / "results.json").read_text())["steps"] == 11
    spent = 0.0
    for row in rows_of(folder):
        spent += row["flops_sample"] + row["flops_update"]
        assert row["flops_spent"] == spent
    assert spent - row["flops_sample"] - row["flops_update"] < run_folder.read_config(folder).flops <= spent


def test_a_run_that_continues_remembers_what_it_has_spent(tmp_path):
    folder, state = budgeted()
    config = settings(tmp_path, flops=run_folder.read_config(folder).flops)
    with pytest.raises(Stop):
        run(config, report=stop_at(10))
    assert checkpoints.newest_step(tmp_path / "checkpoints") == 8
    assert_same_state(run(config), state)
    assert_same_run(tmp_path, folder)
    with pytest.raises(InputError, match="holds a run with flops="):
        run(settings(tmp_path, flops=2 * config.flops))


def test_what_was_spent_before_checkpoints_said_so_is_in_the_rows():
    rows = rows_of(finished()[0])
    assert run_rows.flops_spent(finished()[0], 7) == pytest.approx(rows[6]["flops_spent"], rel=1e-12)
    assert run_rows.flops_spent(Path("nowhere"), 7) == 0


def test_a_budget_is_a_number():
    for wrong in (-1.0, float("nan")):
        with pytest.raises(InputError, match=f"flops={wrong}: use a number of FLOPs"):
            settings("x", flops=wrong).check()
