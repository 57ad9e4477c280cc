"""The decoder: Llama, Qwen2/2.5 and Qwen3 by configuration; pure functions over explicit parameters and caches.

In: token ids with the place of each token in its own sequence, and any keys and values computed before. Out: hidden
states after the last norm, and the keys and values of these tokens. Three uses: whole sequences (no context), decode
(one token; context = the prompt's and the rollout's own cache), and streams in which shared prefixes stand once
(prefill, and training of G responses that share a prompt; stream.py).

One mask source: a query at position q sees the keys with 0 <= position <= q of its own sequence; padding has -1.
"""

import math
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

from rpt_jax.config import ModelConfig, RopeScaling
from rpt_jax.mesh import copies_of_heads, laid_out, whole_over_fsdp
from rpt_jax.policy.attention import attend, attend_in_blocks
from rpt_jax.policy.stream import Stream
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


def rotate(x_BTHC: Array, positions_BT: Array, config: ModelConfig) -> Array:
    """Rotary embedding, pairs (i, i + C/2) as Hugging Face checkpoints have them; float32 inside."""
    frequencies_C = rope_frequencies(config.head_channels, config.rope_theta, config.rope_scaling)
    angles_BT1C = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_C[None, None, None, :]
    gain = _rope_gain(config.rope_scaling)
    cos_BT1C, sin_BT1C = jnp.cos(angles_BT1C) * gain, jnp.sin(angles_BT1C) * gain
    left, right = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos_BT1C - right * sin_BT1C, right * cos_BT1C + left * sin_BT1C], axis=-1)
    return turned.astype(x_BTHC.dtype)


