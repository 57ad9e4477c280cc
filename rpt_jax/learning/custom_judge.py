"""A judge of the user's own -> the scores of predictions: reward.kind=judged.

For targets that may be said in other words. RLPT pays 1 where a prediction means the same as a beginning of the
reference ("relaxed prefix"), 0 otherwise, as a judging model says [arXiv 2509.19249]. What judges is not part of this
project: reward.judge names a function in a Python file, for example one that asks a model or a server. It gets whole
batches, so that it may ask about many predictions at one time:

    def judge(contexts: list[bytes], predictions: list[bytes], truths: list[bytes]) -> Sequence[float]:
        '''One score for each prediction, 0 (wrong) to 1 (right).'''

    contexts     the text that the policy was shown, without instructions; of a masked span with the gap in it
    predictions  what stood in the box, never empty
    truths       the whole target; of positions.target next_token what follows, whole tokens of prompt.truth_bytes bytes

All are bytes: a token may end within a character of UTF-8. Responses without an answer, or with an empty one, earn 0
and are not shown to it. A run is continued exactly only if the same arguments always get the same scores. Of several
processes each asks about the rows of its own.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from rpt_jax.experiment_file import load_module
from rpt_jax.records import InputError, words_of

Judge = Callable[[list[bytes], list[bytes], list[bytes]], Sequence[float]]


@functools.cache
def load_judge(name: str) -> Judge:
    """The function that FILE.py:FUNCTION names; the file runs once. Raises InputError where there is none."""
    path, colon, function = name.rpartition(":")
    if not colon or not path or not function:
        raise InputError(f"reward.judge={name!r}: name a file and a function in it, FILE.py:FUNCTION")
    judge = getattr(load_module(path), function, None)
    if not callable(judge):
        raise InputError(f"reward.judge={name!r}: {path} defines no function {function}: name one that it has")
    return judge


def judged(
    name: str,
    contexts_N: Sequence[bytes],
    predictions: Sequence[Sequence[bytes | None]],
    truths_N: Sequence[bytes],
) -> np.ndarray:
    """scores_NG, float32, in [0, 1]; 0 where there is no answer. name: reward.judge; predictions: N rows of G.

    Raises InputError, naming file and function, where the judge fails, gives another number of scores than it was
    asked for, or one that is no number from 0 to 1.
    """
    judge = load_judge(name)
    asked = [(n, g) for n, group in enumerate(predictions) for g, answer in enumerate(group) if answer]
    scores_NG = np.zeros((len(predictions), len(predictions[0]) if len(predictions) else 0), np.float32)
    if not asked:
        return scores_NG
    arguments = (
        [contexts_N[n] for n, _ in asked],
        [predictions[n][g] for n, g in asked],
        [truths_N[n] for n, _ in asked],
    )
    try:
        scores = np.asarray(judge(*arguments), np.float64)
    except Exception as error:
        raise InputError(f"reward.judge={name!r} failed: {type(error).__name__}: {words_of(error)}; mend it") from error
    if scores.shape != (len(asked),):
        raise InputError(
            f"reward.judge={name!r} gave scores of shape {scores.shape} for {len(asked)} predictions: return one "
            "number for each"
        )
    wrong = np.flatnonzero(~((scores >= 0) & (scores <= 1)))  # not finite, too
    if len(wrong):
        raise InputError(
            f"reward.judge={name!r} gave the score {scores[wrong[0]]} for the prediction {arguments[1][wrong[0]]!r}: "
            "return numbers from 0 to 1"
        )
    scores_NG[tuple(np.array(asked).T)] = scores
    return scores_NG
