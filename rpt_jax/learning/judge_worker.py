"""A worker of the judge: (reference, answer) in, one byte of verdict out. Run as a script, so that no JAX is imported.

    python -P judge_worker.py SECONDS MEBIBYTES

It reads requests from stdin, each four bytes of length (big-endian) and a JSON list [reference, answer], and writes one
byte for each to stdout. Every answer is judged in a process of its own, forked from this one, which has loaded the
library once: no answer leaves anything behind for the next, and one that hangs, eats memory or crashes costs only
itself. This process evaluates nothing, so it can always kill; when its stdin ends it ends.
"""

import gc
import itertools
import json
import logging
import math
import os
import resource
import select
import signal
import sys

WRONG, RIGHT, TIMED_OUT, CRASHED = range(4)
# Compared once before the first fork: parser and algebra then have their tables, which every child would else fill for
# itself. Measured: `\frac{5}{x+7}` against 0.5 takes a child 38 ms of CPU, 186 without.
WARM = (
    "-1,234.5",
    r"\frac{a+1}{2}\cdot\sqrt[3]{12}",
    r"\left(3,\frac{\pi}{2}\right)",
    r"[0,1)\cup(2,\infty)",
    r"\{1,-2\}",
    r"x^2+2x y_1=(x-1)^2",
    r"0\le x<1",
    r"\text{(B)}",
    r"2 \binom{n}{2}+3!",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"50\%",
    "18 dollars are left",
    "0.5",
    r"\frac{3}{x+7}",
    "0.5",
    r"\sin^2(x)+\log_2 8-2^{x}|x|",
    "x+y",
)


def main() -> None:
    """Serves until stdin ends."""
    seconds, mebibytes = float(sys.argv[1]), int(sys.argv[2])
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    if sys.platform != "darwin":  # which knows no limit of the address space
        _limit(resource.RLIMIT_AS, mebibytes << 20)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns, four times, that its limits of time are off
    for reference, answer in itertools.pairwise(WARM):
        is_equal(reference, answer)
    _silence()
    gc.freeze()  # a collection in a child would else touch, and so copy, every page
    while header := requests.read(4):
        request = requests.read(int.from_bytes(header, "big"))
        os.write(replies, bytes([judged(request, seconds)]))


def judged(request: bytes, seconds: float) -> int:
    """The verdict on one request, from a child that lives `seconds` at the longest."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _confine(seconds)
            os.write(writing, bytes([RIGHT if is_equal(*json.loads(request)) else WRONG]))
        finally:
            os._exit(0)
    os.close(writing)
    is_done = bool(select.select([reading], [], [], seconds)[0])
    verdict = os.read(reading, 1) if is_done else bytes([TIMED_OUT])
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return verdict[0] if verdict else CRASHED


def is_equal(reference: str, answer: str) -> bool:
    """Whether math-verify finds the two contents of a box to mean the same; False for what it cannot read."""
    from math_verify import LatexExtractionConfig, parse, verify

    kinds = [LatexExtractionConfig(boxed_match_priority=0)]  # no plain expressions: those go through Python's eval
    sides = [parse(f"\\boxed{{{text}}}", kinds, parsing_timeout=None) for text in (reference, answer)]
    # Without its own limits of time: the one here is harder.
    return bool(verify(*sides, timeout_seconds=None))


def _confine(seconds: float) -> None:
    """Limits of a child: CPU time, should this process die before it can kill; no files, no cores, no processes."""
    limits = {resource.RLIMIT_CPU: math.ceil(seconds) + 1, resource.RLIMIT_FSIZE: 0}
    for kind, most in (limits | {resource.RLIMIT_CORE: 0, resource.RLIMIT_NPROC: 0}).items():
        _limit(kind, most)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _silence() -> None:
    """What the library prints must not get among the replies, and what it complains of would fill the log."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)


if __name__ == "__main__":
    main()
