"""Claims: what was freed goes back to the system, at each checkpoint; where the C library cannot, nothing is said."""

import ctypes
import os
from pathlib import Path

import pytest
import toy

from rpt_jax import host_memory
from rpt_jax.learning import train


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_freed_memory_goes_back():
    """A hundred MiB in pieces of 64 KiB; glibc would keep them, since the last piece stays."""
    if host_memory._trim() is None:
        pytest.skip("this C library cannot return memory")
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    pieces = [libc.malloc(1 << 16) for _ in range(1600)]
    for piece in pieces:
        ctypes.memset(piece, 1, 1 << 16)
    for piece in pieces[:-1]:
        libc.free(piece)
    before = resident_mib()
    host_memory.give_back()
    given = before - resident_mib()
    libc.free(pieces[-1])
    assert given > 80


def test_other_systems_are_let_alone(monkeypatch):
    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    host_memory._trim.cache_clear()
    try:
        host_memory.give_back()
        assert host_memory._trim() is None
    finally:
        host_memory._trim.cache_clear()


def test_a_run_gives_back_at_each_checkpoint(tmp_path, monkeypatch):
    """Four updates, a checkpoint every two."""
    given = []
    monkeypatch.setattr(host_memory, "give_back", lambda: given.append(1))
    train.train(toy.config(tmp_path / "run"), **toy.arguments())
    assert len(given) == 2
