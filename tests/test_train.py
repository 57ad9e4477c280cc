"""Claims: the loop learns; a run that was broken off and continued is the run that was not, to the bit; several devices
give what one gives; signals and figures that are not finite leave a whole checkpoint. What it spends:
test_train_budget.py; bad input: test_train_refusals.py."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy
from toy import Stop, rows_of, stop_at

from rpt_jax.config import CheckpointConfig, DynamicSamplingConfig, EvaluateConfig, MeshConfig, SampleConfig
from rpt_jax.learning import checkpoints, collect, policy_folder, run_folder, run_rows, train
from rpt_jax.learning.inputs import Inputs
from rpt_jax.learning.update import init_state, make_optimizer
from rpt_jax.mesh import AXES, make_mesh, param_shardings, place
from rpt_jax.policy import decoder
from rpt_jax.records import InputError

STEPS = 24  # the same in all runs, so that they share what is compiled


def settings(folder, **options):
    """Dynamic sampling acts from step 3 on, in at most one more round; groups that agree are common."""
    changes = {
        "seed": 4,
        "steps": STEPS,
        "sample": SampleConfig(group_size=8, temperature=1.0, max_tokens=8, tokens_per_call=8),
        "dynamic_sampling": DynamicSamplingConfig(from_step=3, max_rounds=1),
        "checkpoint": CheckpointConfig(every=8, keep=2),
        "evaluate": EvaluateConfig(every=12),
    }
    return toy.config(folder, **changes | options)


def mesh_of(*shape):
    return make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


def run(config, mesh=None, **options):
    return train.train(config, **toy.arguments(mesh=mesh or mesh_of(1, 1, 1), **{"evaluate": evaluate} | options))


def evaluate(params, step):
    return {"weight": float(params["head"].sum())}


def texts_of(folder):
    """The rollouts shown, without log-probs, which other devices round otherwise."""
    return [row | {"pieces": None} for row in rows_of(folder, "rollouts.jsonl")]


def assert_same_run(a, b, steps=STEPS):
    """Every row of two run folders up to a step, to the bit."""
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
        assert rows_of(a, name) == [row for row in rows_of(b, name) if row["step"] <= steps], name


def assert_same_state(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@functools.cache
def finished():
    """(run folder, last state) of a run that nothing disturbed."""
    folder = Path(tempfile.mkdtemp()) / "run"
    return folder, run(settings(folder))


def test_the_loop_learns():
    """Random digits in the right form would earn 0.2: it has begun to learn which digit follows which letter."""
    rewards = [row["reward"] for row in rows_of(finished()[0])]
    assert np.mean(rewards[:3]) < 0.2 and np.mean(rewards[-3:]) > 0.35
    assert max(row["mismatch_max"] for row in rows_of(finished()[0])) < 1e-4


def test_the_run_folder_holds_what_the_run_was():
    folder, state = finished()
    assert int(state.step) == STEPS
    assert run_folder.read_config(folder) == dataclasses.replace(settings(folder), model=toy.model())
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows_of(folder, "rollouts.jsonl")] == [1 + i // 2 for i in range(2 * STEPS)]
    assert [row["step"] for row in rows_of(folder, "evaluations.jsonl")] == [0, 12, 24]
    assert rows_of(folder, "evaluations.jsonl")[-1]["weight"] == evaluate(state.params, STEPS)["weight"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["16", "24"]
    assert json.loads((folder / "results.json").read_text())["last_step"]["reward"] == rows[-1]["reward"]
    assert any(row["prediction"] == row["truth"] and row["reward"] == 1 for row in rows_of(folder, "rollouts.jsonl"))


def test_dynamic_sampling_acts_from_its_step_on():
    rows = rows_of(finished()[0])
    assert all(row["rounds"] == 1 and row["queued"] == 0 for row in rows[:3])
    assert any(row["zero_variance_share"] > 0 for row in rows[:3])
    assert {row["rounds"] for row in rows[3:]} == {1, 2} and any(row["queued"] for row in rows[3:])
    for row in rows[3:]:
        assert (row["rounds"] == 1) == (row["zero_variance_share"] == 0), row["step"]
        disagree = round((1 - row["zero_variance_share"]) * row["sampled_prompts"])
        assert row["refilled"] == max(0, 8 - disagree)


@pytest.mark.parametrize("step", [5, 19])
def test_a_continued_run_is_the_run_that_was_not_broken_off(tmp_path, step):
    """Broken off before the first checkpoint, and between two of them with positions queued."""
    folder, state = finished()
    with pytest.raises(Stop):
        run(settings(tmp_path), report=stop_at(step))
    assert checkpoints.newest_step(tmp_path / "checkpoints") == (16 if step == 19 else None)
    assert_same_state(run(settings(tmp_path)), state)
    assert_same_run(tmp_path, folder)


def test_another_machine_continues_from_the_checkpoints_alone(tmp_path):
    """The run's own folder is gone, as that of a spot slice; the small files came with the checkpoints."""
    folder, state = finished()
    kept = CheckpointConfig(every=8, keep=2, folder=str(tmp_path / "bucket"))
    with pytest.raises(Stop):
        run(settings(tmp_path / "first", checkpoint=kept), report=stop_at(19))
    shutil.rmtree(tmp_path / "first")
    config = settings(tmp_path / "second", checkpoint=kept)
    assert_same_state(run(config), state)
    assert_same_run(tmp_path / "second", folder)
    assert_same_run(tmp_path / "bucket" / "run", folder)
    assert_same_state(policy_folder.load_policy(tmp_path / "second")[1], state.params)
    with pytest.raises(InputError, match="bucket/run holds a run with seed=4, this one has 5"):
        run(settings(tmp_path / "third", checkpoint=kept, seed=5))
    with pytest.raises(InputError, match=f"checkpoints are in {tmp_path}/bucket .newest: 24., and .* has none"):
        run(settings(tmp_path / "second"))
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    (mine / "config.json").write_text((mine / "config.json").read_text().replace('"seed": 4', '"seed": 6'))
    with pytest.raises(InputError, match="mine holds a run with seed=6, this one has 4"):
        run(settings(mine, checkpoint=kept))
    assert '"seed": 6' in (mine / "config.json").read_text()  # not overwritten by what was in the bucket


