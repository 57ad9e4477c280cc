"""How the groups of a step divide into parts that run one behind the other, or on devices side by side."""

import math

from rpt_jax.records import InputError


def parts_of_groups(prompts: int, group: int, bins: int, what: str = "update.microbatches=") -> int:
    """Into how many parts each group is split, so that prompts and their parts divide into `bins`; 1 if they do anyway.

    what: `bins` in words, behind which the number is put. Raises InputError where no part of a group does it.
    """
    parts = bins // math.gcd(prompts, bins)
    if group % parts:
        raise InputError(
            f"{prompts} prompts with groups of {group} do not divide into {what}{bins}: "
            f"choose so that it divides {prompts * group}"
        )
    return parts
