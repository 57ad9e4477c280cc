"""Rollouts for people to read: what rollouts.jsonl, and so the report, has of a step.

In: the groups of a step, and what their prompts are made from. Out: rows of texts.
"""

from collections.abc import Iterable

import jax
import numpy as np

from rpt_jax.corpus.pieces import readable_pieces
from rpt_jax.corpus.prompts import THOUGHT_END, parse_answers
from rpt_jax.learning.collect import Groups, Source
from rpt_jax.learning.rewards import truths

SHOWN_CONTEXT = 240  # bytes of context in rollouts.jsonl
SHOWN_TRUTH = 60  # bytes of what really follows


def shown(source: Source, groups: Groups, count: int, step: int) -> Iterable[dict]:
    """Up to `count` rollouts of a step for people to read: evenly spread over prompts, members in turn.

    context is the end of what stands before the position, truth its first token (of a segment and of the reference of
    a question all of it), continuation a little more of what follows.
    pieces is the whole response as [text, log-prob] of each token, those that share a character together. Bytes that
    are no UTF-8 show as U+FFFD.
    """
    N, G = groups.rewards_NG.shape
    for i in range(min(count, N * G)):
        n, g = (i * N // count, i % G) if count <= N else divmod(i, G)
        position, rollouts = groups.positions[n], groups.rollouts
        before = source.documents[position.document][max(0, position.index - SHOWN_CONTEXT) : position.index]
        one = (
            array[n : n + 1, g : g + 1] for array in (rollouts.tokens_NGR, rollouts.lengths_NG, rollouts.finished_NG)
        )
        ((answer,),) = parse_answers(source.tokenizer, *one)
        length = int(rollouts.lengths_NG[n, g])
        contents = [source.tokenizer.bytes_of([token]) for token in rollouts.tokens_NGR[n, g, :length].tolist()]
        response = b"".join(contents)
        yield {
            "step": step,
            "document": position.document,
            "index": position.index,
            "entropy": position.entropy,
            "member": g,
            "context": _text(source.tokenizer.bytes_of(before.tolist())[-SHOWN_CONTEXT:]),
            "thought": _text(response.rpartition(THOUGHT_END)[0] if THOUGHT_END in response else response),
            "prediction": None if answer is None else _text(answer),
            "truth": _text(_target(source, groups, n)),
            "continuation": _text(groups.prompts.truth_NX[n].tobytes()[:SHOWN_TRUTH].rstrip(b"\0")),
            "reward": float(groups.rewards_NG[n, g]),
            "right": bool(groups.right_NG[n, g]),
            "finished": bool(rollouts.finished_NG[n, g]),
            "tokens": length,
            "pieces": [
                [text, round(p, 4)]
                for text, p in readable_pieces(contents, rollouts.logprobs_NGR[n, g, :length].tolist())
            ],
        }


def _target(source: Source, groups: Groups, n: int) -> bytes:
    """What was to be predicted of prompt n: its segment, its reference answer, or the first token that follows."""
    if groups.positions[n].length:
        return truths(jax.tree.map(lambda leaf: leaf[n : n + 1], groups.prompts))[0]
    truth = groups.prompts.truth_NX[n].tobytes()
    if source.judge is not None:
        return truth.rstrip(b"\0")
    return truth[: int(np.argmax(groups.prompts.boundaries_NX[n])) + 1]


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="replace")
