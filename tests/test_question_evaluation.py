"""Claims: figures are those of verdicts counted by hand; a run on questions pays what the judge says, evaluates on
questions held out, and continues to the bit; other questions are another run."""

import dataclasses
import functools
import importlib.util
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import toy
from test_train import assert_same_run, assert_same_state, mesh_of
from toy import Stop, rows_of, stop_at

from rpt_jax import commands
from rpt_jax.config import (
    CheckpointConfig,
    DynamicSamplingConfig,
    EvaluateConfig,
    QuestionConfig,
    RewardConfig,
    SampleConfig,
)
from rpt_jax.corpus.questions import Question, make_questions
from rpt_jax.learning import run_rows, train
from rpt_jax.learning.judge import CRASHED, RIGHT, TIMED_OUT, WRONG
from rpt_jax.learning.policy_folder import load_policy, save_policy
from rpt_jax.records import InputError
from rpt_jax.study import question_evaluation as study

needs_library = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra questions")
# Half of the references need the library: {3} and 3 are the same number and not the same text.
TEXTS = [*toy.LETTERS, *(f"{letter} a" for letter in toy.LETTERS), "b b", "b c", "b d"]
ASKED = [(text, str(i % 5) if i % 2 else f"{{{i % 5}}}") for i, text in enumerate(TEXTS)]
STEPS = 6


def questions(asked=ASKED):
    made = [Question(f"toy:{i}", text, answer) for i, (text, answer) in enumerate(asked)]
    return make_questions(toy.tokenizer(), made, made[:3])


def settings(folder, **options):
    changes = {
        "steps": STEPS,
        "reward": RewardConfig("verified"),
        "questions": QuestionConfig(seconds=60.0),
        "sample": SampleConfig(group_size=8, temperature=1.0, max_tokens=8, tokens_per_call=8),
        "dynamic_sampling": DynamicSamplingConfig(from_step=1, max_rounds=1),
        "rollouts_logged": 64,
    }
    return toy.config(folder, **changes | options)


def run(config, asked=None, **options):
    made = asked or questions()
    return train.train(config, **toy.arguments(annotated=made, positions=made.train, mesh=mesh_of(1, 1, 1), **options))


@functools.cache
def finished():
    folder = Path(tempfile.mkdtemp()) / "run"
    return folder, run(settings(folder))


@needs_library
def test_a_run_pays_what_the_judge_says():
    """The toy's answers are digits, so that the judge can be checked by reading."""
    folder, _ = finished()
    shown, rows = rows_of(folder, "rollouts.jsonl"), rows_of(folder)
    references = dict(ASKED)
    assert {row["truth"] for row in shown} <= set(references.values()) and any("{" in row["truth"] for row in shown)
    for row in shown:
        is_right = row["prediction"] is not None and row["prediction"].strip() == row["truth"].strip("{}")
        assert row["truth"] == references[row["context"]]
        assert (row["reward"], row["right"]) == (float(is_right), is_right)
    assert any(row["right"] and row["truth"] == f"{{{row['prediction']}}}" for row in shown)
    assert all(row["judge_timeouts"] == row["judge_crashes"] == 0 for row in rows)
    assert [row["reward"] for row in rows] == [row["accuracy"] for row in rows]
    assert max(row["reward"] for row in rows) > 0


@needs_library
def test_too_few_questions_are_said_to_be_questions(tmp_path):
    with pytest.raises(InputError, match="19 questions are fewer than batch_size=20 .*: lower it, or give more"):
        run(settings(tmp_path, batch_size=20))


@needs_library
def test_a_continued_run_is_the_run_that_was_not_broken_off(tmp_path):
    """And the queue of dynamic sampling was not empty where it continued."""
    folder, state = finished()
    assert rows_of(folder)[3]["queued"] > 0
    with pytest.raises(Stop):
        run(settings(tmp_path), report=stop_at(5))
    workers = QuestionConfig(seconds=60.0, workers=1)  # changes nothing
    assert_same_state(run(settings(tmp_path, questions=workers)), state)
    assert_same_run(tmp_path, folder, STEPS)
    with pytest.raises(InputError, match="another set of questions"):
        run(settings(tmp_path), questions([*ASKED[:-1], ("b d", "{1}")]))


