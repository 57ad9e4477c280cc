"""Claims: bfloat16 learns as float32 does; 20,000 tokens before or in a response, temperatures of 0 and 1e6 and
vocabularies of 97 to 262,144 change no law; the same command twice writes the same bytes, times apart."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
import scipy.special
import toy
import toy_run
from test_sampler import IDS_N2, policy, prompts

from rpt_jax.config import ModelConfig, SampleConfig
from rpt_jax.learning import train
from rpt_jax.policy import decoder, sampler, scorer

SHAPE = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_channels": 8, "hidden": 16}
LONG = 20_000


def drawn(model, length, sampling, seed=0):
    """(prompts of so many random tokens, rollouts)."""
    tokens_1T = np.random.default_rng(seed).integers(0, model.vocab_size, (1, length)).astype(np.int32)
    asked = prompts(tokens_1T, np.array([length], np.int32), IDS_N2[:1])
    return asked, sampler.sample(policy(model), model, sampling, asked, jax.random.key(seed), ())


def scored(model, asked, rollouts, temperature):
    """(log-probs, entropies) of the scorer."""
    given = asked.tokens_NT, asked.lengths_N, rollouts.tokens_NGR, rollouts.lengths_NG
    found = scorer.score(policy(model), model, *given, temperature, token_chunk=512)
    return tuple(np.asarray(each) for each in found)


def full_logits(model, asked, tokens_1R):
    """All logits of prompt and response, float64 [T + R, V]."""
    whole_1T = np.concatenate([asked.tokens_NT, tokens_1R], axis=1)
    hidden_1TD = decoder.forward(policy(model), model, whole_1T, np.arange(whole_1T.shape[1], dtype=np.int32)[None])[0]
    return np.asarray(decoder.logits(policy(model), model, hidden_1TD), np.float64)[0]


@pytest.mark.parametrize(("before", "within"), [(LONG, 16), (16, LONG)])
def test_20_000_tokens(before, within):
    """Cached = uncached at the far end: the sampler's log-probs are the scorer's."""
    model = ModelConfig(vocab_size=97, **SHAPE)
    sampling = SampleConfig(group_size=1, temperature=1.0, max_tokens=within, tokens_per_call=500)
    asked, rollouts = drawn(model, before, sampling)
    assert rollouts.lengths_NG.tolist() == [[within]]
    logprobs_NGR, _ = scored(model, asked, rollouts, 1.0)
    np.testing.assert_allclose(rollouts.logprobs_NGR, logprobs_NGR, atol=2e-4)
    assert np.ptp(rollouts.logprobs_NGR) > 1  # a policy that has something to say


def test_angles_of_far_places():
    """RoPE in float32 against float64: at place 20,000 an angle is off by its rounding, 2e-3 at most."""
    model = ModelConfig(vocab_size=97, **SHAPE)
    places_T = np.array([0, 1, 4095, LONG, 2 * LONG])
    channels = model.head_channels
    x_1TC = np.random.default_rng(0).normal(size=(1, len(places_T), channels)).astype(np.float32)
    turned = np.asarray(decoder.rotate(x_1TC[:, :, None], places_T[None].astype(np.int32), model))[0, :, 0]
    angles = places_T[:, None] * model.rope_theta ** (-2.0 * np.arange(channels // 2) / channels)
    z = (x_1TC[0, :, : channels // 2] + 1j * x_1TC[0, :, channels // 2 :]) * np.exp(1j * angles)
    np.testing.assert_allclose(turned, np.concatenate([z.real, z.imag], axis=-1), atol=6e-3)


def test_temperature_0_and_a_million():
    """Greedy is the arg-max with log-probs of temperature 1; a million is even over the vocabulary."""
    model = ModelConfig(vocab_size=97, **SHAPE)
    sampling = SampleConfig(group_size=4, temperature=0.0, max_tokens=64, tokens_per_call=64)
    asked, greedy = drawn(model, 7, sampling)
    assert (greedy.tokens_NGR == greedy.tokens_NGR[:, :1]).all()
    np.testing.assert_allclose(scored(model, asked, greedy, 1.0)[0], greedy.logprobs_NGR, atol=1e-5)
    logits_TV = full_logits(model, asked, greedy.tokens_NGR[:, 0])
    np.testing.assert_array_equal(logits_TV[6:-1].argmax(axis=1), greedy.tokens_NGR[0, 0])
    asked, even = drawn(model, 7, replace(sampling, temperature=1e6))
    logprobs_NGR, entropies_NGR = scored(model, asked, even, 1e6)
    for each in (logprobs_NGR, even.logprobs_NGR, -entropies_NGR):
        np.testing.assert_allclose(each, -np.log(97), atol=1e-4)
    assert len(np.unique(even.tokens_NGR)) > 80  # of 256 draws; 90 are expected


@pytest.mark.parametrize("vocabulary", [97, 50_257, 262_144])
def test_vocabularies(vocabulary):
    """Sampler and scorer against float64 over all logits; the last token of the vocabulary can be scored."""
    model = ModelConfig(vocab_size=vocabulary, **SHAPE)
    asked, rollouts = drawn(model, 5, SampleConfig(group_size=2, temperature=0.8, max_tokens=6, tokens_per_call=6))
    tokens_NGR = rollouts.tokens_NGR.copy()
    tokens_NGR[0, 1, -1] = vocabulary - 1
    logprobs_NGR, entropies_NGR = scored(model, asked, rollouts.replace(tokens_NGR=tokens_NGR), 0.8)
    for g in range(2):
        log_p_TV = scipy.special.log_softmax(full_logits(model, asked, tokens_NGR[:, g])[4:-1] / 0.8, axis=1)
        np.testing.assert_allclose(logprobs_NGR[0, g], log_p_TV[range(6), tokens_NGR[0, g]], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(entropies_NGR[0, g], -(np.exp(log_p_TV) * log_p_TV).sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(rollouts.logprobs_NGR[0, 0], logprobs_NGR[0, 0], atol=1e-5)


def test_bfloat16_learns_as_float32_does(tmp_path):
    """The same run: rewards within what seeds differ by, sampler and scorer within the rounding of eight bits."""
    rewards = {}
    for dtype in ("float32", "bfloat16"):
        config = toy.config(tmp_path / dtype, steps=12)
        model, params, tokenizer = toy.arguments()["policy"]
        train.train(config, **toy.arguments(policy=(replace(model, dtype=dtype), params, tokenizer)))
        rows = toy.rows_of(tmp_path / dtype)
        rewards[dtype] = [row["reward"] for row in rows]
        mean, peak = ({"float32": (1e-6, 1e-4), "bfloat16": (5e-3, 0.1)})[dtype]
        assert max(row["mismatch_mean"] for row in rows) < mean and max(row["mismatch_max"] for row in rows) < peak
    early, late = (np.mean([rewards[d][part] for d in rewards], axis=1) for part in (slice(0, 4), slice(-4, None)))
    assert (late > early).all() and abs(np.subtract(*late)) < 0.15, rewards


def test_the_same_command_writes_the_same_bytes(tmp_path):
    """In two processes; all that differs is seconds and what follows from them."""
    both = [toy_run.start(tmp_path / name, 1, 1, (1, 1, 1), steps=4) for name in "ab"]
    errors = [toy_run.finish(each) for each in both]
    assert all(each.returncode == 0 for (each,) in both), errors
    times = re.compile(rb'"(seconds\w*|\w*per_second|programs_compiled)": [^,}]+')
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
        first, second = ((tmp_path / run / name).read_bytes() for run in "ab")
        assert first and times.sub(b"", first) == times.sub(b"", second), name
