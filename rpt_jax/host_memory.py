"""Memory of this process that is free, back to the system.

XLA's threads on CPU, and Orbax's, allocate and free buffers of all sizes; glibc keeps what they have freed, in pools of
their own, and a run of hours holds more and more that nobody uses. This returns part of it: what still rises with each
checkpoint is in experiments/LOG.md.
"""

import ctypes
import functools
import sys
from collections.abc import Callable


def give_back() -> None:
    """Returns freed memory to the system where the C library can (glibc, within 0.1 s); elsewhere nothing happens."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
