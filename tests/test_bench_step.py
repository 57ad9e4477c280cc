"""`rpt bench step`: the workload is the one that other implementations draw, and figures are of what they say."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rpt_jax import cli
from rpt_jax.bench import step as bench_step
from rpt_jax.bench import stopwatch
from rpt_jax.bench.step import StepBench, measure_here
from rpt_jax.bench.workload import WORKLOADS, Workload, draw_data, draw_params
from rpt_jax.policy import flops

SMALL = {"vocabulary": 64, "prompt": 8, "prompts": 2, "group": 2, "tokens": 4, "width": 16, "layers": 2, "heads": 2}
SMALL |= {"kv_heads": 1, "head_channels": 8, "hidden": 24}
FLAGS = [word for name, size in SMALL.items() for word in (f"--workload.{name.replace('_', '-')}", str(size))]
PHASES = ("rollout", "score", "update", "e2e")


def test_w1_has_the_log_probs_that_other_implementations_find():
    """google-tunix 0.1.7 and TRL 1.14 to 1.16 agree on these to seven digits: mean, and the first three tokens."""
    workload = WORKLOADS["W1"]
    params, data = draw_params(workload), draw_data(workload)
    logprobs_NGR = np.asarray(bench_step._logprobs(params, data, None, workload.model), np.float64)
    assert logprobs_NGR.shape == (8, 8, 64)
    assert logprobs_NGR.mean() == pytest.approx(-9.808802, abs=1e-5)
    assert logprobs_NGR[0, 0, :3] == pytest.approx([-9.76075, -10.88222, -10.36410], abs=2e-5)
    assert sum(x.size for x in jax.tree.leaves(params)) == 10_494_208


def test_figures_of_every_phase(capsys):
    """Through the real command and its process: a sample of each group's own, log-probs near chance, one policy."""
    core = min(os.sched_getaffinity(0))
    words = ["--repeats", "2", "--cores", str(core), "--json"]
    assert cli.main(["bench", "step", *FLAGS, *words]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["workload"] == "custom" and SMALL.items() <= figures["shape"].items()
    assert figures["cores"] == [core] and figures["repeats"] == 2 and figures["backend"] == "cpu"
    assert {"rpt_jax", "jax", "jaxlib", "numpy"} <= figures["versions"].keys()
    for phase in PHASES:
        row = figures[phase]
        assert row["s"]["n"] == row["cpu_s"]["n"] == 2
        assert 0 < row["s"]["min"] <= row["s"]["median"] <= row["s"]["max"]
        assert row["first_call_s"] > 0 and row["peak_rss_mib"] > 0
        assert math.isfinite(row["share_of_matmul_peak"]) and row["share_of_matmul_peak"] > 0
    work = flops.sampling(Workload(**SMALL).model, 2, 16, 4, 16)
    assert [figures[phase]["flops"] / work for phase in PHASES] == [1, 1, 3, 4]
    rate, seconds = figures["rollout"]["tokens_per_s"], figures["rollout"]["s"]
    assert rate["max"] * seconds["min"] == pytest.approx(16) and rate["median"] * seconds["median"] == pytest.approx(16)
    checks = figures["checks"]
    assert checks["rollout_lengths"] == [4] and checks["rollout_distinct_in_group"] == 2
    assert checks["score_mean"] == pytest.approx(-math.log(64), abs=1) and len(checks["score_seq0"]) == 3
    assert checks["checked_updates"] == 4 and checks["update_adv_dlogp"] > 0
    assert 0 <= checks["e2e_mismatch_max"] < 1e-4


@pytest.fixture
def quick(monkeypatch):
    """The peak from small products."""
    monkeypatch.setattr(stopwatch, "SIDE", 16)


def test_the_update_is_checked_after_five_whatever_the_repeats(quick):
    def gained(repeats):
        config = StepBench(Workload(**SMALL), phases=("update",), repeats=repeats)
        return measure_here(config)["checks"]

    three, six = gained(3), gained(6)
    assert three == six and three["checked_updates"] == 5
    assert gained(2)["update_adv_dlogp"] < three["update_adv_dlogp"]


def test_ragged_responses_are_the_full_ones_cut(quick):
    """Lengths as a coin decides them, within the limit; the log-probs of what is left do not change."""
    many = Workload(**SMALL | {"prompts": 500, "tokens": 64}, lengths="geometric", mean_length=5.0)
    lengths_NG = draw_data(many).lengths_NG
    assert lengths_NG.min() == 1 and lengths_NG.max() <= 64 and lengths_NG.mean() == pytest.approx(5, rel=0.1)
    workload = Workload(**SMALL | {"tokens": 12}, lengths="geometric", mean_length=4.0)
    full, ragged = draw_data(Workload(**SMALL | {"tokens": 12})), draw_data(workload)
    live_NGR = np.arange(12)[None, None, :] < ragged.lengths_NG[:, :, None]
    assert 0 < live_NGR.mean() < 1
    np.testing.assert_array_equal(ragged.tokens_NGR, np.where(live_NGR, full.tokens_NGR, 0))
    np.testing.assert_array_equal(ragged.advantages_NG, full.advantages_NG)
    exact_NGR = np.asarray(bench_step._logprobs(draw_params(workload), full, None, workload.model))
    figures = measure_here(StepBench(workload, phases=("score", "update"), repeats=1))
    assert figures["checks"]["score_mean"] == pytest.approx(exact_NGR[live_NGR].mean(), abs=1e-5)
    assert figures["score"]["flops"] == flops.sampling(workload.model, 2, 16, 4, int(live_NGR.sum()))


def test_ragged_rollouts_have_the_lengths_of_the_responses(quick):
    workload = Workload(**SMALL | {"tokens": 12}, lengths="geometric", mean_length=4.0)
    figures = measure_here(StepBench(workload, phases=("rollout", "e2e"), repeats=1))
    lengths_NG = draw_data(workload).lengths_NG
    assert figures["checks"]["rollout_lengths"] == sorted(set(lengths_NG.ravel().tolist()))
    row = figures["rollout"]
    assert row["tokens_per_s"]["median"] * row["s"]["median"] == pytest.approx(lengths_NG.sum())
    assert row["tokens"] == lengths_NG.sum() <= row["slot_steps"]


def test_a_shared_beginning_counts_once():
    """Four prompts of two documents: FLOPs and the update's stream have the documents' tokens, each once."""
    config = StepBench(Workload(**SMALL | {"prompts": 4}, positions_per_document=2))
    model, data, responses = config.workload.model, draw_data(config.workload), 4 * 2 * 4
    run = flops.forward(model, 16, 7.5 / 2, 4) + flops.forward(model, responses, 7.5 + 2, responses)
    assert bench_step._work(config, flops.update, data) == pytest.approx(3 * run)
    sizes = bench_step._stream_sizes(bench_step._stream(config, data))
    assert sizes == {"stream_tokens": 16 + 4 * 2 * 3, "stream_places": 16 + 32}  # a response's last token is not read


def test_without_refill_each_batch_takes_as_long_as_its_longest():
    """The same tokens as with refill, at more slot steps: those of each batch's slots until its last one has ended."""
    workload = Workload(**SMALL | {"tokens": 24, "layers": 1}, lengths="geometric", mean_length=8.0)
    params, data = draw_params(workload), draw_data(workload)
    refilled, waited = (
        bench_step._sample(StepBench(workload, slots=2, refill=refill), params, data, 0) for refill in (True, False)
    )
    np.testing.assert_array_equal(refilled.tokens_NGR, waited.tokens_NGR)
    np.testing.assert_array_equal(refilled.lengths_NG, waited.lengths_NG)
    np.testing.assert_allclose(refilled.logprobs_NGR, waited.logprobs_NGR, atol=1e-5)
    assert waited.slot_steps == 2 * data.lengths_NG.max(axis=1).sum()
    assert data.lengths_NG.sum() <= refilled.slot_steps < waited.slot_steps


def test_advantages_are_those_of_rewards_in_units_of_the_sample():
    """Each group's add up to nothing and have the standard deviation 1, counted with G - 1, or are all 0."""
    advantages_NG = draw_data(WORKLOADS["W1"]).advantages_NG
    assert advantages_NG.shape == (8, 8) and np.any(advantages_NG)
    for advantages_G in advantages_NG:
        assert len(set(advantages_G.tolist())) <= 2
        np.testing.assert_allclose(advantages_G.sum(), 0, atol=1e-5)
        np.testing.assert_allclose(advantages_G.std(ddof=1), np.any(advantages_G), atol=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "0"], "repeats=0: use 1 or more"),
        (["--phases"], "phases=[], repeats=5"),
        (["--cores", "100000"], "cores='100000': use some of 0"),
        (["--no-refill"], "slots=0, refill=False: use 0 or more, and without refill a divisor of the 64 rollouts that"),
        (["--no-refill", "--slots", "12"], "slots=12, refill=False"),
        (["--slots", "-8"], "slots=-8: use 0 or more"),
        (["--workload.group", "1"], "workload.group=1: use 2 or more"),
        (["--workload.kv-heads", "3"], "model.heads=8 is no multiple of model.kv_heads=3"),
    ],
)
def test_what_cannot_be_measured_stops_before_the_process_starts(capsys, monkeypatch, words, message):
    monkeypatch.setattr(bench_step, "run_for_json", None)
    assert cli.main(["bench", "step", *words]) == 2
    assert message in capsys.readouterr().err


def test_sigterm_ends_what_measures(tmp_path):
    """The process that measures goes with the one that waits for it, which ends as a signal ends one."""
    begun = tmp_path / "begun"
    measuring = f"import os, pathlib, time; pathlib.Path({str(begun)!r}).write_text(str(os.getpid())); time.sleep(600)"
    command = [sys.executable, "-c", measuring]
    waiting = f"from rpt_jax.bench.step import run_for_json; run_for_json({command}, '')"
    process = subprocess.Popen([sys.executable, "-c", waiting])
    try:
        while not (begun.exists() and begun.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(int(begun.read_text()), 0)
    finally:
        process.kill()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(begun.read_text()), signal.SIGKILL)
