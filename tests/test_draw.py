"""Drawing a token: cuts by hand and by property, frequencies by chi-square."""

from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from rpt_jax.config import SampleConfig
from rpt_jax.policy import draw

SAMPLING = SampleConfig()


@pytest.mark.parametrize(
    ("cuts", "kept"),
    [
        ({}, [0.2, 0.05, 0.5, 0.1, 0.15]),
        ({"top_k": 1}, [0.5]),
        ({"top_k": 3}, [0.2, 0.5, 0.15]),
        ({"top_k": 9}, [0.2, 0.05, 0.5, 0.1, 0.15]),
        ({"top_p": 0.01}, [0.5]),
        ({"top_p": 0.49}, [0.5]),
        ({"top_p": 0.51}, [0.2, 0.5]),
        ({"top_p": 0.8}, [0.2, 0.5, 0.15]),
        ({"top_p": 0.8, "top_k": 3}, [0.2, 0.5]),  # of what is left, 0.85, the two have 0.82
        ({"min_p": 0.25}, [0.2, 0.5, 0.15]),
        ({"min_p": 0.99}, [0.5]),
        ({"min_p": 0.25, "top_k": 2}, [0.2, 0.5]),
    ],
)
def test_cuts_by_hand(cuts, kept):
    probabilities_V = np.array([0.2, 0.05, 0.5, 0.1, 0.15], np.float32)
    got_V = np.asarray(draw.cut(jnp.log(probabilities_V)[None], replace(SAMPLING, **cuts)))[0]
    np.testing.assert_allclose(np.exp(got_V), np.where(np.isin(probabilities_V, np.float32(kept)), probabilities_V, 0))


@hypothesis.given(
    logits_V=st.lists(st.sampled_from(np.linspace(-9, 9, 37).tolist()), min_size=7, max_size=7),
    top_k=st.integers(0, 8),
    top_p=st.floats(0.01, 1.0),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.999)),
)
def test_cuts_keep_what_they_promise(logits_V, top_k, top_p, min_p):
    """The best stays, nothing better than a kept token goes, logits stay as they are, and masses are right."""
    logits_V = np.asarray(logits_V, np.float32)

    def kept(**cuts):
        got_V = np.asarray(draw.cut(jnp.asarray(logits_V)[None], replace(SAMPLING, **cuts)))[0]
        kept_V = np.isfinite(got_V)
        np.testing.assert_array_equal(got_V[kept_V], logits_V[kept_V])
        assert kept_V[logits_V == logits_V.max()].any()
        assert logits_V[kept_V].min() >= logits_V[~kept_V].max(initial=-np.inf)
        return kept_V

    p_V = scipy.special.softmax(logits_V.astype(np.float64))
    by_k, by_p, by_min = kept(top_k=top_k), kept(top_p=top_p), kept(min_p=min_p)
    if top_k:
        assert by_k.sum() >= min(top_k, 7) > (logits_V[by_k] > logits_V[by_k].min()).sum()  # ties of the last all stay
    assert p_V[by_p].sum() >= top_p - 1e-5 and p_V[by_p].sum() - p_V[by_p].min() < top_p + 1e-5
    assert p_V[by_min].min() >= min_p * p_V.max() - 1e-6 and p_V[~by_min].max(initial=0) <= min_p * p_V.max() + 1e-6
    assert not (kept(top_k=top_k, top_p=top_p, min_p=min_p) & ~(by_k & by_p)).any()


