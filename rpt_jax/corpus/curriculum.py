"""Positions -> the order in which a run takes them: shuffled, or easy ones first.

In: the positions of a run and how many it will draw. Out: a Grain dataset whose state is one number, so that a run
continues where it stood. The paper [RPT, arXiv 2506.08007] shuffles, as far as it says.

Easy to hard. Entropy says what is hard. In the k-th of S stages, each a like part of the draws, positions come from
the k/S of lowest entropy, shuffled: harder ones join easier ones, and the last stage, which never ends, has all. Ties
go by stored order.

    stage     1       2            3                 4 ...
    from      ####    ########     ############      ################     low entropy first

Draws are counted, not updates: dynamic sampling draws more than steps * batch_size positions (those of its queue count
once), so its run reaches the later stages in fewer updates, and is in the last one longer.
"""

import grain
import numpy as np

from rpt_jax.config import Config
from rpt_jax.corpus.positions import Positions, in_order, position_stream
from rpt_jax.records import InputError

ENDLESS = 2**62  # draws


def stream(positions: Positions, config: Config) -> grain.IterDataset:
    """Endless stream of Position in the order that config.positions.order names, the same in every process."""
    if config.positions.order == "shuffled":
        return position_stream(positions, seed=config.seed)
    require_stages(len(positions), config)
    draws = config.steps * config.batch_size
    return easy_to_hard(positions, seed=config.seed, draws=draws, stages=config.positions.stages)


def require_stages(count: int, config: Config) -> None:
    """Raises InputError where the first stage has fewer positions than a batch: rollouts of the same would be alike."""
    first = count // config.positions.stages
    if config.positions.order == "easy_to_hard" and first < config.batch_size:
        raise InputError(
            f"positions.order=easy_to_hard: the first of positions.stages={config.positions.stages} has {first} of "
            f"{count} positions, fewer than batch_size={config.batch_size}: use fewer stages, or select more positions"
        )


def easy_to_hard(positions: Positions, *, seed: int, draws: int, stages: int) -> grain.IterDataset:
    """Endless stream of Position: `draws` of them in `stages` stages of like length, then more of the last stage.

    Each stage is shuffled by the seed anew each time it has been through its positions. Iterators have get_state and
    set_state.
    """
    ordered = np.argsort(positions.entropies, kind="stable")
    parts = []
    for stage in range(stages):
        easiest = positions[np.sort(ordered[: max(1, (stage + 1) * len(ordered) // stages)])]
        length = (stage + 1) * draws // stages - stage * draws // stages
        shuffled = grain.MapDataset.source(easiest).seed((seed + stage) % 2**32).shuffle().repeat()
        parts.append(shuffled[: length if stage + 1 < stages else ENDLESS])
    return in_order(grain.MapDataset.concatenate(parts))
