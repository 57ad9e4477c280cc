"""Claims: stages have the easiest positions, in shuffled order, as long as they should; the stream resumes exactly,
and what it cannot do is named."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.config import Config, PositionConfig
from rpt_jax.corpus import curriculum
from rpt_jax.corpus.positions import Positions, position_stream
from rpt_jax.records import InputError


def many(count, seed=0):
    """Entropies in no order, none twice; the index of each is its rank."""
    ranks = np.random.default_rng(seed).permutation(count)
    return Positions(np.arange(count, dtype=np.int32), ranks.astype(np.int32), (ranks / count).astype(np.float32))


def take(stream, count):
    return [position.index for position in itertools.islice(iter(stream), count)]


def test_stages_by_hand():
    """Twelve positions, three stages of eight draws: the easiest four twice, the easiest eight, then all."""
    drawn = take(curriculum.easy_to_hard(many(12), seed=3, draws=24, stages=3), 60)
    first, second, third = drawn[:8], drawn[8:16], drawn[16:]
    assert sorted(first[:4]) == sorted(first[4:]) == [0, 1, 2, 3] and first[:4] != first[4:]
    assert sorted(second) == list(range(8)) and second != list(range(8))
    for epoch in (third[:12], third[12:24], third[24:36]):
        assert sorted(epoch) == list(range(12))
    assert drawn == take(curriculum.easy_to_hard(many(12), seed=3, draws=24, stages=3), 60)
    assert drawn != take(curriculum.easy_to_hard(many(12), seed=4, draws=24, stages=3), 60)


def test_entropies_rise_from_stage_to_stage():
    drawn = list(itertools.islice(iter(curriculum.easy_to_hard(many(200), seed=0, draws=400, stages=4)), 400))
    means = np.array([position.entropy for position in drawn]).reshape(4, 100).mean(axis=1)
    np.testing.assert_allclose(means, [0.125, 0.25, 0.375, 0.5], atol=0.04)  # of the parts, drawn evenly


def test_lengths_come_along():
    positions = Positions(*(np.arange(6, dtype=np.int32) for _ in range(4)))
    for position in itertools.islice(iter(curriculum.easy_to_hard(positions, seed=0, draws=8, stages=2)), 20):
        assert position.length == position.index == position.document


@settings(max_examples=8)
@given(st.integers(6, 40), st.integers(0, 60), st.integers(1, 4), st.integers(0, 2**40))
def test_resumed_equals_uninterrupted(count, stop, stages, seed):
    """Also across the end of a stage."""
    stream = curriculum.easy_to_hard(many(count), seed=seed, draws=48, stages=stages)
    whole, first, second = take(stream, stop + 15), iter(stream), iter(stream)
    for _ in range(stop):
        next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert [next(second).index for _ in range(15)] == whole[stop:]


def test_the_config_chooses_the_order():
    config = Config(steps=3, batch_size=4, seed=5)
    assert take(curriculum.stream(many(20), config), 30) == take(position_stream(many(20), seed=5), 30)
    rising = Config(steps=3, batch_size=4, seed=5, positions=PositionConfig(order="easy_to_hard", stages=2))
    by_hand = curriculum.easy_to_hard(many(20), seed=5, draws=12, stages=2)
    assert take(curriculum.stream(many(20), rising), 30) == take(by_hand, 30)
    with pytest.raises(InputError, match="first of positions.stages=2 has 3 of 7 positions, fewer than batch_size=4"):
        curriculum.stream(many(7), rising)
    curriculum.require_stages(7, config)
    with pytest.raises(InputError, match="stages=0"):
        Config(positions=PositionConfig(stages=0)).check()
