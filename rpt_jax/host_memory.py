"""Memory of this process that is free, back to the system.

XLA's threads on CPU, and Orbax's, allocate and free buffers of all sizes; glibc keeps what they have freed, in pools
("arenas") that it makes for them, and a run of hours holds more and more that nobody uses. Two things help: one pool
that all threads share, and to give back what is free in it. How much: experiments/LOG.md.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Callable

ARENAS = 1
"""Pools that the threads of `rpt` share; glibc would make up to eight for each core."""

M_ARENA_MAX = -8  # malloc.h


def share_arenas() -> None:
    """Bounds the pools of this process, for good, where the C library is glibc and the user has not set a bound.

    To be called early, since pools that exist stay. A user's bound is MALLOC_ARENA_MAX or
    glibc.malloc.arena_max in GLIBC_TUNABLES, see mallopt(3).
    """
    if "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc.arena_max" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    bound = _function("mallopt", ctypes.c_int, ctypes.c_int)
    if bound is not None:
        bound(M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Returns freed memory to the system where the C library can (glibc, within 0.1 s); elsewhere nothing happens."""
    trim = _function("malloc_trim", ctypes.c_size_t)
    if trim is not None:
        trim(0)


@functools.cache
def _function(name: str, *takes: type) -> Callable[..., int] | None:
    """A function of the C library that returns an int; None where there is none (other systems, musl)."""
    if not sys.platform.startswith("linux"):
        return None
    found = getattr(ctypes.CDLL(None), name, None)
    if found is not None:
        found.argtypes, found.restype = takes, ctypes.c_int
    return found
