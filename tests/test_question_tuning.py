"""Claims of experiments/question_tuning.py: training and exam share no question, every policy is tuned on the same ones
and examined before and after, and rows that exist are not made again."""

import csv
import dataclasses
from pathlib import Path

import pytest

from rpt_jax.config import PretrainConfig
from rpt_jax.experiment_file import load_module
from rpt_jax.records import InputError
from rpt_jax.study.base import BaseConfig, train_tokenizer
from rpt_jax.study.quickstart import QuickstartConfig

experiment = load_module(str(Path(__file__).resolve().parent.parent / "experiments" / "question_tuning.py"))

BASE = BaseConfig(
    width=16, layers=1, heads=2, examples=100, pretrain=PretrainConfig(batch_size=8, sequence_length=88, steps=3)
)
TINY = QuickstartConfig(from_scratch=True, documents=39, base=BASE, steps=2, batch_size=8, group_size=2)


def test_the_exam_is_on_other_computations(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(tmp_path)
    asked = experiment.draw_questions(experiment.Settings(), 0, tokenizer)
    assert (len(asked.train), len(asked.held_out)) == (256, 200)
    texts = [tokenizer.bytes_of(tokens_T.tolist()).decode() for tokens_T in asked.documents]
    assert len(set(texts)) == 456
    for position in map(asked.held_out.__getitem__, range(3)):
        assert texts[position.document].endswith(asked.answers[position.document])
        assert asked.answers[position.document].strip() in set("0123456789")
    other = experiment.draw_questions(experiment.Settings(), 1, tokenizer)
    assert other.answers[256:] == asked.answers[256:] and other.answers[:256] != asked.answers[:256]
    assert set(asked.names) == {f"{family}_{steps}" for family, steps in experiment.KINDS}
    monkeypatch.setattr(experiment, "KINDS", (("total", 2),))
    with pytest.raises(InputError, match="40 different questions cannot be drawn"):
        experiment.draw_questions(experiment.Settings(questions=4, exam=40), 0, tokenizer)  # there are 36


def test_a_row_for_each_policy(tmp_path, capsys):
    settings = experiment.Settings(
        seeds=(3,),
        runs=tmp_path / "runs",
        results=tmp_path / "rows.csv",
        questions=16,
        exam=8,
        batch_size=8,
        group_size=2,
        updates=2,
        quickstart=TINY,
    )
    experiment.main(settings)
    with settings.results.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["policy"], row["seed"], row["exam"]) for row in rows] == [
        (name, "3", "8") for name in ("base", "next_token", "rpt")
    ]
    for row in rows:
        for when in ("before", "after"):
            assert 0 <= float(row[f"{when}.accuracy"]) <= float(row[f"{when}.pass_at_k"]) <= 1
        assert float(row["flops"]) > 0 and row["judge_stopped"] == "0"
    experiment.main(settings)
    assert capsys.readouterr().out.count("has a row already") == 3
    made = tmp_path / "runs" / "question_tuning_default_3"
    named = dataclasses.replace(settings, base=str(made / "base"), rpt=str(made / "policy"), runs=tmp_path / "other")
    with pytest.raises(InputError, match="no metrics.jsonl to say what RPT spent"):
        experiment.flops_of_rpt(named, 3, tmp_path)
    named = dataclasses.replace(named, rpt=str(tmp_path / "runs" / "question_tuning_default_{seed}" / "rpt"))
    assert experiment.flops_of_rpt(named, 3, tmp_path) > 0
