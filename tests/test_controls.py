"""Claims: a control ends with the batch that reaches its budget, all that is sampled or trained on counted; expert
iteration trains on right rollouts alone, a few of each prompt and none twice, and learns from them."""

import dataclasses
import functools

import numpy as np
import pytest
import toy

from rpt_jax.corpus.templates import load_template
from rpt_jax.learning.collect import Groups
from rpt_jax.policy import flops
from rpt_jax.records import InputError, Prompts, Rollouts
from rpt_jax.study import base, controls
from rpt_jax.study.controls import ExpertConfig, Trained, right_examples, spend

EXPERT = ExpertConfig(prompts=16, kept=2, updates=6, batch_size=8, learning_rate=3e-3)


def quiet(*args, **options):
    pass


def policy():
    return toy.model(), toy.params(), toy.tokenizer()


def test_controls_spend_the_flops_of_rpt(monkeypatch):
    """The control stops with the batch that crosses the budget, padding not counted."""
    batch = np.zeros((4, 10), np.int32)
    batch[:, :6] = 3
    one = flops.pretraining(toy.model(), 4, 24)
    seen = []
    monkeypatch.setattr(controls, "pretrain", lambda params, model, settings, *a, **k: seen.append(settings) or params)
    done = spend(policy(), iter([(batch, batch)] * 10), 4.5 * one, 1e-3, "test", print)
    assert seen[0].steps == done.updates == 5 and seen[0].learning_rate == 1e-3
    assert done.flops == pytest.approx(5 * one)


def test_next_token_control_goes_on_with_the_last_mixture(monkeypatch):
    """That of the base, plain texts alone where it had no cold start; never the batches that the base has seen."""
    asked = []
    monkeypatch.setattr(
        controls, "mixture_batches", lambda t, config, mixture, size, seed: asked.append((mixture, seed))
    )
    monkeypatch.setattr(controls, "spend", lambda policy, *rest: Trained(policy, 0, 0.0))
    for traces in ("default", "none"):
        controls.next_token_control(policy(), base.BaseConfig(traces=traces), 1.0, 1e-3, 7, quiet)
    assert asked == [(base.STAGES[-1][1], 1_000_007), (base.Mixture(plain=1.0), 1_000_007)]


def test_supervised_answers_are_the_tokens_that_follow(monkeypatch):
    """Of each position the prompt, uncounted, and the boxed token with the end, counted: no thought."""
    seen = []
    monkeypatch.setattr(controls, "row_batches", lambda examples, *rest: seen.extend(examples))
    monkeypatch.setattr(controls, "spend", lambda policy, *rest: Trained(policy, 0, 0.0))
    bare = load_template("bare")
    controls.sft_control(policy(), toy.annotated(), toy.targets(), bare, 32, 1.0, 1e-3, 0, quiet)
    shown = [toy.tokenizer().bytes_of(tokens_T.tolist()).decode() for tokens_T, _ in seen]
    counted = [toy.tokenizer().bytes_of(t[w == 1].tolist()).decode() for t, w in seen]
    assert shown == [f"<predict>{text[:2]}<think></think>\\boxed{{{text[2]}}}" for text in toy.TEXTS]
    assert counted == [f"</think>\\boxed{{{text[2]}}}" for text in toy.TEXTS]
    assert all(tokens_T[-1] == toy.tokenizer().end_of_text for tokens_T, _ in seen)


def test_right_rollouts_of_a_prompt_count_once_and_not_all():
    """By hand: members 1 and 3 are the same, 0 is wrong, 2 and 4 are right and different; padding is no part."""
    tokens_NGR = np.array([[[5, 9, 0], [6, 9, 0], [7, 7, 9], [6, 9, 0], [8, 9, 0]], [[5, 9, 0]] * 5], np.int32)
    lengths_NG = np.array([[2, 2, 3, 2, 2], [2] * 5], np.int32)
    right_NG = np.array([[False, True, True, True, True], [False] * 5])
    blank_NG = np.zeros((2, 5), np.float32)
    prompts = Prompts(*([None] * len(dataclasses.fields(Prompts)))).replace(
        tokens_NT=np.array([[1, 2, 3], [1, 2, 0]], np.int32), lengths_N=np.array([2, 2], np.int32)
    )
    rollouts = Rollouts(tokens_NGR=tokens_NGR, lengths_NG=lengths_NG, logprobs_NGR=None, finished_NG=None)
    groups = Groups((), prompts, rollouts, right_NG, blank_NG, right_NG, lengths_NG)

    def responses(kept):
        found = right_examples(groups, kept)
        for tokens_T, weights_T in found:
            assert tokens_T[:2].tolist() == [1, 2] and weights_T.tolist() == [0, 0] + [1] * (len(tokens_T) - 2)
        return [tokens_T[2:].tolist() for tokens_T, _ in found]

    assert responses(4) == [[6, 9], [7, 7, 9], [8, 9]]
    assert responses(2) == [[6, 9], [7, 7, 9]]


