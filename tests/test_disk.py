"""Claims: a full disk is known by the error itself and by what it came from, and ends the process with words; no other
error does."""

import errno
import subprocess
import sys

import pytest

from rpt_jax import disk

FULL = OSError(errno.ENOSPC, "No space left on device", "runs/rpt/metrics.jsonl")


def chained(error, cause=None, context=None):
    error.__cause__, error.__context__ = cause, context
    return error


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError('RESOURCE_EXHAUSTED: Failed to write "d/0": No space left on device [OS error 28: ENOSPC]'),
        chained(RuntimeError("closing"), cause=chained(ValueError("x"), context=FULL)),
    ],
)
def test_a_full_disk_is_known(error, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(disk.os, "_exit", ended.append)
    disk.end_if_full(error)
    said = capsys.readouterr().err
    assert ended == [2] and said.startswith("rpt: no space left on the disk") and "same command again" in said


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "No such file"), ValueError("RESOURCE_EXHAUSTED: Out of memory"), KeyError()]
)
def test_other_errors_are_left_alone(monkeypatch, error):
    ended = []
    monkeypatch.setattr(disk.os, "_exit", ended.append)
    looped = chained(RuntimeError("a"), cause=error)
    error.__context__ = looped
    disk.end_if_full(looped)
    assert ended == []


def test_the_command_ends_with_words(tmp_path):
    """/dev/full takes nothing: status 2, one line, no traceback."""
    words = "import sys\nfrom rpt_jax import cli\n"
    words += "def run(*_):\n    with open('/dev/full', 'w') as file:\n        file.write('x' * 9)\n"
    words += "cli.run = run\nsys.exit(cli.main(['train']))"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no space left" in done.stderr, done.stderr


def test_output_to_the_full_disk_ends_with_words_too():
    """`rpt --help > /dev/full`: the write fails when the output is flushed."""
    with open("/dev/full", "w") as nowhere:
        command = [sys.executable, "-m", "rpt_jax.cli", "--help"]
        done = subprocess.run(command, stdout=nowhere, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no space left" in done.stderr, done.stderr
