"""Claims: settings read off the source are those that the dataclasses have, by name, default and choices, for every
command, and tyro takes every flag; the comment is that of the field."""

import dataclasses
import importlib

import pytest

from rpt_jax import cli, help, ranges, settings


def class_of(place):
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def values(instance, prefix=""):
    """Dotted name -> value, of a dataclass and those within it."""
    found = {}
    for field in dataclasses.fields(instance):
        value, name = getattr(instance, field.name), prefix + field.name.replace("_", "-")
        found |= values(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


@pytest.mark.parametrize("command", help.PAGES)
def test_names_and_defaults_are_those_of_the_dataclass(command):
    place = help.PAGES[command].settings
    assert {setting.name: setting.default for setting in settings.read(place)} == values(class_of(place)())


@pytest.mark.parametrize("command", help.PAGES)
def test_tyro_takes_every_flag(command, monkeypatch):
    """All flags at once, each with another value than its default; whether that makes sense is not asked."""
    monkeypatch.setattr(ranges, "BOUNDS", {})
    place = help.PAGES[command].settings
    words, expected = [], {}
    for setting in settings.read(place):
        one = {"INT": 77, "FLOAT": 0.125, "": not setting.default}.get(setting.kind.removesuffix(" ..."), "x")
        if setting.choices:
            one = setting.choices[-1]
        expected[setting.name] = (one,) if setting.kind.endswith("...") else one
        words += [setting.flag] if setting.kind == "" else [setting.flag, str(one)]
    assert values(cli.parse(command, class_of(place)(), words)) == expected


def test_comments_behind_and_above():
    found = {setting.name: setting for setting in settings.read("rpt_jax.config:Config")}
    assert found["update.learning-rate"].about == "(paper: 1e-6)"
    assert found["positions.target"].about.startswith("What is predicted: next_token (paper: what follows, one")
    assert found["positions.target"].about.endswith("seen before and behind it (RLPT).")
    assert found["model.rope-scaling.kind"].about == ""
    assert found["checkpoint.keep"].about == "newest checkpoints kept"
    assert settings.comments("rpt_jax.records:Prompts")["lengths_N"] == "int32, live tokens"
    assert "param_dtype" not in settings.comments("rpt_jax.config:ModelConfig")


def test_flags_as_they_are_typed():
    found = {setting.name: setting for setting in settings.read("rpt_jax.config:Config")}
    assert (found["profile"].flag, found["update.on-policy"].flag) == ("--profile", "--update.no-on-policy")
    assert (found["corpus.files"].takes, found["steps"].takes) == ("STR ...", "INT")
    assert found["update.advantage"].takes == "{std,mean,leave_one_out}"
    assert found["update.advantage"].shown_default == "std" and found["corpus.files"].shown_default == ""
    assert found["corpus.template"].section == "corpus" and found["model.rope-scaling.factor"].section == "model"
    phases = next(each for each in settings.read("rpt_jax.bench.step:StepBench") if each.name == "phases")
    assert phases.shown_default == "rollout score update e2e" and phases.takes == "{rollout,score,update,e2e} ..."


def test_sections_say_what_they_are():
    assert settings.sections("rpt_jax.config:Config")["update"] == "GRPO and its optimizer."
    assert settings.sections("rpt_jax.scaling.fit:FitSettings") == {}
    with pytest.raises(LookupError, match="rpt_jax.config has no Nothing"):
        settings.read("rpt_jax.config:Nothing")
