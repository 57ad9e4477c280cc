"""A disk that is full, told in words, whatever was being written: rows, TensorBoard's events or a checkpoint."""

import errno
import os
from collections.abc import Iterator

from rpt_jax import ending

FULL = (errno.ENOSPC, errno.EDQUOT)
EXIT = 2


def end_if_full(error: BaseException) -> None:
    """Ends this process at once, with a message and exit status 2, where a full disk is behind the error; else returns.

    Without ceremony (ending.at_once): who writes would try again at the end, and say the same in tracebacks.
    """
    if not any(is_full(each) for each in chain(error)):
        return
    where = next((f" for {each.filename}" for each in chain(error) if getattr(each, "filename", None)), "")
    ending.at_once(
        f"rpt: no space left on the disk{where}: free some and give the same command again; a run goes on from its "
        "newest whole checkpoint",
        EXIT,
    )


def is_full(error: BaseException) -> bool:
    """Whether the error itself says so: an OSError by its number, others (tensorstore's) by the system's words."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(os.strerror(number) in str(error) for number in FULL)


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it came from, or came upon."""
    seen, queue = set(), [error]
    while queue:
        each = queue.pop(0)
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            queue += [each.__cause__, each.__context__]
