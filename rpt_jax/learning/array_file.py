"""params.npz -> numpy arrays, of exactly the names, shapes and kinds that are asked for.

What a file says of itself is compared with what is wanted before anything is read, so a header that lies can neither
take the memory that it claims nor have anything run: numpy's own reader allocates what the header says.
"""

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rpt_jax.records import InputError, words_of

MOST_PACKED = 1100  # to 1: deflate cannot do better than 1032, so a file that claims more lies
REMEDY = "copy or make the policy again"
UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, OverflowError, zipfile.BadZipFile, zlib.error, struct.error)


def read_arrays(path: Path, wanted: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, np.ndarray]:
    """The arrays by name; wanted: their shapes. Raises InputError for any other content, naming file and array."""
    try:
        with zipfile.ZipFile(path) as file:
            members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            if members.keys() != wanted.keys():
                odd = sorted(members.keys() ^ wanted.keys())[0]
                side = "file" if odd in members else "model"
                raise InputError(f"{path}: parameter {odd!r} is in the {side} only: make the policy again")
            return {name: _read(path, file, members[name], name, wanted[name], dtype) for name in wanted}
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read ({words_of(error)}): {REMEDY}") from error


def _read(path, file, member, name, shape, dtype) -> np.ndarray:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{path}: {name!r} is not packed as this program does: {REMEDY}")
    with file.open(member) as stream:
        there, is_by_columns, kind = _header(stream)
        if there != shape:
            raise InputError(f"{path}: {name!r} has shape {there}, policy.json says {shape}: make the policy again")
        if kind != dtype:
            raise InputError(f"{path}: {name!r} is {kind}, policy.json says {dtype}: make the policy again")
        size = math.prod(shape) * dtype.itemsize
        if size > MOST_PACKED * path.stat().st_size:
            raise InputError(f"{path}: {name!r} would have {size} bytes, which no file of its size holds: {REMEDY}")
        content = stream.read(size)
        if len(content) != size or stream.read(1):
            raise InputError(f"{path}: {name!r} has another number of bytes than its shape takes: {REMEDY}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if is_by_columns else "C")


def _header(stream) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether columns come first, dtype) of an .npy file; raises ValueError, whatever is wrong with it."""
    try:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        return readers[np.lib.format.read_magic(stream)](stream)
    except (KeyError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise ValueError(f"no header of an array: {error}") from error
