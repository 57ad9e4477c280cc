"""An experiment file, Python -> the module, and the Config that it stands for."""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from rpt_jax.config import Config
from rpt_jax.config_dict import from_dict, to_dict
from rpt_jax.records import InputError, words_of


def load_module(path: str) -> ModuleType:
    """Runs an experiment file, which may import its neighbours in the folder; raises InputError where that fails.

    The folder stays on Python's path, for what the file's functions import when they are called.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no experiment file {path}; the ones that come with the project are in experiments/")
    spec = importlib.util.spec_from_file_location(f"_experiment_{file.stem}", file)
    if spec is None:
        raise InputError(f"{path} does not end in .py: name an experiment file")
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[spec.name] = module  # where dataclasses look for the names of types that are text
    called(path, spec.loader.exec_module, module)
    return module


def called(path: str, function: Callable, *arguments):
    """What a function of an experiment file returns; raises InputError that names the line for what goes wrong.

    What the project itself complains of (InputError) passes as it is.
    """
    try:
        return function(*arguments)
    except InputError:
        raise
    except Exception as error:
        own = Path(path).resolve()
        places = [place for place in traceback.extract_tb(error.__traceback__) if Path(place.filename).resolve() == own]
        number = error.lineno if isinstance(error, SyntaxError) else places[-1].lineno if places else "?"
        raise InputError(f"{path}, line {number}: {type(error).__name__}: {words_of(error)}: mend the file") from error


def load_experiment(path: str) -> Config:
    """What the `config()` of an experiment file returns; raises InputError if it has none, or wrong settings."""
    module = load_module(path)
    made = called(path, module.config) if callable(getattr(module, "config", None)) else None
    if not isinstance(made, Config):
        raise InputError(f"{path}: an experiment file defines config() returning a rpt_jax.config.Config")
    from_dict(type(made), called(path, to_dict, made), f"{path}: config()")  # dataclasses check no types
    return made
