"""Claims: every bound is of a setting that exists and holds its default; what is out of bounds is named."""

import dataclasses

import pytest

from rpt_jax import commands, config, convert, ranges
from rpt_jax.bench import compare, kernel, step
from rpt_jax.config import Config, PromptConfig, QuestionConfig, SampleConfig
from rpt_jax.planning import estimate
from rpt_jax.records import InputError
from rpt_jax.scaling import fit, sweep
from rpt_jax.study import base, harness, multiple_choice, quickstart, report, sample

MODULES = (config, commands, convert, compare, kernel, step, estimate, fit, sweep)
MODULES += (base, harness, multiple_choice, quickstart, report, sample)
CLASSES = {
    name: kind
    for module in MODULES
    for name, kind in vars(module).items()
    if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
}


@pytest.mark.parametrize("name", ranges.BOUNDS)
def test_bounds_are_of_settings_that_exist_and_hold_the_defaults(name):
    made = CLASSES[name]()
    assert set(ranges.BOUNDS[name]) <= {field.name for field in dataclasses.fields(made)}
    assert all(low <= getattr(made, field) <= high for field, (low, high) in ranges.BOUNDS[name].items())
    ranges.require_in_range(made)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Config(steps=0), r"^steps=0: use 1 or more$"),
        (Config(seed=2**63), r"^seed=9223372036854775808: use .*, and at most 9223372036854775807$"),
        (Config(sample=SampleConfig(temperature=float("nan"))), "^sample.temperature=nan: use a finite number$"),
        (Config(sample=SampleConfig(temperature=-1.0)), "^sample.temperature=-1.0: use 0 or more$"),
        (Config(sample=SampleConfig(top_p=1.5)), "^sample.top_p=1.5: use 0 or more, and at most 1$"),
        (Config(questions=QuestionConfig(seconds=0.0)), "^questions.seconds=0.0: use more than 0$"),
        (Config(questions=QuestionConfig(files=("a", "b\0"))), r"^questions.files='b\\x00': use UTF-8"),
        (Config(name="\udcff"), r"^name='\\udcff': use UTF-8 without zero bytes$"),
        (Config(prompt=PromptConfig(truth_bytes=10**12)), "prompt.truth_bytes=1000000000000: .* at most 1048576"),
    ],
)
def test_what_is_out_of_bounds_is_named(made, message):
    with pytest.raises(InputError, match=message):
        ranges.require_in_range(made)
