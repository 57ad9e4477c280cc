"""Claims: whole runs on the dense rewards pay what a replay of the rollouts gives, learn, and continue to the bit."""

import dataclasses
import functools
import math
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from toy import rows_of

from rpt_jax.config import MeshConfig, RewardConfig
from rpt_jax.learning import train
from rpt_jax.mesh import make_mesh

STEPS = 6
KINDS = pytest.mark.parametrize("kind", ["dense", "conditional_dense"])


def settings(folder, kind):
    """Every rollout is written down."""
    return toy.config(folder, seed=4, steps=STEPS, reward=RewardConfig(kind), rollouts_logged=32)


def run(config, **options):
    return train.train(config, **toy.arguments(mesh=make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), **options))


@functools.cache
def finished(kind):
    folder = Path(tempfile.mkdtemp()) / "run"
    return folder, run(settings(folder, kind))


@KINDS
def test_a_run_pays_what_the_rollouts_say(kind):
    """Right: 1. Wrong: the probability of the answer's token, as the rollout's own pieces show it; without one 0."""
    rollouts, rows = rows_of(finished(kind)[0], "rollouts.jsonl"), rows_of(finished(kind)[0])
    groups = {(row["step"], row["document"]): [] for row in rollouts}
    for row in rollouts:
        groups[row["step"], row["document"]].append(row)
    assert len(rollouts) == 32 * STEPS and {len(group) for group in groups.values()} == {4}
    kinds = set()
    for group in groups.values():
        solved = any(row["right"] for row in group)
        for row in group:
            assert row["right"] == (bool(row["prediction"]) and row["continuation"].startswith(row["prediction"]))
            expected = float(row["right"])
            if row["prediction"] and not row["right"]:
                boxes = [i for i, (text, _) in enumerate(row["pieces"]) if text == "\\boxed{"]
                expected = math.exp(row["pieces"][boxes[-1] + 1][1])
            if kind == "conditional_dense" and not solved:
                expected = 0.0
            assert row["reward"] == pytest.approx(expected, rel=1e-3)
            kinds.add((row["right"], 0 < row["reward"] < 1, solved))
    assert kinds >= {(True, False, True), (False, True, True), (False, kind == "dense", False)}
    assert all(row["gradient_norm"] > 0 for row in rows)
    means = [np.mean([row["reward"] for row in rollouts if row["step"] == step]) for step in range(1, STEPS + 1)]
    np.testing.assert_allclose([row["reward"] for row in rows], means, rtol=1e-5)
    assert np.mean(means[-2:]) > np.mean(means[:2])


@KINDS
def test_a_continued_run_is_the_run_that_was_not_broken_off(tmp_path, kind):
    toy.assert_continues(run, lambda folder: settings(folder, kind), finished(kind), tmp_path, stopped=4, saved=2)


def test_the_two_kinds_are_different_runs():
    weights = [np.asarray(finished(kind)[1].params["head"]) for kind in ("dense", "conditional_dense")]
    assert np.abs(weights[0] - weights[1]).max() > 1e-3
    changed = dataclasses.replace(settings(finished("dense")[0], "dense"), reward=RewardConfig("conditional_dense"))
    with pytest.raises(Exception, match="reward/kind='dense', this one has 'conditional_dense'"):
        run(changed)
