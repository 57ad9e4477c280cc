"""Prompts to rollouts: prefill once per prompt, then a jitted decode loop for all its G rollouts.

Each of the B = N*G rollouts has its own cache behind the prompt's, which the group shares (decoder.attend reads it
once for the group). Many tokens are made per host call; between calls the host looks whether all rollouts have ended
and doubles the cache when it is full, so that short rollouts never pay for the longest that is allowed.

Randomness: the key of a token is folded from (the caller's key, document, position, member of the group, token
index), never from a row of the batch, so a rollout does not depend on what it is batched with.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rpt_jax.config import ModelConfig, SampleConfig
from rpt_jax.mesh import to_host
from rpt_jax.policy import decoder
from rpt_jax.policy.decoder import KeyValues
from rpt_jax.records import Array, Params, Prompts, Rollouts

FIRST_CACHE = 64  # slots; doubled when full


@struct.dataclass
class DecodeState:
    """Everything that a decode step reads and writes; `cache` holds the responses only."""

    cache: KeyValues
    hidden_BD: Array  # after the newest token: predicts the next one
    tokens_BR: Array
    logprobs_BR: Array
    lengths_B: Array
    finished_B: Array
    step: Array  # tokens made so far, the same for all rows


def sample(
    params: Params,
    model: ModelConfig,
    sampling: SampleConfig,
    prompts: Prompts,
    key: Array,
    end_ids: tuple[int, ...],
) -> Rollouts:
    """Draws `sampling.group_size` rollouts for each prompt; host arrays in and out.

    `key` is the run's key folded with the step. A rollout ends with a token of `end_ids` (kept) or after
    `sampling.max_tokens`. Log-probs are those of the softmax at `sampling.temperature` before top-k, top-p and min-p
    cut it (the distribution that the scorer gives), or at temperature 1 when it is 0 (greedy).
    """
    prompt_kv, state = prefill(params, model, sampling, prompts.tokens_NT, prompts.lengths_N)
    keys_B = rollout_keys(key, prompts.ids_N2, sampling.group_size)
    while not bool(jnp.all(state.finished_B)) and int(state.step) < sampling.max_tokens:
        capacity = state.cache.positions_BS.shape[1]
        if int(state.step) == capacity:
            state = state.replace(cache=_grow(state.cache, min(2 * capacity, sampling.max_tokens)))
        state = decode(params, model, sampling, end_ids, prompt_kv, prompts.lengths_N, keys_B, state)
    shape_NG = (prompts.tokens_NT.shape[0], sampling.group_size)
    tokens_BR, logprobs_BR, lengths_B, finished_B = to_host(
        (state.tokens_BR, state.logprobs_BR, state.lengths_B, state.finished_B)
    )
    return Rollouts(
        tokens_NGR=tokens_BR.reshape(*shape_NG, -1),
        lengths_NG=lengths_B.reshape(shape_NG),
        logprobs_NGR=logprobs_BR.reshape(*shape_NG, -1),
        finished_NG=finished_B.reshape(shape_NG),
    )


@partial(jax.jit, static_argnums=2)
def rollout_keys(key: Array, ids_N2: Array, group_size: int) -> Array:
    """One key per rollout, [N*G]: folded from the position's identity and the member of the group."""

    def of_member(ids_2, member):
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, ids_2[0]), ids_2[1]), member)

    members_G = jnp.arange(group_size)
    return jax.vmap(lambda ids_2: jax.vmap(partial(of_member, ids_2))(members_G))(ids_N2).reshape(-1)


@partial(jax.jit, static_argnums=(1, 2))
def prefill(
    params: Params, model: ModelConfig, sampling: SampleConfig, tokens_NT: Array, lengths_N: Array
) -> tuple[KeyValues, DecodeState]:
    """The prompts' keys and values, computed once per prompt, and the state before the first token."""
    N, T = tokens_NT.shape
    hidden_NTD, prompt_kv = decoder.forward(params, model, tokens_NT, decoder.positions_from_lengths(lengths_N, T))
    last_ND = jnp.take_along_axis(hidden_NTD, (lengths_N - 1)[:, None, None], axis=1)[:, 0]
    B, R = N * sampling.group_size, sampling.max_tokens
    slots = (model.layers, B, model.kv_heads, min(FIRST_CACHE, R), model.head_channels)
    dtype = jnp.dtype(model.dtype)
    state = DecodeState(
        cache=KeyValues(jnp.zeros(slots, dtype), jnp.zeros(slots, dtype), jnp.full((B, slots[3]), -1, jnp.int32)),
        hidden_BD=jnp.repeat(last_ND, sampling.group_size, axis=0),
        tokens_BR=jnp.zeros((B, R), jnp.int32),
        logprobs_BR=jnp.zeros((B, R), jnp.float32),
        lengths_B=jnp.zeros((B,), jnp.int32),
        finished_B=jnp.zeros((B,), bool),
        step=jnp.int32(0),
    )
    return prompt_kv, state


