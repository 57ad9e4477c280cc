"""Decoder: numbers by hand, a float64 decoder in plain numpy as the judge, and the laws of cache and padding (of
context and gradients: test_decoder_gradients.py).

The judge goes through layers, heads and queries one at a time and turns channel pairs as complex numbers; it shares
no code with the decoder, so it also checks the scan over layers and the grouped heads.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import ModelConfig, RopeScaling
from rpt_jax.policy import decoder
from rpt_jax.policy.decoder import KeyValues

MODEL = ModelConfig(vocab_size=13, width=16, layers=2, heads=4, kv_heads=2, head_channels=8, hidden=24)
LLAMA3 = RopeScaling("llama3", factor=8.0, original_context=512)
YARN = RopeScaling("yarn", factor=4.0, original_context=512)
FAMILIES = {
    "llama": replace(MODEL, rope_theta=500.0, rope_scaling=LLAMA3, norm_epsilon=1e-2),
    "qwen2": replace(MODEL, qkv_bias=True, tied_head=True, kv_heads=1, rope_theta=1000.0, rope_scaling=YARN),
    "qwen3": replace(MODEL, qk_norm=True, kv_heads=4, layers=3),
}
TOKENS_BT = np.array([[3, 1, 4, 9, 5, 9, 2], [6, 5, 3, 5, 8, 7, 0]], np.int32)
POSITIONS_BT = np.array([[0, 3, 11, 40, 41, 100, 300], [0, 1, -1, 2, 90, -1, -1]], np.int32)  # jumps, holes, padding


@functools.cache
def policy(model: ModelConfig = MODEL):
    """Parameters far from any symmetry: no bias is 0, no norm scale 1."""
    rng = np.random.default_rng(0)
    shapes = decoder.shapes(model)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + ("scale" in str(path[-1])), params)


@functools.partial(jax.jit, static_argnames="model")
def forward(params, tokens_BT, positions_BT, model=MODEL):
    return decoder.forward(params, model, tokens_BT, positions_BT)[0]


def hidden(*args):
    """Hidden states [B, T, D] on the host."""
    return np.asarray(forward(*args))


def assert_close(tree, expected, rtol=1e-4):
    """Equal up to float32 rounding of values that are sums of others of like size."""
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 10 * scale), tree, expected)


def judge(params, model: ModelConfig, tokens_T, positions_T):
    """Hidden states [T, D] of one sequence, float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x_TD = params["embedding"][tokens_T]
    for layer in range(model.layers):
        w = jax.tree.map(lambda leaf, i=layer: leaf[i], params["layers"])
        x_TD = x_TD + judge_attention(w, model, judge_norm(x_TD, w["attention_norm"], model), positions_T)
        y_TD = judge_norm(x_TD, w["mlp_norm"], model)
        gate_TF = y_TD @ w["w_gate"]
        x_TD = x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * (y_TD @ w["w_up"])) @ w["w_down"]
    return judge_norm(x_TD, params["final_norm"], model)


def judge_norm(x, norm, model):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon) * norm["scale"]


