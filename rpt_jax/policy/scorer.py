"""Log-probs of given tokens under the policy, differentiable; the only caller of the grouped log-prob kernel.

In: rollouts, or plain sequences. Out: log-prob and entropy of each token given all before it, nats, under
softmax(z / temperature) as in the sampler. Only positions that predict such a token go through the head, and their
logits never exist all at once. On several devices, call inside jax.set_mesh(mesh): the kernel then splits its work as
the mesh says.
"""

import jax.numpy as jnp

from rpt_jax.config import ModelConfig
from rpt_jax.kernels.grouped_logprob import grouped_logprob
from rpt_jax.policy.decoder import forward, output_head, positions_from_lengths
from rpt_jax.records import Array, Params


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
    """
    N, G, R = tokens_NGR.shape
    hidden = _shared_hidden if shared_prefix else _plain_hidden
    hidden_NGRD = hidden(params, model, prompt_tokens_NT, prompt_lengths_N, tokens_NGR, lengths_NG)
    live_NGR = jnp.arange(R)[None, None, :] < lengths_NG[:, :, None]
    out = _head(params, model, hidden_NGRD, tokens_NGR, live_NGR, temperature, token_chunk)
    return out.logprob, out.entropy


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


def _head(params, model, hidden, targets, live, temperature, token_chunk):
    temperature = jnp.where(temperature == 0, 1.0, temperature)
    head, chunk = output_head(params, model), token_chunk or None
    return grouped_logprob(hidden, head, targets, live, temperature, tied=model.tied_head, chunk=chunk)


def _response_positions(prompt_lengths_N, lengths_NG, R):
    """Places of response tokens behind their prompt, -1 in padding; [N * G, R]."""
    N, G = lengths_NG.shape
    positions_BR = positions_from_lengths(lengths_NG.reshape(N * G), R)
    starts_B1 = jnp.repeat(prompt_lengths_N, G)[:, None]
    return jnp.where(positions_BR >= 0, starts_B1 + positions_BR, -1)


def _shared_hidden(params, model, prompt_tokens_NT, prompt_lengths_N, tokens_NGR, lengths_NG):
    """Hidden states that predict the response tokens, prompts computed once; [N, G, R, D]."""
    N, G, R = tokens_NGR.shape
    prompt_positions_NT = positions_from_lengths(prompt_lengths_N, prompt_tokens_NT.shape[1])
    prompt_NTD, prompt_keys = forward(params, model, prompt_tokens_NT, prompt_positions_NT)
    last_N1D = jnp.take_along_axis(prompt_NTD, prompt_lengths_N[:, None, None] - 1, axis=1)
    first_NG1D = jnp.broadcast_to(last_N1D[:, None], (N, G, 1, last_N1D.shape[-1]))
    if R == 1:
        return first_NG1D
    positions_BR = _response_positions(prompt_lengths_N, lengths_NG, R)
    responses_BRD, _ = forward(params, model, tokens_NGR.reshape(N * G, R), positions_BR, (prompt_keys,))
    return jnp.concatenate([first_NG1D, responses_BRD.reshape(N, G, R, -1)[:, :, :-1]], axis=2)


def _plain_hidden(params, model, prompt_tokens_NT, prompt_lengths_N, tokens_NGR, lengths_NG):
    """The same with the prompt repeated before each response, live tokens in a row, padding behind; [N, G, R, D]."""
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
