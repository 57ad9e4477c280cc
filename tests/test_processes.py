"""Claims: several processes make the run of one, to the bit where sums are of two; one continues what two began; hosts
that differ are named; a run that was killed, or told to stop, ends as the one that was not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fault_campaign
import jax
import numpy as np
import pytest
import toy
import toy_run

from rpt_jax import agreement
from rpt_jax.corpus.positions import open_annotated
from rpt_jax.learning import run_rows
from rpt_jax.learning.policy_folder import save_policy
from rpt_jax.mesh import make_mesh

STEPS = 20


def alone(folder, mesh=(2, 1, 2), steps=STEPS):
    """The run in this process, on as many of its devices."""
    config = toy_run.settings(folder, steps, mesh)
    return toy_run.run(config, mesh=make_mesh(config.mesh, jax.devices()[: int(np.prod(mesh))]))


def test_two_processes_make_the_run_of_one_and_one_goes_on(tmp_path):
    """Every figure to the bit: on (2, 1, 2) sums over devices have two terms, whoever adds them."""
    both = toy_run.start(tmp_path / "two")
    state = alone(tmp_path / "one")
    errors = toy_run.finish(both)
    assert [process.returncode for process in both] == [0, 0], errors
    found = np.load(tmp_path / "two" / "state.npz")
    for name, expected in toy_run.flat(state).items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    rows = fault_campaign.rows(tmp_path / "one")
    assert any(row.get("queued") for row in rows) and any(row.get("rounds") == 2 for row in rows)
    assert fault_campaign.rows(tmp_path / "two") == rows
    alone(tmp_path / "two", mesh=(1, 1, 1), steps=STEPS + 3)
    alone(tmp_path / "one", steps=STEPS + 3)
    shown = (run_rows.read_rows(tmp_path / side / "rollouts.jsonl") for side in ("two", "one"))
    texts = [[row | {"pieces": None} for row in rows] for rows in shown]  # log-probs are rounded otherwise
    assert texts[0] == texts[1] and texts[0][-1]["step"] == STEPS + 3
    for ours, theirs in zip(*(fault_campaign.rows(tmp_path / side) for side in ("two", "one")), strict=True):
        for name in ours.keys() & {"loss", "reward", "gradient_norm", "entropy", "mismatch_mean", "weight"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (ours["step"], name)


def host(folder: Path, texts=toy.TEXTS, scale=1.0) -> Path:
    """A disk with a policy and texts."""
    params = jax.tree.map(lambda x: scale * x, toy.params())
    save_policy(folder / "policy", toy.model(), params, toy.tokenizer(), {})
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def annotating(hosts, flags=((), ())) -> list[subprocess.Popen]:
    """`rpt annotate` on hosts with disks of their own, parameters split over them."""
    command = [Path(sys.executable).with_name("rpt"), "annotate", "--policy", "policy", "--corpus.files", "texts.jsonl"]
    command += ["--corpus.holdout", 2, "--positions.annotated", "train", "--evaluate.annotated", "holdout"]
    if len(hosts) > 1:
        command += ["--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.processes", 2, "--mesh.coordinator"]
        command += [f"localhost:{toy_run.free_port()}", "--mesh.process"]
    options = {"env": os.environ | toy_run.ENVIRONMENT, "stderr": subprocess.PIPE, "text": True}
    rest = [[process, *flags[process]] if len(hosts) > 1 else [] for process in range(len(hosts))]
    return [
        subprocess.Popen([*map(str, [*command, *own])], cwd=folder, **options)
        for folder, own in zip(hosts, rest, strict=True)
    ]


def test_two_processes_annotate_as_one(tmp_path):
    """By the command line; the first alone writes, and the other one does not see its disk."""
    one, first, second = (host(tmp_path / name) for name in ("one", "first", "second"))
    running = annotating([one]) + annotating([first, second])
    said = toy_run.finish(running)
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert not (second / "train").exists() and not (second / "holdout").exists()
    for part, count in (("train", len(toy.TEXTS) - 2), ("holdout", 2)):
        alone, both = (open_annotated(folder / part, toy.tokenizer()) for folder in (one, first))
        assert alone.header == both.header and len(alone) == len(both) == count
        for ours, theirs in zip(alone, both, strict=True):
            np.testing.assert_array_equal(ours.tokens_T, theirs.tokens_T)
            np.testing.assert_array_equal(ours.argmaxes_T, theirs.argmaxes_T)
            np.testing.assert_allclose(ours.entropies_T, theirs.entropies_T, rtol=1e-5)


@pytest.mark.parametrize("what", ["set of settings", "set of documents", "policy"])
def test_hosts_that_would_annotate_differently_are_named(tmp_path, what):
    """Another mesh would hang in the first program of all; other texts would give one's entropies to the other's, and
    other weights be mixed with the first one's."""
    texts = toy.TEXTS[::-1][1:] if what == "set of documents" else toy.TEXTS
    flags = [[], ["--mesh.data", 2, "--mesh.fsdp", 1] if what == "set of settings" else []]
    second = host(tmp_path / "second", texts, scale=1.5 if what == "policy" else 1.0)
    both = annotating([host(tmp_path / "first"), second], flags)
    for process, said in zip(both, toy_run.finish(both), strict=True):
        assert process.returncode == 2 and "process 1 on host" in said and f"has another {what}" in said, said
    assert not (tmp_path / "first" / "train").exists()


