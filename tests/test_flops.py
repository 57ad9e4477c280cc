"""FLOPs counted from shapes agree with what XLA counts, up to the elementwise work that is left out."""

import jax
import jax.numpy as jnp
import pytest

from rpt_jax.config import ModelConfig
from rpt_jax.policy import decoder, flops

MODEL = ModelConfig(vocab_size=512, width=256, layers=1, heads=8, kv_heads=4, head_channels=32, hidden=512)


def test_forward_agrees_with_the_compiler():
    """XLA counts the whole T x T attention, so `seen` is T; loop bodies count once, so there is one layer."""
    B, T = 4, 64

    def run(params, tokens_BT):
        hidden_BTD, _ = decoder.forward(params, MODEL, tokens_BT, jnp.broadcast_to(jnp.arange(T)[None], (B, T)))
        return decoder.logits(params, MODEL, hidden_BTD)

    params = jax.eval_shape(lambda: decoder.init(MODEL, jax.random.key(0)))
    counted = jax.jit(run).lower(params, jax.ShapeDtypeStruct((B, T), jnp.int32)).compile().cost_analysis()["flops"]
    assert flops.forward(MODEL, B * T, T, B * T) == pytest.approx(counted, rel=0.05)


def test_by_hand():
    tiny = ModelConfig(vocab_size=10, width=4, layers=2, heads=2, kv_heads=1, head_channels=2, hidden=3)
    # a token and layer: q 4*4, k and v 4*2 each, o 4*4, three of 4*3; attention 2 * 2 * 2 for each key
    weights = 16 + 8 + 8 + 16 + 36
    assert flops.forward(tiny, 5, 3, 1) == 2 * (2 * 5 * (weights + 8 * 3) + 40)


def test_a_shared_prompt_costs_once():
    one = flops.sampling(MODEL, 1, 100, 8, 80)
    alone = flops.sampling(MODEL, 8, 800, 8, 80)
    per_token = flops.forward(MODEL, 700, 50, 7)
    assert alone - one == pytest.approx(per_token)
    assert flops.update(MODEL, 1, 100, 8, 80) == 3 * one


def test_a_shared_document_costs_once():
    """Two positions of one document of 100 tokens: the layers run 100 tokens for both, responses see what they saw."""
    apart, together = flops.sampling(MODEL, 2, 200, 8, 80), flops.sampling(MODEL, 2, 200, 8, 80, 100)
    assert apart - together == pytest.approx(flops.forward(MODEL, 100, 50, 0))
    assert flops.update(MODEL, 2, 200, 8, 80, 100) == 3 * together
