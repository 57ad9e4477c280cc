"""That what is predicted, how it is asked for, how it is paid and in which order it comes fit together.

In: what the loop was given. Out: InputError, with the remedy, for what clashes.
"""

from rpt_jax.corpus.curriculum import require_stages
from rpt_jax.corpus.positions import Positions
from rpt_jax.corpus.segments import require_room
from rpt_jax.corpus.templates import require_fitting
from rpt_jax.learning.collect import Source, is_whole
from rpt_jax.learning.custom_judge import load_judge
from rpt_jax.records import InputError


def check(source: Source, positions: Positions) -> None:
    """Raises InputError where positions, template, truth_bytes, order or judge do not fit the config."""
    config = source.config
    has_ends = positions.lengths is not None and bool(positions.lengths.all())
    if has_ends != is_whole(config):
        raise InputError(
            f"positions.target={config.positions.target}, but the positions given are "
            f"{'segments' if has_ends else 'no segments'}: select them with the same setting"
        )
    require_fitting(source.template, config.positions.target)
    require_room(source.documents, source.tokenizer.token_bytes, positions, config.prompt.truth_bytes)
    require_stages(len(positions), config)
    if config.reward.kind == "judged":
        load_judge(config.reward.judge)
