"""Caches: a ring by hand, and which seatings need no copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import MeshConfig
from rpt_jax.mesh import copies_of_heads, make_mesh
from rpt_jax.policy import caches
from rpt_jax.policy.decoder import KeyValues
from rpt_jax.policy.slots import Seating

KEYS = jax.random.split(jax.random.key(0), 4)[None]
PREFILLED = caches.Prefilled(jnp.zeros((1, 1, 2, 1, 2)), jnp.zeros((1, 1, 2, 1, 2)), jnp.array([[[7.0], [8.0]]]))


def moves(rollouts, sources, made, limits):
    """For one unit whose prompts are one token each, at places 0 and 1; a group of two."""
    prompts_UR = np.array([rollouts]) // 2
    ones_UR = np.ones_like(prompts_UR)
    arrays = prompts_UR, prompts_UR[:, :, None], ones_UR, *(np.array([a]) for a in (rollouts, sources, made, limits))
    return caches.Moves(*(jnp.asarray(a, jnp.int32) for a in arrays))


def ring():
    """Two slots that have made 3 and 2 tokens in a ring of 4; the next column is 1: tokens 0 1 2 lie at 2 3 0."""
    positions_BS = jnp.array([[3, -1, 1, 2], [2, -1, -1, 1]])  # places in the sequence: token + 1
    k_BS = 10.0 * jnp.arange(1, 3)[:, None] + positions_BS
    k_LBKSC = jnp.stack([k_BS, k_BS], axis=-1)[None, :, None]
    return KeyValues(k_LBKSC, -k_LBKSC, positions_BS), jnp.array([[1.0], [2.0]])


def test_a_moved_ring_has_its_newest_tokens_in_the_last_columns():
    """Slots change places and the ring grows to 6 columns: tokens of both end before column 3, the next one."""
    cache, hidden_BD = ring()
    state = caches.move(PREFILLED, KEYS, moves([1, 0], [1, 0], [2, 3], [9, 9]), 1, cache, hidden_BD, 6)
    assert int(state.column) == 3
    np.testing.assert_array_equal(state.cache.positions_BS, [[-1, 1, 2, -1, -1, -1], [1, 2, 3, -1, -1, -1]])
    np.testing.assert_array_equal(state.cache.k_LBKSC[0, 0, 0, 1:3, 0], [21, 22])
    np.testing.assert_array_equal(state.cache.k_LBKSC[0, 1, 0, :3, 0], [11, 12, 13])
    np.testing.assert_array_equal(state.cache.v_LBKSC, -state.cache.k_LBKSC)
    np.testing.assert_array_equal(state.hidden_BD, [[2], [1]])
    np.testing.assert_array_equal(state.alive_B, [True, True])


def test_a_refilled_slot_is_forgotten_and_its_neighbour_untouched():
    cache, hidden_BD = ring()
    kept_LKSC = np.asarray(cache.k_LBKSC[:, 1])
    state = caches.refill(PREFILLED, KEYS, moves([2, 1], [-1, 1], [0, 2], [9, 9]), 1, cache, hidden_BD, jnp.int32(1))
    assert int(state.column) == 1
    np.testing.assert_array_equal(state.cache.positions_BS, [[-1] * 4, [2, -1, -1, 1]])
    np.testing.assert_array_equal(state.cache.k_LBKSC[:, 1], kept_LKSC)
    np.testing.assert_array_equal(state.hidden_BD, [[8], [2]])  # after the second prompt; as it was
    np.testing.assert_array_equal(state.made_B, [0, 2])


def test_in_place_is_the_same_slots_for_all_who_stay():
    before = Seating(np.array([[0, 1]]), 2)
    assert caches.in_place(before, moves([2, 1], [-1, 1], [0, 2], [9, 9]))
    assert not caches.in_place(before, moves([1, 0], [1, 0], [2, 3], [9, 9]))
    assert not caches.in_place(before, moves([1], [1], [2], [9]))


@pytest.mark.parametrize(
    ("tensor", "kv_heads", "copies"), [(8, 2, 4), (2, 2, 1), (2, 4, 1), (4, 3, 4), (4, 6, 2), (1, 1, 1)]
)
def test_heads_are_repeated_up_to_the_least_common_multiple(tensor, kv_heads, copies):
    with jax.set_mesh(make_mesh(MeshConfig(tensor=tensor), jax.devices()[:8])):
        assert copies_of_heads(kv_heads) == copies
    assert copies_of_heads(kv_heads) == 1
