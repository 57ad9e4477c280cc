"""An experiment file, Python -> the module, and the Config that it stands for."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from rpt_jax.config import Config
from rpt_jax.records import InputError


def load_module(path: str) -> ModuleType:
    """Runs an experiment file, which may import its neighbours in the folder; raises InputError where there is none."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no experiment file {path}; the ones that come with the project are in experiments/")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None:
        raise InputError(f"{path} does not end in .py: name an experiment file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def load_experiment(path: str) -> Config:
    """What the `config()` of an experiment file returns; raises InputError if it has none."""
    module = load_module(path)
    made = module.config() if hasattr(module, "config") else None
    if not isinstance(made, Config):
        raise InputError(f"{path}: an experiment file defines config() returning a rpt_jax.config.Config")
    return made
