"""What fuzz.py and test_fuzz.py throw inputs at: a target each for whatever reads a file or a word of the user's."""

import atexit
import functools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuzz_mutate import damaged

Mutate = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


@dataclass(frozen=True)
class Target:
    """Something that reads bytes, and what it usually reads."""

    name: str
    seeds: tuple[bytes, ...]
    run: Callable[[bytes], None]  # raises InputError for what cannot be used, AssertionError where a law is broken
    mutate: Mutate = damaged
    weight: float = 1.0  # how often, against the other targets of the surface


@functools.cache
def surface(name: str) -> tuple[Target, ...]:
    """The targets of a surface; imports what they need."""
    if name == "texts":
        import fuzz_texts as module
    elif name == "readers":
        import fuzz_readers as module
    elif name == "models":
        import fuzz_models as module
    else:
        import fuzz_settings as module
    return module.targets()


@functools.cache
def scratch() -> Path:
    """A folder of this process, in memory where that can be; taken away at its end."""
    place = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    atexit.register(place.cleanup)
    return Path(place.name)


def file_of(name: str) -> Callable[[bytes], Path]:
    """Writes an input under this name, in a folder of its own."""
    folder = scratch() / name.replace("/", "-")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(content: bytes) -> Path:
        path.write_bytes(content)
        return path

    return write


def file_in(folder: Path, name: str) -> Callable[[bytes], Path]:
    """Writes an input in place of a file in a copy of a folder; gives the copy."""
    copy = scratch() / f"{folder.name}-{name.replace('/', '-')}"
    shutil.copytree(folder, copy)
    (copy / name).parent.mkdir(parents=True, exist_ok=True)

    def write(content: bytes) -> Path:
        (copy / name).write_bytes(content)
        return copy

    return write
