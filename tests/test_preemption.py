"""Claims: a signal breaks off what may be broken off, waits for what may not, and leaves the process as it was."""

import signal
import threading

import pytest

from rpt_jax.learning import preemption


def test_a_signal_breaks_off_only_inside():
    with preemption.watch() as told:
        assert not told.agreed()
        with pytest.raises(preemption.Abandoned), told.may_break_off():
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("went on")
        assert told.number == signal.SIGTERM and told.agreed()


def test_a_signal_outside_is_noted_and_breaks_off_the_next_phase():
    with preemption.watch() as told:
        signal.raise_signal(signal.SIGINT)
        assert told.agreed()
        with pytest.raises(preemption.Abandoned), told.may_break_off():
            pytest.fail("began")


def test_a_second_ctrl_c_kills():
    with preemption.watch() as told:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert told.number == signal.SIGTERM


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with pytest.raises(ZeroDivisionError), preemption.watch():
        assert [signal.getsignal(number) for number in preemption.SIGNALS] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


def test_another_thread_watches_nothing_and_fails_not():
    seen = []

    def run():
        with preemption.watch() as told, told.may_break_off():
            seen.append(told.agreed())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]
