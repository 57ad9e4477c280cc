"""What the processes of a run tell each other on the host: that they run the same, and that one of them cannot go on.

In a single process nothing is said. The functions here but the last three are collectives: every process calls
them alike.
"""

import contextlib
import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
import numpy.typing
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from rpt_jax import ending
from rpt_jax.records import InputError

LONGEST_ERROR = 2048  # bytes of a message from one process to the others
MEET_SECONDS = 10  # in which processes that fail for the same reason come to their ends
LAST_SECONDS = 300  # for which a process that is done waits for the others, as JAX does (shutdown_timeout_seconds)
EXIT_LOST = 3  # status of a process that cannot go on without another one
OF_INPUT, OF_THE_MACHINE = b"\1", b"\2"  # what a process failed with, before its message
OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")  # of what JAX raises, no matter how the other hosts do


class HostTrouble(InputError):
    """A host cannot go on, and not for the input: files may be whole that it does not see or could not read."""


def require_agreement(facts: Mapping[str, str]) -> None:
    """Raises InputError, in all processes alike, where one of them has other facts than process 0; names its host.

    facts: what all must have in common, by what it is called; the same names everywhere. A collective.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.blake2b(value.encode(), digest_size=8).digest() for value in facts.values()]
    host = socket.gethostname().encode()[:64].ljust(64)
    every = multihost_utils.process_allgather(np.frombuffer(b"".join([host, *digests]), np.uint8))  # a row a process
    hosts, found = every[:, :64], every[:, 64:].reshape(len(every), len(facts), 8)
    for process, fact in np.argwhere((found != found[0]).any(axis=2)):
        name = hosts[process].tobytes().decode().strip()
        raise InputError(
            f"process {process} on host {name!r} has another {list(facts)[fact]} than process 0: give all hosts the "
            "same code, settings and files, then start again"
        )


def of_first(array: np.ndarray) -> np.ndarray:
    """The array of process 0, to the bit, in all processes; of one shape and dtype everywhere. A collective."""
    if jax.process_count() == 1 or not array.size:
        return array
    sent = multihost_utils.broadcast_one_to_all(np.frombuffer(array.tobytes(), np.uint8))  # JAX would cut float64
    return np.frombuffer(np.asarray(sent).tobytes(), array.dtype).reshape(array.shape).copy()


def found_by_first(find: Callable[[], np.typing.ArrayLike], like: np.ndarray) -> np.ndarray:
    """What process 0 finds, in all processes; it has the shape and dtype of `like`. What it raises ends all."""
    with together():
        found = np.asarray(find(), like.dtype) if jax.process_index() == 0 else like
    return of_first(found)


def in_first_process(act: Callable[[], None]) -> None:
    """Calls `act` in process 0 alone; what it raises there ends all, see together."""
    with together():
        if jax.process_index() == 0:
            act()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What a process raises inside ends all of them, so that none waits for it in vain. A collective at the end.

    Inside there must be no collective. Who raised raises that again, the others InputError with the first one's words,
    or HostTrouble where that one raised this, or something else than InputError.
    """
    if jax.process_count() == 1:
        yield
        return
    raised, said = None, b""
    try:
        yield
    except Exception as error:  # goes on below, in every process
        is_of_input = isinstance(error, InputError) and not isinstance(error, HostTrouble)
        words = (str(error) or type(error).__name__).encode(errors="replace")
        raised, said = error, ((OF_INPUT if is_of_input else OF_THE_MACHINE) + words)[:LONGEST_ERROR]
    line = np.frombuffer(said.ljust(LONGEST_ERROR, b"\0"), np.uint8)
    every = [each.tobytes().rstrip(b"\0") for each in multihost_utils.process_allgather(line)]
    if raised is not None:
        raise raised
    for process, text in enumerate(every):
        if text:
            kind = InputError if text[:1] == OF_INPUT else HostTrouble
            raise kind(f"process {process}: {text[1:].decode(errors='replace')}")


def end_if_host_lost(error: Exception) -> None:
    """Ends this process at once, with a message, where the error tells that another process is gone; else returns.

    Without ceremony (ending.at_once): JAX would wait at its end for the process that is gone, and then abort. No
    collective.
    """
    lost = isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(OWN_FAULTS)
    if not lost or jax.process_count() == 1:
        return
    ending.at_once(
        f"process {jax.process_index()} of {jax.process_count()} on host {socket.gethostname()!r} lost another one: "
        f"{str(error).splitlines()[0]}\nThe log of the host that ended first says why. The same command on all hosts "
        "goes on from the newest checkpoint.",
        EXIT_LOST,
    )


def end_if_alone(status: int) -> None:
    """Returns where all other processes come to their ends, too; else ends this one at once with the status.

    For a process that cannot go on and has said why. At its end JAX would wait for the others, minutes long, while they
    wait for it in a collective; so it ends without ceremony. Then they do (end_if_host_lost), or JAX aborts them where
    it was process 0. Does nothing in a single process. No collective.
    """
    if not all_end(MEET_SECONDS):
        ending.at_once(f"process {jax.process_index()} of {jax.process_count()} ends; the others cannot go on", status)


def all_end(seconds: int) -> bool:
    """Whether all processes of the run call this, each at its end, within so many seconds. True in a single process."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return True
    try:
        multihost.get_barrier_sync_fn()(key="end", timeout_ms=1000 * seconds)
    except jax.errors.JaxRuntimeError:
        return False
    return True
