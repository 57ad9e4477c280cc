"""Claims: nothing that a file or a command line holds ends in anything but a line of words, or breaks a law of what was
read. Here the cases that fuzz.py has found worth keeping, and some hundred fresh ones; a campaign runs millions."""

import random
import subprocess
import sys
from pathlib import Path

import fuzz
import fuzz_targets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SURFACES = {"texts": 1200, "readers": 1000, "models": 800, "settings": 600}  # fresh cases
SLOW = ("orbax", "words", "commands")  # targets whose cases take a tenth of a second: a few in each campaign's pool


def run(target, content: bytes) -> None:
    how, fault = fuzz.ended(target.run, content)
    if fault is not None:
        raise AssertionError(f"{target.name} of {content!r} ended with {how}: {fault}") from fault


@pytest.mark.parametrize("surface", SURFACES)
def test_what_was_found_before(surface):
    targets = {target.name: target for target in fuzz_targets.surface(surface)}
    cases = fuzz.kept_cases(fuzz.CASES / surface)
    assert cases and {name for name, _ in cases} <= targets.keys()
    for name, content in cases:
        run(targets[name], content)


@pytest.mark.parametrize("surface", SURFACES)
def test_fresh_cases(surface):
    """Each target as it is fed usually, and then damaged by a number that hypothesis draws."""
    targets = [target for target in fuzz_targets.surface(surface) if target.name not in SLOW]
    for target in targets:
        for content in target.seeds:
            run(target, content)

    @settings(max_examples=SURFACES[surface])
    @given(st.sampled_from(targets), st.integers(0, 2**32 - 1))
    def fresh(target, number):
        chance = random.Random(number)
        run(target, target.mutate(chance, chance.choice(target.seeds), target.seeds))

    fresh()


def test_seeds_are_read_and_not_refused():
    """What a target reads usually is what it should read: otherwise nothing behind its door would be tried."""
    refused = []
    for surface in SURFACES:
        for target in fuzz_targets.surface(surface):
            if not any(fuzz.ended(target.run, content)[0] == "done" for content in target.seeds):
                refused.append(target.name)
    assert refused == ["tiktoken"]  # a kind that is not read: refused always


def test_a_fault_is_found_and_counted(tmp_path):
    """The loop itself: a reader that breaks on some bytes is caught, with the input; one that dies, too."""
    (tmp_path / "fuzz_targets.py").write_text(
        "import os\nfrom types import SimpleNamespace\n"
        "def run(content):\n"
        "    if b'!' in content: raise KeyError('x')\n"
        "    if b'?' in content: os.abort()\n"
        "def damaged(chance, content, others): return bytes([chance.choice(b'abcdefghi!' * 3 + b'?')])\n"
        "def surface(name): return [SimpleNamespace(name='t', seeds=(b'a',), run=run, mutate=damaged, weight=1)]\n"
    )
    for name in ("fuzz.py", "fast_xla.py"):
        (tmp_path / name).write_text(Path(fuzz.__file__).with_name(name).read_text())
    words = [
        "--surface",
        "texts",
        "--cases",
        "40",
        "--results",
        str(tmp_path / "x.csv"),
        "--faults",
        str(tmp_path / "f"),
    ]
    code = "import sys; sys.path.insert(1, sys.argv.pop(1)); import fuzz; fuzz.main()"
    experiments = str(Path(fuzz.__file__).parent.parent / "experiments")
    done = subprocess.run(
        [sys.executable, "-c", code, experiments, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = sorted(path.name.rpartition(".")[0] for path in (tmp_path / "f").glob("*.bin"))
    assert len(names) == 2 and "KeyError" in names[0] and "death" in names[1]
    header, row = (tmp_path / "x.csv").read_text().splitlines()
    assert header == "surface,cases,seed,new_paths,faults,seconds,commit"
    assert row.startswith("texts,") and int(row.split(",")[4]) >= 2
