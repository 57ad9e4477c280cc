"""Claims: the last words and the status come out, also where stdout or stderr takes nothing; a broken pipe that is not
stdout's is not taken for it."""

import os
import signal
import subprocess
import sys

import pytest

from rpt_jax import ending

LAST = "from rpt_jax import ending\nprint('figures')\nending.at_once('no room', 7)\nprint('went on')"


def test_what_was_printed_and_the_last_words_come_out():
    done = subprocess.run([sys.executable, "-c", LAST], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "figures\n", "no room\n")


@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_a_stream_that_takes_nothing_keeps_neither_the_other_nor_the_status(full):
    """/dev/full takes nothing; printed words wait in Python's buffer until the end."""
    with open("/dev/full", "w") as nowhere:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {full: nowhere}
        buffered = os.environ | {"PYTHONUNBUFFERED": ""}
        done = subprocess.run([sys.executable, "-c", LAST], text=True, env=buffered, **streams)
    left = done.stderr if full == "stdout" else done.stdout
    assert done.returncode == 7 and left == ("no room\n" if full == "stdout" else "figures\n")


@pytest.mark.parametrize("has_reader", [True, False])
def test_only_a_broken_pipe_of_stdout_is_one_that_nobody_reads(has_reader):
    asked = "import sys\nfrom rpt_jax import ending\n"
    asked += "said = [ending.nobody_reads(error) for error in (BrokenPipeError(), ConnectionResetError())]\n"
    asked += "print(said, file=sys.stderr)"
    reader, writer = os.pipe()
    if not has_reader:
        os.close(reader)
    done = subprocess.run([sys.executable, "-c", asked], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    if has_reader:
        os.close(reader)
    assert done.stderr == f"[{not has_reader}, False]\n"


def test_the_status_is_that_of_a_program_which_sigpipe_ended():
    assert ending.UNREAD == 128 + signal.SIGPIPE
