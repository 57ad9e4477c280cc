"""Predictions and what really follows -> prefix-matching rewards [RPT, arXiv 2506.08007, section 3.2, Eq. 3].

Everything is bytes on the host: predictions as cut out of the responses, truth as the exact bytes of the
document's tokens. Nothing is decoded to text or tokenised again.
"""

from collections.abc import Sequence

import numpy as np

from rpt_jax.records import Prompts


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
