"""Claims: dynamic sampling keeps groups that disagree, in the order sampled, refills within its rounds, and queues the
positions it has too many of; rows of a batch belong together; the metrics are what they are called."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import toy

from rpt_jax.config import DynamicSamplingConfig, SampleConfig
from rpt_jax.corpus.positions import Position
from rpt_jax.learning import collect
from rpt_jax.learning.collect import Groups, Source
from rpt_jax.records import InputError, Prompts, Rollouts

N, G, T, R = 4, 2, 6, 40


def groups_of(positions, agree, width=T):
    """Groups whose every array tells which position it belongs to; position.index in `agree` earns 1 throughout."""
    index_N = np.array([position.index for position in positions])
    rewards_NG = np.array([[1.0, 1.0] if index in agree else [0.0, 1.0] for index in index_N], np.float32)
    lengths_NG = np.stack([index_N % 7 + 1, index_N % 5 + 1], axis=1)
    live_NGR = np.arange(R) < lengths_NG[:, :, None]
    prompts = Prompts(
        tokens_NT=np.where(np.arange(width) < 3, index_N[:, None], 0),
        lengths_N=np.full(N, 3),
        ids_N2=np.stack([index_N, index_N], axis=1),
        truth_NX=np.repeat(index_N[:, None], 5, axis=1).astype(np.uint8),
        boundaries_NX=np.ones((N, 5), bool),
        entropies_N=index_N.astype(np.float32),
    )
    rollouts = Rollouts(index_N[:, None, None] * live_NGR, lengths_NG, -0.5 * live_NGR, lengths_NG < 7)
    answered_NG = np.stack([index_N % 2 == 0, np.ones(N, bool)], axis=1)
    return Groups(tuple(positions), prompts, rollouts, answered_NG, rewards_NG, rewards_NG == 1, lengths_NG)


@pytest.fixture
def run_collect(monkeypatch):
    """collect with invented rollouts; the stream counts up."""

    def run(agree, max_rounds=4, from_step=3, step=3, queue=(), start=0):
        rounds = []

        def roll(source, params, positions, key, state):
            rounds.append([position.index for position in positions])
            return groups_of(positions, agree, T if len(rounds) == 1 else 2 * T), (1.0, 0.25)

        monkeypatch.setattr(collect, "roll", roll)
        settings = toy.config("unused", batch_size=N, dynamic_sampling=DynamicSamplingConfig(from_step, max_rounds))
        source = Source(settings, toy.model(), None, None, None, (), None)
        stream = (Position(0, index, 0.0) for index in itertools.count(start))
        groups, queue, row = collect.collect(source, None, stream, queue, step)
        chosen = [position.index for position in groups.positions]
        return groups, chosen, [position.index for position in queue], row, rounds

    return run


@pytest.mark.parametrize(("from_step", "step"), [(-1, 3), (4, 3)])
def test_without_dynamic_sampling_every_group_counts(run_collect, from_step, step):
    _, chosen, queue, row, rounds = run_collect({0, 1, 2, 3}, from_step=from_step, step=step)
    assert (chosen, queue, rounds) == ([0, 1, 2, 3], [], [[0, 1, 2, 3]])
    assert (row["rounds"], row["refilled"], row["zero_variance_share"]) == (1, 0, 1.0)


def test_unanimous_groups_are_dropped_and_others_sampled_in_their_place(run_collect):
    """0..3 of which 1 and 2 agree, 4..7 of which 4 agrees: 5 and 6 take their places, 7 comes first next time."""
    groups, chosen, queue, row, rounds = run_collect({1, 2, 4})
    assert rounds == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert chosen == [0, 3, 5, 6] and queue == [7]
    assert (row["rounds"], row["refilled"], row["queued"], row["sampled_prompts"]) == (2, 0, 1, 8)
    assert (row["seconds_sample"], row["seconds_reward"]) == (2.0, 0.5)
    np.testing.assert_allclose(row["zero_variance_share"], 3 / 8)  # of all sampled: the dropped ones count
    assert not (groups.rewards_NG.max(axis=1) == groups.rewards_NG.min(axis=1)).any()


def test_the_queue_is_drawn_from_first_and_what_is_left_of_it_stays(run_collect):
    waiting = tuple(Position(0, index, 0.0) for index in (90, 91, 92, 93, 94))
    _, chosen, queue, row, _ = run_collect(set(), queue=waiting)
    assert chosen == [90, 91, 92, 93] and queue == [94] and row["queued"] == 1
    _, chosen, queue, _, rounds = run_collect({90}, queue=waiting[:2])
    assert rounds == [[90, 91, 0, 1], [2, 3, 4, 5]] and chosen == [91, 0, 1, 2] and queue == [3, 4, 5]


def test_a_position_that_comes_twice_in_a_round_waits_for_the_next():
    """There it would get the same rollouts again: an epoch of five ends after the fifth, and 3 and 4 come once more."""
    stream = (Position(0, index, 0.0) for index in (0, 1, 2, 3, 4, 3, 4, 0, 1, 2))
    indices = []
    queue = ()
    for _ in range(3):
        drawn, queue = collect.draw(stream, queue, 3)
        indices.append(([each.index for each in drawn], [each.index for each in queue]))
    assert indices == [([0, 1, 2], []), ([3, 4, 0], [3, 4]), ([3, 4, 1], [])]
    drawn, queue = collect.draw(iter([Position(0, 7, 0.0)] * 9), (), 3)  # no others: not for ever
    assert len(drawn) == len(queue) == 3


def test_the_key_is_that_of_seed_step_and_round(monkeypatch):
    """Whatever the queue. A position that comes again in another round gets rollouts of its own."""
    keys = []

    def roll(source, params, positions, key, state):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return groups_of(positions, {0, 1}), (1.0, 0.25)

    monkeypatch.setattr(collect, "roll", roll)
    for seed, step, queue in ((0, 3, ()), (0, 3, (Position(0, 9, 0.0),)), (0, 4, ()), (1, 3, ())):
        dynamic = DynamicSamplingConfig(from_step=0, max_rounds=1)
        settings = toy.config("unused", seed=seed, batch_size=N, dynamic_sampling=dynamic)
        source = Source(settings, toy.model(), None, None, None, (), None)
        stream = (Position(0, index, 0.0) for index in itertools.count())
        collect.collect(source, None, stream, queue, step)
    of_step = jax.random.fold_in(jax.random.key(0), 3)
    expected = [tuple(jax.random.key_data(key).tolist()) for key in (of_step, jax.random.fold_in(of_step, 1))]
    assert keys[:4] == 2 * expected and len(keys) == 8 and len(set(keys)) == 6


def test_rounds_are_bounded_and_agreeing_groups_then_fill_the_batch(run_collect):
    _, chosen, queue, row, rounds = run_collect(set(range(100)) - {5}, max_rounds=2)
    assert len(rounds) == 3 and chosen == [5, 0, 1, 2] and queue == []
    assert (row["refilled"], row["rounds"]) == (3, 3)


def test_rows_of_the_batch_belong_together_and_shapes_are_few(run_collect):
    groups, chosen, _, _, _ = run_collect({1, 2, 4})
    for n, index in enumerate(chosen):
        one = groups_of([Position(0, index, 0.0)] * N, {1, 2, 4})
        assert groups.positions[n].index == index
        np.testing.assert_array_equal(groups.answered_NG[n], one.answered_NG[0])
        np.testing.assert_array_equal(groups.rewards_NG[n], one.rewards_NG[0])
        np.testing.assert_array_equal(groups.right_NG[n], one.right_NG[0])
        np.testing.assert_array_equal(groups.learnt_NG[n], one.learnt_NG[0])
        for name in ("lengths_N", "ids_N2", "truth_NX", "boundaries_NX", "entropies_N"):
            np.testing.assert_array_equal(getattr(groups.prompts, name)[n], getattr(one.prompts, name)[0])
        np.testing.assert_array_equal(groups.prompts.tokens_NT[n, :T], one.prompts.tokens_NT[0])
        for name in ("lengths_NG", "finished_NG"):
            np.testing.assert_array_equal(getattr(groups.rollouts, name)[n], getattr(one.rollouts, name)[0])
        for name in ("tokens_NGR", "logprobs_NGR"):
            np.testing.assert_array_equal(getattr(groups.rollouts, name)[n], getattr(one.rollouts, name)[0])
    assert groups.prompts.tokens_NT.shape == (N, 2 * T) and groups.rollouts.tokens_NGR.shape == (N, G, 40)


def test_metrics_by_hand():
    """Two rounds: rewards 1 1 / 0 1 / 0 0 / 0 1 and 0 0 / 0 0 / 1 1 / 0 1; six of eight have an answer."""
    parts = []
    for rewards in ([[1, 1], [0, 1], [0, 0], [0, 1]], [[0, 0], [0, 0], [1, 1], [0, 1]]):
        made = groups_of([Position(0, index, 0.0) for index in (6, 1, 2, 3)], set())
        rewards_NG = np.array(rewards, np.float32)
        parts.append(dataclasses.replace(made, rewards_NG=rewards_NG, right_NG=rewards_NG == 1))
    row = collect.describe(parts)
    lengths = [7, 2, 2, 2, 3, 3, 4, 4] * 2
    expected = {
        "reward": 7 / 16,
        "accuracy": 7 / 16,
        "format_rate": 6 / 8,
        "solved_share": 5 / 8,
        "zero_variance_share": 5 / 8,
        "all_right_share": 2 / 8,
        "all_wrong_share": 3 / 8,
        "length": sum(lengths) / 16,
        "length_max": 7,
        "unfinished_share": 2 / 16,
        "sampled_prompts": 8,
        "sampled_rollouts": 16,
        "sampled_prompt_tokens": 24,
        "sampled_tokens": sum(lengths),
        "live_slot_share": 1.0,
    }
    assert row == pytest.approx(expected)

    # Other rewards for the same answers: what tells of right answers stays as it is.
    paid = [dataclasses.replace(part, rewards_NG=part.rewards_NG / 2 + [[0.125, 0.25]]) for part in parts]
    assert collect.describe(paid) == pytest.approx(expected | {"reward": 7 / 32 + 3 / 16, "zero_variance_share": 0})


def test_end_ids():
    tokenizer = toy.tokenizer()
    assert collect.end_ids(tokenizer, ()) == (tokenizer.end_of_text,)
    assert collect.end_ids(tokenizer, ("}", ".")) == (tokenizer.id_of("}"), tokenizer.id_of("."))
    with pytest.raises(InputError, match="sample.end_tokens: the tokenizer has no token '<end>'"):
        collect.end_ids(tokenizer, ("}", "<end>"))


def test_a_tokenizer_without_end_of_text_needs_an_end_token():
    silent = type("Silent", (), {"end_of_text": None})()
    with pytest.raises(InputError, match="--sample.end-tokens"):
        collect.end_ids(silent, SampleConfig().end_tokens)
