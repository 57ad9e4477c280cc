"""config.py: what is saved is read back, and each mistake is named with its remedy before anything is compiled."""

import json

import pytest

from rpt_jax import config as configs
from rpt_jax.config import Config, CorpusConfig, ModelConfig, RopeScaling, SampleConfig, UpdateConfig
from rpt_jax.records import InputError


def test_saved_config_reads_back_equal(tmp_path):
    """Tuples, nested records, choices and floats survive JSON."""
    config = Config(
        name="träin",
        model=ModelConfig(rope_scaling=RopeScaling("yarn", factor=4.0), tied_head=True, dtype="bfloat16"),
        corpus=CorpusConfig(files=("a.jsonl", "b*.parquet"), template="{problem}\n\n{solution}"),
        sample=SampleConfig(end_tokens=("<|im_end|>",)),
        update=UpdateConfig(learning_rate=2e-6),
    )
    configs.save(config, tmp_path / "config.json")
    assert configs.load(Config, tmp_path / "config.json") == config


def test_every_default_passes_its_own_checks():
    Config().check()


def test_whole_number_stands_for_a_float():
    made = configs.from_dict(UpdateConfig, {"learning_rate": 1})
    assert made.learning_rate == 1.0 and type(made.learning_rate) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1.0}, "config: unknown setting 'learning_rat'; known are batch_size, checkpoint"),
        ({"update": {"learning_rat": 1.0}}, r"config\.update: unknown setting 'learning_rat'; known are advantage"),
        ({"update": {"learning_rate": "2e-6"}}, r"config\.update\.learning_rate='2e-6': expected float, got str"),
        ({"steps": 1.5}, r"config\.steps=1\.5: expected int, got float"),
        ({"steps": True}, r"config\.steps=True: expected int, got bool"),
        ({"wandb": 1}, r"config\.wandb=1: expected bool, got int"),
        ({"name": None}, r"config\.name=None: expected str, got NoneType"),
        ({"update": {"advantage": "grpo"}}, r"advantage='grpo': choose from 'std', 'mean', 'leave_one_out'"),
        ({"update": 3}, r"config\.update=3: expected the settings of UpdateConfig by name"),
        ({"corpus": {"files": "a.jsonl"}}, r"config\.corpus\.files='a\.jsonl': expected a list of str"),
        ({"corpus": {"files": ["a.jsonl", 3]}}, r"config\.corpus\.files\[1\]=3: expected str, got int"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(InputError, match=message):
        configs.from_dict(Config, values)


def test_broken_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{\n  "steps": 3,\n}\n')
    with pytest.raises(InputError, match=r"config\.json:(2|3): not JSON"):
        configs.load(Config, path)
    path.write_text(json.dumps({"stepz": 3}))
    with pytest.raises(InputError, match=r"config\.json: unknown setting 'stepz'"):
        configs.load(Config, path)
    with pytest.raises(InputError, match=r"no config file .*absent\.json"):
        configs.load(Config, tmp_path / "absent.json")


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
    values = configs.to_dict(Config())
    for name, value in change.items():
        *rooms, field = name.split(".")
        room = values
        for each in rooms:
            room = room[each]
        room[field] = value
    with pytest.raises(InputError, match=message):
        configs.from_dict(Config, values).check()


def test_groups_are_split_no_more_than_needed():
    """16 prompts are 8 parts as they are; 12 of them are halved, and 1 prompt of 8 rollouts makes 4 pairs."""
    assert [configs.parts_of_groups(*sizes) for sizes in ((16, 8, 8), (12, 8, 8), (1, 8, 4), (6, 8, 3))] == [1, 2, 4, 1]
    with pytest.raises(InputError, match="choose so that it divides 24"):
        configs.parts_of_groups(3, 8, 5)
