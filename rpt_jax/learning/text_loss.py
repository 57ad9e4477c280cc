"""Next-token loss on plain text, mixed into the policy update: update.next_token_share.

In: the annotated training documents, and the loss and gradients of a policy update. Out: their mix

    (1 - s) * GRPO loss + s * mean next-token cross entropy,    s = update.next_token_share,

one gradient for one step of the optimizer. It keeps the policy a language model while rewards pull at it (the
pretraining mix of InstructGPT [arXiv 2203.02155, Eq. 2], there with a weight beside the reward's instead of a share).
The paper [RPT, arXiv 2506.08007] has none: s = 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from rpt_jax.config import Config, ModelConfig, UpdateConfig
from rpt_jax.corpus.positions import AnnotatedDocuments
from rpt_jax.mesh import batch_parts, batch_sharding, place
from rpt_jax.policy.scorer import score_tokens
from rpt_jax.records import Array, InputError, Params

KEY = 0x7E47  # mixed into the seed, so that the draw shares no stream of random numbers with others of the seed


@struct.dataclass
class Text:
    """Windows of documents that one update reads."""

    tokens_BT: Array  # int32, padded on the right with 0
    lengths_B: Array  # int32, live tokens, 2 or more


@dataclass(frozen=True)
class Windows:
    """Where the windows of all documents lie, a row each; documents[number] are token ids."""

    documents: Mapping[int, np.ndarray]
    numbers: np.ndarray  # int32, of the document
    starts: np.ndarray  # int32, first token
    length: int  # tokens, T; the last window of a document may be shorter


def rows_of(config: Config) -> int:
    """Windows that each update reads; 0 without a share."""
    return (config.update.next_token_sequences or config.batch_size) if config.update.next_token_share else 0


def check(config: Config, mesh: Mesh) -> None:
    """Raises InputError for a share that is none, and for windows that do not divide over devices and microbatches."""
    share, length, rows = config.update.next_token_share, config.update.next_token_length, rows_of(config)
    if not 0 <= share < 1:
        raise InputError(
            f"update.next_token_share={share}: use 0 (off) to below 1; for next tokens alone there is `rpt pretrain`"
        )
    units = batch_parts(mesh) * config.update.microbatches
    if share and length < 2:
        raise InputError(f"update.next_token_length={length}: use 2 or more, a token and what it is predicted from")
    if share and (rows < 1 or rows % units):
        raise InputError(
            f"update.next_token_sequences: {rows} sequences have to divide over "
            f"{batch_parts(mesh)} devices and update.microbatches={config.update.microbatches}: use "
            f"--update.next-token-sequences {max(1, -(-rows // units)) * units}"
        )


def cut(annotated: AnnotatedDocuments, length: int) -> Windows:
    """All windows of `length` tokens, each beginning with the last token of the one before it.

    So every token but the first of a document is predicted in one of them. Reads the documents once. Raises
    InputError where no document has two tokens.
    """
    numbers, starts = [], []
    for each in annotated:
        first = np.arange(0, len(each.tokens_T) - 1, length - 1, dtype=np.int32)
        numbers.append(np.full(len(first), each.document, np.int32))
        starts.append(first)
    numbers, starts = (np.concatenate([np.zeros(0, np.int32), *column]) for column in (numbers, starts))
    if not len(numbers):
        raise InputError("update.next_token_share: no document has 2 tokens, so there is no next token to learn from")
    return Windows(annotated.documents, numbers, starts, length)


def drawn(windows: Windows, seed: int, step: int, rows: int) -> Text:
    """`rows` windows, on the host: a function of seed and step alone. None twice where there are enough."""
    random = np.random.default_rng([KEY, seed % 2**64, step])
    chosen = random.choice(len(windows.numbers), rows, replace=rows > len(windows.numbers))
    tokens_BT, lengths_B = np.zeros((rows, windows.length), np.int32), np.zeros(rows, np.int32)
    for row, (number, start) in enumerate(zip(windows.numbers[chosen], windows.starts[chosen], strict=True)):
        tokens_T = windows.documents[int(number)][start : start + windows.length]
        tokens_BT[row, : len(tokens_T)], lengths_B[row] = tokens_T, len(tokens_T)
    return Text(tokens_BT, lengths_B)


def cut_for(config: Config, annotated: AnnotatedDocuments) -> Windows | None:
    """cut, None without a share."""
    return cut(annotated, config.update.next_token_length) if config.update.next_token_share else None


def of_step(windows: Windows | None, config: Config, step: int, mesh: Mesh) -> Text | None:
    """What update `step`, from 0, reads, split over the mesh; None without windows."""
    if windows is None:
        return None
    return place(drawn(windows, config.seed, step, rows_of(config)), batch_sharding(mesh))


def mixed(
    params: Params, loss: Array, gradients: Params, text: Text, *, model: ModelConfig, config: UpdateConfig
) -> tuple[Array, Params, dict]:
    """(loss, gradients, metrics) of the mix, from those of the policy's loss; float32 gradients.

    In config.microbatches parts, whose gradients are added to the given ones. Metrics: next_token_loss (nats per
    token), next_token_tokens (live tokens of the windows), next_token_rows.
    """
    share, parts = config.next_token_share, config.microbatches
    predicted = jnp.maximum(jnp.sum(text.lengths_B - 1), 1)
    split = jax.tree.map(lambda a: jnp.asarray(a).reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), text)

    def part_loss(params, part):
        with jax.named_scope("next_token_loss"):
            logprobs_BT = score_tokens(params, model, part.tokens_BT, part.lengths_B, 1.0, config.token_chunk)
        return -jnp.sum(logprobs_BT) / predicted

    def body(total, part):
        loss, gradients = jax.value_and_grad(part_loss)(params, part)
        return jax.tree.map(lambda a, b: a + share * b.astype(jnp.float32), total, gradients), loss

    total = jax.tree.map(lambda g: (1 - share) * g.astype(jnp.float32), gradients)
    total, losses = jax.lax.scan(body, total, split)
    text_loss = losses.sum()
    counts = {"next_token_tokens": jnp.sum(text.lengths_B), "next_token_rows": len(text.lengths_B)}
    return (1 - share) * loss + share * text_loss, total, {"next_token_loss": text_loss} | counts
