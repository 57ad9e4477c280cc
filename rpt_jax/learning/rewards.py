r"""What came of the rollouts -> their rewards, in the kinds that reward.kind names.

Every kind is a function of Outcomes; `reward` chooses. Prefix matching [RPT, arXiv 2506.08007, section 3.2, Eq. 3] is
the default, and what "right" means of next tokens (of a segment it is `exact`): metrics and evaluation count that,
whatever is paid. First token, dense and conditional dense are variants of its appendix A, information gain is RLP's
[arXiv 2510.01265]. The truth of a segment ends with it, so that all kinds but information gain work within it.

Everything is bytes on the host: predictions as cut out of the responses, truth as the exact bytes of the
document's tokens. Nothing is decoded to text or tokenised again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rpt_jax.config import RewardConfig
from rpt_jax.corpus.prompts import answer_start
from rpt_jax.learning.custom_judge import judged
from rpt_jax.learning.judge_worker import RIGHT
from rpt_jax.records import Prompts


@dataclass(frozen=True)
class Outcomes:
    """What rewards look at, of N prompts with G rollouts each; on the host."""

    predictions: Sequence[Sequence[bytes | None]]  # N rows of G; None: no answer
    prompts: Prompts  # their truth and boundaries
    first_logprobs_NG: np.ndarray | None = None  # dense: nats, of the token that begins the answer; answer_logprobs
    thought_logprobs_NG: np.ndarray | None = None  # information_gain: nats, of the token that follows; next_token.py
    plain_logprobs_N: np.ndarray | None = None  # information_gain: the same without a thought
    verdicts_NG: np.ndarray | None = None  # verified: int8, what judge.verdicts says of the answers to questions
    contexts_N: Sequence[bytes] | None = None  # judged: the text that was shown; prompts.contexts_of
    whole: bool = False  # targets are segments: the truth ends with them, and whoever is right names all of it


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
    if config.kind == "verified":
        return verified(outcomes)
    if config.kind == "exact":
        return exact(outcomes)
    if config.kind == "judged":
        return judged(config.judge, outcomes.contexts_N, outcomes.predictions, truths(outcomes.prompts))
    return prefix_matching(outcomes.predictions, outcomes.prompts)


def right(outcomes: Outcomes) -> np.ndarray:
    """right_NG, bool, whatever is paid: of questions the judge's verdict, of segments exact, else prefix matching."""
    if outcomes.verdicts_NG is not None:
        return outcomes.verdicts_NG == RIGHT
    return (exact(outcomes) if outcomes.whole else prefix_matching(outcomes.predictions, outcomes.prompts)) == 1


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


def exact(outcomes: Outcomes) -> np.ndarray:
    """1 where the prediction is the whole target, else 0; float32 [N, G].

    The target is the segment, compared without white space around it; or, of next tokens, the first token that has
    bytes, compared as it stands: there white space belongs to the token or is all of it. An empty prediction earns 0.
    """
    truth_NX, boundaries_NX = np.asarray(outcomes.prompts.truth_NX), np.asarray(outcomes.prompts.boundaries_NX)
    rewards_NG = np.zeros(pack_predictions(outcomes.predictions, 0)[1].shape, np.float32)
    targets = truths(outcomes.prompts)
    if not outcomes.whole:
        first_N = np.where(boundaries_NX.any(axis=1), boundaries_NX.argmax(axis=1) + 1, 0)
        targets = [truth_X[:first].tobytes() for truth_X, first in zip(truth_NX, first_N, strict=True)]
    for n, g in np.ndindex(*rewards_NG.shape):
        answer, target = outcomes.predictions[n][g] or b"", targets[n]
        if outcomes.whole:
            answer, target = answer.strip(), target.strip()
        rewards_NG[n, g] = bool(answer) and answer == target
    return rewards_NG


def truths(prompts: Prompts) -> list[bytes]:
    """The bytes of all whole tokens of the truth kept: of a segment all of it, otherwise what follows in the text."""
    boundaries_NX = np.asarray(prompts.boundaries_NX)
    ends_N = boundaries_NX.shape[1] - boundaries_NX[:, ::-1].argmax(axis=1)
    ends_N = np.where(boundaries_NX.any(axis=1), ends_N, 0)
    return [truth_X[:end].tobytes() for truth_X, end in zip(np.asarray(prompts.truth_NX), ends_N, strict=True)]


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


def verified(outcomes: Outcomes) -> np.ndarray:
    """1 where the judge found that the answer means what the reference does, else 0  [RPT, its table on fine-tuning].

    An answer that could not be judged within its limits (judge.py), and a response without one, earn 0.
    """
    return (outcomes.verdicts_NG == RIGHT).astype(np.float32)


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
