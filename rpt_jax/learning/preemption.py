"""SIGTERM and Ctrl-C: end the phase at hand so that the run can save and exit.

Sampling and evaluation change nothing that is saved, so in a single process a signal breaks them off at once. An update
is waited for: its state is donated. With several processes all must stop at the same place, so each only notes the
signal and they agree between steps. A second Ctrl-C kills as usual.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Abandoned(BaseException):
    """A phase was broken off by a signal; no `except Exception` in between may keep it."""


@dataclass
class Preemption:
    """What the signal handler writes and the loop reads."""

    number: int = 0  # of the signal; 0: none came
    breaks_off: bool = False  # the phase at hand may be abandoned

    @contextlib.contextmanager
    def may_break_off(self) -> Iterator[None]:
        """Inside, a signal raises Abandoned at once, also one that came before."""
        self.breaks_off = jax.process_count() == 1
        try:
            if self.breaks_off and self.number:
                raise Abandoned
            yield
        finally:
            self.breaks_off = False

    def agreed(self) -> bool:
        """Some process has been told to stop; the same answer in all of them."""
        if jax.process_count() == 1:
            return self.number != 0
        return bool(multihost_utils.process_allgather(np.array(self.number)).any())


@contextlib.contextmanager
def watch() -> Iterator[Preemption]:
    """Notes SIGTERM and SIGINT while inside; outside the main thread, where no handler can stand, notes nothing."""
    preemption = Preemption()

    def note(number, frame):
        if preemption.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        preemption.number = number
        if preemption.breaks_off:
            raise Abandoned

    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield preemption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
