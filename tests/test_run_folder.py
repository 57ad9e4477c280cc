"""Claims: config.json comes first and tells how to repeat the run; a continued run loses exactly the rows after its
checkpoint; a folder that holds another run is refused with both values; numbers reach TensorBoard."""

import dataclasses
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy
from tensorboardX.proto.event_pb2 import Event

from rpt_jax.config import CorpusConfig, MeshConfig, UpdateConfig
from rpt_jax.learning import run_folder, run_rows, tensorboard
from rpt_jax.records import InputError

IDENTITY = {"starting_policy": "00ff00ff", "template": ["<predict>", "<think>"]}


@pytest.fixture
def config(tmp_path):
    return toy.config(tmp_path / "run", corpus=CorpusConfig(files=("a.txt", "b.txt")))


def opened(config, start=None):
    return run_folder.open_run(config, toy.tokenizer(), start, IDENTITY)


def row(step, **figures):
    return {"step": step, "seconds": 0.5, "reward": step / 10} | figures


def write(config, steps, start=None):
    with opened(config, start) as record:
        for step in steps:
            run_folder.write_step(record, row(step), [{"step": step, "thought": "zwei\u2028 é \ufffd"}] * 2)
            run_folder.write_evaluation(record, {"step": step, "hard": {"reasoning": 0.5}})
        return run_folder.write_results(record, config)


def steps_in(config, name):
    return [line["step"] for line in run_rows.read_rows(f"{config.run_folder}/{name}")]


def test_config_comes_first_and_tells_how_to_repeat_the_run(config, tmp_path):
    with opened(config):
        written = json.loads((tmp_path / "run" / "config.json").read_text())
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert run_folder.read_config(config.run_folder) == config
    assert written["versions"]["jax"] == sys.modules["jax"].__version__ and written["devices"]["kind"] == "cpu"
    assert written["commit"] is None or len(written["commit"]) == 40
    assert written["identity"] == IDENTITY


def test_a_new_run_keeps_no_tokenizer_of_the_one_before(config, tmp_path):
    """Of several files in the folder one counts, and that could be the older one's."""
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("of another run")
    with opened(config):
        there = sorted(path.name for path in (tmp_path / "run" / "tokenizer").iterdir())
    assert there == ["tokenizer.model"]


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(InputError, match=f"no run in '{tmp_path}'"):
        run_folder.read_config(tmp_path)


def test_rows_come_back_and_results_sum_up(config, tmp_path):
    results = write(config, [1, 2, 3])
    assert run_rows.read_rows(tmp_path / "run" / "metrics.jsonl") == [row(1), row(2), row(3)]
    assert [line["thought"] for line in run_rows.read_rows(tmp_path / "run" / "rollouts.jsonl")] == [
        "zwei\u2028 é \ufffd"
    ] * 6
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["seconds"] == 1.5 and results["last_step"] == row(3)
    assert results["evaluation"] == {"step": 3, "hard": {"reasoning": 0.5}} and len(results["evaluations"]) == 3


def test_a_continued_run_loses_exactly_what_came_after_its_checkpoint(config, tmp_path):
    write(config, [1, 2, 3, 4])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # a crash in the middle of a row
    assert steps_in(config, "metrics.jsonl") == [1, 2, 3, 4]
    first = json.loads((tmp_path / "run" / "config.json").read_text())["id"]
    with opened(config, start=2) as record:
        assert not (tmp_path / "run" / "results.json").exists()
        assert run_folder.last_evaluation(record) == 2
    write(config, [3], start=2)
    assert steps_in(config, "metrics.jsonl") == [1, 2, 3]
    assert steps_in(config, "rollouts.jsonl") == [1, 1, 2, 2, 3, 3]
    assert steps_in(config, "evaluations.jsonl") == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["id"] == first


def test_a_run_without_checkpoint_begins_anew(config, tmp_path):
    write(config, [0, 1, 2])
    (tmp_path / "run" / "tensorboard" / "events.old").touch()
    with opened(config) as record:
        assert run_folder.last_evaluation(record) == -1
        assert steps_in(config, "metrics.jsonl") == steps_in(config, "evaluations.jsonl") == []
    assert not (tmp_path / "run" / "tensorboard" / "events.old").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "seed=0, this one has 3"),
        ({"update": UpdateConfig(learning_rate=0.5)}, "update.*, this one has"),
        ({"corpus": CorpusConfig(files=("a.txt",))}, r"corpus/files=\['a.txt', 'b.txt'\], this one has \['a.txt'\]"),
    ],
)
def test_another_run_in_the_folder_is_named_with_both_values(config, change, message):
    write(config, [1, 2])
    with pytest.raises(InputError, match=message):
        run_folder.require_same_run(dataclasses.replace(config, **change), IDENTITY, 2)