def test_the_queue_was_not_empty_where_the_run_continued():
    """Otherwise the law above would say nothing of it."""
    assert rows_of(finished()[0])[15]["queued"] > 0


def test_a_finished_run_stays_as_it_is(tmp_path):
    def never(*args):
        pytest.fail("ran again")

    folder, state = finished()
    assert_same_state(run(settings(folder), evaluate=never, report=never), state)
    assert (folder / "results.json").is_file()


def test_a_run_says_where_its_time_goes(tmp_path, caplog):
    """A trace of the second update with the host at work, phases in every row, and one check of the shared way."""
    caplog.set_level("INFO", "rpt_jax.learning.batch")
    with pytest.raises(Stop):
        run(settings(tmp_path, profile=True), report=stop_at(3), evaluate=None)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    lines = [line for plane in jax.profiler.ProfileData.from_file(str(trace)).planes for line in plane.lines]
    assert {"reward", "host"} <= {event.name for line in lines for event in line.events}
    rows = run_rows.read_rows(tmp_path / "metrics.jsonl")
    for row in rows:
        assert min(row[f"seconds_{phase}"] for phase in ("sample", "reward", "update")) > 0
        assert 0 < row["live_slot_share"] <= 1 < row["sharing_ratio"]
    counts = [row["programs_compiled"] for row in rows]
    assert counts == sorted(counts)
    assert sum("log-probs of whole sequences" in record.message for record in caplog.records) == 1


def test_another_seed_is_another_run(tmp_path):
    with pytest.raises(Stop):
        run(settings(tmp_path, seed=1), report=stop_at(2))
    assert rows_of(tmp_path, "rollouts.jsonl") != rows_of(finished()[0], "rollouts.jsonl")[:4]


def told_in(phase, monkeypatch):
    """Makes SIGTERM come at the second evaluation, in the middle of step 14's sampling, or in its update."""
    calls = []

    def telling(function, at):
        def told(*args, **options):
            calls.append(None)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*args, **options)

        return told

    if phase == "evaluate":
        return {"evaluate": telling(evaluate, 2)}
    module, name = {"sample": (collect, "sample"), "update": (train, "train_step")}[phase]
    at = 14 if phase == "update" else 14 + sum(row["rounds"] - 1 for row in rows_of(finished()[0])[:13])
    monkeypatch.setattr(module, name, telling(getattr(module, name), at))
    return {}


@pytest.mark.parametrize(("phase", "step"), [("evaluate", 12), ("sample", 13), ("update", 14)])
def test_sigterm_saves_and_exits_and_the_run_continues_exactly(tmp_path, phase, step):
    folder, _ = finished()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        run(settings(tmp_path), **told_in(phase, patch))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert checkpoints.newest_step(tmp_path / "checkpoints") == step
    with pytest.raises(Stop):
        run(settings(tmp_path), report=stop_at(16))
    assert_same_run(tmp_path, folder, 16)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        calls = []

        def poisoned(rewards_NG, kind, epsilon):
            calls.append(None)
            return np.full_like(rewards_NG, np.nan if len(calls) == 13 else 0.0) + advantages(rewards_NG, kind, epsilon)

        advantages = train.group_advantages
        patch.setattr(train, "group_advantages", poisoned)
        with pytest.raises(FloatingPointError, match="step 13: loss nan"):
            run(settings(tmp_path))
    assert checkpoints.newest_step(tmp_path / "checkpoints") == 8
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 13))
    with pytest.raises(Stop):
        run(settings(tmp_path), report=stop_at(14))
    assert_same_run(tmp_path, finished()[0], 14)


