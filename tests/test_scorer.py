"""Scorer: against whole sequences one by one, shared prefix against plain, causality, padding, temperature."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import ModelConfig
from rpt_jax.policy import decoder, scorer

MODEL = ModelConfig(vocab_size=11, width=16, layers=2, heads=2, kv_heads=1, head_channels=8, hidden=24)
PROMPTS_NT = np.array([[3, 1, 4, 1, 5], [9, 0, 0, 0, 0], [2, 6, 5, 0, 0]], np.int32)
PROMPT_LENGTHS_N = np.array([5, 1, 3], np.int32)  # a full one, one of a single token, a ragged one
LENGTHS_NG = np.array([[4, 1], [2, 4], [0, 3]], np.int32)
TOKENS_NGR = np.random.default_rng(0).integers(0, 11, (3, 2, 4)).astype(np.int32)
TOKENS_NGR *= np.arange(4) < LENGTHS_NG[:, :, None]
ROLLOUTS = PROMPTS_NT, PROMPT_LENGTHS_N, TOKENS_NGR, LENGTHS_NG
LIVE_NGR = np.arange(4) < LENGTHS_NG[:, :, None]


@functools.partial(jax.jit, static_argnames=("model", "shared_prefix"))
def score(params, rollouts, temperature=1.0, model=MODEL, shared_prefix=True):
    """24 response tokens in chunks of at most 5."""
    return scorer.score(params, model, *rollouts, temperature, 5, shared_prefix=shared_prefix)


@functools.cache
def policy(model=MODEL):
    """Parameters whose logits are far from uniform."""
    params = jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(0))
    return params | {"head": 2 * params["head"]}


def rows():
    """Each rollout's prompt and response in a row, filled up behind; tokens_BT and lengths_B."""
    tokens_BT = np.zeros((6, 9), np.int32)
    for b, (n, g) in enumerate(np.ndindex(*LENGTHS_NG.shape)):
        row_T = np.concatenate([PROMPTS_NT[n, : PROMPT_LENGTHS_N[n]], TOKENS_NGR[n, g, : LENGTHS_NG[n, g]]])
        tokens_BT[b, : len(row_T)] = row_T
    return tokens_BT, (PROMPT_LENGTHS_N[:, None] + LENGTHS_NG).reshape(-1)


@jax.jit
def full_logits(params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    return decoder.logits(params, MODEL, decoder.forward(params, MODEL, tokens_BT, positions_BT)[0])


def full_log_softmax(temperature):
    z_BTV = np.asarray(full_logits(policy(), rows()[0]), np.float64) / temperature
    return z_BTV - np.log(np.exp(z_BTV).sum(2, keepdims=True))


def by_hand(temperature):
    """Scores picked from the full logits of whole rows, softmax in float64."""
    logprobs_NGR, entropies_NGR = np.zeros((2, *TOKENS_NGR.shape))
    log_p_BTV = full_log_softmax(temperature)
    for b, (n, g) in enumerate(np.ndindex(*LENGTHS_NG.shape)):
        for r in range(LENGTHS_NG[n, g]):
            log_p_V = log_p_BTV[b, PROMPT_LENGTHS_N[n] + r - 1]
            logprobs_NGR[n, g, r] = log_p_V[TOKENS_NGR[n, g, r]]
            entropies_NGR[n, g, r] = -(np.exp(log_p_V) * log_p_V).sum()
    return logprobs_NGR, entropies_NGR


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_full_logits_of_whole_rows(shared_prefix, temperature):
    got = score(policy(), ROLLOUTS, temperature, shared_prefix=shared_prefix)
    for a, b in zip(got, by_hand(temperature), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert not np.asarray(a)[~LIVE_NGR].any()


@functools.partial(jax.jit, static_argnames="shared_prefix")
def objective_gradient(params, shared_prefix):
    mix_NGR = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 2, 4)), jnp.float32)

    def objective(params):
        outputs = scorer.score(params, MODEL, *ROLLOUTS, 0.8, 7, shared_prefix=shared_prefix)
        return jnp.vdot(mix_NGR, jnp.stack(outputs))

    return jax.grad(objective)(params)


def test_shared_prefix_has_the_gradients_of_the_plain_path():
    shared, plain = (objective_gradient(policy(), shared_prefix=s) for s in (True, False))
    scale = max(np.abs(g).max() for g in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale), shared, plain)