@functools.cache
def watched():
    """(what expert iteration gives back, batches it trained on, groups it sampled) with a budget of several rounds."""
    trained_on, sampled = [], []
    pretrain, roll = controls.pretrain, controls.roll

    def watched_pretrain(params, model, settings, batches):
        batches = list(batches)
        trained_on.extend(batches)
        return pretrain(params, model, settings, iter(batches))

    def watched_roll(*arguments):
        groups, seconds = roll(*arguments)
        sampled.append(groups)
        return groups, seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controls, "pretrain", watched_pretrain)
        patch.setattr(controls, "roll", watched_roll)
        return iterate(BUDGET), trained_on, sampled


def iterate(budget, expert=EXPERT):
    config = toy.config("unused", seed=4)
    bare = load_template("bare")
    return controls.expert_iteration(policy(), config, toy.annotated(), toy.targets(), bare, budget, expert, quiet)


ONE_UPDATE = flops.pretraining(toy.model(), 8, 8 * 12)  # of the longest rows there may be: prompt of 4, response of 8
ONE_SAMPLING = flops.sampling(toy.model(), 8, 32, 32, 32 * 8)
BUDGET = 12 * (6 * ONE_UPDATE + 2 * ONE_SAMPLING)


def test_expert_iteration_learns():
    """Random digits in the right form are right one time in five."""
    _, _, sampled = watched()
    shares = [groups.right_NG.mean() for groups in sampled]
    assert np.mean(shares[:2]) < 0.25 and np.mean(shares[-2:]) > 0.5


def test_expert_iteration_trains_on_right_rollouts_alone():
    """Every row trained on ends in its true digit, boxed; wrong digits were sampled, too. Prompts count nothing."""
    _, trained_on, sampled = watched()
    rows = [row for batch in trained_on for row in zip(*batch, strict=True)]
    digit_of = {f"<predict>{text[0]} <think>": text[2] for text in toy.TEXTS}
    shown = [toy.tokenizer().bytes_of(tokens_T[tokens_T > 0].tolist()).decode() for tokens_T, _ in rows]
    prompts = [text[: text.index("<think>") + 7] for text in shown]
    assert len(shown) > 100 and set(prompts) == set(digit_of)
    assert all(text.endswith(f"\\boxed{{{digit_of[prompt]}}}") for text, prompt in zip(shown, prompts, strict=True))
    for tokens_T, weights_T in rows:
        live = int((tokens_T > 0).sum())
        assert weights_T.tolist() == [0] * 4 + [1] * (live - 4) + [0] * (len(tokens_T) - live)
    assert not all(groups.right_NG.all() for groups in sampled)


def test_expert_iteration_pays_for_all_that_it_samples():
    done, trained_on, sampled = watched()
    model = toy.model()
    cost = sum(flops.sampling(model, 8, 32, 32, int(groups.rollouts.lengths_NG.sum())) for groups in sampled)
    cost += sum(flops.pretraining(model, 8, int((tokens_BT > 0).sum())) for tokens_BT, _ in trained_on)
    assert done.flops == pytest.approx(cost) and done.updates == len(trained_on)
    assert BUDGET <= done.flops < BUDGET + max(ONE_UPDATE, ONE_SAMPLING)


def test_where_nothing_is_right_nothing_is_learnt(monkeypatch):
    """The budget goes into sampling, and the policy stays the base."""
    monkeypatch.setattr(controls, "right_examples", lambda groups, kept: [])
    done = iterate(4.5 * ONE_SAMPLING)
    assert done.updates == 0 and done.policy[1]["head"].tolist() == toy.params()["head"].tolist()
    assert 4.5 * ONE_SAMPLING <= done.flops < 5.5 * ONE_SAMPLING


def test_a_round_of_nothing_is_refused():
    with pytest.raises(InputError, match="expert.kept=0: use 1 or more"):
        iterate(1.0, dataclasses.replace(EXPERT, kept=0))
