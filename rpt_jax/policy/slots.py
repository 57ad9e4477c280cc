"""Which rollout is decoded where: slots that are refilled, and that become fewer when nothing waits.

In: which rollouts live and which wait. Out: `Seating`. All of it is bookkeeping on the host between two calls of the
decoder; a rollout's random keys depend on what it is, not on its slot, so the seating changes no rollout.

A row is one copy of a prompt's keys and values with the slots that share it. As long as groups begin together a row has
a slot for every member; when some have ended, single slots with a prompt of their own waste less. Slots come in few
numbers (the first one, its half, quarter and eighth), since each is compiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FEWEST = 8  # the smallest number of slots is this part of the first


@dataclass(frozen=True)
class Seating:
    """Rollouts of each unit by slot, width slots a row; a rollout is prompt * G + member within its unit, -1: none."""

    rollouts_US: np.ndarray
    width: int

    def prompts(self, group: int) -> np.ndarray:
        """[U, S / width], the prompt of each row; 0 for an empty one."""
        return np.maximum(self.rollouts_US.reshape(len(self.rollouts_US), -1, self.width).max(axis=2), 0) // group


class Look(NamedTuple):
    """Numbers of living rollouts at which the seating can become better."""

    refill_U: np.ndarray  # of one unit, for the slots that become free there; -1: none waits for them
    shrink: np.integer  # of the unit with the most, for fewer slots everywhere


def first_seating(prompts: int, group: int, units: int, slots: int) -> tuple[Seating, list[list[int]]]:
    """(whole groups, as many as fit into slots / units, the rollouts of each unit that wait)."""
    rows = max(1, min(prompts, slots // units // group)) if slots else prompts
    seated = np.tile(np.arange(rows * group), (units, 1))
    return Seating(seated, group), [list(range(rows * group, prompts * group)) for _ in range(units)]


def next_seating(
    now: Seating, alive_US: np.ndarray, waiting: Sequence[list[int]], group: int, first: int
) -> tuple[Seating, list[list[int]]]:
    """(the seating to go on with, what waits then); the very seating where nothing is to be gained.

    Something is, when an eighth of the slots (or all that waits) can be refilled, or when fewer will do. `first` is the
    number of slots at the beginning.
    """
    living = [now.rollouts_US[u][alive_US[u]].tolist() for u in range(len(alive_US))]
    slots, steps = now.rollouts_US.shape[1], _steps(first)
    if any(waiting):
        free = [slots - len(here) for here in living]
        if not any(there and f >= min(_refill(slots), len(there)) for f, there in zip(free, waiting, strict=True)):
            return now, list(waiting)
        coming = [there[:f] for there, f in zip(waiting, free, strict=True)]
        waiting = [there[f:] for there, f in zip(waiting, free, strict=True)]
        living = [here + new for here, new in zip(living, coming, strict=True)]
        fewest = slots if any(waiting) else _least(steps, living)
        return (_refilled(now, alive_US, coming) if fewest == slots else _singles(living, fewest)), waiting
    fewest = _least(steps, living)
    if fewest == slots:
        return now, list(waiting)
    rows = max(len({rollout // group for rollout in here}) for here in living)
    if now.width > 1 and fewest >= rows * group and fewest % group == 0:
        return _grouped(living, fewest, group), list(waiting)
    return _singles(living, fewest), list(waiting)


def worth_a_look(now: Seating, waiting: Sequence[list[int]], first: int) -> Look:
    """How few may live before next_seating has something to gain."""
    slots = now.rollouts_US.shape[1]
    if any(waiting):
        refill_U = [slots - min(_refill(slots), len(there)) if there else -1 for there in waiting]
        return Look(np.array(refill_U, np.int32), np.int32(0))
    smaller = max((size for size in _steps(first) if size < slots), default=0)
    return Look(np.full(len(waiting), -1, np.int32), np.int32(smaller))


def _refill(slots: int) -> int:
    """Free slots from which on it pays to seat those that wait."""
    return -(-slots // 8)


def _steps(first: int) -> list[int]:
    """Numbers of slots, ascending."""
    return [-(-first // part) for part in (FEWEST, 4, 2, 1)]


def _least(steps: Sequence[int], living: Sequence[list[int]]) -> int:
    return next(size for size in steps if size >= max(map(len, living)))


def _refilled(now: Seating, alive_US: np.ndarray, coming: Sequence[list[int]]) -> Seating:
    """Who lives stays where it is."""
    seats = np.where(alive_US, now.rollouts_US, -1)
    for u, new in enumerate(coming):
        seats[u, np.flatnonzero(seats[u] < 0)[: len(new)]] = new
    return Seating(seats, 1)


def _singles(living: Sequence[list[int]], slots: int) -> Seating:
    seats = np.full((len(living), slots), -1)
    for u, here in enumerate(living):
        seats[u, : len(here)] = here
    return Seating(seats, 1)


def _grouped(living: Sequence[list[int]], slots: int, group: int) -> Seating:
    """Each prompt that has a living rollout in a row of its own."""
    seats = np.full((len(living), slots // group, group), -1)
    for u, here in enumerate(living):
        for row, prompt in enumerate(sorted({rollout // group for rollout in here})):
            members = [rollout for rollout in here if rollout // group == prompt]
            seats[u, row, : len(members)] = members
    return Seating(seats.reshape(len(living), -1), group)
