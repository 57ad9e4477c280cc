"""Logits -> one token a row: temperature, the cuts, and a draw from what they leave.

In: logits, a random key for each row. Out: tokens and their log-probs before the cuts, which are those that the scorer
gives.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import SampleConfig
from rpt_jax.records import Array

BLOCK = 128  # tokens whose probabilities are added up at once
HALF_A_STEP = 2.0**-24
"""Of jax.random.uniform, which gives one of 2^23 numbers from 0 on: 0 itself would draw the first token, however
improbable it is, once in so many draws."""


def draw(logits_BV: Array, keys_B: Array, sampling: SampleConfig) -> tuple[Array, Array]:
    """One token per row and its log-prob: where uniform numbers fall in the summed up probabilities of the cut
    distribution; arg-max at temperature 0.

    One number finds a block of tokens, another one the token in it: a single float32 number would have no digits left
    for the tokens of an improbable block. A vocabulary of one block takes one number.
    """
    scaled_BV = logits_BV / (sampling.temperature or 1.0)
    if sampling.temperature == 0:
        tokens_B = jnp.argmax(logits_BV, axis=-1)
    else:
        keys_B2 = jax.vmap(lambda key: jnp.stack([key, jax.random.fold_in(key, 1)]))(keys_B)
        uniform_B2 = jax.vmap(jax.vmap(jax.random.uniform))(keys_B2) + HALF_A_STEP
        tokens_B = _inverse(cut(scaled_BV, sampling), uniform_B2)
    chosen_B = jnp.take_along_axis(scaled_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B.astype(jnp.int32), chosen_B - jax.nn.logsumexp(scaled_BV, axis=-1)


def _inverse(scaled_BV: Array, uniform_B2: Array) -> Array:
    """The token at which the distribution functions of softmax(scaled), over blocks and within one, pass the numbers.

    These are in (0, 1).
    """
    B, V = scaled_BV.shape
    weights_BV = jnp.exp(scaled_BV - jnp.max(scaled_BV, axis=-1, keepdims=True))
    if V <= BLOCK:
        return _passed(weights_BV, uniform_B2[:, 0])
    weights_BXY = jnp.pad(weights_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    block_B = _passed(jnp.sum(weights_BXY, axis=2), uniform_B2[:, 0])
    inside_BY = jnp.take_along_axis(weights_BXY, block_B[:, None, None], axis=1)[:, 0]
    return block_B * BLOCK + _passed(inside_BY, uniform_B2[:, 1])


def _passed(weights_BX: Array, uniform_B: Array) -> Array:
    """The first place whose sum of weights is above this share of all; always one that adds something."""
    sums_BX = jnp.cumsum(weights_BX, axis=1)
    index_B = jnp.sum(sums_BX <= (uniform_B * sums_BX[:, -1])[:, None], axis=1)
    return jnp.minimum(index_B, jnp.argmax(sums_BX, axis=1))  # rounding may set the goal past the end


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
