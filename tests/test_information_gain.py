"""Claims: a run on information gain pays log p(next token | thought) - log p_average(next token), learns from thoughts
alone with RLP's advantage, keeps the average of its policies, and continues to the bit."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from toy import Stop, rows_of, stop_at

from rpt_jax.config import CheckpointConfig, DynamicSamplingConfig, EvaluateConfig, MeshConfig, RewardConfig
from rpt_jax.corpus.positions import Positions
from rpt_jax.learning import train
from rpt_jax.mesh import make_mesh
from rpt_jax.policy.scorer import score_tokens
from rpt_jax.records import InputError

STEPS, DECAY = 8, 0.75


def settings(folder, steps=STEPS, advantage="leave_one_out", **options):
    config = toy.config(
        folder,
        seed=4,
        steps=steps,
        reward=RewardConfig("information_gain", ema_decay=DECAY, opening="\\boxed{"),
        dynamic_sampling=DynamicSamplingConfig(from_step=2, max_rounds=1),
        checkpoint=CheckpointConfig(every=4, keep=2),
        evaluate=EvaluateConfig(every=1),
    )
    update = dataclasses.replace(config.update, advantage=advantage)
    return dataclasses.replace(config, update=update, **options)


@functools.cache
def thinker():
    """The toy's policy, which thinks a digit or nothing, and forgets to end one thought of two."""
    id_of, head = toy.tokenizer().id_of, toy.params()["head"].copy()
    digits = [id_of(str(digit)) for digit in range(5)]
    head[id_of("<think>"), digits] = head[digits, id_of("</think>")] = 2
    return toy.params() | {"head": head}


def run(config, mesh=(1, 1, 1), **options):
    devices = jax.devices()[: int(np.prod(mesh))]
    given = {"policy": (toy.model(), thinker(), toy.tokenizer()), "mesh": make_mesh(MeshConfig(*mesh), devices)}
    return train.train(config, **toy.arguments(**given | {"evaluate": evaluate} | options))


def evaluate(params, step):
    return {"weight": float(np.asarray(params["head"], np.float64).sum())}


@functools.cache
def finished():
    folder = Path(tempfile.mkdtemp()) / "run"
    return folder, run(settings(folder))


def test_a_continued_run_is_the_run_that_was_not_broken_off(tmp_path):
    """Parameters, moments and average to the bit, and every row; each update was one."""
    folder, state = finished()
    continued = toy.assert_continues(run, settings, (folder, state), tmp_path, stopped=7, saved=4)
    assert jax.tree.structure(continued) == jax.tree.structure(state) and continued.average is not None
    assert all(row["gradient_norm"] > 1e-4 and row["zero_variance_share"] < 1 for row in rows_of(folder))


def test_the_average_is_that_of_the_policies():
    """Replayed from the sum of a matrix before and after every update."""
    folder, state = finished()
    weights = [row["weight"] for row in rows_of(folder, "evaluations.jsonl")]
    assert len(weights) == STEPS + 1
    average = weights[0]
    for weight in weights[1:]:
        average = DECAY * average + (1 - DECAY) * weight
    assert evaluate(state.average, 0)["weight"] == pytest.approx(average, abs=1e-4)
    assert abs(average - weights[-1]) > 1e-2


def captured_step(monkeypatch, folder):
    """(parameters, groups, batch) of the third update; the average is behind the policy by then."""
    seen, collect, step = {}, train.collect, train.train_step

    def watched(source, params, stream, queue, number, state):
        seen.update(params=jax.device_get(state.params), average=jax.device_get(state.average))
        seen["groups"], *rest = collect(source, params, stream, queue, number, state)
        return seen["groups"], *rest

    def stepped(state, batch, *arguments, **options):
        seen["batch"] = batch
        return step(state, batch, *arguments, **options)

    monkeypatch.setattr(train, "collect", watched)
    monkeypatch.setattr(train, "train_step", stepped)
    config = settings(folder, dynamic_sampling=DynamicSamplingConfig())
    with pytest.raises(Stop):
        run(config, report=stop_at(3))
    return seen


