"""Claims: what was freed goes back to the system, at each checkpoint; all threads share one pool, unless the user has
said how many; where the C library cannot, nothing is said."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import toy

from rpt_jax import cli, host_memory
from rpt_jax.learning import train

TWELVE_THREADS = """
import ctypes, sys, threading
from rpt_jax import cli, host_memory

cli.main()
import numpy

libc, together = ctypes.CDLL(None), threading.Barrier(12)
threads = [threading.Thread(target=lambda: (together.wait(), libc.malloc(4096), together.wait())) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
"""
"""Words for `rpt`, then threads that allocate at the same time, then glibc's list of its pools."""


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_freed_memory_goes_back():
    """A hundred MiB in pieces of 64 KiB; glibc would keep them, since the last piece stays."""
    if host_memory._function("malloc_trim", ctypes.c_size_t) is None:
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


@pytest.mark.parametrize(
    ("of_user", "pools"),
    [
        ({}, host_memory.ARENAS),
        ({"MALLOC_ARENA_MAX": "5"}, 5),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=5"}, 5),
    ],
)
def test_threads_share_one_pool(of_user, pools):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("this C library is not glibc")
    environment = {k: v for k, v in os.environ.items() if k not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")} | of_user
    words = [sys.executable, "-c", TWELVE_THREADS, "--version"]
    shown = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.count("<heap nr=") == pools


def test_a_process_of_others_is_let_alone(monkeypatch):
    bounded = []
    monkeypatch.setattr(host_memory, "share_arenas", lambda: bounded.append(1))
    assert cli.main(["--version"]) == 0
    assert not bounded


def test_other_systems_are_let_alone(monkeypatch):
    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    host_memory._function.cache_clear()
    try:
        host_memory.give_back()
        host_memory.share_arenas()
        assert host_memory._function("malloc_trim", ctypes.c_size_t) is None
    finally:
        host_memory._function.cache_clear()


def test_a_run_gives_back_at_each_checkpoint(tmp_path, monkeypatch):
    """Four updates, a checkpoint every two."""
    given = []
    monkeypatch.setattr(host_memory, "give_back", lambda: given.append(1))
    train.train(toy.config(tmp_path / "run"), **toy.arguments())
    assert len(given) == 2
