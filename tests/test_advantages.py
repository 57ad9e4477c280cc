"""Claims: the three advantages are what their papers say, and a group that agrees teaches exactly nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rpt_jax.learning.advantages import group_advantages, groups_agree
from rpt_jax.records import InputError

KINDS = ("std", "mean", "leave_one_out")
REWARDS_NG = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], np.float32)


@pytest.mark.parametrize(
    "kind, expected_NG",
    [
        # means 1/4 and 1/2; population deviations sqrt(3)/4 and 1/2, so 0.75 / 0.4330 = sqrt(3)
        ("std", [[np.sqrt(3), -1 / np.sqrt(3), -1 / np.sqrt(3), -1 / np.sqrt(3)], [1, 1, -1, -1]]),
        ("mean", [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]),
        # the others' mean: 0 for the winner of the first row, 1/3 for its losers; 1/3 and 2/3 in the second
        ("leave_one_out", [[1, -1 / 3, -1 / 3, -1 / 3], [2 / 3, 2 / 3, -2 / 3, -2 / 3]]),
    ],
)
def test_numbers_by_hand(kind, expected_NG):
    advantages_NG = group_advantages(REWARDS_NG, kind, 0.0)
    assert advantages_NG.dtype == jnp.float32
    np.testing.assert_allclose(advantages_NG, expected_NG, rtol=1e-6)
    jitted = jax.jit(group_advantages, static_argnames="kind")(jnp.asarray(REWARDS_NG), kind=kind, epsilon=0.0)
    np.testing.assert_allclose(jitted, expected_NG, rtol=1e-6)


def test_epsilon_is_added_to_the_deviation():
    np.testing.assert_allclose(group_advantages([[1.0, 0.0]], "std", 0.5), [[0.5, -0.5]], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_agreeing_groups_are_exactly_zero(kind, reward):
    # Seven times 0.1 has a float32 mean that is not 0.1, which 0 epsilon would blow up.
    rewards_NG = np.full((3, 7), reward, np.float32)
    assert np.all(np.asarray(group_advantages(rewards_NG, kind, 0.0)) == 0.0)
    assert np.all(np.asarray(jax.jit(lambda r_NG: group_advantages(r_NG, kind, 1e-6))(rewards_NG)) == 0.0)


@given(arrays.arrays(np.float32, (3, 5), elements=st.floats(-4, 4, width=32)), st.permutations(range(5)))
def test_laws(rewards_NG, order):
    for kind in KINDS:
        advantages_NG = np.asarray(group_advantages(rewards_NG, kind, 1e-3))
        np.testing.assert_allclose(advantages_NG.sum(axis=1), 0, atol=1e-2 if kind == "std" else 1e-4)
        permuted_NG = np.asarray(group_advantages(rewards_NG[:, order], kind, 1e-3))
        np.testing.assert_allclose(permuted_NG, advantages_NG[:, order], atol=1e-3)
        alone_G = group_advantages(rewards_NG[1:2], kind, 1e-3)[0]  # a group knows nothing of its neighbours
        np.testing.assert_allclose(alone_G, advantages_NG[1], atol=1e-6)


def test_groups_that_agree():
    rewards_NG = np.array([[0, 0], [1, 1], [1, 0], [0, 1]], np.float32)
    assert groups_agree(rewards_NG).tolist() == [True, True, False, False]


@pytest.mark.parametrize("shape, kind", [((4, 1), "std"), ((4, 2), "variance")])
def test_input_that_cannot_work(shape, kind):
    with pytest.raises(InputError, match="group_size" if shape[1] == 1 else "leave_one_out"):
        group_advantages(np.zeros(shape, np.float32), kind, 1e-6)
