"""What the stopwatch counts, and that memory is that of the calls, not of what came before."""

import numpy as np
import pytest

from rpt_jax.bench import stopwatch


def test_the_first_calls_stand_apart(monkeypatch):
    """A clock that the calls set: 100 s to compile, 10 to warm up, then 1, 2 and 4; what comes after is not timed."""
    monkeypatch.setattr(stopwatch, "_matmul_rate", lambda: 50.0)
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(stopwatch.time, "process_time", lambda: clock["cpu"])
    seen = []

    def call(index):
        clock["wall"] += [100, 10, 1, 2, 4][index]
        clock["cpu"] += [200, 20, 2, 4, 8][index]

    def after(index):
        seen.append(index)
        clock["wall"] += 1000

    figures = stopwatch.measure(call, 1, 3, 25.0, after)
    assert seen == [0, 1, 2, 3, 4]
    assert figures["s"] == {"min": 1, "median": 2, "max": 4, "n": 3}
    assert figures["cpu_s"] == {"min": 2, "median": 4, "max": 8, "n": 3}
    assert figures["first_call_s"] == 100
    assert figures["share_of_matmul_peak"] == 25 / 2 / 50


def test_the_peak_is_what_the_calls_held(monkeypatch):
    monkeypatch.setattr(stopwatch, "SIDE", 16)
    if not stopwatch._reset_peak_memory():
        pytest.skip("this system keeps no high-water mark that can be reset")

    def peak(mebibytes):
        return stopwatch.measure(lambda _: np.ones(mebibytes << 17).sum(), 0, 1, 1.0)["peak_rss_mib"]

    few, many, few_again = peak(1), peak(300), peak(1)
    assert many - few == pytest.approx(300, abs=40) and abs(few_again - few) < 40


def test_a_system_without_proc_has_no_peak(monkeypatch):
    monkeypatch.setattr(stopwatch, "SIDE", 16)
    monkeypatch.setattr(stopwatch, "Path", lambda path: Missing())
    assert stopwatch.measure(lambda _: None, 0, 1, 1.0)["peak_rss_mib"] is None


class Missing:
    def write_text(self, text):
        raise FileNotFoundError

    read_text = write_text
