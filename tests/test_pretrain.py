"""Next-token and SFT training: batches by hand, the weighted loss, learning on a toy set, what stops a run."""

import functools
import itertools

import jax
import numpy as np
import pytest

from rpt_jax.config import ModelConfig, PretrainConfig
from rpt_jax.learning import pretrain as module
from rpt_jax.learning.pretrain import plain, pretrain, row_batches, running_batches, supervised
from rpt_jax.learning.update import init_state, make_optimizer
from rpt_jax.policy import decoder, scorer
from rpt_jax.records import InputError

MODEL = ModelConfig(vocab_size=11, width=16, layers=2, heads=2, kv_heads=1, head_channels=8, hidden=24)
CONFIG = PretrainConfig(learning_rate=1e-2, warmup_steps=5, steps=40, batch_size=4, sequence_length=6, token_chunk=16)
# A prompt of two tokens, then a response that depends on both: (a, b) -> a + 5, b + 5, 10.
PAIRS = [supervised([a, b], [a + 5, b + 5, 10]) for a in range(5) for b in range(5)]
score_tokens = jax.jit(scorer.score_tokens, static_argnums=1)


@functools.cache
def params():
    return jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))


def test_examples_weigh_what_they_should():
    np.testing.assert_array_equal(supervised([1, 2], [3, 4, 5])[0], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(supervised([1, 2], [3, 4, 5])[1], [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(plain([7, 8])[1], [1, 1])


def test_rows_hold_every_example_once_an_epoch_and_padding_weighs_nothing():
    examples = [plain(range(i, i + 2 + i % 3)) for i in range(6)]  # lengths 2, 3, 4, 2, 3, 4
    epoch = list(itertools.islice(row_batches(examples, 2, 4, seed=1), 3))
    rows = [(t[w > 0], t) for tokens_BT, weights_BT in epoch for t, w in zip(tokens_BT, weights_BT, strict=True)]
    assert sorted(tuple(live) for live, _ in rows) == sorted(tuple(tokens) for tokens, _ in examples)
    assert all(len(row) == 4 and not row[len(live) :].any() for live, row in rows)
    again = list(itertools.islice(row_batches(examples, 2, 4, seed=1), 3))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(epoch, again, strict=True))


def test_buckets_pad_to_the_shortest_width_that_fits():
    examples = [plain(np.full(length, length)) for length in (2, 3, 4, 5, 6, 7, 8)]
    seen = {}
    for tokens_BT, _ in itertools.islice(row_batches(examples, 2, 8, seed=0, buckets=2), 40):
        for row in tokens_BT:
            seen[int(row[0])] = tokens_BT.shape[1]
    assert seen == {2: 4, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def test_long_examples_are_cut_so_that_each_token_is_predicted_once():
    """9 tokens in rows of 4: 0123, 3456, 678; the first token of a row is context only."""
    ((tokens_BT, weights_BT),) = itertools.islice(row_batches([plain(range(9))], 3, 4, seed=0), 1)
    assert sorted(map(tuple, tokens_BT)) == [(0, 1, 2, 3), (3, 4, 5, 6), (6, 7, 8, 0)]
    predicted = tokens_BT[:, 1:][weights_BT[:, 1:] > 0]
    assert sorted(predicted) == list(range(1, 9))


@pytest.mark.parametrize("lengths", [[5, 1, 4, 2], [40, 3], [2, 2]])
def test_running_text_follows_on_without_gaps(lengths):
    """Rows laid end to end, less the shared token, are whole documents in some order, again and again."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    examples = [plain(np.arange(n) + start) for n, start in zip(lengths, starts, strict=True)]
    batches = list(itertools.islice(running_batches(examples, 2, 4, seed=3), 12))
    assert all(tokens_BT.shape == (2, 4) and weights_BT.all() for tokens_BT, weights_BT in batches)
    rows = np.concatenate([tokens_BT for tokens_BT, _ in batches])
    np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])
    line = np.concatenate([rows[:1, 0], rows[:, 1:].reshape(-1)])
    ends = np.cumsum(lengths) - 1
    for here, after in itertools.pairwise(line):
        assert (after in starts) if here in ends else after == here + 1
    whole_epochs = line[: len(line) // sum(lengths) * sum(lengths)]
    assert (np.bincount(whole_epochs) == len(whole_epochs) // sum(lengths)).all()


def test_nothing_to_predict_is_refused():
    for batches in (row_batches, running_batches):
        with pytest.raises(InputError, match="none of 1 training examples"):
            next(batches([plain([3])], 1, 4, seed=0))
        with pytest.raises(InputError, match="sequence_length=1"):
            next(batches([plain([3, 4])], 1, 1, seed=0))


def test_step_loss_is_the_weighted_mean_and_ignores_padding_and_row_order():
    """Weights 2, 0 and 1; a weight on token 0 counts nothing; other tokens behind weight 0 and other rows order too."""
    tokens_BT = np.array([[1, 2, 3, 4], [5, 6, 7, 0]], np.int32)
    weights_BT = np.array([[9, 2, 0, 1], [9, 1, 1, 0]], np.float32)
    logprobs_BT = np.asarray(score_tokens(params(), MODEL, tokens_BT, np.array([4, 4])))
    expected = -(weights_BT[:, 1:] * logprobs_BT[:, 1:]).sum() / 5

    def step(tokens_BT, weights_BT):
        state = init_state(params(), make_optimizer(CONFIG, CONFIG.steps))
        return module.pretrain_step(state, tokens_BT, weights_BT, model=MODEL, config=CONFIG)

    state, metrics = step(tokens_BT, weights_BT)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2 / 5)
    assert metrics["tokens"] == 4 and metrics["finite"]
    tokens_BT[1, 3] = 8
    other_state, other = step(tokens_BT[::-1], weights_BT[::-1])
    np.testing.assert_allclose(other["gradient_norm"], metrics["gradient_norm"], rtol=1e-5)
    np.testing.assert_allclose(
        other_state.optimizer_state[1][0].mu["head"], state.optimizer_state[1][0].mu["head"], rtol=1e-4, atol=1e-8
    )


def test_training_learns_a_toy_set_and_leaves_the_given_params():
    """Responses follow from the prompts: mean log-prob rises from below -1.2 to above -0.2; prompts are no target."""
    rows = []
    before = jax.device_get(params())
    config = PretrainConfig(learning_rate=3e-2, warmup_steps=5, steps=150, token_chunk=256)
    after = pretrain(
        params(), MODEL, config, row_batches(PAIRS, 25, 5, seed=0), lambda *row: rows.append(row), report_every=60
    )
    assert [step for step, _ in rows] == [60, 120, 150]
    assert rows[-1][1]["loss"] < 0.2 and rows[-1][1]["tokens"] == 75
    jax.tree.map(np.testing.assert_array_equal, before, params())
    tokens_BT = np.stack([tokens_T for tokens_T, _ in PAIRS])
    lengths_B = np.full(25, 5)
    assert np.asarray(score_tokens(params(), MODEL, tokens_BT, lengths_B))[:, 2:].mean() < -1.2
    logprobs_BT = np.asarray(score_tokens(after, MODEL, tokens_BT, lengths_B))
    assert logprobs_BT[:, 2:].mean() > -0.2
    assert logprobs_BT[:, 1].mean() < -2.0  # the second prompt token was never a target


def test_batches_that_end_early_or_hold_foreign_ids_stop_the_run():
    batch = np.ones((2, 4), np.int32), np.ones((2, 4), np.float32)
    with pytest.raises(InputError, match=r"after 2 of pretrain.steps=40"):
        pretrain(params(), MODEL, CONFIG, iter([batch, batch]))
    with pytest.raises(InputError, match="token id 11 in a training batch, but model.vocab_size=11"):
        pretrain(params(), MODEL, CONFIG, iter([(np.full((2, 4), 11), batch[1])]))


def test_a_loss_that_is_not_finite_stops_the_run():
    bad = np.ones((2, 4), np.int32), np.full((2, 4), np.nan, np.float32)
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        pretrain(params(), MODEL, CONFIG, itertools.repeat(bad))
