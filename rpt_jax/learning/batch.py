"""Rollouts and advantages -> what one update reads, dealt out to microbatches and devices by tokens.

In: records of one step on the host. Out: a Batch on the mesh, its rows in the order in which microbatches and devices
take them, with the stream in which shared prefixes run once (policy/stream.py). And the check that this shared way
gives the log-probs of whole sequences.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import ModelConfig, UpdateConfig
from rpt_jax.learning.update import response_logprobs
from rpt_jax.mesh import batch_parts, batch_sharding, place, to_host
from rpt_jax.parts import parts_of_groups
from rpt_jax.policy.scorer import score
from rpt_jax.policy.stream import deal, packed
from rpt_jax.records import Array, Batch, Params, Prompts, Rollouts

log = logging.getLogger(__name__)

CHECKED_RESPONSES, CHECKED_TOKENS = 2, 128  # of each prompt that is checked: whole sequences need much memory
# Mean distance of log-probs, nats, that rounding explains; a wrong mask makes tenths.
ROUNDING = {"float32": 1e-3, "bfloat16": 5e-2}


def pack(prompts: Prompts, rollouts: Rollouts, advantages_NG: Array, config: UpdateConfig, mesh: Mesh) -> Batch:
    """The batch of a step on the mesh, rows reordered so that all microbatches and devices have like many tokens.

    Where these are more than the prompts, or do not divide them, a group becomes several rows with the same prompt.
    """
    microbatches, devices = config.microbatches, batch_parts(mesh)
    parts = parts_of_groups(*rollouts.lengths_NG.shape, microbatches * devices)
    prompts = jax.tree.map(lambda a: np.repeat(a, parts, axis=0), prompts)
    rollouts, advantages_NG = jax.tree.map(
        lambda a: np.asarray(a).reshape(len(prompts.lengths_N), -1, *a.shape[2:]), (rollouts, np.asarray(advantages_NG))
    )
    loads_N = prompts.lengths_N + rollouts.lengths_NG.sum(axis=1)
    dealt = deal(loads_N, prompts.ids_N2[:, 0], microbatches * devices)
    rows = dealt.reshape(-1)
    lengths = prompts.lengths_N[rows], rollouts.lengths_NG[rows]
    stream = packed(prompts.tokens_NT[rows], lengths[0], rollouts.tokens_NGR[rows], lengths[1], len(dealt))
    order = dealt.reshape(microbatches, devices, -1).transpose(1, 2, 0).reshape(-1)  # as update._split takes them
    batch = Batch(
        prompt_tokens_NT=prompts.tokens_NT[order],
        prompt_lengths_N=prompts.lengths_N[order],
        tokens_NGR=rollouts.tokens_NGR[order],
        lengths_NG=rollouts.lengths_NG[order],
        logprobs_NGR=rollouts.logprobs_NGR[order],
        advantages_NG=advantages_NG[order],
    )
    stream = jax.tree.map(lambda a: a.reshape(microbatches, devices, *a.shape[1:]), stream)
    return place(batch, batch_sharding(mesh)).replace(stream=place(stream, batch_sharding(mesh, axis=1)))


def shortened(rollouts: Rollouts, lengths_NG: np.ndarray) -> Rollouts:
    """The first tokens of each response, as many as given; what follows is padding."""
    live_NGR = np.arange(rollouts.tokens_NGR.shape[2]) < lengths_NG[:, :, None]
    tokens_NGR, logprobs_NGR = (np.where(live_NGR, a, 0) for a in (rollouts.tokens_NGR, rollouts.logprobs_NGR))
    return rollouts.replace(tokens_NGR=tokens_NGR, logprobs_NGR=logprobs_NGR, lengths_NG=lengths_NG)


def maybe_check(
    seen: set, params: Params, batch: Batch, temperature: float, model: ModelConfig, config: UpdateConfig, mesh: Mesh
) -> None:
    """check_shared_prefix, if config asks for it at this batch, which has a shape that is not among those `seen`.

    The shape is added to them. A new one means that the update is compiled.
    """
    shape = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
    if shape in seen:
        return
    tokens = batch.stream.tokens_UT.shape[2]
    log.info("compiling the update for batches of up to %d tokens a device and microbatch", tokens)
    if config.check_shared_prefix == "every_shape" or (config.check_shared_prefix == "first_step" and not seen):
        apart = check_shared_prefix(params, batch, temperature, model=model, config=config, mesh=mesh)
        log.info("shared prefixes give the log-probs of whole sequences: %.1e nats apart on average", apart)
    seen.add(shape)


def check_shared_prefix(
    params: Params, batch: Batch, temperature: float, *, model: ModelConfig, config: UpdateConfig, mesh: Mesh
) -> float:
    """Mean |log-prob(shared way) - log-prob(whole sequences)|, nats, over the first tokens of two responses a device.

    Raises FloatingPointError where that is more than rounding.
    """
    every = max(1, len(batch.prompt_lengths_N) // batch_parts(mesh))
    few = jax.tree.map(lambda a: a[::every], to_host(batch.replace(stream=None)))
    few = few.replace(
        tokens_NGR=few.tokens_NGR[:, :CHECKED_RESPONSES, :CHECKED_TOKENS],
        lengths_NG=np.minimum(few.lengths_NG[:, :CHECKED_RESPONSES], CHECKED_TOKENS),
    )
    shared_NGR = to_host(response_logprobs(params, batch, temperature, model=model, config=config))[::every]
    plain_NGR = to_host(_whole(params, place(few, batch_sharding(mesh)), temperature, model, config.token_chunk))
    live_NGR = np.arange(plain_NGR.shape[2]) < few.lengths_NG[:, :, None]
    shared_NGR = shared_NGR[:, :CHECKED_RESPONSES, :CHECKED_TOKENS]
    apart = float(np.abs(np.where(live_NGR, shared_NGR - plain_NGR, 0)).sum() / max(1, few.lengths_NG.sum()))
    if not apart <= ROUNDING[model.dtype]:
        raise FloatingPointError(
            f"log-probs with shared prefixes are {apart:.1e} nats a token off those of whole sequences, more than "
            f"{ROUNDING[model.dtype]:.0e}, which rounding in {model.dtype} explains: no update was made. This is a "
            "defect of rpt_jax or of the compiler; please report it with config.json"
        )
    return apart


@jax.jit(static_argnames=("model", "token_chunk"))
def _whole(params, batch, temperature, model, token_chunk):
    prompts, responses = (batch.prompt_tokens_NT, batch.prompt_lengths_N), (batch.tokens_NGR, batch.lengths_NG)
    return score(params, model, *prompts, *responses, jnp.asarray(temperature), token_chunk, shared_prefix=False)[0]
