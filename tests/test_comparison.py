"""Claims of experiments/comparison.py: methods spend one budget on one base, each by its own settings; a row is made
once, by whoever is free; the table's intervals are those of the book."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_quickstart import TINY

from rpt_jax.config import ModelConfig
from rpt_jax.config_dict import to_dict
from rpt_jax.experiment_file import load_module
from rpt_jax.learning import run_rows
from rpt_jax.records import InputError
from rpt_jax.scaling import claims
from rpt_jax.study import quickstart
from rpt_jax.study.controls import ExpertConfig, Trained

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
comparison = load_module(str(EXPERIMENTS / "comparison.py"))
append_row, read_rows = comparison.append_row, comparison.read_rows


def settings_in(folder, **options):
    results, expert = folder / "comparison.csv", ExpertConfig(prompts=8, updates=1)
    return comparison.Settings(runs=folder / "runs", results=results, quickstart=TINY, expert=expert, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(settings, rows by method) of a row asked for alone and two more after it."""
    folder = tmp_path_factory.mktemp("comparison")
    settings = settings_in(folder, methods=("first_token",), seeds=(1,))
    comparison.main(settings)
    comparison.main(dataclasses.replace(settings, methods=("base", "first_token", "expert_iteration")))
    return settings, read_rows(settings.results)


def test_a_row_alone_makes_what_it_needs(finished):
    """The base, the run that sets the budget, whose row comes with it, then the row; no row twice."""
    settings, rows = finished
    assert [row["method"] for row in rows] == ["prefix", "first_token", "base", "expert_iteration"]
    assert {row["seed"] for row in rows} == {"1"}
    assert all((settings.runs / "base-1" / name).is_dir() for name in ("base", "annotated", "held_out"))


def test_all_spend_what_prefix_has_spent(finished):
    settings, rows = finished
    by_method = {row["method"]: row for row in rows}
    steps = run_rows.read_rows(settings.runs / "prefix-1" / "metrics.jsonl")
    budget = sum(row["flops_sample"] + row["flops_update"] for row in steps)
    assert float(by_method["prefix"]["flops"]) == pytest.approx(budget, rel=1e-5) and len(steps) == 2
    assert by_method["base"]["flops"] == by_method["base"]["updates"] == "0"
    for method in ("first_token", "expert_iteration"):
        row = by_method[method]
        assert float(row["budget"]) == pytest.approx(budget, rel=1e-5)
        assert budget <= float(row["flops"]) * (1 + 1e-5) and float(row["flops"]) < 1.7 * budget
    last = run_rows.read_rows(settings.runs / "first_token-1" / "metrics.jsonl")[-1]
    assert last["flops_spent"] - last["flops_sample"] - last["flops_update"] < budget <= last["flops_spent"]


def test_rows_hold_the_figures_of_the_evaluation(finished):
    settings, rows = finished
    shared = comparison.open_shared(dataclasses.replace(TINY, seed=1), settings.runs / "base-1")
    row = next(row for row in rows if row["method"] == "base")
    expected = quickstart.examine(shared.config, shared.policy, shared.held_out, shared.splits).summary()
    for split in ("hard", "medium"):
        for name in ("reasoning", "argmax", "format_rate", "positions"):
            assert float(row[f"{split}.{name}"]) == pytest.approx(expected[split][name], abs=1e-5)
        errors = expected[split]["standard_errors"]
        assert float(row[f"{split}.argmax_error"]) == pytest.approx(errors["argmax"], abs=1e-5)


def test_a_base_of_other_settings_is_refused(finished):
    settings, _ = finished
    with pytest.raises(InputError, match="holds a base made by .*choose other --runs"):
        comparison.open_shared(dataclasses.replace(TINY, seed=2), settings.runs / "base-1")


def test_what_a_row_needs_comes_first_and_others_tasks_are_left_alone(tmp_path, monkeypatch):
    done = []

    def run(settings, task, seed):
        done.append((task, seed))
        if task == "prepare":
            (settings.runs / f"base-{seed}").mkdir(parents=True)
            return
        (settings.runs / f"{task}-{seed}").mkdir(exist_ok=True)
        (settings.runs / f"{task}-{seed}" / "results.json").write_text("{}")
        append_row(settings.results, {"method": task, "seed": seed})

    monkeypatch.setattr(comparison, "run", run)
    settings = settings_in(tmp_path, methods=("sft", "base"), seeds=(0, 1))
    claim = claims.take(settings.runs / "claims", "sft-0")
    claim.path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    left = [("sft", 0), ("base", 0), ("sft", 1), ("base", 1)]
    for _ in range(3):
        any(comparison.run_if_free(settings, *comparison.needed(settings, *cell)) for cell in left)
    assert done == [("prepare", 0), ("prefix", 0), ("base", 0)]
    claims.give_back(claim)
    comparison.main(settings)
    assert done[3:] == [("sft", 0), ("prepare", 1), ("prefix", 1), ("sft", 1), ("base", 1)]
    comparison.main(settings)
    assert len(done) == 8


