"""Rollouts -> how probable the token that really follows is after each thought, and without one.

For rewards.information_gain [RLP, arXiv 2510.01265]. Two forward passes, teacher-forced, at temperature 1 whatever
the rollouts were sampled at: the policy after its own thoughts, and an average of past policies on the text alone.
Beginnings in common run once (policy/stream.py) and only one place of each sequence goes through the head.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import ModelConfig
from rpt_jax.corpus.positions import Position
from rpt_jax.corpus.prompts import THOUGHT_END
from rpt_jax.mesh import batch_parts, batch_sharding, place, to_host
from rpt_jax.policy import flops
from rpt_jax.policy.scorer import score
from rpt_jax.policy.stream import packed
from rpt_jax.records import Params, Prompts, Rollouts


class Sequences(NamedTuple):
    """Token ids, on the host; padded on the right with 0."""

    tokens_BT: np.ndarray
    lengths_B: np.ndarray


def thought_lengths(
    bytes_of: Callable[[Sequence[int]], bytes], tokens_NGR: np.ndarray, lengths_NG: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of each thought, int32 [N, G]; bool [N, G]: it ends by itself), read off the bytes of the tokens.

    A thought goes on to the token in which the first `</think>` ends, that one included. Where there is none, the
    whole response is thought, an end token included.
    """
    thoughts_NG, closed_NG = np.array(lengths_NG, np.int32), np.zeros(lengths_NG.shape, bool)
    for n, g in np.ndindex(*lengths_NG.shape):
        contents = [bytes_of([token]) for token in tokens_NGR[n, g, : lengths_NG[n, g]].tolist()]
        start = b"".join(contents).find(THOUGHT_END)
        if start >= 0:
            ends_R = np.cumsum([len(content) for content in contents])
            thoughts_NG[n, g] = np.searchsorted(ends_R, start + len(THOUGHT_END)) + 1
            closed_NG[n, g] = True
    return thoughts_NG, closed_NG


def plain_contexts(
    documents: Mapping[int, np.ndarray] | Sequence[np.ndarray], positions: Sequence[Position], limit: int
) -> tuple[Sequences, np.ndarray]:
    """(the last `limit` tokens before each position, no prompt around them; int32 [N], the tokens that follow).

    As the arg-max of an evaluation sees them. T is `limit`. Each position needs a token before it.
    """
    contexts = [documents[each.document][max(0, each.index - limit) : each.index] for each in positions]
    tokens_NT = np.stack([np.pad(context, (0, limit - len(context))) for context in contexts]).astype(np.int32)
    targets_N = np.array([documents[each.document][each.index] for each in positions], np.int32)
    return Sequences(tokens_NT, np.array([len(context) for context in contexts], np.int32)), targets_N


def after_thoughts(
    prompts: Prompts,
    rollouts: Rollouts,
    thoughts_NG: np.ndarray,
    closed_NG: np.ndarray,
    closing: Sequence[int],
    opening: Sequence[int],
) -> Sequences:
    """What the policy has before it when the next token is due: prompt, thought, `opening`; B = N * G rows.

    A thought that does not end by itself is ended by the tokens `closing`.
    """
    rows = []
    for n, g in np.ndindex(*thoughts_NG.shape):
        prompt, thought = prompts.tokens_NT[n, : prompts.lengths_N[n]], rollouts.tokens_NGR[n, g, : thoughts_NG[n, g]]
        rows.append(np.concatenate([prompt, thought, () if closed_NG[n, g] else closing, opening]).astype(np.int32))
    lengths_B = np.array([len(row) for row in rows], np.int32)
    return Sequences(np.stack([np.pad(row, (0, lengths_B.max() - len(row))) for row in rows]), lengths_B)


def next_logprobs(
    params: Params,
    model: ModelConfig,
    before: Sequences,
    targets_B: np.ndarray,
    mesh: Mesh,
    microbatches: int = 1,
    token_chunk: int = 0,
) -> np.ndarray:
    """log p(target | the tokens before it) of each row under softmax(z), float32 [B], nats.

    params are read in model.param_dtype. Rows run in so many parts one after the other, each over all devices:
    microbatches times these divide B. Call inside jax.set_mesh(mesh).
    """
    B, units = len(targets_B), microbatches * batch_parts(mesh)
    ones_B1 = np.ones((B, 1), np.int32)
    stream = packed(before.tokens_BT, before.lengths_B, targets_B[:, None, None], ones_B1, units)
    stream = jax.tree.map(lambda a: a.reshape(microbatches, -1, *a.shape[1:]), stream)
    stream = place(stream, batch_sharding(mesh, axis=1))
    return to_host(_next_logprobs(params, stream, model=model, rows=B // microbatches, token_chunk=token_chunk))


@partial(jax.jit, static_argnames=("model", "rows", "token_chunk"))
def _next_logprobs(params, stream, *, model, rows, token_chunk):
    params = jax.tree.map(lambda x: x.astype(model.param_dtype), params)
    responses_B11 = jnp.zeros((rows, 1, 1), jnp.int32)  # for their shape; the stream holds all tokens

    def of_part(stream):
        return score(params, model, None, None, responses_B11, None, 1.0, token_chunk, stream=stream)[0]

    with jax.named_scope("next_token"):
        return jax.lax.map(of_part, stream).reshape(-1)


def scoring_flops(model: ModelConfig, after: Sequences, prompts: Prompts, plain: Sequences) -> float:
    """Matmul FLOPs of both passes; the prompt of a group counts once."""
    N, B = len(prompts.lengths_N), len(after.lengths_B)
    prompt_tokens, own_tokens = prompts.lengths_N.sum(), after.lengths_B.sum() - B // N * prompts.lengths_N.sum()
    P, R, C = prompt_tokens / N, own_tokens / B, plain.lengths_B.sum() / N
    return (
        flops.forward(model, float(prompt_tokens), P / 2, 0)
        + flops.forward(model, float(own_tokens), P + R / 2, B)
        + flops.forward(model, float(plain.lengths_B.sum()), C / 2, N)
    )