def judge_attention(w, model, y_TD, positions_T):
    angles_C = judge_frequencies(model.head_channels, model.rope_theta, model.rope_scaling)
    gain = 0.1 * np.log(model.rope_scaling.factor) + 1 if model.rope_scaling.kind == "yarn" else 1.0

    def head_of(kind, head):
        x_TC = y_TD @ w[f"w{kind}"][:, head] + (w[f"b{kind}"][head] if model.qkv_bias else 0)
        if kind == "v":
            return x_TC
        x_TC = judge_norm(x_TC, w[f"{kind}_norm"], model) if model.qk_norm else x_TC
        pairs = x_TC[:, : model.head_channels // 2] + 1j * x_TC[:, model.head_channels // 2 :]
        pairs = pairs * gain * np.exp(1j * positions_T[:, None] * angles_C)
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    out_TD = np.zeros_like(y_TD)
    for head in range(model.heads):
        shared = head // (model.heads // model.kv_heads)
        q_TC, k_TC, v_TC = head_of("q", head), head_of("k", shared), head_of("v", shared)
        for t in np.flatnonzero(positions_T >= 0):
            seen = (positions_T >= 0) & (positions_T <= positions_T[t])
            weights = np.exp(k_TC[seen] @ q_TC[t] / np.sqrt(model.head_channels))
            out_TD[t] += weights / weights.sum() @ v_TC[seen] @ w["wo"][head]
    return out_TD


def judge_frequencies(channels, theta, scaling):
    """Pair by pair: llama3 by wavelengths as the Llama 3.1 release has it, yarn by counting rotations."""
    plain = np.array([1 / theta ** (2 * i / channels) for i in range(channels)])  # beyond C/2 only to count on
    turns = scaling.original_context * plain / (2 * np.pi)
    first = max([i for i in range(channels) if turns[i] >= scaling.beta_fast], default=0)
    last = min([i for i in range(channels) if turns[i] <= scaling.beta_slow], default=channels - 1)
    out = []
    for i, frequency in enumerate(plain[: channels // 2]):
        if scaling.kind == "llama3":
            wavelength, old = 2 * np.pi / frequency, scaling.original_context
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            if wavelength > old / low:
                frequency /= scaling.factor
            elif wavelength > old / high:
                smooth = (old / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        elif scaling.kind == "yarn" and i > first:
            stretched = min((i - first) / (last - first), 1)
            frequency = frequency * (1 - stretched) + frequency / scaling.factor * stretched
        out.append(frequency)
    return np.array(out)


def test_rms_norm_by_hand():
    """[3, 4] has mean square 12.5; with epsilon 12.5 the divisor is 5. Large bf16 inputs do not lose the mean."""
    norm = decoder.RMSNorm(12.5, "float32")
    y = norm.apply({"params": {"scale": jnp.array([1.0, 2.0])}}, jnp.array([[3.0, 4.0]]))
    np.testing.assert_allclose(y, [[0.6, 1.6]], rtol=1e-6)
    many = jnp.full((1, 1000), 3.0, jnp.bfloat16)
    y = decoder.RMSNorm(0.0, "float32").apply({"params": {"scale": jnp.ones(1000)}}, many)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1.0)


def test_rope_by_hand():
    """theta 100 and 4 channels: channels (0, 2) turn by 1 radian a token, (1, 3) by 0.1."""
    model = replace(MODEL, head_channels=4, rope_theta=100.0)
    x_BTHC = jnp.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])[None, :, None]
    turned = decoder.rotate(x_BTHC, jnp.array([[3, 3, 2]]), model)[0, :, 0]
    expected = [
        [np.cos(3), 0, np.sin(3), 0],
        [0, np.cos(0.3), 0, np.sin(0.3)],
        [-np.sin(2), 0, np.cos(2), 0],
    ]
    np.testing.assert_allclose(turned, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "theta", "scaling"),
    [
        (128, 5e5, RopeScaling("llama3", 8.0, 8192)),  # Llama 3.1
        (64, 5e5, RopeScaling("llama3", 32.0, 8192)),  # Llama 3.2 1B
        (128, 1e6, RopeScaling("yarn", 4.0, 32768)),  # Qwen2.5 and Qwen3 beyond 32k
        (64, 1e4, RopeScaling("yarn", 16.0, 4096, beta_fast=20.0, beta_slow=2.0)),
        (8, 1e4, RopeScaling("yarn", 4.0, 64)),  # even the fastest pair turns less than beta_fast times
    ],
)
def test_stretched_frequencies(channels, theta, scaling):
    """As counted pair by pair; the fastest pair of a long context is left alone, the slowest stretched in full."""
    got = decoder.rope_frequencies(channels, theta, scaling)
    np.testing.assert_allclose(got, judge_frequencies(channels, theta, scaling), rtol=1e-5)
    plain = decoder.rope_frequencies(channels, theta, RopeScaling())
    np.testing.assert_allclose(plain, theta ** (-np.arange(0, channels, 2) / channels), rtol=1e-5)
    np.testing.assert_allclose(got[0], plain[0])
    if channels > 8:
        np.testing.assert_allclose(got[-1], plain[-1] / scaling.factor, rtol=1e-5)
        assert len(set(np.round(np.asarray(got / plain), 4))) > 3, "nothing is blended between the two ends"