def test_what_a_step_pays_and_learns_from(tmp_path, monkeypatch):
    """Rewards against whole sequences scored one by one; RLP's advantage; no token behind the thought in the batch."""
    seen, tokenizer, model = captured_step(monkeypatch, tmp_path), toy.tokenizer(), toy.model()
    groups, batch = seen["groups"], jax.device_get(seen["batch"])
    end, box = tokenizer.id_of("</think>"), tokenizer.id_of("\\boxed{")
    N, G = groups.rewards_NG.shape
    kinds = set()
    for n, position in enumerate(groups.positions):
        document = toy.annotated().documents[position.document]
        target, context = int(document[position.index]), document[: position.index].tolist()
        plain = logprob(seen["average"], model, context, target)
        prompt = groups.prompts.tokens_NT[n, : groups.prompts.lengths_N[n]].tolist()
        row = next(i for i in range(N) if batch.prompt_tokens_NT[i, : len(prompt)].tolist() == prompt)
        rewards_G = groups.rewards_NG[n].astype(np.float64)
        expected_G = [r - (rewards_G.sum() - r) / (G - 1) for r in rewards_G]  # r less the mean of the others
        np.testing.assert_allclose(batch.advantages_NG[row], expected_G, atol=1e-6)
        np.testing.assert_allclose(expected_G, G / (G - 1) * (rewards_G - rewards_G.mean()), atol=1e-12)
        for g in range(G):
            response = groups.rollouts.tokens_NGR[n, g, : groups.rollouts.lengths_NG[n, g]].tolist()
            is_closed = end in response
            thought = response[: response.index(end) + 1] if is_closed else response
            kinds.add((is_closed, len(thought)))
            before = [*prompt, *thought, *([] if is_closed else [end]), box]
            gain = logprob(seen["params"], model, before, target) - plain
            assert groups.rewards_NG[n, g] == pytest.approx(gain, abs=1e-4)
            assert batch.lengths_NG[row, g] == len(thought)
            assert batch.tokens_NGR[row, g].tolist() == thought + [0] * (8 - len(thought))
            assert not batch.logprobs_NGR[row, g, len(thought) :].any()
            is_right = tokenizer.bytes_of(response).endswith(b"</think>\\boxed{" + tokenizer.bytes_of([target]) + b"}")
            assert groups.right_NG[n, g] == (is_right and groups.rollouts.finished_NG[n, g])
    assert len({length for is_closed, length in kinds if is_closed}) > 1 and not all(closed for closed, _ in kinds)
    assert int((batch.stream.targets_UX >= 0).sum()) == groups.learnt_NG.sum() < groups.rollouts.lengths_NG.sum()


def logprob(params, model, before, target):
    tokens_BT = np.zeros((1, 16), np.int32)
    tokens_BT[0, : len(before) + 1] = [*before, target]
    return float(score_tokens(params, model, tokens_BT, np.array([len(before) + 1]))[0, len(before)])


def test_several_devices_give_what_one_gives(tmp_path):
    """Up to rounding, in two microbatches."""
    config = settings(tmp_path)
    config = dataclasses.replace(config, update=dataclasses.replace(config.update, microbatches=2))
    with pytest.raises(Stop):
        run(config, (2, 2, 1), report=stop_at(2))
    for row, there in zip(rows_of(tmp_path), rows_of(finished()[0])[:2], strict=True):
        for name in row.keys() - {"sharing_ratio", "live_slot_share"}:
            np.testing.assert_allclose(row[name], there[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_other_runs_have_no_average_and_do_not_continue_this_one(tmp_path):
    config = settings(tmp_path, steps=1, reward=RewardConfig(ema_decay=DECAY, opening="\\boxed{"))
    assert run(config).average is None
    with pytest.raises(InputError, match="reward/kind='prefix', this one has 'information_gain'"):
        run(settings(tmp_path))


def test_what_cannot_be_is_named(tmp_path):
    with pytest.raises(InputError, match="update.advantage=std: .*use --update.advantage leave_one_out"):
        run(settings(tmp_path / "run", advantage="std"))
    first = Positions(*(np.zeros(8, kind) for kind in (np.int32, np.int32, np.float32)))
    with pytest.raises(InputError, match="first token of a document: .*minimum-context"):
        run(settings(tmp_path / "run"), positions=first)
    assert not (tmp_path / "run").exists()