def of_script(code: str, folder: Path | None = None) -> tuple[list[str], list[int]]:
    """(what each of two processes says, their statuses) of `rpt evaluate` with another body."""
    command = [sys.executable, "-c", code, "evaluate", "policy", "--mesh.processes", "2", "--mesh.coordinator"]
    command += [f"localhost:{toy_run.free_port()}", "--mesh.process"]
    options = {"env": os.environ | toy_run.ENVIRONMENT, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    both = [subprocess.Popen([*command, str(process)], **options) for process in range(2)]
    return toy_run.finish(both), [process.returncode for process in both]


APART = """
import os, sys
import jax, numpy as np
from rpt_jax import agreement, cli, commands, mesh
from rpt_jax.learning import checkpoints

def act(config):
    mesh.start_distributed(config.mesh)
    rank = jax.process_index()
    assert agreement.of_first(np.array(0.1 + rank)) == 0.1  # float64, which JAX would cut
    assert agreement.of_first(np.array([rank, 2], np.int32)).tolist() == [0, 2]
    checkpoints.require_shared("shared")
    assert rank or os.listdir("shared") == []  # the first one takes its mark away
    checkpoints.SEEN_SECONDS = 1
    checkpoints.require_shared(f"{rank}/own")

commands.run_evaluate = act
sys.exit(cli.main(sys.argv[1:]))
"""


def test_checkpoints_on_disks_that_hosts_do_not_share_are_refused(tmp_path):
    """They would hold a part each, and no run could go on from them."""
    said, statuses = of_script(APART, tmp_path)
    assert statuses == [2, 2], said
    assert all("does not see what process 0 writes to 1/own" in each for each in said), said


def test_hosts_that_differ_are_named(tmp_path):
    """Another seed on the second: both end, and say which."""
    both = toy_run.start(tmp_path / "two", seeds=(4, 5))
    for process, errors in zip(both, toy_run.finish(both), strict=True):
        assert process.returncode == 2
        assert "process 1 on host" in errors and "has another set of settings than process 0" in errors
    assert not (tmp_path / "two").exists()


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Iterator[Path]:
    """A folder for runs that share what is compiled, and the one that they are compared with."""
    before = os.environ.copy()
    folder = tmp_path_factory.mktemp("faults")
    fault_campaign.keep_compiled(folder)
    yield folder
    os.environ.clear()
    os.environ.update(before)


def test_a_host_that_dies_takes_the_other_with_it(faults):
    """With words, and no wait for who is gone: JAX would abort after one. (It does where the coordinator dies.)"""
    both = toy_run.start(faults / "two", devices=1, mesh=(2, 1, 1))
    fault_campaign.wait_for(both, faults / "two", "UPDA", 1)
    both[1].kill()
    said = toy_run.finish(both)[0]
    assert both[0].returncode == agreement.EXIT_LOST and "lost another one" in said and "newest checkpoint" in said


def test_an_error_of_one_process_alone_ends_both(faults):
    """Process 0 writes the run's files, and cannot; JAX would let it wait for the other, which waits for it."""
    (faults / "in_the_way" / "config.json").mkdir(parents=True)
    both = toy_run.start(faults / "in_the_way", devices=1, mesh=(2, 1, 1))
    said = toy_run.finish(both)[0]
    assert both[0].returncode == 2 and "config.json" in said and "process 0 of 2 ends" in said, said
    assert both[1].returncode


LAST = """
import sys
import jax
from rpt_jax import cli, commands, mesh
from rpt_jax.records import InputError

def act(config):
    mesh.start_distributed(config.mesh)
    if jax.process_index() == 0:
        raise InputError("nowhere to write")
    return {}

commands.run_evaluate = act
sys.exit(cli.main(sys.argv[1:]))
"""


def test_an_error_of_one_process_when_the_others_are_done_costs_them_nothing():
    """As where process 0 writes what all have computed: they wait for it, and end as they would have."""
    (first, second), statuses = of_script(LAST)
    assert statuses == [2, 0], (first, second)
    assert first.endswith("rpt: nowhere to write\n") and "nowhere" not in second


def test_a_checkpoint_that_one_process_cannot_read_ends_both(faults):
    """Each says which; Orbax would let the other one wait for minutes. On (1, 2, 1) a process reads its own half."""
    folder = faults / "halves"
    toy_run.finish(toy_run.start(folder, devices=1, mesh=(1, 2, 1), steps=3))
    written = (folder / "checkpoints" / "3" / "params" / "ocdbt.process_1" / "d").iterdir()
    data = max(written, key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    both = toy_run.start(folder, devices=1, mesh=(1, 2, 1), steps=4)
    first, second = toy_run.finish(both)
    assert [process.returncode for process in both] == [2, 2]
    assert "process 1: checkpoint" in first and "cannot be read" in first
    assert "process 1: " not in second and "cannot be read" in second


@pytest.mark.parametrize(("number", "phase"), [(signal.SIGKILL, "SAVE"), (signal.SIGTERM, "SAMP")])
def test_a_run_that_was_struck_ends_as_the_one_that_was_not(faults, number, phase):
    """The campaign in fault_campaign.py, with few faults."""
    row = fault_campaign.strike_and_compare(faults, processes=2, number=number, phase=phase, seed=2)
    assert row["same"] and row["restarts"] == 1, row
    if number == signal.SIGTERM:
        assert row["continued_from"] == row["step"]
