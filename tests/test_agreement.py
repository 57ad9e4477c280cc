"""Claims: what one process raises ends all of them, each with the words that say why; nobody else is held up.

That hosts which differ are named is shown in test_processes.py, with real ones.
"""

import contextlib
import os

import jax
import numpy as np
import pytest

from rpt_jax import agreement
from rpt_jax.records import InputError


class Missing(Exception):
    pass


@pytest.fixture
def of_two(monkeypatch):
    """Plays process `index` of two; `other` is what the other one says."""

    def play(index, other=b""):
        monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)
        monkeypatch.setattr(agreement.jax, "process_index", lambda: index)

        def allgather(line):
            theirs = np.frombuffer(other.ljust(agreement.LONGEST_ERROR, b"\0"), np.uint8)
            return np.stack([line, theirs] if index == 0 else [theirs, line])

        monkeypatch.setattr(agreement.multihost_utils, "process_allgather", allgather)

    return play


def fail():
    raise Missing("no file träume.jsonl")


def test_alone_an_error_is_itself():
    with pytest.raises(Missing), agreement.together():
        fail()
    with pytest.raises(Missing):
        agreement.in_first_process(fail)


def test_who_raises_keeps_the_error_and_the_other_gets_its_words(of_two):
    of_two(0)
    with pytest.raises(Missing), agreement.together():
        fail()
    of_two(1, other=agreement.OF_INPUT + "no file träume.jsonl".encode())
    with pytest.raises(InputError, match="process 0: no file träume.jsonl"), agreement.together():
        pass
    of_two(0, other=agreement.OF_THE_MACHINE + b"disk full")
    with pytest.raises(agreement.HostTrouble, match="process 1: disk full"), agreement.together():
        pass
    with pytest.raises(Missing), agreement.together():  # both: each its own
        fail()


def test_an_error_without_words_or_with_too_many_is_told_too(of_two):
    of_two(0)
    for error in (KeyError(), ValueError("x" * 5000)):
        with pytest.raises(type(error)), agreement.together():
            raise error
    of_two(1, other=agreement.OF_THE_MACHINE + b"KeyError")
    with pytest.raises(InputError, match="process 0: KeyError"), agreement.together():
        pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InputError("bad"), InputError),
        *((kind("bad"), agreement.HostTrouble) for kind in (OSError, agreement.HostTrouble)),
    ],
)
def test_the_others_know_whether_it_was_the_input(of_two, monkeypatch, error, kind):
    of_two(0)
    gather, said = agreement.multihost_utils.process_allgather, []
    monkeypatch.setattr(agreement.multihost_utils, "process_allgather", lambda line: said.append(line) or gather(line))
    with pytest.raises(type(error)), agreement.together():
        raise error
    of_two(1, other=said[0].tobytes())
    with pytest.raises(InputError, match="process 0: bad") as told, agreement.together():
        pass
    assert told.type is kind


def test_nothing_happens_where_nobody_raises(of_two):
    of_two(1)
    with agreement.together():
        done = True
    assert done
    agreement.in_first_process(fail)  # runs in process 0 alone


class Ended(BaseException):
    pass


@pytest.fixture
def ended(monkeypatch):
    """os._exit raises instead."""

    def leave(status):
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", leave)


def test_a_lost_host_ends_this_process_with_a_message(of_two, ended, capsys):
    of_two(1)
    with pytest.raises(Ended, match="3"):
        agreement.end_if_host_lost(jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: closed by peer"))
    said = capsys.readouterr().err
    assert "process 1 of 2" in said and "closed by peer" in said and "newest checkpoint" in said


@pytest.mark.parametrize(
    ("processes", "error"),
    [
        (1, jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed")),
        (2, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")),
        (2, RuntimeError("UNKNOWN: of another kind")),
    ],
)
def test_other_errors_stay_errors(of_two, ended, capsys, processes, error):
    if processes == 2:
        of_two(0)
    agreement.end_if_host_lost(error)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("met", [True, False])
def test_who_fails_alone_ends_at_once(of_two, ended, capsys, monkeypatch, met):
    of_two(1)

    def meet(key, timeout_ms):
        if not met:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(agreement.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(agreement.multihost, "get_barrier_sync_fn", lambda: meet)
    with contextlib.nullcontext() if met else pytest.raises(Ended, match="2"):
        agreement.end_if_alone(2)
    assert capsys.readouterr().err == ("" if met else "process 1 of 2 ends; the others cannot go on\n")


def test_a_single_process_waits_for_nobody(ended, monkeypatch):
    monkeypatch.setattr(agreement.multihost, "get_barrier_sync_fn", fail)
    agreement.end_if_alone(2)