def test_response_limit_of_one_token():
    """R = 1: only the prompts run; the same numbers as the first tokens of the longer responses."""
    first = (PROMPTS_NT, PROMPT_LENGTHS_N, TOKENS_NGR[:, :, :1], np.minimum(LENGTHS_NG, 1))
    for a, b in zip(score(policy(), first), score(policy(), ROLLOUTS), strict=True):
        np.testing.assert_allclose(a[..., 0], b[..., 0], rtol=1e-5, atol=1e-6)


def test_longer_padding_of_any_content_changes_nothing():
    prompts_NT = np.pad(PROMPTS_NT, ((0, 0), (0, 3)))
    prompts_NT[np.arange(8) >= PROMPT_LENGTHS_N[:, None]] = 7
    tokens_NGR = np.pad(TOKENS_NGR, ((0, 0), (0, 0), (0, 2)))
    tokens_NGR[np.arange(6) >= LENGTHS_NG[:, :, None]] = 8
    padded = score(policy(), (prompts_NT, PROMPT_LENGTHS_N, tokens_NGR, LENGTHS_NG))
    for a, b in zip(padded, score(policy(), ROLLOUTS), strict=True):
        np.testing.assert_allclose(a[..., :4], b, rtol=1e-5, atol=1e-6)
        assert not np.asarray(a)[..., 4:].any()


def test_no_score_depends_on_what_comes_later():
    """Log-prob r has a gradient by the embedding of every token before place r, and none by those from r on."""
    prompts_NT, tokens_NGR = np.array([[1, 2]], np.int32), np.array([[[3, 4, 5]]], np.int32)

    @jax.jit
    def jacobian(params):
        def logprobs(embedding_VD):
            rollouts = prompts_NT, np.array([2]), tokens_NGR, np.array([[3]])
            return scorer.score(params | {"embedding": embedding_VD}, MODEL, *rollouts)[0][0, 0]

        return jax.jacrev(logprobs)(params["embedding"])

    strength_RV = np.abs(jacobian(policy())).max(axis=2)
    expected_RV = np.zeros((3, 11), bool)
    for r, seen in enumerate([[1, 2], [1, 2, 3], [1, 2, 3, 4]]):
        expected_RV[r, seen] = True
    np.testing.assert_array_equal(strength_RV > 0, expected_RV)


def test_temperature_divides_the_logits():
    """Scores at temperature 0.5 are those of a head twice as large at 1."""
    double = policy() | {"head": 2 * policy()["head"]}
    cold, large = score(policy(), ROLLOUTS, 0.5), score(double, ROLLOUTS, 1.0)
    for a, b in zip(cold, large, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_temperature_0_scores_at_1_as_the_sampler_does():
    jax.tree.map(np.testing.assert_array_equal, score(policy(), ROLLOUTS, 0.0), score(policy(), ROLLOUTS, 1.0))


def test_rollouts_swapped_swap_their_scores():
    swapped = (*ROLLOUTS[:2], TOKENS_NGR[:, ::-1], LENGTHS_NG[:, ::-1])
    for a, b in zip(score(policy(), swapped), score(policy(), ROLLOUTS), strict=True):
        np.testing.assert_allclose(a[:, ::-1], b, rtol=1e-5, atol=1e-6)


def test_bfloat16_model_scores_near_float32():
    """Outputs stay float32 and within the rounding of bf16 activations of the float32 model's."""
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    got = score(policy(), ROLLOUTS, model=model)
    for a, b in zip(got, score(policy(), ROLLOUTS), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.1)
        assert not np.asarray(a)[~LIVE_NGR].any()


def test_plain_sequences_equal_log_softmax():
    tokens_BT, lengths_B = rows()
    score_tokens = jax.jit(scorer.score_tokens, static_argnums=(1, 5))
    got_BT = np.asarray(score_tokens(policy(), MODEL, tokens_BT, lengths_B, 0.7, 3))
    log_p_BTV = full_log_softmax(0.7)
    for b, t in np.ndindex(*tokens_BT.shape):
        expected = log_p_BTV[b, t - 1, tokens_BT[b, t]] if 0 < t < lengths_B[b] else 0.0
        np.testing.assert_allclose(got_BT[b, t], expected, rtol=1e-5, atol=1e-5)
