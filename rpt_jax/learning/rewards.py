r"""What came of the rollouts -> their rewards, in the kinds that reward.kind names.

Every kind is a function of Outcomes; `reward` chooses. Prefix matching [RPT, arXiv 2506.08007, section 3.2, Eq. 3] is
the default, and what "right" means everywhere: metrics and evaluation count it whatever is paid. First token, dense
and conditional dense are variants of its appendix A, information gain is RLP's [arXiv 2510.01265].

Everything is bytes on the host: predictions as cut out of the responses, truth as the exact bytes of the
document's tokens. Nothing is decoded to text or tokenised again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rpt_jax.config import RewardConfig
from rpt_jax.corpus.prompts import answer_start
from rpt_jax.records import Prompts


@dataclass(frozen=True)
class Outcomes:
    """What rewards look at, of N prompts with G rollouts each; on the host."""

    predictions: Sequence[Sequence[bytes | None]]  # N rows of G; None: no answer
    prompts: Prompts  # their truth and boundaries
    first_logprobs_NG: np.ndarray | None = None  # dense: nats, of the token that begins the answer; answer_logprobs
    thought_logprobs_NG: np.ndarray | None = None  # information_gain: nats, of the token that follows; next_token.py
    plain_logprobs_N: np.ndarray | None = None  # information_gain: the same without a thought


def reward(config: RewardConfig, outcomes: Outcomes) -> np.ndarray:
    """rewards_NG, float32, of the kind that the config names."""
    if config.kind == "first_token":
        return first_token(outcomes)
    if config.kind == "dense":
        return dense(outcomes)
    if config.kind == "conditional_dense":
        return conditional_dense(outcomes)
    if config.kind == "information_gain":
        return information_gain(outcomes)
    return prefix_matching(outcomes.predictions, outcomes.prompts)


def prefix_matching(predictions: Sequence[Sequence[bytes | None]], prompts: Prompts) -> np.ndarray:
    """1 where prediction Y equals the first l = len(Y) bytes of the continuation and l is in B, else 0  [Eq. 3].

    predictions: N rows of G, None for a response without answer. B holds the cumulative byte lengths of the
    continuation's tokens, so one token or several earn the same 1; an empty prediction earns 0, as 0 is not in B.
    Differs from Eq. 3 for predictions longer than the X bytes of truth that the prompts keep: they earn 0.
    Returns rewards_NG, float32.
    """
    truth_NX = np.asarray(prompts.truth_NX)
    boundaries_NX = np.asarray(prompts.boundaries_NX)
    bytes_NGX, lengths_NG = pack_predictions(predictions, truth_NX.shape[1])
    within_NGX = np.arange(truth_NX.shape[1]) < lengths_NG[..., None]
    agrees_NG = np.all((bytes_NGX == truth_NX[:, None, :]) | ~within_NGX, axis=-1)
    fits_NG = (lengths_NG >= 1) & (lengths_NG <= truth_NX.shape[1])
    last_NG = np.where(fits_NG, lengths_NG - 1, 0)
    ends_token_NG = np.take_along_axis(boundaries_NX, last_NG, axis=1)
    return (agrees_NG & fits_NG & ends_token_NG).astype(np.float32)


def first_token(outcomes: Outcomes) -> np.ndarray:
    """1 where the prediction begins with all bytes of the continuation's first token, else 0  [RPT, appendix A].

    r = 1 if len(Y) >= b and Y[:b] = X[:b], b = min B. What stands behind these b bytes counts for nothing, right or
    wrong, whole tokens or not, so whatever is right by prefix matching earns 1 here too, and not the other way round:
    with " the", " c", "at" to come, " the dog", " the ca" and " then" earn 1 here alone. (Bytes decide, not the tokens
    that the policy wrote them with: a box cannot say where its first token ends.) A prediction may be longer than the
    truth kept. Where no token has bytes, or the first does not fit into the truth kept, all earn 0.
    """
    truth_NX, boundaries_NX = np.asarray(outcomes.prompts.truth_NX), np.asarray(outcomes.prompts.boundaries_NX)
    bytes_NGX, lengths_NG = pack_predictions(outcomes.predictions, truth_NX.shape[1])
    first_N = np.where(boundaries_NX.any(axis=1), boundaries_NX.argmax(axis=1) + 1, truth_NX.shape[1] + 1)
    beyond_NX = np.arange(truth_NX.shape[1]) >= first_N[:, None]
    agrees_NG = np.all((bytes_NGX == truth_NX[:, None, :]) | beyond_NX[:, None, :], axis=-1)
    exists_N1 = (first_N <= truth_NX.shape[1])[:, None]
    return (agrees_NG & exists_N1 & (lengths_NG >= first_N[:, None])).astype(np.float32)


def dense(outcomes: Outcomes) -> np.ndarray:
    """1 where the prediction is right (prefix matching), else p(first token of the prediction)  [RPT, appendix A].

    p is the policy's own probability of the token that begins the wrong answer, in its place in the response: the one
    it was sampled with, so at sample.temperature and before top-k, top-p and min-p. Without an answer, or with an
    empty one, 0. A wrong prediction whose first token is right is wrong, and earns that token's probability.
    """
    right_NG = prefix_matching(outcomes.predictions, outcomes.prompts)
    answered_NG = np.array([[bool(answer) for answer in group] for group in outcomes.predictions], bool)
    wrong_NG = np.exp(np.where(answered_NG, outcomes.first_logprobs_NG, -np.inf), dtype=np.float32)
    return np.where(right_NG == 1, right_NG, wrong_NG)


def conditional_dense(outcomes: Outcomes) -> np.ndarray:
    """dense in groups with a right prediction (prefix matching); 0 for all of the others  [RPT, appendix A]."""
    right_NG = prefix_matching(outcomes.predictions, outcomes.prompts)
    return np.where(right_NG.any(axis=1, keepdims=True), dense(outcomes), np.float32(0))


def information_gain(outcomes: Outcomes) -> np.ndarray:
    """log p_policy(x_t | context, thought) - log p_EMA(x_t | context), nats  [RLP, arXiv 2510.01265].

    x_t is the one token that follows in the document, and no verifier looks at an answer: the response behind
    `</think>` plays no part, right or wrong, there or not. The policy reads the prompt and its thought (then
    reward.opening, if any), the average of past policies the text alone; both at temperature 1. See next_token.py.
    """
    return (outcomes.thought_logprobs_NG - outcomes.plain_logprobs_N[:, None]).astype(np.float32)


def answer_logprobs(
    bytes_of: Callable[[Sequence[int]], bytes], tokens_NGR: np.ndarray, lengths_NG: np.ndarray, logprobs_NGR: np.ndarray
) -> np.ndarray:
    """Log-prob of the token that begins the answer, float32 [N, G], nats; -inf where no box with a token in it is.

    That is the token in which the first byte of the box's content lies (a token such as `{x` may hold the end of the
    opening, too); found by bytes, tokens without any are passed over.
    """
    found_NG = np.full(lengths_NG.shape, -np.inf, np.float32)
    for n, g in np.ndindex(*lengths_NG.shape):
        contents = [bytes_of([token]) for token in tokens_NGR[n, g, : lengths_NG[n, g]].tolist()]
        start, ends_R = answer_start(b"".join(contents)), np.cumsum([len(content) for content in contents])
        if start is not None and start < ends_R[-1]:
            found_NG[n, g] = logprobs_NGR[n, g, np.searchsorted(ends_R, start, side="right")]
    return found_NG


def pack_predictions(predictions: Sequence[Sequence[bytes | None]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions as bytes_NGX (uint8, padded with 0, cut at X = width) and their lengths_NG (int32, uncut).

    No answer (None) has length 0, as an empty one: neither can earn a reward. Raises ValueError for groups of
    unequal size.
    """
    flat = [answer or b"" for group in predictions for answer in group]
    shape = (len(predictions), len(predictions[0]) if len(predictions) else 0)
    if any(len(group) != shape[1] for group in predictions):
        raise ValueError(f"groups of {sorted({len(group) for group in predictions})} predictions: all need the same G")
    lengths_NG = np.array([len(answer) for answer in flat], np.int32).reshape(shape)
    padded = b"".join(answer[:width].ljust(width, b"\0") for answer in flat)
    return np.frombuffer(padded, np.uint8).reshape(*shape, width), lengths_NG