@pytest.mark.parametrize(
    ("scaling", "gain"),
    [
        (RopeScaling("yarn", 4.0), 1.1386294),  # 0.1 ln 4 + 1
        (RopeScaling("yarn", 4.0, attention_factor=1.5), 1.5),
        (RopeScaling("llama3", 4.0), 1.0),
    ],
)
def test_yarn_gain_is_on_cos_and_sin(scaling, gain):
    turned = decoder.rotate(jnp.ones((1, 1, 1, 8)), jnp.array([[5]]), replace(MODEL, rope_scaling=scaling))
    np.testing.assert_allclose(np.linalg.norm(turned), gain * np.sqrt(8), rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_judge(family):
    """Hidden states of live tokens and logits, with stretched RoPE, biases, qk norm and tied head all at work."""
    model = FAMILIES[family]
    got_BTD = hidden(policy(model), TOKENS_BT, POSITIONS_BT, model)
    head_DV = np.asarray(policy(model)["embedding"].T if model.tied_head else policy(model)["head"], np.float64)
    assert ("head" in policy(model)) is not model.tied_head
    logits_BTV = np.asarray(decoder.logits(policy(model), model, got_BTD))
    assert logits_BTV.dtype == np.float32
    for b in range(2):
        live = POSITIONS_BT[b] >= 0
        expected_TD = judge(policy(model), model, TOKENS_BT[b], POSITIONS_BT[b])[live]
        np.testing.assert_allclose(got_BTD[b, live], expected_TD, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logits_BTV[b, live], expected_TD @ head_DV, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "names"), [("qwen2", ["bq", "bk", "bv"]), ("qwen3", ["q_norm", "k_norm"]), ("llama", ["wo", "w_down"])]
)
def test_every_option_acts(family, names):
    """The parameters that an option brings change the output; the judge above could be blind to the same option."""
    model = FAMILIES[family]
    before_BTD = hidden(policy(model), TOKENS_BT, POSITIONS_BT, model)
    for name in names:
        layers = policy(model)["layers"]
        changed = policy(model) | {"layers": layers | {name: jax.tree.map(jnp.zeros_like, layers[name])}}
        after_BTD = hidden(changed, TOKENS_BT, POSITIONS_BT, model)
        assert np.abs(after_BTD - before_BTD)[POSITIONS_BT >= 0].max() > 1e-2, name


def test_grouped_heads_are_full_heads_with_repeated_keys_and_values():
    full = replace(MODEL, kv_heads=4)
    layers = policy()["layers"]
    repeated = {name: jnp.repeat(layers[name], 2, axis=2) for name in ("wk", "wv")}
    got_BTD = hidden(policy() | {"layers": layers | repeated}, TOKENS_BT, POSITIONS_BT, full)
    assert_close(got_BTD[POSITIONS_BT >= 0], hidden(policy(), TOKENS_BT, POSITIONS_BT)[POSITIONS_BT >= 0])


def test_padding_changes_nothing():
    """What stands in padding is not seen, and a row without it gives the same."""
    padded_BTD = hidden(policy(), TOKENS_BT, POSITIONS_BT)
    other_BT = np.where(POSITIONS_BT >= 0, TOKENS_BT, 11)
    live = POSITIONS_BT[1] >= 0
    np.testing.assert_array_equal(hidden(policy(), other_BT, POSITIONS_BT)[1, live], padded_BTD[1, live])
    alone_TD = hidden(policy(), TOKENS_BT[1:, live], POSITIONS_BT[1:, live])[0]
    assert_close(alone_TD, padded_BTD[1, live])
    np.testing.assert_array_equal(
        decoder.positions_from_lengths(jnp.array([2, 0, 3]), 3), [[0, 1, -1], [-1, -1, -1], [0, 1, 2]]
    )


