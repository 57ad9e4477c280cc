"""Claims: bad input stops before anything is written, with the numbers that clash and what to do."""

import dataclasses
from contextlib import nullcontext

import jax
import pytest
import toy
from test_train import mesh_of, run, settings

from rpt_jax.config import CheckpointConfig, SampleConfig
from rpt_jax.corpus.templates import Template
from rpt_jax.learning import train
from rpt_jax.learning.inputs import with_numerics
from rpt_jax.records import InputError

BAD = [
    ({"batch_size": 9}, {"mesh": (8, 1, 1)}, "batch of 9 prompts does not divide over data=8 devices: use 8 or 16"),
    ({"batch_size": 16}, {}, "8 positions are fewer than batch_size=16"),
    ({"sample": SampleConfig(group_size=1)}, {}, "sample.group_size=1"),
    ({"sample": SampleConfig(temperature=0)}, {}, "sample.temperature=0"),
    ({"sample": SampleConfig(end_tokens=("<eot>",))}, {}, "no token '<eot>'"),
    ({"checkpoint": CheckpointConfig(every=0)}, {}, "checkpoint.every=0"),
    ({"steps": 0}, {}, "steps=0"),
    ({}, {"template": Template("mine", head="Weiter: ")}, "cannot represent 'W'"),
    ({"prompt": dataclasses.replace(toy.config("x").prompt, max_tokens=2)}, {}, "prompt.max_tokens=2"),
]


@pytest.mark.parametrize(("changes", "options", "message"), BAD)
def test_bad_input_stops_before_anything_is_written(tmp_path, changes, options, message):
    options = options | ({"mesh": mesh_of(*options["mesh"])} if "mesh" in options else {})
    with pytest.raises(InputError, match=message):
        run(settings(tmp_path / "run", **changes), **options)
    assert not (tmp_path / "run").exists()


def test_documents_of_another_tokenizer_are_named(tmp_path):
    """The policy's tokenizer as such, that of the documents as theirs."""
    annotated = toy.annotated()
    foreign = dataclasses.replace(annotated, header=annotated.header | {"tokenizer": "x", "vocab_size": 9})
    with pytest.raises(InputError, match="annotated documents were read with .* 9 ids .* the policy has one of 24 ids"):
        run(settings(tmp_path / "run"), annotated=foreign)


def test_a_microbatch_that_does_not_divide_is_named(tmp_path):
    config = settings(tmp_path / "run")
    config = dataclasses.replace(config, update=dataclasses.replace(config.update, microbatches=16))
    with pytest.raises(
        InputError, match="microbatches=16 on each of 8 devices, which together is 128: choose so that it divides 64"
    ):
        run(config, mesh_of(8, 1, 1))


@pytest.mark.parametrize(("rate", "refused"), [(1e-6, True), (1e-3, False)])
def test_updates_that_bfloat16_parameters_would_round_away_are_refused(tmp_path, rate, refused):
    config = settings(tmp_path / "run")
    config = dataclasses.replace(config, steps=1, update=dataclasses.replace(config.update, learning_rate=rate))
    params = jax.tree.map(lambda x: x.astype("bfloat16"), toy.params())
    policy = toy.model(param_dtype="bfloat16"), params, toy.tokenizer()
    with pytest.raises(InputError, match="rounded away in all weights above") if refused else nullcontext():
        run(config, policy=policy)


def test_numerics_are_the_runs_and_the_shape_is_the_policys():
    model = toy.model()
    asked = dataclasses.replace(train.ModelConfig(), dtype="bfloat16", remat="layer")
    assert with_numerics(asked, model) == dataclasses.replace(model, dtype="bfloat16", remat="layer")
    assert with_numerics(model, model) == model
    with pytest.raises(InputError, match="model.width=48, but the policy has 32"):
        with_numerics(dataclasses.replace(asked, width=48), model)