def test_two_processes_share_the_rows(tmp_path, monkeypatch):
    """As threads here: each task is run once."""
    done = []

    def run(settings, task, seed):
        done.append((task, seed))
        (settings.runs / f"base-{seed}").mkdir(parents=True, exist_ok=True)
        if task != "prepare":
            append_row(settings.results, {"method": task, "seed": seed})

    monkeypatch.setattr(comparison, "run", run)
    monkeypatch.setattr(comparison, "POLL", 0.01)
    monkeypatch.setattr(comparison.compilation, "keep_on_disk", lambda: None)
    settings = settings_in(tmp_path, methods=("base",), seeds=tuple(range(8)))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(comparison.main, [settings] * 4))
    assert sorted(done) == sorted((task, seed) for task in ("base", "prepare") for seed in range(8))
    assert len(read_rows(settings.results)) == 8


def test_each_method_has_its_settings(monkeypatch, tmp_path):
    """What differs from RPT's run, and nothing else; only RPT's own has a number of updates for its end."""
    policy = (ModelConfig(), None, None)
    common = comparison.run_config("prefix", TINY, policy, 0.0, tmp_path)
    assert (common.steps, common.flops, common.reward.kind) == (2, 0.0, "prefix")

    def changes(method):
        made = comparison.run_config(method, TINY, policy, 5.0, tmp_path)
        made.check()
        flat = run_rows.flat
        old, new = flat(to_dict(common)), flat(to_dict(made))
        assert (new.pop("flops"), new.pop("steps"), new.pop("name")) == (5.0, 200, method)
        return {name: value for name, value in new.items() if value != old[name]}

    for kind in ("first_token", "dense", "conditional_dense"):
        assert changes(kind) == {"reward/kind": kind}
    rlp = {"reward/kind": "information_gain", "reward/opening": "\\boxed{", "update/advantage": "leave_one_out"}
    assert changes("information_gain") == rlp
    for method in ("random_positions", "no_cold_start", "expert_iteration"):
        assert changes(method) == {}


def test_random_positions_are_as_many_of_any_entropy(finished):
    settings, _ = finished
    shared = comparison.open_shared(dataclasses.replace(TINY, seed=1), settings.runs / "base-1")
    chosen = comparison.random_positions(shared.annotated, 100, 3)
    assert len(chosen) == 100 and chosen.indices.min() >= 4
    kept = comparison.random_positions(shared.annotated, 100, 3)
    assert (chosen.indices == kept.indices).all() and (chosen.documents == kept.documents).all()
    assert (comparison.random_positions(shared.annotated, 100, 4).indices != chosen.indices).any()


def test_no_cold_start_begins_with_a_base_of_plain_texts(finished, monkeypatch):
    """Everything else is shared: texts, positions, budget."""
    settings, _ = finished
    seen = {}

    def train_method(method, shared, expert, rate, budget, folder):
        seen.update(shared=shared, budget=budget)
        return Trained(shared.policy, 0, 0.0)

    monkeypatch.setattr(comparison, "train_method", train_method)
    monkeypatch.setattr(comparison, "figures", lambda policy, shared: {})
    monkeypatch.setattr(comparison, "append_row", lambda path, row: None)
    comparison.run(settings, "no_cold_start", 1)
    base = comparison.open_shared(dataclasses.replace(TINY, seed=1), settings.runs / "base-1")
    assert seen["budget"] == comparison.spent(settings.runs / "prefix-1")
    assert (seen["shared"].positions.indices == base.positions.indices).all()
    assert (np.asarray(seen["shared"].policy[1]["head"]) != np.asarray(base.policy[1]["head"])).any()
    made = json.loads((settings.runs / "plain-base-1" / "base" / "policy.json").read_text())["provenance"]
    assert made["base"]["traces"] == "none"


def rows_of(method, accuracies):
    """A row a seed; all columns of the table hold the accuracy."""
    return [
        {"method": method, "seed": str(seed), "updates": "120"}
        | dict.fromkeys(comparison.COLUMNS.values(), str(value))
        | {"hard.reasoning_error": "0.01"}
        for seed, value in enumerate(accuracies)
    ]


def test_the_table_by_hand():
    """Accuracies .90 .92 .94: mean 92, sd 2, standard error 2 / sqrt 3; binomial 1 / sqrt 3. Differences -10, -8, -12
    have mean -10 and sd 2, and t(2) is 4.303 for 95 %: 4.303 * 2 / sqrt 3 = 4.97."""
    rows = rows_of("prefix", (0.90, 0.92, 0.94)) + rows_of("sft", (0.80, 0.84, 0.82))
    heading, _, prefix, sft = comparison.table(rows).splitlines()
    assert heading.startswith("| method | seeds | updates | hard, reasoning |") and heading.endswith("| less prefix |")
    assert prefix.startswith("| prefix | 3 | 120 | 92.0 ± 1.2 (0.6) | 92.0 ± 1.2 |") and prefix.endswith("|  |")
    assert sft.endswith("| -10.0 [-15.0, -5.0] |")
    alone = comparison.table(rows_of("sft", (0.8,)) + rows_of("prefix", (0.9, 0.9))).splitlines()[-1]
    assert "| sft | 1 | 120 | 80.0 (1.0) |" in alone and alone.endswith("| -10.0 |")
