"""Claims: an experiment file gives its config, and one that does not is named."""

import dataclasses

import pytest

from rpt_jax.config import Config, SampleConfig
from rpt_jax.experiment_file import load_experiment
from rpt_jax.records import InputError


def test_experiment_file_gives_its_config(tmp_path):
    """A file as in experiments/: starts from the defaults and replaces."""
    path = tmp_path / "small.py"
    path.write_text(
        "from dataclasses import replace\nfrom rpt_jax.config import Config, SampleConfig\n\n"
        "def config():\n    return replace(Config(), steps=7, sample=SampleConfig(group_size=1))\n"
    )
    made = load_experiment(str(path))
    assert made == dataclasses.replace(Config(), steps=7, sample=SampleConfig(group_size=1))
    with pytest.raises(InputError, match="group of 1"):
        made.check()


@pytest.mark.parametrize("body", ["STEPS = 3\n", "def config():\n    return {'steps': 3}\n"])
def test_experiment_without_a_config_is_refused(tmp_path, body):
    path = tmp_path / "empty.py"
    path.write_text(body)
    with pytest.raises(InputError, match=r"empty\.py: an experiment file defines config\(\)"):
        load_experiment(str(path))
    with pytest.raises(InputError, match=r"no experiment file .*absent\.py"):
        load_experiment(str(tmp_path / "absent.py"))
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(InputError, match=r"table\.csv does not end in \.py"):
        load_experiment(str(tmp_path / "table.csv"))