@pytest.mark.parametrize("shape", [(2, 2, 2)])
def test_eight_devices_give_what_one_gives(tmp_path, shape, monkeypatch):
    """Up to rounding, and one device continues what eight began. The kernel knows the mesh: Pallas needs that."""
    rows = rows_of(finished()[0])
    config = settings(tmp_path, checkpoint=CheckpointConfig(every=2))
    meshes = toy.watch_kernel(monkeypatch)
    with pytest.raises(Stop):
        run(config, mesh_of(*shape), report=stop_at(3))
    assert meshes and all(mesh == dict(zip(AXES, shape, strict=True)) for mesh in meshes)
    assert_close(rows_of(tmp_path), rows[:3])
    with pytest.raises(Stop):
        run(config, report=stop_at(4))
    assert_close(rows_of(tmp_path), rows[:4])
    texts, expected = (texts_of(folder) for folder in (tmp_path, finished()[0]))
    assert texts == expected[: len(texts)]


def assert_close(rows, expected):
    assert len(rows) == len(expected)
    for row, there in zip(rows, expected, strict=True):
        assert row.keys() == there.keys()
        for name in row.keys() - {"sharing_ratio", "live_slot_share"}:  # what meets on a device shares head and slots
            np.testing.assert_allclose(row[name], there[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_policy_of_a_run_is_its_newest_checkpoint(tmp_path):
    folder, state = finished()
    model, params, tokenizer = policy_folder.load_policy(folder)
    assert model == toy.model() and tokenizer.fingerprint == toy.tokenizer().fingerprint
    assert_same_state(params, state.params)


def test_kl_is_to_the_starting_policy(tmp_path, monkeypatch):
    """Also in a run that continues: its log-probs are those that the starting policy sampled with in step 1."""

    def capture(state, batch, temperature, limit, reference_NGR, **options):
        captured.append((batch, reference_NGR))
        raise Stop

    captured = []
    monkeypatch.setattr(train, "train_step", capture)
    for start in (0, 2):
        config = settings(tmp_path / str(start))
        config = dataclasses.replace(config, update=dataclasses.replace(config.update, kl_coefficient=0.1))
        if start:
            shutil.copytree(tmp_path / "0", tmp_path / "2")
            with contextlib.closing(checkpoints.open_checkpoints(tmp_path / "2" / "checkpoints", 2)) as manager:
                state = init_state(jax.tree.map(lambda x: 1.1 * x, toy.params()), make_optimizer(config.update, STEPS))
                stream = {"next_index": 0}
                checkpoints.save(manager, start, state, {"stream": stream, "queue": []})
        with pytest.raises(Stop):
            run(config)
    (first, reference_NGR), (second, second_NGR) = captured
    np.testing.assert_allclose(reference_NGR, first.logprobs_NGR, atol=1e-4)
    assert np.abs(np.asarray(second_NGR) - second.logprobs_NGR).max() > 0.01


def test_a_run_holds_its_parameters_once(tmp_path, monkeypatch):
    """What was loaded is gone from the devices once the state has its own copy."""
    mesh = mesh_of(1, 1, 1)
    arguments = toy.arguments(mesh=mesh)
    model, params, tokenizer = arguments["policy"]
    loaded = [place(params, param_shardings(mesh, decoder.logical_axes(model), params))]
    alive = [weakref.ref(leaf) for leaf in jax.tree.leaves(loaded)]

    def load_inputs(config):
        shared = {name: arguments[name] for name in ("annotated", "positions", "template", "mesh")}
        return Inputs(config, (model, loaded.pop(), tokenizer), **shared)

    def look(params, step):
        raise Stop(sum(each() is not None for each in alive))

    monkeypatch.setattr(train.inputs, "load_inputs", load_inputs)
    with pytest.raises(Stop, match="^0$"):
        train.run(settings(tmp_path / "run"), lambda found: look)


@pytest.mark.parametrize("host", [{}, {"stream": None, "queue": 7}, {"queue": [[1, 2]], "flops": "x"}])
def test_a_checkpoint_that_does_not_say_where_the_run_stood(tmp_path, host):
    class Stream:
        def set_state(self, state):
            if not isinstance(state, dict):
                raise ValueError("no state")

    host = {"stream": {}} | host if host else host
    with pytest.raises(
        InputError, match="checkpoint .*/3 does not say where the run stood .*: start the run anew|damaged"
    ):
        train._continued(Stream(), host, settings(tmp_path), 3)


def test_a_row_that_does_not_say_what_was_spent_is_named_with_its_own_remedy(tmp_path):
    """For checkpoints that leave it to the rows: they are whole, so nothing is to be started anew."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    stream = SimpleNamespace(set_state=lambda state: None)
    with pytest.raises(InputError, match="^[^:]*metrics.jsonl: a row does not say .*: mend or delete it$"):
        train._continued(stream, {"stream": {}, "queue": []}, settings(tmp_path), 3)
