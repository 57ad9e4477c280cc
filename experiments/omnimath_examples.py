"""Annotated texts and a base -> what the cold start and the controls of omnimath_small.py learn from."""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from rpt_jax.config import Config, ModelConfig
from rpt_jax.corpus.positions import position_stream, select_positions
from rpt_jax.corpus.prompts import parse_answer
from rpt_jax.corpus.templates import load_template
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.learning.pretrain import Example, plain, supervised
from rpt_jax.policy import decoder
from rpt_jax.policy.proxy import text_logits
from rpt_jax.records import Params

# Pieces of their own, no text; <seen> and <then> belong to an earlier kind of thought (LOG.md) and are free.
MARKS = ("<predict>", "<think>", "</think>", "<seen>", "<then>", "<or>")
QUOTED = 2  # tokens of the context that a thought repeats before a candidate
CONTEXT_WEIGHT = 0.2  # of a token before the thought in the cold start
Policy = tuple[ModelConfig, Params, Tokenizer]


def marks(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that are no text."""
    return tuple(tokenizer.id_of(mark) for mark in MARKS)


def make_response(
    tokenizer: Tokenizer,
    context_T: np.ndarray,
    logprobs_V: np.ndarray,
    truth: int,
    careful: float,
    rng: np.random.Generator,
) -> list[int] | None:
    """A thought with one to three draws of the base, then a choice among them; None if no box can hold it."""
    count = rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])
    options = np.argsort(-(logprobs_V + rng.gumbel(size=len(logprobs_V))))[:count].tolist()
    thought = []
    for token in options:
        thought += [tokenizer.id_of("<or>"), *context_T[-QUOTED:].tolist(), token]
    is_careful = rng.random() < careful and truth in options
    choice = truth if is_careful else int(rng.choice(options))
    box = [*tokenizer.encode("\\boxed{"), choice, *tokenizer.encode("}")]
    response = [*thought[1:], tokenizer.id_of("</think>"), *box]
    if parse_answer(tokenizer.bytes_of(response)) != tokenizer.token_bytes[choice]:
        return None
    return [*response, tokenizer.end_of_text]


@partial(jax.jit, static_argnums=(1, 2))
def next_logprobs(params, model, banned_ids, tokens_BT, lengths_B):
    hidden_BTD, _ = decoder.forward(
        params, model, tokens_BT, decoder.positions_from_lengths(lengths_B, tokens_BT.shape[1])
    )
    last_BD = hidden_BTD[jax.numpy.arange(len(lengths_B)), lengths_B - 1]
    return jax.nn.log_softmax(text_logits(params, model, last_BD, banned_ids))


def make_traces(run: Config, base: Policy, annotated, count: int, careful: float) -> list[Example]:
    """Prompts with their thoughts; an example of the text before the position too, so every token counts.

    run: the RPT run, for positions, prompt and seed. count: traces at most. careful: share that looks at the truth.
    """
    model, params, tokenizer = base
    rng = np.random.default_rng(run.seed + 1)
    positions = select_positions(annotated, run.positions, run.seed)
    documents = {document.document: document.tokens_T for document in annotated}
    rows = rng.choice(len(positions), min(count, len(positions)), replace=False)
    head, tail = frame(tokenizer, run)
    room = run.prompt.max_tokens - len(head) - len(tail)
    traces = []
    for start in range(0, len(rows) - 127, 128):
        chosen = [positions[row] for row in rows[start : start + 128]]
        contexts = [documents[p.document][max(0, p.index - room) : p.index] for p in chosen]
        lengths_B = np.array([len(context) for context in contexts], np.int32)
        tokens_BT = np.stack([np.pad(context, (0, room - len(context))) for context in contexts])
        logprobs_BV = np.asarray(next_logprobs(params, model, marks(tokenizer), tokens_BT, lengths_B))
        for position, context, logprobs_V in zip(chosen, contexts, logprobs_BV, strict=True):
            truth = int(documents[position.document][position.index])
            response = make_response(tokenizer, context, logprobs_V, truth, careful, rng)
            if response is not None:
                before = len(head) + len(context) + len(tail)
                weights_T = np.repeat(np.float32([CONTEXT_WEIGHT, 1]), [before, len(response)])
                traces.append((np.array([*head, *context, *tail, *response], np.int32), weights_T))
    return traces


def frame(tokenizer: Tokenizer, run: Config) -> tuple[list[int], list[int]]:
    """Tokens of the prompt before and after the context."""
    template = load_template(run.prompt.template)
    return tokenizer.encode_markup(template.before), tokenizer.encode_markup(template.after)


def next_token_examples(
    texts: Sequence[str], tokenizer: Tokenizer, traces: list[Example], length: int, seed: int
) -> list[Example]:
    """Rows of the texts, of `length` tokens at most, and as many traces."""
    tokens = [np.array([*tokenizer.encode(text), tokenizer.end_of_text]) for text in texts]
    rows = [plain(tokens_T[i : i + length]) for tokens_T in tokens for i in range(0, len(tokens_T) - 1, length)]
    chosen = np.random.default_rng(seed).permutation(len(rows))[: len(traces)]
    return [rows[i] for i in chosen] + traces


def boxed_examples(run: Config, tokenizer: Tokenizer, annotated) -> list[Example]:
    """The positions of the RPT run with the truth in the box and no thought; only the response counts."""
    stream = position_stream(select_positions(annotated, run.positions, run.seed), seed=run.seed)
    documents = {document.document: document.tokens_T for document in annotated}
    head, tail = frame(tokenizer, run)
    room = run.prompt.max_tokens - len(head) - len(tail)
    examples = []
    for position in itertools.islice(stream, run.steps * run.batch_size):
        tokens_T = documents[position.document]
        context = tokens_T[max(0, position.index - room) : position.index]
        box = [*tokenizer.encode("</think>\\boxed{"), int(tokens_T[position.index]), *tokenizer.encode("}")]
        if parse_answer(tokenizer.bytes_of(box)) == tokenizer.token_bytes[tokens_T[position.index]]:
            examples.append(supervised([*head, *context, *tail], [*box, tokenizer.end_of_text]))
    return examples
