"""The decoder: Llama, Qwen2/2.5 and Qwen3 by configuration; pure functions over explicit parameters and caches.

In: token ids with the place of each token in its own sequence, and any keys and values computed before. Out: hidden
states after the last norm, and the keys and values of these tokens. One function serves three uses: prefill (no
context), decode (one token; context = the prompt's and the rollout's own cache), and training of G responses that
share a prompt (context = the prompt's keys and values, differentiated through).

One mask source: a query at position q sees the keys with 0 <= position <= q of its own sequence; padding has -1.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from rpt_jax.config import ModelConfig, RopeScaling
from rpt_jax.records import Array, Params


@struct.dataclass
class KeyValues:
    """Keys (rotated) and values of S tokens in every layer, with the tokens' positions (-1: nothing there)."""

    k_LBKSC: Array
    v_LBKSC: Array
    positions_BS: Array


def rope_frequencies(channels: int, theta: float, scaling: RopeScaling) -> Array:
    """Angles per token for each channel pair, C/2 values in radians.

    theta^(-2i/C) [RoFormer, arXiv 2104.09864]; `llama3` stretches long wavelengths by `factor` and blends between the
    two cut-offs [Llama 3.1 release]; `yarn` does so by the number of rotations over the original context
    [arXiv 2309.00071, section 3.2]. Its blend runs evenly over the pairs between the two cut-offs, as in the authors'
    code and transformers; the paper's formula has it run evenly over rotations.
    """
    base = theta ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    if scaling.kind == "none":
        return base
    if scaling.kind == "llama3":
        rotations = scaling.original_context * base / (2 * jnp.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        keep = jnp.clip((rotations - low) / (high - low), 0.0, 1.0)
    else:
        pair = partial(_yarn_pair, channels=channels, theta=theta, context=scaling.original_context)
        first = max(math.floor(pair(scaling.beta_fast)), 0)
        last = min(math.ceil(pair(scaling.beta_slow)), channels - 1)
        ramp = (jnp.arange(channels // 2) - first) / max(last - first, 0.001)
        keep = 1.0 - jnp.clip(ramp, 0.0, 1.0)
    return base * keep + base / scaling.factor * (1.0 - keep)


def _yarn_pair(rotations: float, *, channels: int, theta: float, context: int) -> float:
    """The (fractional) channel pair that turns `rotations` times over the context."""
    return channels * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _rope_gain(scaling: RopeScaling) -> float:
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def rotate(x_BHTC: Array, positions_BT: Array, config: ModelConfig) -> Array:
    """Rotary embedding, pairs (i, i + C/2) as Hugging Face checkpoints have them; float32 inside."""
    frequencies_C = rope_frequencies(config.head_channels, config.rope_theta, config.rope_scaling)
    angles_B1TC = positions_BT[:, None, :, None].astype(jnp.float32) * frequencies_C[None, None, None, :]
    gain = _rope_gain(config.rope_scaling)
    cos_B1TC, sin_B1TC = jnp.cos(angles_B1TC) * gain, jnp.sin(angles_B1TC) * gain
    left, right = jnp.split(x_BHTC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos_B1TC - right * sin_B1TC, right * cos_B1TC + left * sin_B1TC], axis=-1)
    return turned.astype(x_BHTC.dtype)


def attend(q_BHTC: Array, positions_BT: Array, sources: tuple) -> Array:
    """Exact softmax attention of B x T queries over all sources together; [B, H, T, C].

    sources: (k_NKSC, v_NKSC, positions_NS) each; a source with N rows serves B = N*G query rows, G in a row, and is
    read once for the whole group. Scores and softmax are float32.
    """
    B, H, T, C = q_BHTC.shape
    K = sources[0][0].shape[1]
    scores = []
    for k_NKSC, _, keys_NS in sources:
        N, S = keys_NS.shape
        q_NGKQTC = q_BHTC.reshape(N, B // N, K, H // K, T, C)
        z = jnp.einsum("ngkqtc,nksc->nkgqts", q_NGKQTC, k_NKSC, preferred_element_type=jnp.float32) * C**-0.5
        places_NGT = positions_BT.reshape(N, B // N, T)
        seen_NGTS = (keys_NS[:, None, None, :] >= 0) & (keys_NS[:, None, None, :] <= places_NGT[..., None])
        z = jnp.where(seen_NGTS[:, None, :, None], z, -1e30)
        scores.append(z.swapaxes(1, 2).reshape(B, K, H // K, T, S))
    weights_BKQTS = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q_BHTC.dtype)
    out_BHTC, start = jnp.zeros_like(q_BHTC), 0
    for _, v_NKSC, keys_NS in sources:
        N, S = keys_NS.shape
        w_NGKQTS = weights_BKQTS[..., start : start + S].reshape(N, B // N, K, H // K, T, S)
        out_BHTC = out_BHTC + jnp.einsum("ngkqts,nksc->ngkqtc", w_NGKQTS, v_NKSC).reshape(B, H, T, C)
        start += S
    return out_BHTC


def project(x: Array, w: Array, axes: int = 1) -> Array:
    """Contracts the last `axes` axes of x with the first of w, as one plain matrix product.

    Flattened on purpose: on CPU, XLA runs the three-dimensional form and its gradients at two thirds of the speed.
    """
    lead, inputs = x.shape[: x.ndim - axes], math.prod(w.shape[:axes])
    return (x.reshape(-1, inputs) @ w.reshape(inputs, -1)).reshape(*lead, *w.shape[axes:])


class RMSNorm(nn.Module):
    epsilon: float
    param_dtype: str

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(self.param_dtype))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU; scanned over layers."""

    config: ModelConfig

    def weight(self, name, shape, axes, inputs, scale=1.0):
        """A matrix with N(0, scale^2 / fan-in) entries; `inputs` leading axes make the fan-in."""
        init = nn.with_logical_partitioning(nn.initializers.normal(scale * math.prod(shape[:inputs]) ** -0.5), axes)
        return self.param(name, init, shape, jnp.dtype(self.config.param_dtype)).astype(self.config.dtype)

    def bias(self, name, shape, axes):
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        return self.param(name, init, shape, jnp.dtype(self.config.param_dtype)).astype(self.config.dtype)

    @nn.compact
    def __call__(self, x_BTD, positions_BT, context_positions, context_kv):
        config = self.config
        norm = partial(RMSNorm, config.norm_epsilon, config.param_dtype)
        x_BTD, kv = self.attention(
            x_BTD, norm(name="attention_norm")(x_BTD), positions_BT, context_positions, context_kv
        )
        return x_BTD + self.swiglu(norm(name="mlp_norm")(x_BTD)), kv

    def attention(self, x_BTD, normed_BTD, positions_BT, context_positions, context_kv):
        config = self.config
        D, H, K, C = config.width, config.heads, config.kv_heads, config.head_channels
        q = project(normed_BTD, self.weight("wq", (D, H, C), ("embed", "heads", "channels"), 1))
        k = project(normed_BTD, self.weight("wk", (D, K, C), ("embed", "kv_heads", "channels"), 1))
        v = project(normed_BTD, self.weight("wv", (D, K, C), ("embed", "kv_heads", "channels"), 1))
        if config.qkv_bias:
            q = q + self.bias("bq", (H, C), ("heads", "channels"))[None, None]
            k = k + self.bias("bk", (K, C), ("kv_heads", "channels"))[None, None]
            v = v + self.bias("bv", (K, C), ("kv_heads", "channels"))[None, None]
        if config.qk_norm:
            q = RMSNorm(config.norm_epsilon, config.param_dtype, name="q_norm")(q)
            k = RMSNorm(config.norm_epsilon, config.param_dtype, name="k_norm")(k)
        q_BHTC, k_BKTC, v_BKTC = (a.swapaxes(1, 2) for a in (q, k, v))
        q_BHTC, k_BKTC = rotate(q_BHTC, positions_BT, config), rotate(k_BKTC, positions_BT, config)
        seen = tuple((ck, cv, p) for (ck, cv), p in zip(context_kv, context_positions, strict=True))
        out_BHTC = attend(q_BHTC, positions_BT, (*seen, (k_BKTC, v_BKTC, positions_BT)))
        depth = (2 * config.layers) ** -0.5  # residual branches start small  [GPT-2]
        wo = self.weight("wo", (H, C, D), ("heads", "channels", "embed"), 2, depth)
        return x_BTD + project(out_BHTC.swapaxes(1, 2), wo, axes=2), (k_BKTC, v_BKTC)

    def swiglu(self, x_BTD):
        config = self.config
        D, F = config.width, config.hidden
        gate_BTF = project(x_BTD, self.weight("w_gate", (D, F), ("embed", "mlp"), 1))
        up_BTF = project(x_BTD, self.weight("w_up", (D, F), ("embed", "mlp"), 1))
        w_down = self.weight("w_down", (F, D), ("mlp", "embed"), 1, (2 * config.layers) ** -0.5)
        return project(jax.nn.silu(gate_BTF) * up_BTF, w_down)


REMAT = {"layer": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Decoder(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, context: tuple[KeyValues, ...] = ()):
        config = self.config
        V, D = config.vocab_size, config.width
        dtype = jnp.dtype(config.param_dtype)
        init = nn.with_logical_partitioning(
            nn.initializers.normal(D**-0.5 if config.tied_head else 1.0), ("vocab", "embed")
        )
        embedding_VD = self.param("embedding", init, (V, D), dtype)
        if not config.tied_head:
            self.param(
                "head", nn.with_logical_partitioning(nn.initializers.normal(D**-0.5), ("embed", "vocab")), (D, V), dtype
            )
        x_BTD = embedding_VD.astype(config.dtype)[tokens_BT]
        layer = Layer if config.remat == "none" else nn.remat(Layer, policy=REMAT[config.remat], prevent_cse=False)
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            out_axes=0,
            length=config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, name="layers")
        context_kv = tuple((c.k_LBKSC, c.v_LBKSC) for c in context)
        context_positions = tuple(c.positions_BS for c in context)
        x_BTD, (k_LBKTC, v_LBKTC) = scanned(x_BTD, positions_BT, context_positions, context_kv)
        x_BTD = RMSNorm(config.norm_epsilon, config.param_dtype, name="final_norm")(x_BTD)
        return x_BTD, KeyValues(k_LBKTC, v_LBKTC, positions_BT)


def _init_boxed(config: ModelConfig, key: Array) -> Params:
    one = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, one, one)["params"]


def init(config: ModelConfig, key: Array) -> Params:
    """Fresh parameters of a decoder; layers are stacked on a leading L axis."""
    return nn.meta.unbox(_init_boxed(config, key))


def logical_axes(config: ModelConfig) -> Params:
    """The tree of `init` with the logical axis names of each array, for mesh.py."""
    boxed = jax.eval_shape(partial(_init_boxed, config), jax.random.key(0))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def forward(
    params: Params, config: ModelConfig, tokens_BT: Array, positions_BT: Array, context: tuple[KeyValues, ...] = ()
) -> tuple[Array, KeyValues]:
    """Hidden states [B, T, D] after the final norm and the KeyValues of these tokens.

    positions_BT: place of each token in its own sequence, -1 for padding. A context with N rows serves B = N*G rows
    of tokens, G consecutive ones each; its keys are seen like the tokens' own.
    """
    return Decoder(config).apply({"params": params}, tokens_BT, positions_BT, context)


def output_head(params: Params, config: ModelConfig) -> Array:
    """Output matrix in the computation's dtype: [D, V], or with a tied head the embedding as it is, [V, D]."""
    return params["embedding" if config.tied_head else "head"].astype(config.dtype)


def logits(params: Params, config: ModelConfig, hidden: Array) -> Array:
    """Next-token logits, float32 [..., V]; for a few positions only (decode): scoring goes through the kernel."""
    product = "...d,vd->...v" if config.tied_head else "...d,dv->...v"
    return jnp.einsum(product, hidden, output_head(params, config), preferred_element_type=jnp.float32)


def positions_from_lengths(lengths_B: Array, T: int) -> Array:
    """0, 1, .. for the live tokens of right-padded rows, -1 behind them; int32 [B, T]."""
    places_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    return jnp.where(places_1T < lengths_B[:, None], places_1T, -1)
