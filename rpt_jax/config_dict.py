"""Configs <-> plain nested dicts, fit for JSON; a dict is checked against the fields' types."""

import dataclasses
import typing
from typing import Literal

from rpt_jax.records import InputError


def to_dict(config) -> dict:
    """Plain nested dict of a config, fit for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls, values: dict, where: str = "config"):
    """A config of class `cls` from nested plain values; raises InputError for an unknown key or a wrong type."""
    if not isinstance(values, dict):
        raise InputError(f"{where}={values!r}: expected the settings of {cls.__name__} by name")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InputError(f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(hints))}")
    return cls(**{name: _typed(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _typed(hint, value, where: str):
    """`value` as the type `hint` of a field: nested config, tuple, choice, or a plain bool, int, float or str."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}={value!r}: expected a list of {kind.__name__}")
        return tuple(_typed(kind, item, f"{where}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise InputError(f"{where}={value!r}: choose from {', '.join(map(repr, typing.get_args(hint)))}")
    if hint is float and type(value) is int and abs(value) < 2**63:  # beyond, float() may raise
        return float(value)
    if isinstance(hint, type) and type(value) is not hint:  # exact: a bool is no number here
        raise InputError(f"{where}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value
