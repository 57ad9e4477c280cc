"""Claims: an answer is judged in a process of its own that ends in time, whatever it does, and leaves the worker as it
was; the limits of that process hold."""

import importlib.util
import json
import os
import signal
import time

import pytest

from rpt_jax.learning import judge_worker
from rpt_jax.learning.judge_worker import CRASHED, RIGHT, TIMED_OUT, WRONG


def judged(monkeypatch, is_equal, seconds=30.0, answer="b"):
    monkeypatch.setattr(judge_worker, "is_equal", is_equal)
    return judge_worker.judged(json.dumps(["a", answer]).encode(), seconds)


# The process of a test has the threads of JAX; a child that only runs Python returns from its fork all the same.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:This process.*fork:DeprecationWarning")
def test_every_end_has_its_verdict(monkeypatch):
    assert judged(monkeypatch, lambda reference, answer: (reference, answer) == ("a", "b")) == RIGHT
    assert judged(monkeypatch, lambda reference, answer: reference == answer) == WRONG
    assert judged(monkeypatch, lambda reference, answer: os.kill(os.getpid(), signal.SIGKILL)) == CRASHED
    assert judged(monkeypatch, lambda reference, answer: 1 / 0) == CRASHED
    assert judged(monkeypatch, lambda reference, answer: os._exit(0)) == CRASHED
    began = time.monotonic()
    assert judged(monkeypatch, lambda reference, answer: time.sleep(60), seconds=0.2) == TIMED_OUT
    assert time.monotonic() - began < 30
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # nothing is left to wait for


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:This process.*fork:DeprecationWarning")
def test_a_child_writes_no_file_and_leaves_no_trace_in_the_worker(monkeypatch, tmp_path):
    seen = []

    def writes(reference, answer):
        seen.append(answer)
        (tmp_path / "file").write_text("x" * 9)
        return True

    assert judged(monkeypatch, writes) == CRASHED
    assert not seen and (not (tmp_path / "file").exists() or not (tmp_path / "file").read_text())


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra questions")
def test_is_equal_is_not_fooled_by_what_surrounds_the_answer():
    """One answer is compared: neither several guesses nor what another box or a plain number says."""
    assert judge_worker.is_equal("18", "\\frac{36}{2}")
    for answer in ("17, 18", "18 17", "17} or \\boxed{18", "the answer is 17, not 18", "\\{18, 17\\}", ""):
        assert not judge_worker.is_equal("18", answer), answer