def project(x: Array, w: Array, axes: int = 1) -> Array:
    """Contracts the last `axes` axes of x with the first of w, as one plain matrix product.

    Flattened on purpose: on CPU, XLA runs the three-dimensional form and its gradients at two thirds of the speed.
    """
    lead, inputs = x.shape[: x.ndim - axes], math.prod(w.shape[:axes])
    return (x.reshape(-1, inputs) @ w.reshape(inputs, -1)).reshape(*lead, *w.shape[axes:])


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + epsilon) * scale, float32 inside  [arXiv 1910.07467]."""

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
    keep: bool = False  # give back keys and values of a stream, too

    def weight(self, name, shape, axes, inputs, scale=1.0):
        """A matrix with N(0, scale^2 / fan-in) entries; `inputs` leading axes make the fan-in."""
        init = nn.with_logical_partitioning(nn.initializers.normal(scale * math.prod(shape[:inputs]) ** -0.5), axes)
        return self.param(name, init, shape, jnp.dtype(self.config.param_dtype)).astype(self.config.dtype)

    def biased(self, x_BTHC, name, axes):
        """With a bias for each head, added in float32, as its gradient is then summed over all tokens."""
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        bias_HC = self.param(name, init, x_BTHC.shape[2:], jnp.dtype(self.config.param_dtype)).astype(self.config.dtype)
        return (x_BTHC.astype(jnp.float32) + bias_HC.astype(jnp.float32)[None, None]).astype(x_BTHC.dtype)

    @nn.compact
    def __call__(self, x_BTD, positions_BT, context_positions, stream, context_kv):
        config = self.config
        norm = partial(RMSNorm, config.norm_epsilon, config.param_dtype)
        x_BTD, kv = self.attention(
            x_BTD, norm(name="attention_norm")(x_BTD), positions_BT, context_positions, stream, context_kv
        )
        return x_BTD + self.swiglu(norm(name="mlp_norm")(x_BTD)), kv

    def attention(self, x_BTD, normed_BTD, positions_BT, context_positions, stream, context_kv):
        config = self.config
        D, H, K, C = config.width, config.heads, config.kv_heads, config.head_channels
        q = project(normed_BTD, self.weight("wq", (D, H, C), ("embed", "heads", "channels"), 1))
        k = project(normed_BTD, self.weight("wk", (D, K, C), ("embed", "kv_heads", "channels"), 1))
        v = project(normed_BTD, self.weight("wv", (D, K, C), ("embed", "kv_heads", "channels"), 1))
        if config.qkv_bias:
            q = self.biased(q, "bq", ("heads", "channels"))
            k = self.biased(k, "bk", ("kv_heads", "channels"))
            v = self.biased(v, "bv", ("kv_heads", "channels"))
        if config.qk_norm:
            q = RMSNorm(config.norm_epsilon, config.param_dtype, name="q_norm")(q)
            k = RMSNorm(config.norm_epsilon, config.param_dtype, name="k_norm")(k)
        q, k = (checkpoint_name(rotate(a, positions_BT, config), "rotated") for a in (q, k))
        if stream is None:
            k, v = (jnp.repeat(a, copies_of_heads(K), axis=2) for a in (k, v))
            q_BHTC, k_BKTC, v_BKTC = (a.swapaxes(1, 2) for a in (q, k, v))
            seen = tuple((ck, cv, p) for (ck, cv), p in zip(context_kv, context_positions, strict=True))
            out_BTHC = attend(q_BHTC, positions_BT, (*seen, (k_BKTC, v_BKTC, positions_BT))).swapaxes(1, 2)
            made = k_BKTC, v_BKTC
        else:
            out_BTHC = checkpoint_name(attend_in_blocks(q, k, v, stream), "attended")
            made = (k, v) if self.keep else ()
        depth = (2 * config.layers) ** -0.5  # residual branches start small  [GPT-2]
        wo = self.weight("wo", (H, C, D), ("heads", "channels", "embed"), 2, depth)
        return x_BTD + project(out_BTHC, wo, axes=2), made

    def swiglu(self, x_BTD):
        config = self.config
        D, F = config.width, config.hidden
        gate_BTF = project(x_BTD, self.weight("w_gate", (D, F), ("embed", "mlp"), 1))
        up_BTF = project(x_BTD, self.weight("w_up", (D, F), ("embed", "mlp"), 1))
        w_down = self.weight("w_down", (F, D), ("mlp", "embed"), 1, (2 * config.layers) ** -0.5)
        return project(jax.nn.silu(gate_BTF) * up_BTF, w_down)


REMAT = {  # what is kept of a layer for its backward pass, besides its input
    "layer": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attended", "rotated"),
    ),
}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(embedding_VD: Array, tokens_BT: Array, dtype: str) -> Array:
    """The tokens' rows of the embedding, in dtype; [B, T, D].

    The gradient adds up all uses of a token in float32: a sum in bfloat16 stands still from some 256 terms on.
    """
    table_VD = laid_out(embedding_VD.astype(dtype), "vocab")  # rows whole: they then lie where tokens do
    return laid_out(table_VD[tokens_BT], "batch")


def _look_up(embedding_VD, tokens_BT, dtype):
    return look_up(embedding_VD, tokens_BT, dtype), (embedding_VD, tokens_BT)


def _looked_up(dtype, seen, grad_BTD):
    embedding_VD, tokens_BT = seen
    grad_VD = jnp.zeros(embedding_VD.shape, jnp.float32).at[tokens_BT].add(grad_BTD.astype(jnp.float32))
    return laid_out(grad_VD, "vocab").astype(embedding_VD.dtype), None


look_up.defvjp(_look_up, _looked_up)


class Decoder(nn.Module):
    """(hidden states after the final norm, keys and values of these tokens in every layer; of a stream, if `keep`)."""

    config: ModelConfig
    keep: bool = False

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, context: tuple[KeyValues, ...] = (), stream: Stream | None = None):
        config = self.config
        V, D = config.vocab_size, config.width
        dtype = jnp.dtype(config.param_dtype)
        init = nn.with_logical_partitioning(
            nn.initializers.normal(D**-0.5 if config.tied_head else 1.0), ("vocab", "embed")
        )
        embedding_VD = self.param("embedding", init, (V, D), dtype)
        if not config.tied_head:  # made here, read by output_head
            self.param(
                "head", nn.with_logical_partitioning(nn.initializers.normal(D**-0.5), ("embed", "vocab")), (D, V), dtype
            )
        x_BTD = look_up(embedding_VD, tokens_BT, config.dtype)
        layer = Layer if config.remat == "none" else nn.remat(Layer, policy=REMAT[config.remat], prevent_cse=False)
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            out_axes=0,
            length=config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, self.keep, name="layers")
        context_kv = tuple((c.k_LBKSC, c.v_LBKSC) for c in context)
        context_positions = tuple(c.positions_BS for c in context)
        x_BTD, made = scanned(x_BTD, positions_BT, context_positions, stream, context_kv)
        x_BTD = RMSNorm(config.norm_epsilon, config.param_dtype, name="final_norm")(x_BTD)
        return x_BTD, made


def _init_boxed(config: ModelConfig, key: Array) -> Params:
    one = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, one, one)["params"]


def init(config: ModelConfig, key: Array) -> Params:
    """Fresh parameters of a decoder; layers are stacked on a leading L axis."""
    return nn.meta.unbox(_init_boxed(config, key))


@cache  # tracing takes half a second
def shapes(config: ModelConfig) -> Params:
    """The tree of `init`, each array with shape and dtype only."""
    return jax.eval_shape(partial(init, config), jax.random.key(0))


def logical_axes(config: ModelConfig) -> Params:
    """The tree of `init` with the logical axis names of each array, for mesh.py."""
    boxed = jax.eval_shape(partial(_init_boxed, config), jax.random.key(0))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


REORDERED = ("tpu",)  # platforms with a layout of their own for sampling


def sampling_dtype(path: tuple, x: Array, config: ModelConfig):
    """In which a parameter is kept for sampling: that of the computation, and norm scales as they are."""
    return x.dtype if path[-1].key == "scale" else jnp.dtype(config.dtype)


def sampling_format(path: tuple, x, sharding: Sharding) -> Format:
    """Where a parameter lies for sampling: whole over fsdp, and on TPUs its axes in the order that decode reads.

    Left alone, a TPU turns a matrix over whose last axis does not fill its 128 lanes, such as w_gate [5120, 13824 / 8],
    and puts the heads of [D, H, C] first. Each call of decode would copy all layers of such a matrix to turn it back:
    2 GiB at 14B on v5e:16x16. As written, padded by a few lanes, and q, k and v as [H C, D], they are read where they
    lie.
    """
    where = whole_over_fsdp(sharding)
    if next(iter(where.device_set)).platform not in REORDERED:
        return Format(None, where)
    return Format(Layout((0, 2, 3, 1) if path[-1].key in ("wq", "wk", "wv") else tuple(range(x.ndim))), where)


def gathered(params: Params, config: ModelConfig) -> Params:
    """Parameters for sampling, which reads every matrix for every token: in config.dtype, as sampling_format has them.

    Norm scales keep their dtype, so that hidden states are those of the scorer. Leaves that are so already are not
    copied: where many calls sample from the same parameters, pass them what this returns.
    """

    def one(path, x):
        x = x.astype(sampling_dtype(path, x, config))
        wanted = sampling_format(path, x, x.sharding)
        if wanted.layout is None:
            return x if wanted.sharding == x.sharding else jax.device_put(x, wanted.sharding)
        lies = wanted.sharding == x.sharding and wanted.layout.major_to_minor == x.format.layout.major_to_minor
        return x if lies else jax.device_put(x, wanted)

    return jax.tree_util.tree_map_with_path(one, jax.tree.map(jnp.asarray, params))


def forward(
    params: Params, config: ModelConfig, tokens_BT: Array, positions_BT: Array, context: tuple[KeyValues, ...] = ()
) -> tuple[Array, KeyValues]:
    """Hidden states [B, T, D] after the final norm and the KeyValues of these tokens.

    positions_BT: place of each token in its own sequence, -1 for padding. A context with N rows serves B = N*G rows
    of tokens, G consecutive ones each; its keys are seen like the tokens' own.
    """
    hidden_BTD, (k_LBKTC, v_LBKTC) = Decoder(config).apply({"params": params}, tokens_BT, positions_BT, context)
    return hidden_BTD, KeyValues(k_LBKTC, v_LBKTC, positions_BT)


def forward_stream(params: Params, config: ModelConfig, stream: Stream) -> Array:
    """Hidden states [U, T, D] after the final norm of all tokens of a stream; anything in its padding."""
    apply = Decoder(config).apply
    return apply({"params": params}, stream.tokens_UT, stream.positions_UT, stream=stream)[0]


def prefill_stream(params: Params, config: ModelConfig, stream: Stream) -> tuple[Array, tuple[Array, Array]]:
    """The hidden states, and keys (rotated) and values [L, U, T, K, C] of all tokens of a stream."""
    apply = Decoder(config, keep=True).apply
    return apply({"params": params}, stream.tokens_UT, stream.positions_UT, stream=stream)


def output_head(params: Params, config: ModelConfig) -> Array:
    """Output matrix in the computation's dtype: [D, V], or with a tied head the embedding as it is, [V, D]."""
    return params["embedding" if config.tied_head else "head"].astype(config.dtype)


def logits(params: Params, config: ModelConfig, hidden: Array) -> Array:
    """Next-token logits, float32 [..., V]; for a few positions at a time: given tokens are scored by the kernel."""
    product = "...d,vd->...v" if config.tied_head else "...d,dv->...v"
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None  # as the kernel: a TPU would round
    head = output_head(params, config)
    return jnp.einsum(product, hidden, head, precision=precision, preferred_element_type=jnp.float32)


def positions_from_lengths(lengths_B: Array, T: int) -> Array:
    """0, 1, .. for the live tokens of right-padded rows, -1 behind them; int32 [B, T]."""
    places_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    return jnp.where(places_1T < lengths_B[:, None], places_1T, -1)