def assert_drawn_from(counts, probabilities):
    """Chi-square test at 0.001; draws are from fixed keys, so it passes or fails for good."""
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible] * counts.sum()
    assert expected.min() > 5, "too few draws for the test"
    assert scipy.stats.chisquare(counts[possible], expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("top_k", [0, 3])
def test_draws_follow_the_softmax(top_k):
    """At temperature 0.7 over 20,000 keys; log-probs are of the distribution before the cut."""
    logits_V = np.array([0.3, -1.0, 1.2, 0.0, 0.9, -0.4], np.float32)
    drawn = jax.jit(draw.draw, static_argnums=2)
    keys_B = jax.random.split(jax.random.key(3), 20_000)
    tokens_B, logprobs_B = drawn(
        np.tile(logits_V, (20_000, 1)), keys_B, replace(SAMPLING, temperature=0.7, top_k=top_k)
    )
    p_V = scipy.special.softmax(logits_V.astype(np.float64) / 0.7)
    np.testing.assert_allclose(logprobs_B, np.log(p_V)[tokens_B], rtol=1e-5)
    left_V = np.where(np.isin(np.arange(6), [0, 2, 4]), p_V, 0) if top_k else p_V
    assert_drawn_from(np.bincount(tokens_B, minlength=6), left_V / left_V.sum())


def test_zero_draws_no_improbable_token(monkeypatch):
    """JAX draws 0 once in 2^23 times, where the first of these tokens is due once in 2^100."""
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(0))
    logits_1V = np.log(np.array([[2.0**-100, 0.5, 0.5, 2.0**-100]], np.float32))
    tokens_1, _ = draw.draw(logits_1V, jax.random.split(jax.random.key(0), 1), SAMPLING)
    assert tokens_1.tolist() == [1]


def test_tokens_of_an_improbable_block_are_drawn_as_often_as_they_should():
    """Of a block of 1e-6 of all, two tokens share what there is, and the one before them is due once in 2^60 times."""
    weights_V = np.zeros(256, np.float32)
    weights_V[0], weights_V[128], weights_V[130:132] = 1, 2.0**-80, 5e-7
    within_B = (np.arange(1000, dtype=np.float32) + 0.5) / 1000
    numbers_B2 = np.stack([np.full(1000, 1 - 2.0**-24, np.float32), within_B], axis=1)
    with np.errstate(divide="ignore"):
        logits_BV = np.tile(np.log(weights_V), (1000, 1))
    tokens_B = np.asarray(draw._inverse(jnp.asarray(logits_BV), jnp.asarray(numbers_B2)))
    np.testing.assert_array_equal(tokens_B, np.where(within_B < 0.5, 130, 131))


_inverse = jax.jit(draw._inverse)  # as it runs: XLA contracts what it may


@hypothesis.given(
    weights_V=st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 0.5, 1.0, 3.0]), min_size=1, max_size=300),
    uniform=st.sampled_from([1e-7, 0.25, 0.5, 0.75, 1 - 2.0**-24]),
    within=st.sampled_from([2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-24]),
)
def test_the_numbers_fall_where_the_sums_pass_them(weights_V, uniform, within):
    """Against float64 up to rounding at the borders, of blocks and within one; never a token of probability 0."""
    hypothesis.assume(max(weights_V) > 1e-7)
    weights_V = np.array([*weights_V, *[0.0] * (384 - len(weights_V))])  # one shape
    with np.errstate(divide="ignore"):
        logits_1V = np.log(weights_V)[None].astype(np.float32)
    token = int(_inverse(logits_1V, np.array([[uniform, within]], np.float32))[0])
    assert weights_V[token] > 0
    blocks = weights_V.reshape(-1, draw.BLOCK)
    for place, number, weights in (
        (token // draw.BLOCK, uniform, blocks.sum(axis=1)),
        (token % draw.BLOCK, within, blocks[token // draw.BLOCK]),
    ):
        sums = np.cumsum(weights) / weights.sum()
        assert sums[place] >= number - 1e-6 and (place == 0 or sums[place - 1] <= number + 1e-6)


def test_a_large_vocabulary_is_drawn_evenly():
    """152,064 equal tokens and 4,000 pairs of numbers: each falls at its own share of all blocks, and of one."""
    uniform_B = np.linspace(0, 1, 4000, endpoint=False, dtype=np.float32) + np.float32(draw.HALF_A_STEP)
    within_B = np.roll(uniform_B, 777)
    drawn = jax.jit(jax.vmap(lambda numbers_2: draw._inverse(jnp.zeros((1, 152_064)), numbers_2[None])[0]))
    tokens_B = np.concatenate([drawn(part) for part in np.stack([uniform_B, within_B], 1).reshape(40, 100, 2)])
    np.testing.assert_allclose(tokens_B // draw.BLOCK, np.floor(uniform_B * 1188 + 1e-4), atol=1)
    np.testing.assert_array_equal(tokens_B % draw.BLOCK, np.floor(within_B * draw.BLOCK))
