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


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def config(:\n", "line 1: SyntaxError"),
        ("x = 1\nraise ValueError('a\\nb')\n", "line 2: ValueError: a b: mend the file"),
        ("import json\njson.loads('{')\n", "line 2: JSONDecodeError"),
        ("import no_such_module_of_anyone\n", "line 1: ModuleNotFoundError"),
        ("def config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        ("config = 7\n", r"defines config\(\)"),
        ("from rpt_jax.config import *\nconfig = lambda: Config(stepz=1)\n", "line 2: TypeError"),
        ("from rpt_jax.config import *\nconfig = lambda: Config(steps='7')\n", r"config\(\).steps='7': expected int"),
        ("from rpt_jax.config import *\nconfig = lambda: Config(model=None)\n", r"config\(\).model=None: expected"),
        ("\0", "line .*: (SyntaxError|ValueError)"),
    ],
)
def test_what_goes_wrong_in_a_file_is_named_with_its_line(tmp_path, body, message):
    path = tmp_path / "broken.py"
    path.write_text(body)
    with pytest.raises(InputError, match=rf"broken\.py.*{message}"):
        load_experiment(str(path))


def test_a_file_may_have_dataclasses_with_types_as_text_and_import_neighbours_late(tmp_path):
    (tmp_path / "late_neighbour.py").write_text("STEPS = 5\n")
    path = tmp_path / "own.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom rpt_jax.config import Config\n\n"
        "@dataclass\nclass Mine:\n    steps: int = 1\n\n"
        "def config():\n    import late_neighbour\n    return Config(steps=late_neighbour.STEPS + Mine().steps)\n"
    )
    assert load_experiment(str(path)).steps == 6
