"""Log-probs of given tokens under the policy, differentiable; the only caller of the grouped log-prob kernel.

In: rollouts, or plain sequences. Out: log-prob and entropy of each token given all before it, nats, under
softmax(z / temperature) as in the sampler. Only positions that predict such a token go through the head, and their
logits never exist all at once. On several devices, call inside jax.set_mesh(mesh): the kernel then splits its work as
the mesh says.
"""

import math

import jax
import jax.numpy as jnp

from rpt_jax.config import ModelConfig
from rpt_jax.kernels.grouped_logprob import grouped_logprob
from rpt_jax.mesh import laid_out
from rpt_jax.policy.decoder import forward, forward_stream, logits, output_head, positions_from_lengths
from rpt_jax.policy.stream import Stream, padded
from rpt_jax.records import Array, Params

GREEDY_CHUNK = 256  # response tokens of a unit whose logits exist at one time in score_greedy


def score(
    params: Params,
    model: ModelConfig,
    prompt_tokens_NT: Array,
    prompt_lengths_N: Array,
    tokens_NGR: Array,
    lengths_NG: Array,
    temperature: Array | float = 1.0,
    token_chunk: int = 0,
    *,
    stream: Stream | None = None,
    shared_prefix: bool = True,
) -> tuple[Array, Array]:
    """(logprobs_NGR, entropies_NGR) of response tokens given prompt and earlier response tokens; 0 in padding.

    The prompt runs once for its G responses, which see its keys and values: P + G R tokens instead of G (P + R), and
    the prompt's last hidden state predicts the first token of all G. shared_prefix=False is the plain path, each
    rollout as one sequence: the same up to rounding, kept as the check on the other.

    Args:
        prompt_tokens_NT: padded on the right; prompt_lengths_N live tokens, at least 1.
        tokens_NGR: padded on the right; lengths_NG live tokens.
        temperature: scalar, may be traced; gets no gradient. 0 (greedy sampling) scores at 1, as the sampler does.
        token_chunk: response tokens whose logits exist at one time (the kernel's `chunk`); 0 leaves it to the kernel.
        stream: these very prompts and responses as stream.packed lays them out; left out, padding runs along.
    """
    rollouts = prompt_tokens_NT, prompt_lengths_N, tokens_NGR, lengths_NG
    if not shared_prefix:
        live_NGR = jnp.arange(tokens_NGR.shape[2])[None, None, :] < lengths_NG[:, :, None]
        hidden_NGRD = _plain_hidden(params, model, *rollouts)
        out = _head(params, model, hidden_NGRD, tokens_NGR, live_NGR, temperature, token_chunk)
        return out.logprob, out.entropy
    stream = padded(*rollouts) if stream is None else stream
    out = _stream_head(params, model, _predicting(params, model, stream), stream, temperature, token_chunk)

    def in_place(values_UX):
        values_UY = jnp.take_along_axis(jnp.pad(values_UX, ((0, 0), (0, 1))), stream.places_UY, axis=1, mode="clip")
        return values_UY.reshape(tokens_NGR.shape)

    return in_place(out.logprob), in_place(out.entropy)


def score_greedy(params: Params, model: ModelConfig, stream: Stream, token_chunk: int = 0) -> tuple[Array, Array]:
    """(logprobs_UX, greedy_UX) of a stream's response tokens: nats under softmax(z), and bool: it is the arg-max of z.

    The arg-max is over all rows of the head, the lowest id of equal ones, as the sampler at temperature 0 takes it.
    Both are in the stream's order (places_UY says where a response's tokens are) and mean nothing in padding.
    """
    hidden_UXD = _predicting(params, model, stream)
    out = _stream_head(params, model, hidden_UXD, stream, 1.0, token_chunk)
    U, X, D = hidden_UXD.shape
    some = math.gcd(X, token_chunk or GREEDY_CHUNK)

    def best(hidden_UXD):
        return jnp.argmax(logits(params, model, hidden_UXD), axis=-1).astype(jnp.int32)

    best_JUX = jax.lax.map(best, hidden_UXD.reshape(U, X // some, some, D).swapaxes(0, 1))
    return out.logprob, best_JUX.swapaxes(0, 1).reshape(U, X) == stream.targets_UX


def score_tokens(
    params: Params,
    model: ModelConfig,
    tokens_BT: Array,
    lengths_B: Array,
    temperature: Array | float = 1.0,
    token_chunk: int = 0,
) -> Array:
    """logprobs_BT of token t given tokens before t; 0 at t = 0, which nothing predicts, and in padding."""
    B, T = tokens_BT.shape
    positions_BT = positions_from_lengths(lengths_B, T)
    hidden_BTD, _ = forward(params, model, tokens_BT, positions_BT)
    hidden_BSD, targets_BS, live_BS = hidden_BTD[:, :-1], tokens_BT[:, 1:], positions_BT[:, 1:] >= 0
    out = _head(params, model, hidden_BSD, targets_BS, live_BS, temperature, token_chunk)
    return jnp.pad(out.logprob, ((0, 0), (1, 0)))


def _predicting(params, model, stream):
    """The hidden states that predict a stream's response tokens, [U, X, D]."""
    hidden_UTD = laid_out(forward_stream(params, model, stream), "batch")
    return jnp.take_along_axis(hidden_UTD, stream.predictors_UX[:, :, None], axis=1, mode="clip")


def _stream_head(params, model, hidden_UXD, stream, temperature, token_chunk):
    live_UX = stream.targets_UX >= 0
    return _head(params, model, hidden_UXD, jnp.maximum(stream.targets_UX, 0), live_UX, temperature, token_chunk)


def _head(params, model, hidden, targets, live, temperature, token_chunk):
    temperature = jnp.where(temperature == 0, 1.0, temperature)
    head, chunk = output_head(params, model), token_chunk or None
    return grouped_logprob(hidden, head, targets, live, temperature, tied=model.tied_head, chunk=chunk)


def _plain_hidden(params, model, prompt_tokens_NT, prompt_lengths_N, tokens_NGR, lengths_NG):
    """What predicts each response token, [N, G, R, D], with the prompt repeated before each response."""
    N, G, R = tokens_NGR.shape
    T = prompt_tokens_NT.shape[1]
    starts_B1 = jnp.repeat(prompt_lengths_N, G)[:, None]
    padded_BS = jnp.concatenate([jnp.repeat(prompt_tokens_NT, G, axis=0), tokens_NGR.reshape(N * G, R)], axis=1)
    places_1S = jnp.arange(T + R)[None, :]
    sources_BS = jnp.where(places_1S < starts_B1, places_1S, places_1S - starts_B1 + T)
    tokens_BS = jnp.take_along_axis(padded_BS, jnp.minimum(sources_BS, T + R - 1), axis=1)
    positions_BS = positions_from_lengths(starts_B1[:, 0] + lengths_NG.reshape(N * G), T + R)
    hidden_BSD, _ = forward(params, model, tokens_BS, positions_BS)
    predictors_BR = starts_B1 - 1 + jnp.arange(R)[None, :]
    return jnp.take_along_axis(hidden_BSD, predictors_BR[:, :, None], axis=1).reshape(N, G, R, -1)
