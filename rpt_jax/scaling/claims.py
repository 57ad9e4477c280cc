"""Who works on what: a file for each claim in a folder that all workers see, on one machine or on several.

`NAME.0`, `NAME.1`, ... are claims of one thing; the highest number holds. A file is created only if it is not there
yet, which the file system decides for one of those who try, so that nobody has to lock or to delete. The next number
may be taken when the claim before it

- was given back (its holder wrote so), or
- is of a process on this machine that has ended, or
- has not been touched for STALE seconds, by the clock of the file system: its holder touches it every BEAT seconds.

A holder that was only asleep for so long finds out when it touches its claim next, and its process ends at once, before
it writes into what is another's now.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rpt_jax.json_file import parsed

log = logging.getLogger(__name__)

STALE = 600.0  # seconds
BEAT = 30.0
LOST = 128 + signal.SIGTERM  # exit status of a process whose claim another has taken: nothing failed, it was stopped


@dataclass(frozen=True)
class Claim:
    """One number of one thing."""

    folder: Path
    name: str
    number: int

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.{self.number}"


def take(folder: Path, name: str, stale: float = STALE) -> Claim | None:
    """A claim of this process, or None where somebody else holds one."""
    folder.mkdir(parents=True, exist_ok=True)
    number = _highest(folder, name)
    if number >= 0 and not _is_free(folder / f"{name}.{number}", stale):
        return None
    claim = Claim(folder, name, number + 1)
    try:
        with claim.path.open("x") as file:
            file.write(_holder())
    except FileExistsError:
        return None  # another was faster
    return claim


def holds(claim: Claim) -> bool:
    """Whether nobody has taken over."""
    return _highest(claim.folder, claim.name) == claim.number


def give_back(claim: Claim) -> None:
    """Lets anybody take it at once."""
    claim.path.write_text(json.dumps({"given_back": True}))


@contextlib.contextmanager
def kept(claim: Claim, beat: float = BEAT) -> Iterator[None]:
    """Inside, the claim is this process's and stays fresh; the process ends with status LOST when another takes over.

    It ends as it stands, in the middle of what it does: a run that saved first would write into the other's folder.
    """
    if not holds(claim):
        log.warning("%s was taken over by another process: nothing is done here", claim.name)
        raise SystemExit(LOST)
    claim.path.write_text(_holder())
    ended = threading.Event()

    def touch():
        while not ended.wait(beat):
            with contextlib.suppress(OSError):  # a file system that is away for a moment
                os.utime(claim.path)
                if _highest(claim.folder, claim.name) > claim.number:
                    log.warning("%s was taken over by another process: this one ends", claim.name)
                    os._exit(LOST)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _holder() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid()})


def _highest(folder: Path, name: str) -> int:
    """The number that holds, -1 for none."""
    ends = (path.name.removeprefix(f"{name}.") for path in folder.glob(f"{name}.*"))
    return max((int(end) for end in ends if end.isdigit()), default=-1)


def _is_free(path: Path, stale: float) -> bool:
    try:
        holder = parsed(path.read_bytes() or b"{}")
    except ValueError:
        holder = {}  # being written, or damaged: then its time tells
    if not isinstance(holder, dict):
        holder = {}
    if holder.get("given_back"):
        return True
    pid = holder.get("pid")
    if holder.get("host") == socket.gethostname() and type(pid) is int and 0 < pid < 2**31 and not _is_alive(pid):
        return True
    return _now(path.parent) - path.stat().st_mtime > stale


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now(folder: Path) -> float:
    """The file system's time, which may differ from this machine's."""
    probe = folder / f".now-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
