"""Claims: the launch scripts call gcloud and xpk as meant, with words kept whole; a spot slice that is taken away is
requested again and the same command goes on; a command that fails on a slice that stays ends the loop."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "experiments" / "launch"
COMMAND = ("rpt", "train", "experiments/x.py", "--name", "two words")
# Stands for gcloud and xpk: writes down its arguments, takes the next word of the file `states` for a description, and
# fails a training command while the file `fails` has lines left.
STAND_IN = r"""#!/usr/bin/env bash
{ printf '%s' "$(basename "$0")"; printf '|%s' "${@//$'\n'/ }"; echo; } >> "$PLACE/calls"
next() { head -n 1 "$PLACE/$1"; sed -i 1d "$PLACE/$1"; }
case "$*" in
  *describe*)
    word=$(next states)
    case $word in
      NONE) echo "ERROR: (gcloud) NOT_FOUND: Resource 'slice' was not found" >&2; exit 1 ;;
      AWAY) echo "ERROR: (gcloud) UNAVAILABLE: try again later" >&2; exit 1 ;;
      *) echo "$word" ;;
    esac ;;
  *"rpt train"*) [ -z "$(next fails)" ] ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """Runs a script; gives (exit status, calls as lists of words)."""
    for name in ("gcloud", "xpk"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)

    def run(script, *words, states="", fails="", **environment):
        (tmp_path / "states").write_text("\n".join(states.split()) + "\n")
        (tmp_path / "fails").write_text("\n".join(fails.split()) + "\n")
        (tmp_path / "calls").write_text("")
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PLACE": str(tmp_path), "WAIT": "0"}
        done = subprocess.run(
            [LAUNCH / script, *words], env=os.environ | path | environment, capture_output=True, timeout=60
        )
        return done.returncode, [
            line.split("|") for line in (tmp_path / "calls").read_text().splitlines() if "|" in line
        ]

    return run


def actions(calls):
    """The verbs, and where a command is run."""
    return [call[4] if call[3] == "queued-resources" else "/".join(call[3:5]) for call in calls]


def test_a_slice_gets_the_code_and_all_workers_the_command(launch):
    status, calls = launch("tpu_vm.sh", "slice", "zone-a", *COMMAND)
    assert status == 0 and actions(calls) == ["tpu-vm/scp", "tpu-vm/ssh", "tpu-vm/ssh"]
    assert calls[0][6:] == ["slice:rpt_jax.tar.gz", "--zone", "zone-a", "--worker", "all"]
    assert calls[-1][5:-1] == ["slice", "--zone", "zone-a", "--worker", "all", "--command"]
    assert calls[-1][-1].endswith(r"rpt train experiments/x.py --name two\ words ")
    assert launch("tpu_vm.sh", "slice", "zone-a")[0] == 2


def test_a_spot_slice_comes_and_goes(launch):
    """Requested, waited for, taken away in the middle, requested again, and given back at the end."""
    status, calls = launch(
        "spot.sh",
        *("slice", "zone-a", "v5litepod-16", "v2-alpha-tpuv5-lite", "gs://bucket/run", *COMMAND),
        states="NONE PROVISIONING ACTIVE SUSPENDED SUSPENDED NONE ACTIVE",
        fails="once",
    )
    assert status == 0
    run = ["describe", "tpu-vm/scp", "tpu-vm/ssh", "tpu-vm/ssh"]
    assert actions(calls) == [
        *("describe", "create", "describe", *run, "describe", "describe", "delete"),
        *("describe", "create", *run, "delete"),
    ]
    created = next(call for call in calls if call[4] == "create")
    assert created[5:] == [
        *("slice", "--node-id", "slice", "--zone", "zone-a", "--accelerator-type", "v5litepod-16"),
        *("--runtime-version", "v2-alpha-tpuv5-lite", "--spot"),
    ]
    assert calls[-2][-1].endswith(r"--name two\ words --checkpoint.folder gs://bucket/run ")


def test_no_answer_is_asked_for_again(launch):
    """Neither as a slice that is gone, which would be requested twice, nor after a command that failed."""
    spot = ("spot.sh", "slice", "z", "v5p-128", "v2-alpha-tpuv5", "gs://b/r", *COMMAND)
    run = ["tpu-vm/scp", "tpu-vm/ssh", "tpu-vm/ssh"]
    status, calls = launch(*spot, states="AWAY NONE AWAY AWAY ACTIVE")
    assert status == 0 and actions(calls) == [
        *("describe", "describe", "create", "describe", "describe", "describe", *run, "delete"),
    ]
    status, calls = launch(*spot, states="ACTIVE AWAY ACTIVE", fails="once")
    assert status == 1 and actions(calls) == ["describe", *run, "describe", "describe"]


def test_a_command_that_fails_on_a_slice_that_stays_ends_it(launch):
    status, calls = launch(
        "spot.sh", "slice", "z", "v5p-128", "v2-alpha-tpuv5", "gs://b/r", *COMMAND, states="ACTIVE ACTIVE", fails="once"
    )
    assert status == 1 and "delete" not in actions(calls)


def test_xpk_gets_one_workload(launch):
    status, calls = launch("xpk.sh", "cluster", "v5litepod-16", "image", "first", *COMMAND, SLICES="4")
    assert status == 0 and calls == [
        [
            *("xpk", "workload", "create", "--cluster", "cluster", "--workload", "first", "--tpu-type", "v5litepod-16"),
            *("--num-slices", "4", "--docker-image", "image", "--max-restarts", "20"),
            *("--command", r"rpt train experiments/x.py --name two\ words "),
        ]
    ]
