"""Throws damaged files and words at everything that reads them, guided by the lines that they reach.

    python tests/fuzz.py --surface readers --cases 250000 --seed 0

Nothing but InputError (and what a law of the target's own checks) may come out of a case: any other exception, a
death of the process, memory beyond its limit or more than a minute is a fault, which is kept in
--faults. An input that reaches a line, or ends in an error, as none did before joins those that are changed further;
small ones are kept in tests/fuzz_cases, which test_fuzz.py replays. A row for the whole goes to
experiments/results/fuzz.csv. Cases run in a process of their own, so that a crash of native code is one fault.
"""

import argparse
import hashlib
import itertools
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import fast_xla

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "experiments")]
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": "", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {fast_xla.FLAGS}")
CASES = HERE / "fuzz_cases"
PACKAGE = os.sep + "rpt_jax" + os.sep
SMALL, MOST = 1500, 100  # bytes of a case that is kept, and cases of a surface
SECONDS = 60  # of one case
SPARE = 3 << 30  # bytes of address space that cases may take beyond what is taken at the start
BATCH = 25_000  # cases of one process
WORDS = 150  # messages of a target that count as new
FORGOTTEN = re.compile(r"/\S+|=.*?: |'[^']*'|\([^)]*\)|[0-9]+")  # of a message: places, values, names, numbers


class Watch:
    """The lines of this package that were reached, by (file, line)."""

    def __init__(self):
        self.seen: set[tuple[str, int]] = set()
        self.new = False

    def __call__(self, frame, event, argument):
        return self._line if PACKAGE in frame.f_code.co_filename else None

    def _line(self, frame, event, argument):
        place = frame.f_code.co_filename, frame.f_lineno
        if place not in self.seen:
            self.seen.add(place)
            self.new = True
        return self._line


class Hang(BaseException):
    """A case took too long; no Exception, so that nothing swallows it."""


def ended(run, content: bytes) -> tuple[str, BaseException | None]:
    """(how a case ended, in a word or two; the exception if it is a fault)."""
    from rpt_jax.records import InputError

    try:
        run(content)
    except InputError as error:
        if not str(error) or "\n" in str(error):
            return "no line", error
        return f"{type(error.__cause__).__name__} {FORGOTTEN.sub('*', str(error))[:48]}", None
    except (Exception, Hang) as error:
        return type(error).__name__, error
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return type(error).__name__, error  # such as a panic of Rust
    return "done", None