@needs_library
def test_commands_train_and_evaluate_on_files(tmp_path):
    """rpt train evaluates on what it holds out, and rpt evaluate on the run's folder finds the same questions."""
    save_policy(tmp_path / "policy", toy.model(), toy.params(), toy.tokenizer(), {})
    asked = "".join(json.dumps({"problem": text, "answer": answer}) + "\n" for text, answer in ASKED)
    (tmp_path / "asked.jsonl").write_text(asked)
    limits = QuestionConfig((str(tmp_path / "asked.jsonl"),), holdout=3, seconds=60.0)
    exam = EvaluateConfig(every=1, group_size=16, pass_at=4, temperature=1.0, greedy=True, batch_size=8)
    config = settings(
        tmp_path / "run",
        policy=str(tmp_path / "policy"),
        steps=1,
        questions=limits,
        evaluate=exam,
        checkpoint=CheckpointConfig(every=1),
    )
    results = commands.run_train(config)
    before, after = (row["questions"] for row in run_rows.read_rows(tmp_path / "run" / "evaluations.jsonl"))
    assert before["positions"] == after["positions"] == 3
    assert 0 < before["reasoning"] < before["pass_at_k"] <= 1 and before["reasoning"] <= before["format_rate"] <= 1
    assert before["judge_timeouts"] == 0 and 0 <= before["greedy"] <= before["greedy_format_rate"] <= 1
    assert results["evaluation"]["questions"] == after
    again = commands.run_evaluate(commands.settings_of(str(tmp_path / "run")))
    assert again["questions"] == after
    assert load_policy(tmp_path / "run")[2].fingerprint == toy.tokenizer().fingerprint


def reasoning(rewards_NG, answered_NG):
    answers = [[b"1" if answered else None for answered in row] for row in answered_NG]
    made_NG = np.array(rewards_NG, np.float32)
    return study.Reasoning(made_NG, np.full((3, 2), 5, np.int32), answers, [], made_NG)


def test_figures_by_hand():
    """Right: both, one, none of two rollouts; one answer took too long and one broke its process."""
    codes_NG = np.array([[RIGHT, RIGHT], [RIGHT, TIMED_OUT], [WRONG, CRASHED]], np.int8)
    sampled = reasoning([[1, 1], [1, 0], [0, 0]], [[1, 1], [1, 1], [0, 1]])
    greedy = dataclasses.replace(sampled, rewards_NG=sampled.rewards_NG[:, :1], answers=[[b"1"], [b"1"], [None]])
    found = study.figures([(sampled, codes_NG), (greedy, codes_NG[:, :1])], 2)
    assert found["positions"] == 3 and json.loads(json.dumps(found)) == found
    assert (found["judge_timeouts"], found["judge_crashes"]) == (1, 1)
    for name, expected in (("reasoning", 0.5), ("pass_at_k", 2 / 3), ("format_rate", 5 / 6), ("response_length", 5)):
        np.testing.assert_allclose(found[name], expected)
    np.testing.assert_allclose(found["standard_error"], np.std([1, 0.5, 0]) / 3**0.5)
    np.testing.assert_allclose([found["greedy"], found["greedy_format_rate"]], [2 / 3, 2 / 3])
    assert "greedy" not in study.figures([(sampled, codes_NG)], 1)


def test_no_question_held_out_is_said():
    made = make_questions(toy.tokenizer(), [Question("a", "a", "1")], [])
    with pytest.raises(InputError, match="no question to evaluate on: set questions.holdout"):
        study.evaluate_questions(
            toy.params(),
            toy.model(),
            toy.tokenizer(),
            toy.arguments()["template"],
            made,
            limits=QuestionConfig(),
            prompt=settings("x").prompt,
            sample=settings("x").sample,
            config=EvaluateConfig(),
            seed=0,
            end_ids=(0,),
        )
