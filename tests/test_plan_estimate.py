"""plan_estimate.py: FLOPs, bytes and seconds of a step against numbers by hand."""

import dataclasses

import pytest

from rpt_jax.config import MeshConfig, ModelConfig, PromptConfig, SampleConfig
from rpt_jax.study import plan_estimate as estimate


def test_flops_and_seconds_by_hand():
    """4 prompts of 2 tokens, 2 responses of 4 tokens each, 1 layer of 8 * 2 * (4 + 2) + 3 * 8 * 16 = 480 weights."""
    model = ModelConfig(vocab_size=10, width=8, layers=1, heads=2, kv_heads=1, head_channels=2, hidden=16)
    config = estimate.PlanRun(
        topology="v5e:2x2",
        batch_size=4,
        model=model,
        mesh=MeshConfig(data=1, fsdp=2, tensor=2),
        prompt=PromptConfig(max_tokens=2),
        sample=SampleConfig(group_size=2, max_tokens=4),
    )
    prefill = 4 * 2 * (2 * (480 + 8 * 1) + 8 * 10)  # two tokens that see one key on average, one of them predicts
    decode = 4 * 2 * (8 * (480 + 8 * (2 + 2)) + 8 * 8 * 10)
    assert estimate.model_flops(config, "prefill") == prefill
    assert estimate.model_flops(config, "decode") == decode
    assert estimate.model_flops(config, "update") == 3 * (prefill + decode)
    weights = 480 + 80  # layers and head; of the embedding a few rows
    assert estimate.collective_bytes(config, "prefill") == weights * 4 / 2 / 2 + 4 * 2 * (2 * 8 * 4 * 2 / 2 / 2)
    # Four calls read all weights of a device; each token sees 2 / 2 + 2 cached places, 2 * 1 * 2 numbers each, twice.
    read = 4 * weights * 4 / 2 + 32 * 3 * 16 * 2 / 4
    assert estimate.seconds(config, "decode") == pytest.approx(max(read / 819e9, decode / 4 / 197e12, 32 * 32 / 200e9))
    halves = dataclasses.replace(config, sample=dataclasses.replace(config.sample, slots=4))
    read = 8 * weights * 4 / 2 + 32 * 4 * 16 * 2 / 4  # half the rollouts at one time, each with a prompt of its own
    assert estimate.seconds(halves, "decode") == pytest.approx(max(read / 819e9, decode / 4 / 197e12, 32 * 32 / 200e9))