def place_of(error: BaseException) -> str:
    """Where in this package, or in a target, an exception came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if PACKAGE in frame.filename]
    last = (frames or traceback.extract_tb(error.__traceback__))[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"


def kept_cases(folder: Path) -> list[tuple[str, bytes]]:
    """(target, input) of every case in a folder."""
    return [(path.name.rpartition("-")[0], path.read_bytes()) for path in sorted(folder.glob("*.bin"))]


def work(given: argparse.Namespace) -> None:
    """The cases given.start to given.start + given.cases, in this process.

    Longer than 40 lines because `case` shares the watch, the endings and the open file with what is around it.
    """
    import fuzz_targets

    logging.disable()
    targets = {target.name: target for target in fuzz_targets.surface(given.surface)}
    pools = {name: list(target.seeds) for name, target in targets.items()}
    for name, content in kept_cases(CASES / given.surface) + kept_cases(given.folder / "pool"):
        pools[name].append(content)
    watch, endings = Watch(), {name: set() for name in targets}
    current = os.open(given.folder / "current", os.O_WRONLY)

    def alarm(number, frame):
        raise Hang(f"a case took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, alarm)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def case(name: str, content: bytes, counts: bool) -> bool:
        """Runs a case; whether it showed anything new."""
        said = len(name).to_bytes(4, "little") + name.encode() + len(content).to_bytes(4, "little") + content
        os.pwrite(current, said, 0)
        signal.alarm(SECONDS)
        watch.new = False
        sys.settrace(watch)
        try:
            how, fault = ended(targets[name].run, content)
        finally:
            sys.settrace(None)
            signal.alarm(0)
        if fault is not None:
            report_fault(given, name, content, place_of(fault), "".join(traceback.format_exception(fault)))
        is_new = watch.new or (how not in endings[name] and len(endings[name]) < WORDS)
        endings[name].add(how)
        return is_new and counts and fault is None

    for name in targets:  # what is known counts for nothing
        for content in pools[name]:
            case(name, content, counts=False)
    chance = random.Random(f"{given.seed} {given.surface} {given.start}")
    names, weights = zip(*((name, target.weight) for name, target in targets.items()), strict=True)
    found = 0
    for done in range(given.cases):
        (name,) = chance.choices(names, weights)
        pool = pools[name]
        content = targets[name].mutate(chance, chance.choice(pool), pool)
        if case(name, content, counts=True):
            pool.append(content)
            found += 1
            (given.folder / "pool" / file_name(name, content)).write_bytes(content)
        if done % 500 == 0:
            (given.folder / "progress").write_text(f"{done + 1} {found}")
    (given.folder / "progress").write_text(f"{given.cases} {found}")


def file_name(name: str, content: bytes) -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.bin"


def keep_some(surface: str, pool: Path) -> None:
    """Adds the smallest of what was found to the cases that are kept, of each target in turn, up to MOST."""
    by_target: dict[str, list[bytes]] = {}
    for name, content in kept_cases(pool):
        if len(content) <= SMALL:
            by_target.setdefault(name, []).append(content)
    turns = [sorted(contents, key=len) for contents in by_target.values()]
    in_turn = [each for row in itertools.zip_longest(*turns) for each in zip(by_target, row, strict=True)]
    folder = CASES / surface
    folder.mkdir(parents=True, exist_ok=True)
    room = MOST - len(list(folder.iterdir()))
    for name, content in [each for each in in_turn if each[1] is not None][: max(room, 0)]:
        (folder / file_name(name, content)).write_bytes(content)


def report_fault(given: argparse.Namespace, name: str, content: bytes, place: str, words: str) -> None:
    """Keeps a fault, one for each place, and counts all."""
    given.faults.mkdir(parents=True, exist_ok=True)
    with (given.folder / "faults").open("a") as file:
        print(name, place, file=file)
    stem = given.faults / re.sub(r"[^\w.-]+", "_", f"{given.surface}-{name}-{place}")
    if not stem.with_name(stem.name + ".txt").exists():
        stem.with_name(stem.name + ".txt").write_text(words, errors="backslashreplace")
        stem.with_name(stem.name + ".bin").write_bytes(content)
        print(f"fault: {given.surface} {name}: {place}", flush=True)


def run_batch(given: argparse.Namespace, start: int, cases: int) -> tuple[int, int, int]:
    """(cases done, new ones, faults) of one process; a death is a fault of the case that it was at."""
    for name in ("progress", "faults", "current"):
        (given.folder / name).write_bytes(b"")
    words = ["--surface", given.surface, "--cases", str(cases), "--seed", str(given.seed), "--start", str(start)]
    places = ["--folder", str(given.folder), "--faults", str(given.faults), "--work"]
    done = subprocess.run([sys.executable, str(HERE / "fuzz.py"), *words, *places])
    made, found = map(int, (given.folder / "progress").read_text().split() or (0, 0))
    faults = len((given.folder / "faults").read_text().splitlines())
    if done.returncode and not (given.folder / "current").read_bytes():
        raise SystemExit(f"the targets of {given.surface} cannot be made")
    if done.returncode:
        current = (given.folder / "current").read_bytes()
        length = int.from_bytes(current[:4], "little")
        name, rest = current[4 : 4 + length].decode(errors="replace"), current[4 + length :]
        content = rest[4 : 4 + int.from_bytes(rest[:4], "little")]
        report_fault(given, name, content, f"death {done.returncode}", f"the process ended with {done.returncode}")
        faults, made = faults + 1, max(made, 1)
    return made, found, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surface", required=True, choices=("texts", "readers", "models", "settings"))
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE.parent / "experiments" / "results" / "fuzz.csv")
    parser.add_argument("--faults", type=Path, default=Path(tempfile.gettempdir(), "fuzz_faults"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given)
        return
    from rows import append_row

    began, done, found, faults = time.perf_counter(), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        given.folder = Path(folder)
        (given.folder / "pool").mkdir()
        while done < given.cases:
            made, new, bad = run_batch(given, done, min(BATCH, given.cases - done))
            done, found, faults = done + made, found + new, faults + bad
            print(f"{given.surface}: {done} cases, {found} new paths, {faults} faults", flush=True)
        keep_some(given.surface, given.folder / "pool")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    row = {"surface": given.surface, "cases": done, "seed": given.seed, "new_paths": found, "faults": faults}
    append_row(given.results, row | {"seconds": round(time.perf_counter() - began, 1), "commit": commit})


if __name__ == "__main__":
    main()
