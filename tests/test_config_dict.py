"""config_dict.py: what goes to JSON is read back equal, and a wrong name or type is named."""

import json

import pytest

from rpt_jax.config import Config, CorpusConfig, ModelConfig, RopeScaling, SampleConfig, UpdateConfig
from rpt_jax.config_dict import from_dict, to_dict
from rpt_jax.records import InputError


def test_saved_config_reads_back_equal():
    """Tuples, nested records, choices and floats survive JSON."""
    config = Config(
        name="träin",
        model=ModelConfig(rope_scaling=RopeScaling("yarn", factor=4.0), tied_head=True, dtype="bfloat16"),
        corpus=CorpusConfig(files=("a.jsonl", "b*.parquet"), template="{problem}\n\n{solution}"),
        sample=SampleConfig(end_tokens=("<|im_end|>",)),
        update=UpdateConfig(learning_rate=2e-6),
    )
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_whole_number_stands_for_a_float():
    made = from_dict(UpdateConfig, {"learning_rate": 1})
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
        from_dict(Config, values)
