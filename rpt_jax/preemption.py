"""Being told to stop: SIGTERM, Ctrl-C, and the notice that Google Cloud gives a TPU VM before it takes it away.

Sampling and evaluation change nothing that is saved, so they are broken off and the run saves where it stood. In a
single process a signal does so at once; several must stop at the same place, so each notes the signal and they agree
wherever all of them pass (`passing`: between two calls of the sampler, between batches of an evaluation, between
steps). An update is waited for: its state is donated. A second Ctrl-C kills as usual.
"""

import contextlib
import http.client
import logging
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What the metadata server of Google Cloud says of a machine, and the beginning of the answer that means "soon gone":
# a spot VM has half a minute then, one under maintenance a minute.
NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE"}
POLLED = 2.0  # seconds from one question to the next


class Abandoned(BaseException):
    """A phase was broken off by a signal; no `except Exception` in between may keep it."""


@dataclass
class Preemption:
    """What the signal handler writes and the loop reads."""

    number: int = 0  # of the signal; 0: none came
    may_break: bool = False  # the phase at hand may be abandoned

    @contextlib.contextmanager
    def may_break_off(self) -> Iterator[None]:
        """Inside, a signal raises Abandoned: at once, also one that came before, or with several processes where all
        of them are `passing`."""
        before = _watched.set(self)
        try:
            self.may_break = True
            if self.breaks_at_once() and self.number:
                raise Abandoned
            yield
        finally:
            self.may_break = False
            _watched.reset(before)

    def breaks_at_once(self) -> bool:
        return self.may_break and jax.process_count() == 1

    def agreed(self) -> bool:
        """Some process has been told to stop; the same answer in all of them. A collective of several."""
        if jax.process_count() == 1:
            return self.number != 0
        return bool(multihost_utils.process_allgather(np.array(self.number)).any())


_watched: ContextVar[Preemption | None] = ContextVar("watched", default=None)  # whose phase may be broken off now


def passing() -> None:
    """Raises Abandoned where all processes of a run pass together, if one was told to stop and the phase allows it."""
    watched = _watched.get()
    if watched is not None and jax.process_count() > 1 and watched.agreed():
        raise Abandoned


@contextlib.contextmanager
def watch() -> Iterator[Preemption]:
    """Notes SIGTERM, SIGINT and, on TPUs, the cloud's notice while inside.

    Outside the main thread, where no signal handler can stand, notes nothing.
    """
    preemption = Preemption()

    def note(number, frame):
        if preemption.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        preemption.number = number
        if preemption.breaks_at_once():
            raise Abandoned

    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    ended = threading.Event()
    asking = threading.Thread(target=_ask, args=(ended,), daemon=True)
    try:
        if jax.default_backend() == "tpu" or "GCE_METADATA_HOST" in os.environ:
            asking.start()
        yield preemption
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask(ended: threading.Event) -> None:
    """Sends this process SIGTERM when the metadata server announces the end of the machine.

    Gives up where no server ever answered; one that did is asked again whatever happens in between.
    """
    answered = False
    while not ended.wait(POLLED):
        try:
            announced = [f"{name}={said}" for name, end in NOTICES.items() if (said := _metadata(name)).startswith(end)]
        except (OSError, http.client.HTTPException) as error:
            if answered:
                continue
            log.info("no metadata server tells of preemption (%s): only SIGTERM and Ctrl-C do", error)
            return
        answered = True
        if announced:
            log.warning("Google Cloud announces the end of this machine (%s): saving", ", ".join(announced))
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _metadata(name: str) -> str:
    """One value of this machine [cloud.google.com/compute/docs/metadata]; GCE_METADATA_HOST names another server."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read().decode()
