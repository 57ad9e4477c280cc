"""The quickstart from end to end at toy size, and the claims that its results rest on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rpt_jax.config import PretrainConfig
from rpt_jax.config_dict import to_dict
from rpt_jax.corpus import arithmetic
from rpt_jax.policy import flops
from rpt_jax.records import InputError
from rpt_jax.study import quickstart
from rpt_jax.study.base import BaseConfig, train_tokenizer
from rpt_jax.study.quickstart import QuickstartConfig, main, make_documents, new_folder, rpt_flops

TINY = QuickstartConfig(
    from_scratch=True,
    documents=39,
    evaluation_documents=26,
    base=BaseConfig(
        width=16, layers=1, heads=2, examples=100, pretrain=PretrainConfig(batch_size=8, sequence_length=88, steps=3)
    ),
    steps=2,
    batch_size=8,  # divides over the eight devices of the tests
    group_size=2,
    dynamic_from=-1,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, main(dataclasses.replace(TINY, run_folder=str(folder)))


def test_results_have_the_promised_keys(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results
    assert {"total", "base", "filter", "rpt", "controls", "evaluate"} <= set(results["seconds"])
    for split in ("hard", "medium"):
        table = results[split]
        for key in ("argmax_base", "reasoning_before", "reasoning_after", "forced_careful_base", "standard_error"):
            assert 0 <= table[key] <= 1
        for control in ("control_next_token", "control_sft"):
            assert set(table[control]) == {"argmax", "reasoning"}
        assert table["positions"] > 0
    assert set(results["format_rate"]) == {"before", "after"} and "right_steps_given_right" in results


def test_a_run_leaves_policy_metrics_rollouts_and_pictures(finished):
    folder, _ = finished
    rows = [json.loads(line) for line in (folder / "rpt" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert (folder / "policy" / "policy.json").is_file() and (folder / "rpt" / "rollouts.jsonl").stat().st_size > 0
    for name in ("learning_curve.png", "before_after.png"):
        assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_evaluation_texts_are_the_same_for_every_seed_and_never_trained_on():
    texts, exam = make_documents(QuickstartConfig(seed=0))
    others, again = make_documents(QuickstartConfig(seed=1))
    assert [problem.text for problem in exam] == [problem.text for problem in again]
    assert [problem.text for problem in texts] != [problem.text for problem in others]
    assert len({problem.text for problem in exam}) == len(exam)
    assert all(arithmetic.is_held_out(problem) for problem in exam)
    assert not any(arithmetic.is_held_out(problem) for problem in [*texts, *others])


def test_rpt_flops_count_all_sampling_and_the_updates(finished):
    """One round a step here: sampling plus an update of three times its FLOPs; the results say the same."""
    folder, results = finished
    rows = [json.loads(line) for line in (folder / "rpt" / "metrics.jsonl").read_text().splitlines()]
    model = quickstart.load_policy(folder / "policy")[0]
    by_hand = sum(
        4 * flops.sampling(model, row["sampled_prompts"], row["sampled_prompt_tokens"], 16, row["sampled_tokens"])
        for row in rows
    )
    assert rpt_flops(rows) == pytest.approx(by_hand) == results["flops"]


def test_dropped_groups_are_sampled_but_not_updated_on():
    assert rpt_flops([{"flops_sample": 2.0, "flops_update": 3.0}, {"flops_sample": 6.0, "flops_update": 3.0}]) == 14


def test_bad_settings_and_folders_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="from-scratch"):
        QuickstartConfig(base=BaseConfig(width=256)).check()
    with pytest.raises(InputError, match="base.width=100 over base.heads=4 .* use a --base.width that 8 divides"):
        QuickstartConfig(from_scratch=True, base=BaseConfig(width=100)).check()
    with pytest.raises(InputError, match="evaluation_documents=12: there are 13 kinds"):
        QuickstartConfig(evaluation_documents=12).check()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(InputError, match="not empty"):
        new_folder(str(tmp_path / "full"))
    monkeypatch.chdir(tmp_path)
    assert [new_folder("").name for _ in range(2)] == ["quickstart", "quickstart-2"]


def test_the_shipped_base_is_small_and_what_the_code_makes_now(tmp_path):
    """Its settings and its tokenizer are today's, so that it knows the texts of corpus/arithmetic.py."""
    model, params, tokenizer = quickstart.load_base(QuickstartConfig(), None, print)
    provenance = json.loads((quickstart.SHIPPED / "policy.json").read_text())["provenance"]
    assert provenance["base"] == json.loads(json.dumps(to_dict(BaseConfig())))
    assert tokenizer.fingerprint == train_tokenizer(tmp_path).fingerprint
    size = sum(file.stat().st_size for file in quickstart.SHIPPED.rglob("*") if file.is_file())
    assert size < 2 * 2**20
    assert tokenizer.vocab_size == model.vocab_size
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params))