def test_other_inputs_in_the_folder_are_named(config):
    write(config, [1, 2])
    with pytest.raises(InputError, match="another starting policy \\(00ff00ff, now 12345678\\)"):
        run_folder.require_same_run(config, IDENTITY | {"starting_policy": "12345678"}, 2)


def test_what_changes_no_update_may_change(config):
    write(config, [1, 2])
    update = dataclasses.replace(config.update, microbatches=2, token_chunk=7, check_shared_prefix="never")
    sample = dataclasses.replace(config.sample, slots=8)
    other = dataclasses.replace(config, name="b", mesh=MeshConfig(2), rollouts_logged=0, profile=True, steps=99)
    other = dataclasses.replace(other, update=update, sample=sample)
    run_folder.require_same_run(other, IDENTITY, 2)
    with pytest.raises(InputError, match="has made 2 updates already, steps=1"):
        run_folder.require_same_run(dataclasses.replace(config, steps=1), IDENTITY, 2)


def test_a_setting_that_came_later_has_its_default_in_older_runs(config, tmp_path):
    write(config, [1, 2])
    file = tmp_path / "run" / "config.json"
    content = json.loads(file.read_text())
    del content["config"]["model"]["context"]
    file.write_text(json.dumps(content))
    run_folder.require_same_run(config, IDENTITY, 2)
    with pytest.raises(InputError, match="model/context=0, this one has 7"):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, context=7))
        run_folder.require_same_run(changed, IDENTITY, 2)


def test_steps_may_not_change_under_a_schedule_that_ends_with_them(config):
    config = dataclasses.replace(config, update=dataclasses.replace(config.update, schedule="cosine"))
    write(config, [1, 2])
    with pytest.raises(InputError, match="steps=4, this one has 99"):
        run_folder.require_same_run(dataclasses.replace(config, steps=99), IDENTITY, 2)


def events_of(path) -> list[Event]:
    """Records of length, its checksum, an event, its checksum."""
    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_every_number_reaches_tensorboard(config):
    """At once; a run that goes on says from where."""
    write(config, [3])
    (first,) = Path(config.run_folder, "tensorboard").iterdir()
    shown = [(value.tag, value.simple_value, each.step) for each in events_of(first) for value in each.summary.value]
    assert shown == [("seconds", 0.5, 3), ("reward", pytest.approx(0.3), 3), ("evaluate/hard/reasoning", 0.5, 3)]
    events = tensorboard.open_events(first.parent.with_name("again"), 3)
    events.close()
    (again,) = first.parent.with_name("again").iterdir()
    assert [each.step for each in events_of(again) if each.HasField("session_log")] == [4]


def test_weights_and_biases_gets_the_same(config, monkeypatch):
    """With a stand-in for the package: one run, its id kept when it continues."""
    calls, logged = [], []
    record = SimpleNamespace(
        log=lambda numbers, step: logged.append((numbers, step)), finish=lambda: calls.append("end")
    )
    fake = SimpleNamespace(init=lambda **settings: calls.append(settings["id"]) or record, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = dataclasses.replace(config, wandb=True)
    run_folder.require_wandb(config)
    write(config, [1])
    write(config, [2], start=1)
    assert logged[0] == ({"seconds": 0.5, "reward": 0.1}, 1) and calls[0] == calls[2] and calls[1] == "end"


def test_weights_and_biases_that_is_not_there_is_said_so(config, monkeypatch):
    monkeypatch.setattr(run_folder.importlib.util, "find_spec", lambda name: None)
    run_folder.require_wandb(config)
    with pytest.raises(InputError, match=r"pip install 'rpt_jax\[wandb\]'"):
        run_folder.require_wandb(dataclasses.replace(config, wandb=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": ["x"]}, "identity is no object"),
        ({"config": {"seed": 2**70}}, r"config.json: config.seed=\d+: use .*, and at most"),
        ({"config": {"model": {"width": 0}}}, "config.json: config.model.width=0: use 1 or more"),
        ({"config": {"name": "a\0b"}}, "config.json: config.name=.*use UTF-8"),
        ({"config": None}, "config.json: config=None: expected the settings of Config"),
        ({"config": {"update": {"learning_rate": 10**400}}}, "learning_rate=1.*: expected float"),
    ],
)
def test_a_config_that_lies_is_named(config, tmp_path, change, message):
    write(config, [1])
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        run_folder.read_config(tmp_path / "run")
    with pytest.raises(InputError, match=message):
        run_folder.require_same_run(config, IDENTITY, 1)
