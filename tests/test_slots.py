"""Slots: who sits where, and how little work is lost to lengths that differ."""

import numpy as np
import pytest

from rpt_jax.policy.slots import Seating, first_seating, next_seating, worth_a_look


def play(lengths_UY, group, slots, call):
    """(token work: slots times steps, seatings, steps of each call, up to `call`) of rollouts of given lengths."""
    units, rollouts = lengths_UY.shape
    made_UY = np.zeros_like(lengths_UY)
    seating, waiting = first_seating(rollouts // group, group, units, slots)
    first, work, seatings, calls = seating.rollouts_US.shape[1], 0, [], []

    def alive():
        left_US = np.take_along_axis(lengths_UY - made_UY, np.maximum(seating.rollouts_US, 0), axis=1)
        return (seating.rollouts_US >= 0) & (left_US > 0)

    while (alive_US := alive()).any():
        seatings.append(seating)
        here = [seating.rollouts_US[u][alive_US[u]] for u in range(units)]
        look, steps = worth_a_look(seating, waiting, first), 0
        while steps < call:
            steps += 1
            alive_U = np.array([((lengths_UY - made_UY)[u][here[u]] > steps).sum() for u in range(units)])
            if (alive_U <= look.refill_U).any() or alive_U.max() <= look.shrink:
                break
        for u in range(units):
            made_UY[u, here[u]] = np.minimum(made_UY[u, here[u]] + steps, lengths_UY[u, here[u]])
        work += steps * seating.rollouts_US.size
        calls.append(steps)
        seating, waiting = next_seating(seating, alive(), waiting, group, first)
    assert (made_UY == lengths_UY).all() and not any(waiting)
    return work, seatings, calls


@pytest.mark.parametrize(("units", "slots"), [(1, 0), (1, 8), (1, 12), (2, 8), (3, 0)])
def test_every_rollout_is_decoded_to_its_end_and_sits_with_its_prompt(units, slots):
    random = np.random.default_rng(units + slots)
    _, seatings, _ = play(random.integers(1, 40, (units, 24)), 4, slots, 3)
    for seating in seatings:
        for seats_S in seating.rollouts_US:
            taken = seats_S[seats_S >= 0]
            assert len(set(taken)) == len(taken)
            rows = seats_S.reshape(-1, seating.width) // 4
            assert all(len(set(row[row >= 0])) <= 1 for row in rows)
    assert len({(seating.rollouts_US.shape, seating.width) for seating in seatings}) <= 8


def test_refilled_slots_need_a_quarter_more_work_than_the_tokens_at_most():
    """Lengths geometric with mean 64, at most 512; 256 rollouts in 64 slots. Waiting for the longest: 3 to 5 times."""
    worst = []
    for seed in range(8):
        lengths_1Y = np.minimum(np.random.default_rng(seed).geometric(1 / 64, (1, 256)), 512)
        work, seatings, _ = play(lengths_1Y, 8, 64, 32)
        together = sum(64 * lengths_1Y[0, start : start + 64].max() for start in range(0, 256, 64))
        assert together > 3 * lengths_1Y.sum()
        worst.append(work / lengths_1Y.sum())
        assert len({(seating.rollouts_US.shape, seating.width) for seating in seatings}) <= 6
    assert max(worst) <= 1.25, worst


@pytest.mark.parametrize("slots", [0, 64])
def test_calls_are_cut_short_for_another_seating_only(slots):
    """Also where one of four units has all the long rollouts."""
    random = np.random.default_rng(0)
    lengths_UY = random.integers(1, 20, (4, 32))
    lengths_UY[3] = random.integers(100, 400, 32)
    _, seatings, steps = play(lengths_UY, 8, slots, 32)
    assert sum(each < 32 for each in steps[:-1]) > 0
    for now, then, each in zip(seatings, seatings[1:], steps, strict=False):
        assert each == 32 or then is not now


def test_groups_stay_together_as_long_as_that_takes_no_more_slots():
    """Two prompts of four: with one of them done, half the slots, still in a row of four; then one by one."""
    seating = Seating(np.arange(8)[None], 4)
    alive_1S = np.array([[False] * 4 + [True] * 4])
    half, _ = next_seating(seating, alive_1S, [[]], 4, 8)
    assert half.width == 4
    np.testing.assert_array_equal(half.rollouts_US, [[4, 5, 6, 7]])
    single, _ = next_seating(half, np.array([[True, False, False, True]]), [[]], 4, 8)
    assert single.width == 1
    np.testing.assert_array_equal(single.rollouts_US, [[4, 7]])
    same, _ = next_seating(single, np.array([[True, True]]), [[]], 4, 8)
    assert same is single


def test_waiting_rollouts_take_the_slots_of_those_that_ended():
    seating = Seating(np.arange(8)[None], 4)
    alive_1S = np.array([[True, False, True, True, True, True, True, True]])
    filled, waiting = next_seating(seating, alive_1S, [[8, 9]], 4, 8)
    assert filled.width == 1 and waiting == [[9]]
    assert sorted(filled.rollouts_US[0]) == [0, 2, 3, 4, 5, 6, 7, 8]
