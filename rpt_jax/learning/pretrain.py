"""Next-token training and supervised fine-tuning of the decoder: base models, cold starts and the paper's controls.

In: parameters and batches of (tokens_BT, weights_BT); weights_BT[b, t] is what predicting token t counts, so SFT has 0
on the prompt and padding has 0 everywhere. Out: parameters. Batches come from examples, (tokens_T, weights_T) pairs.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import ModelConfig, PretrainConfig
from rpt_jax.learning.update import TrainState, apply_gradients, init_state, make_optimizer, require_finite
from rpt_jax.policy.scorer import score_tokens
from rpt_jax.records import Array, InputError, Params

Example = tuple[np.ndarray, np.ndarray]  # tokens_T int32, weights_T float32


def plain(tokens) -> Example:
    """An example in which every token counts 1."""
    return np.asarray(tokens, np.int32), np.ones(len(tokens), np.float32)


def supervised(prompt, response) -> Example:
    """An example in which the response's tokens count 1 and the prompt's nothing."""
    weights_T = np.repeat(np.float32([0, 1]), [len(prompt), len(response)])
    return np.concatenate([prompt, response]).astype(np.int32), weights_T


def row_batches(
    examples: Sequence[Example], batch_size: int, sequence_length: int, seed: int, buckets: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless (tokens_BT, weights_BT), an example to a row, reshuffled every epoch.

    Rows are padded on the right to the shortest of `buckets` even steps up to sequence_length that holds them, and a
    batch has rows of one bucket; each width compiles once. A longer example is cut, see `_pieces`.
    """
    _check(examples, sequence_length)
    rows = [piece for example in examples for piece in _pieces(example, sequence_length)]
    widths = [-(-sequence_length * (i + 1) // buckets) for i in range(buckets)]
    waiting: dict[int, list[Example]] = {width: [] for width in widths}
    for tokens_T, weights_T in _shuffled(rows, seed):
        width = next(w for w in widths if w >= len(tokens_T))
        padding = (0, width - len(tokens_T))
        waiting[width].append((np.pad(tokens_T, padding), np.pad(weights_T, padding)))
        if len(waiting[width]) == batch_size:
            tokens, weights = zip(*waiting[width], strict=True)
            yield np.stack(tokens), np.stack(weights)
            waiting[width] = []


def running_batches(
    examples: Sequence[Example], batch_size: int, sequence_length: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless (tokens_BT, weights_BT) cut from all examples one behind the other, reshuffled every epoch.

    No padding: an example may begin in the middle of a row and sees the ones before it. End documents with the
    tokenizer's end-of-text token so that the model can tell. Rows share their end token with the next row's start,
    so that every token is predicted once.
    """
    _check(examples, sequence_length)
    stride, parts, held = sequence_length - 1, [], 0
    for example in _shuffled(examples, seed):
        parts.append(example)
        held += len(example[0])
        if held <= batch_size * stride:
            continue
        line = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        while len(line[0]) > batch_size * stride:
            starts_B1 = stride * np.arange(batch_size)[:, None]
            tokens_BT, weights_BT = (array[starts_B1 + np.arange(sequence_length)[None]] for array in line)
            yield tokens_BT, weights_BT
            line = [array[batch_size * stride :] for array in line]
        parts, held = [tuple(line)], len(line[0])


def _pieces(example: Example, length: int) -> list[Example]:
    """Rows of at most `length` tokens; each begins with the last token before it, so that no prediction is lost."""
    tokens_T, weights_T = example
    starts = range(0, max(len(tokens_T) - 1, 1), length - 1)
    return [(tokens_T[i : i + length], weights_T[i : i + length]) for i in starts]


def _check(examples: Sequence[Example], sequence_length: int) -> None:
    if sequence_length < 2:
        raise InputError(f"sequence_length={sequence_length}: a row needs 2 tokens or more, one predicts the next")
    if not any(np.any(weights_T[1:]) for _, weights_T in examples):
        raise InputError(f"none of {len(examples)} training examples has a token to predict: give longer documents")


def _shuffled(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    random = np.random.default_rng(seed % 2**64)
    while True:
        for index in random.permutation(len(examples)):
            yield examples[index]


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnums=0)
def pretrain_step(
    state: TrainState, tokens_BT: Array, weights_BT: Array, *, model: ModelConfig, config: PretrainConfig
) -> tuple[TrainState, dict]:
    """One update on sum(-weight * log p) / sum(weight); state is donated. Metrics of apply_gradients and `tokens`.

    Token 0 of a row has nothing to be predicted from, its weight is ignored. Padding needs no mask of its own:
    attention is causal and padding comes last.
    """
    weights_BT = weights_BT.at[:, 0].set(0.0)
    total = jnp.maximum(jnp.sum(weights_BT), 1e-9)

    def mean_loss(params):
        B, T = tokens_BT.shape
        logprobs_BT = score_tokens(params, model, tokens_BT, jnp.full(B, T), 1.0, config.token_chunk)
        return -jnp.sum(weights_BT * logprobs_BT) / total

    loss, gradients = jax.value_and_grad(mean_loss)(state.params)
    state, metrics = apply_gradients(state, loss, gradients, config, config.steps)
    return state, metrics | {"tokens": jnp.sum(weights_BT > 0)}


def pretrain(
    params: Params,
    model: ModelConfig,
    config: PretrainConfig,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    report: Callable[[int, dict[str, float]], None] | None = None,
    *,
    report_every: int = 50,
    place: Callable = lambda batch: batch,
) -> Params:
    """config.steps updates on what `batches` yields; the given params are left intact.

    report(steps done, metrics) is called every report_every steps and after the last; place puts a host batch on a
    mesh (then call inside jax.set_mesh(mesh)). Raises InputError for batches that end early or hold ids beyond the
    vocabulary, FloatingPointError for a loss or gradient that is not finite.
    """
    state = init_state(params, make_optimizer(config, config.steps))
    last = None
    for step in range(config.steps):
        batch = next(batches, None)
        if batch is None:
            raise InputError(f"batches ended after {step} of pretrain.steps={config.steps}: repeat them or lower steps")
        if np.max(batch[0]) >= model.vocab_size:
            raise InputError(
                f"token id {np.max(batch[0])} in a training batch, but model.vocab_size={model.vocab_size}: "
                "use the tokenizer that the model was made for"
            )
        state, metrics = pretrain_step(state, *place(batch), model=model, config=config)
        if last is not None:
            require_finite(last, step)  # a step late, so that the host prepares the next batch meanwhile
        last = metrics
        if report and ((step + 1) % report_every == 0 or step + 1 == config.steps):
            report(step + 1, {name: float(value) for name, value in metrics.items()})
    if last is not None:
        require_finite(last, config.steps)
    return state.params
