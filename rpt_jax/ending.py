"""The end of this process where Python's own would hang, or show tracebacks of what needs no mending.

In: a last message and an exit status, or a write that failed. Five ends are like this: a host of the run is gone, or
this one fails alone (agreement.py), the disk is full (disk.py), nobody reads stdout any more, as in
`rpt --help | head -3`, and Ctrl-C where nothing is saved for it (cli.py).
"""

import contextlib
import os
import select
import signal
import sys
from typing import NoReturn

STDOUT = 1  # its file descriptor
UNREAD = 141  # exit status of a command whose output nobody reads: 128 + SIGPIPE, as shells have it


def at_once(message: str, status: int) -> None:
    """Ends this process with the message on stderr and what was printed before; nothing is waited for (os._exit).

    What stdout or stderr does not take is lost: it may be a file on the disk that is full, or a pipe without a reader.
    """
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        print(end="", flush=True)
    os._exit(status)


def by_interrupt(message: str) -> NoReturn:
    """Ends this process with the message as Ctrl-C ends one that does not listen: a loop of the shell ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
        print(end="", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(128 + signal.SIGINT)  # where the signal is blocked


def nobody_reads(error: OSError) -> bool:
    """Whether the error is that of a broken pipe, and stdout is a pipe whose reader is gone; others break, too."""
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    poll.register(STDOUT, 0)  # for its end alone: Linux says ERR there, macOS HUP
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def drop_output() -> None:
    """Lets all that is still to be written to stdout vanish; Python flushes it at its end, and would fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