@partial(jax.jit, static_argnums=1)
def _grow(cache: KeyValues, capacity: int) -> KeyValues:
    more = capacity - cache.positions_BS.shape[1]
    slots = ((0, 0), (0, 0), (0, 0), (0, more), (0, 0))
    return KeyValues(
        jnp.pad(cache.k_LBKSC, slots),
        jnp.pad(cache.v_LBKSC, slots),
        jnp.pad(cache.positions_BS, ((0, 0), (0, more)), constant_values=-1),
    )


@partial(jax.jit, static_argnums=(1, 2, 3), donate_argnums=7)
def decode(
    params: Params,
    model: ModelConfig,
    sampling: SampleConfig,
    end_ids: tuple[int, ...],
    prompt_kv: KeyValues,
    lengths_N: Array,
    keys_B: Array,
    state: DecodeState,
) -> DecodeState:
    """Up to `sampling.tokens_per_call` more tokens for every rollout, fewer if all end or the cache is full."""
    capacity = state.cache.positions_BS.shape[1]
    stop = jnp.minimum(state.step + sampling.tokens_per_call, min(capacity, sampling.max_tokens))
    prompt_B = jnp.repeat(lengths_N, sampling.group_size)

    def unfinished(state):
        return (state.step < stop) & ~jnp.all(state.finished_B)

    def one_token(state):
        logits_BV = decoder.logits(params, model, state.hidden_BD)
        token_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.step)
        tokens_B, logprobs_B = draw(logits_BV, token_keys_B, sampling)
        live_B = ~state.finished_B
        tokens_B = jnp.where(live_B, tokens_B, 0)
        ended_B = jnp.any(tokens_B[:, None] == jnp.array(end_ids, jnp.int32)[None, :], axis=1)
        positions_B1 = jnp.where(live_B, prompt_B + state.step, -1)[:, None]
        hidden_B1D, kv = decoder.forward(params, model, tokens_B[:, None], positions_B1, (prompt_kv, state.cache))
        return DecodeState(
            cache=_write(state.cache, kv, state.step),
            hidden_BD=hidden_B1D[:, 0],
            tokens_BR=_put(state.tokens_BR, tokens_B, state.step),
            logprobs_BR=_put(state.logprobs_BR, jnp.where(live_B, logprobs_B, 0.0), state.step),
            lengths_B=state.lengths_B + live_B,
            finished_B=state.finished_B | (live_B & ended_B),
            step=state.step + 1,
        )

    return jax.lax.while_loop(unfinished, one_token, state)


def _put(rows_BR: Array, column_B: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(rows_BR, column_B[:, None], index, axis=1)


def _write(cache: KeyValues, new: KeyValues, slot: Array) -> KeyValues:
    """The cache with one more token in `slot`."""
    return KeyValues(
        jax.lax.dynamic_update_slice_in_dim(cache.k_LBKSC, new.k_LBKSC, slot, axis=3),
        jax.lax.dynamic_update_slice_in_dim(cache.v_LBKSC, new.v_LBKSC, slot, axis=3),
        jax.lax.dynamic_update_slice_in_dim(cache.positions_BS, new.positions_BS, slot, axis=1),
    )


def draw(logits_BV: Array, keys_B: Array, sampling: SampleConfig) -> tuple[Array, Array]:
    """One token per row and its log-prob, by the Gumbel trick on the cut distribution; arg-max at temperature 0."""
    scaled_BV = logits_BV / (sampling.temperature or 1.0)
    if sampling.temperature == 0:
        tokens_B = jnp.argmax(logits_BV, axis=-1)
    else:
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        tokens_B = jnp.argmax(cut(scaled_BV, sampling) + noise_BV, axis=-1)
    chosen_B = jnp.take_along_axis(scaled_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B.astype(jnp.int32), chosen_B - jax.nn.logsumexp(scaled_BV, axis=-1)


def cut(scaled_BV: Array, sampling: SampleConfig) -> Array:
    """Scaled logits with -inf outside top-k, top-p (nucleus, arXiv 1904.09751) and min-p (arXiv 2407.01082).

    Each cut looks at the distribution that the ones before it left; the most probable token always stays.
    """
    V = scaled_BV.shape[1]
    if sampling.top_k and sampling.top_k < V:
        kth_B = jax.lax.top_k(scaled_BV, sampling.top_k)[0][:, -1]
        scaled_BV = jnp.where(scaled_BV < kth_B[:, None], -jnp.inf, scaled_BV)
    if sampling.top_p < 1:
        order_BV = jnp.argsort(-scaled_BV, axis=-1)
        sorted_BV = jnp.take_along_axis(jax.nn.softmax(scaled_BV, axis=-1), order_BV, axis=-1)
        keep_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV < sampling.top_p  # mass before the token
        ranks_BV = jnp.argsort(order_BV, axis=-1)
        scaled_BV = jnp.where(jnp.take_along_axis(keep_BV, ranks_BV, axis=-1), scaled_BV, -jnp.inf)
    if sampling.min_p > 0:
        floor_B1 = jnp.max(scaled_BV, axis=-1, keepdims=True) + np.log(sampling.min_p)
        scaled_BV = jnp.where(scaled_BV < floor_B1, -jnp.inf, scaled_BV)
    return scaled_BV
