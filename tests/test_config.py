"""config.py: settings that clash are named with their remedy before anything is compiled."""

import pytest

from rpt_jax.config import Config
from rpt_jax.config_dict import from_dict, to_dict
from rpt_jax.parts import parts_of_groups
from rpt_jax.records import InputError


def test_every_default_passes_its_own_checks():
    Config().check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample.group_size": 1}, "group_size=1: .* advantage 0 always; use 2 or more"),
        ({"batch_size": 30, "update.microbatches": 7}, "30 prompts .*microbatches=7: choose so that it divides 240"),
        ({"batch_size": 3, "update.microbatches": 16}, "3 prompts .*microbatches=16: choose so that it divides 24"),
        ({"update.microbatches": 0}, "update.microbatches=0: use 1 or more"),
        ({"batch_size": 0}, "batch_size=0, .* use 1 or more"),
        (
            {"model.heads": 6, "model.kv_heads": 4},
            "heads=6 is no multiple of .*kv_heads=4: use kv_heads from 1, 2, 3, 6",
        ),
        ({"model.kv_heads": 0}, "model.kv_heads=0: use 1 or more"),
        ({"model.head_channels": 31}, "head_channels=31 must be even.*use 32"),
        ({"sample.temperature": -0.1}, "temperature=-0.1 must be >= 0"),
        ({"sample.top_p": 0.0}, r"top_p=0.0 in \(0, 1\]"),
        ({"reward.kind": "information_gain"}, "update.advantage=std: .* use --update.advantage leave_one_out"),
        ({"reward.ema_decay": 1.5}, "reward.ema_decay=1.5: use 0 to 1"),
    ],
)
def test_clashing_settings_come_with_a_remedy(change, message):
    values = to_dict(Config())
    for name, value in change.items():
        *rooms, field = name.split(".")
        room = values
        for each in rooms:
            room = room[each]
        room[field] = value
    with pytest.raises(InputError, match=message):
        from_dict(Config, values).check()


def test_groups_are_split_no_more_than_needed():
    """16 prompts are 8 parts as they are; 12 of them are halved, and 1 prompt of 8 rollouts makes 4 pairs."""
    assert [parts_of_groups(*sizes) for sizes in ((16, 8, 8), (12, 8, 8), (1, 8, 4), (6, 8, 3))] == [1, 2, 4, 1]
    with pytest.raises(InputError, match="choose so that it divides 24"):
        parts_of_groups(3, 8, 5)