@jax.jit
def extend(params, tokens_BT, positions_BT, cache, slot):
    """Hidden states of some more tokens, and the cache with them from `slot` on."""
    hidden_BTD, new = decoder.forward(params, MODEL, tokens_BT, positions_BT, (cache,))
    return hidden_BTD, KeyValues(
        jax.lax.dynamic_update_slice_in_dim(cache.k_LBKSC, new.k_LBKSC, slot, axis=3),
        jax.lax.dynamic_update_slice_in_dim(cache.v_LBKSC, new.v_LBKSC, slot, axis=3),
        jax.lax.dynamic_update_slice_in_dim(cache.positions_BS, new.positions_BS, slot, axis=1),
    )


@pytest.mark.parametrize("chunk", [1, 3])
def test_cached_decode_equals_the_full_forward_pass(chunk):
    tokens_BT, positions_BT = np.tile(TOKENS_BT[:, :6], 2), np.arange(12)[None].repeat(2, axis=0)
    positions_BT[1, 9:] = -1
    empty = jnp.full((2, 2, 2, 14, 8), 9.0)  # L, B, K, S, C; what stands in empty slots does not matter
    cache = KeyValues(empty, empty, jnp.full((2, 14), -1))
    parts = []
    for t in range(0, 12, chunk):
        part, cache = extend(policy(), tokens_BT[:, t : t + chunk], positions_BT[:, t : t + chunk], cache, t)
        parts.append(np.asarray(part))
    live = positions_BT >= 0
    assert_close(np.concatenate(parts, axis=1)[live], hidden(policy(), tokens_BT, positions_BT)[live])


def test_bfloat16_is_close_to_float32():
    model = replace(MODEL, dtype="bfloat16")
    got_BTD = hidden(policy(), TOKENS_BT, POSITIONS_BT, model)
    assert got_BTD.dtype == jnp.bfloat16 and decoder.logits(policy(), model, got_BTD).dtype == jnp.float32
    error_BTD = np.asarray(got_BTD, np.float32) - hidden(policy(), TOKENS_BT, POSITIONS_BT)
    assert 0 < np.abs(error_BTD[POSITIONS_BT >= 0]).max() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_logical_axes_name_every_axis_of_every_parameter(family):
    axes = decoder.logical_axes(FAMILIES[family])
    names = jax.tree.map(lambda leaf, names: (len(names), names[0]), policy(FAMILIES[family]), axes)
    ranks = jax.tree.map(lambda leaf: leaf.ndim, policy(FAMILIES[family]))
    assert jax.tree.map(lambda pair: pair[0], names, is_leaf=lambda x: isinstance(x, tuple)) == ranks
    assert {pair[1] for pair in jax.tree.leaves(names["layers"], is_leaf=lambda x: isinstance(x, tuple))} == {"layers"}
    assert axes["layers"]["wq"] == ("layers", "embed", "heads", "channels")
    assert axes["embedding"] == ("vocab", "embed")


def test_fresh_parameters():
    """Layers differ, matrices have variance 1 / fan-in, those that end a branch 1 / (2 L fan-in); dtype is kept."""
    model = replace(MODEL, width=64, heads=8, kv_heads=8, hidden=128, qkv_bias=True, param_dtype="bfloat16")
    params = jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    layers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params["layers"])
    assert np.abs(layers["wq"][0] - layers["wq"][1]).max() > 0.1
    fans = {"wq": 64, "wk": 64, "wv": 64, "wo": 4 * 64, "w_gate": 64, "w_up": 64, "w_down": 4 * 128}
    for name, fan in fans.items():
        np.testing.assert_allclose(layers[name].std() * np.sqrt(fan), 1.0, atol=0.05, err_msg=name)
    assert not layers["bq"].any() and (layers["mlp_norm"]["scale"] == 1).all()
