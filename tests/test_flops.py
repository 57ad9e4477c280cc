"""FLOPs counted from shapes agree with what XLA counts in the compiled programs of sampling, scoring and update.

XLA counts whole blocks of scores where a query sees half of them (causal), which is taken off by hand, and work that
is no matmul: norms, softmax, rotary angles, log-probs; at width 256 that is 1 to 2 % of each program. It counts the
body of a loop once, so there is one layer, one part, and a chunk that holds everything.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import ModelConfig, UpdateConfig
from rpt_jax.learning import next_token
from rpt_jax.learning.next_token import Sequences
from rpt_jax.learning.update import loss_and_gradients
from rpt_jax.policy import attention, decoder, flops
from rpt_jax.policy.decoder import KeyValues
from rpt_jax.policy.stream import packed, packed_prompts
from rpt_jax.records import Batch, Prompts

MODEL = ModelConfig(vocab_size=512, width=256, layers=1, heads=8, kv_heads=4, head_channels=32, hidden=512)


N, G, P, R = 8, 2, 128, 64  # sizes that streams need not round up: all that is computed is live


def counted(program, *arguments) -> float:
    """XLA's own count for a program, compiled and not run."""
    return jax.jit(program).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.fixture
def one_turn(monkeypatch):
    """All blocks of attention at one time."""
    monkeypatch.setitem(attention.SCORES_AT_ONCE, "cpu", 1 << 40)


@functools.cache
def rollouts():
    """(prompts [N, P], their lengths, responses [N, G, R], their lengths) of random tokens: nothing begins alike."""
    rng = np.random.default_rng(0)
    prompts_NT, tokens_NGR = (rng.integers(1, 500, shape).astype(np.int32) for shape in ((N, P), (N, G, R)))
    return prompts_NT, np.full(N, P, np.int32), tokens_NGR, np.full((N, G), R, np.int32)


def masked(stream, seen: float) -> float:
    """FLOPs of scores that a stream's blocks compute beyond `seen`, the sum over tokens of the keys each attends to."""
    scores = sum(block.queries_UBQ.size * block.keys_UBS.shape[2] for block in stream.blocks)
    return 4 * MODEL.heads * MODEL.head_channels * (scores - seen)


SEEN_BY_PROMPTS, SEEN_BY_RESPONSES = N * P * P / 2, N * G * R * (P + R / 2)


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


def test_a_decode_step_agrees_with_the_compiler():
    """One token for each of N * G rollouts, the prompt's cache shared by its group, S columns of the rollouts' own."""

    def step(params, tokens_B1, positions_B1, prompt, cache):
        hidden_B1D, _ = decoder.forward(params, MODEL, tokens_B1, positions_B1, (prompt, cache))
        return decoder.logits(params, MODEL, hidden_B1D)

    def cache(rows, columns):
        kv = jax.ShapeDtypeStruct((1, rows, MODEL.kv_heads, columns, MODEL.head_channels), jnp.float32)
        return KeyValues(kv, kv, jax.ShapeDtypeStruct((rows, columns), jnp.int32))

    one = jax.ShapeDtypeStruct((N * G, 1), jnp.int32)
    for S in (32, 256):
        steps = counted(step, decoder.shapes(MODEL), one, one, cache(N, P), cache(N * G, S))
        assert flops.forward(MODEL, N * G, P + S + 1, N * G) == pytest.approx(steps, rel=0.03)


def test_sampling_is_prefill_and_every_decode_step(one_turn):
    """The prefill by the compiler's count; R steps by the step above, at cache lengths that grow to R."""
    stream, paths_UNT = packed_prompts(*rollouts()[:2])

    def prefill(params, stream):
        hidden_UTD, kv = decoder.prefill_stream(params, MODEL, stream)
        return decoder.logits(params, MODEL, hidden_UTD[0, paths_UNT[0, :, -1]]), kv

    prefilled = counted(prefill, decoder.shapes(MODEL), stream) - masked(stream, SEEN_BY_PROMPTS)
    steps = sum(flops.forward(MODEL, N * G, P + step + 1, N * G) for step in range(R))
    assert flops.sampling(MODEL, N, N * P, 0, 0) == pytest.approx(prefilled, rel=0.03)
    assert flops.sampling(MODEL, N, N * P, N * G, N * G * R) == pytest.approx(prefilled + steps, rel=0.02)


def test_an_update_agrees_with_the_compiler(one_turn):
    """Loss and gradient of a GRPO step; the optimizer's few operations a parameter are left out on both sides."""
    config = UpdateConfig(token_chunk=4096)
    prompts_NT, lengths_N, tokens_NGR, lengths_NG = rollouts()
    stream = packed(prompts_NT, lengths_N, tokens_NGR, lengths_NG)
    blank_NGR = np.zeros((N, G, R), np.float32)
    parts = jax.tree.map(lambda a: a[None], stream)
    batch = Batch(prompts_NT, lengths_N, tokens_NGR, lengths_NG, blank_NGR, blank_NGR[:, :, 0], parts)
    program = functools.partial(loss_and_gradients, model=MODEL, config=config)
    steps = counted(program, decoder.shapes(MODEL), batch, 1.0) - 3 * masked(
        stream, SEEN_BY_PROMPTS + SEEN_BY_RESPONSES
    )
    assert flops.update(MODEL, N, N * P, N * G, N * G * R) == pytest.approx(steps, rel=0.03)


def test_scoring_of_what_follows_agrees_with_the_compiler(one_turn):
    """information_gain's two passes: G sequences of P + R tokens after a thought, and N plain ones of P."""
    prompts_NT, lengths_N, tokens_NGR, _ = rollouts()
    after = np.concatenate([np.repeat(prompts_NT[:, None], G, axis=1), tokens_NGR], axis=2).reshape(N * G, P + R)
    after, plain = Sequences(after, np.full(N * G, P + R, np.int32)), Sequences(prompts_NT, lengths_N)
    seen, total = (SEEN_BY_PROMPTS + SEEN_BY_RESPONSES, SEEN_BY_PROMPTS), 0.0
    for (tokens_BT, lengths_B), keys in zip((after, plain), seen, strict=True):
        targets_B = np.ones((len(lengths_B), 1, 1), np.int32)
        stream = packed(tokens_BT, lengths_B, targets_B, targets_B[:, :, 0])
        program = functools.partial(next_token._next_logprobs, model=MODEL, rows=len(lengths_B), token_chunk=4096)
        parts = jax.tree.map(lambda a: a[None], stream)
        total += counted(program, decoder.shapes(MODEL), parts) - masked(stream, keys)
    prompts = Prompts(prompts_NT, lengths_N, *[None] * 4)
    assert next_token.scoring_flops(MODEL, after, prompts, plain) == pytest.approx(total, rel=0.03)
