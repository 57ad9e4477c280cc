"""Claims: each cell is run once, by whichever worker; rows that are there are skipped; a failure is a row and ends
nothing; what was broken off can go on; cells made with other settings are not mixed; launch commands are only
printed. Cells are stand-ins (a line of Python) here; test_sweep_cell.py has real ones."""

import csv
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from rpt_jax import cli
from rpt_jax.records import InputError
from rpt_jax.scaling import claims, sweep, sweep_cell, sweep_xpk
from rpt_jax.scaling.sweep import SweepSettings

EXPERIMENT = """
from dataclasses import replace
from rpt_jax.config import Config
from rpt_jax.scaling.sweep_cell import Cell

STEPS, FAILS = (2, 4), ()

def cells(folder):
    return [
        Cell(f"{size}-{steps}-{seed}", size, seed, Config(steps=steps, seed=seed), needs=f"base-{size}")
        for size in "sm" for steps in STEPS for seed in (0, 1)
    ]

def prepare(stage, folder):
    (folder / "made").write_text(stage)
"""
NAMES = [f"{size}-{steps}-{seed}" for size in "sm" for steps in (2, 4) for seed in (0, 1)]


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture
def settings(tmp_path):
    return {"folder": str(tmp_path / "runs"), "results": str(tmp_path / "tiny.csv")}


@pytest.fixture
def stand_in(monkeypatch):
    """Processes append their name to FOLDER/ran and leave a result, or do what `codes` says for their name."""
    codes = {}
    make = (
        "import json, os, sys; from pathlib import Path; folder, kind, name, row = sys.argv[1:5]\n"
        "with (Path(folder) / 'ran').open('a') as file: file.write(name + '\\n')\n"
        "{extra}\n"
        "result = Path(folder) / kind / (name + '.json'); result.with_suffix('.new').write_text(row)\n"
        "os.replace(result.with_suffix('.new'), result)\n"  # whole or not at all: others look for it all the time
    )

    def command(state, kind, claim, cores):
        if kind == "stages":
            row = {"status": "done", "stage": claim.name}
        else:
            cell = next(cell for cell in state.cells if cell.name == claim.name)
            row = sweep_cell.head_of_row(cell, "done") | {"hard.reasoning": 0.5, "cores": cores}
        code = make.format(extra=codes.get(claim.name, ""))
        return [sys.executable, "-c", code, str(state.folder), kind, claim.name, json.dumps(row)]

    monkeypatch.setattr(sweep, "command_of", command)
    monkeypatch.setattr(sweep, "POLL", 0.02)
    return codes


def ran(settings):
    path = Path(settings["folder"]) / "ran"
    return path.read_text().split() if path.is_file() else []


def rows_of(settings):
    with Path(settings["results"]).open() as file:
        return list(csv.DictReader(file))


def test_every_cell_once_with_its_stage_before(experiment, settings, stand_in):
    """Two workers; the second run has nothing to do, even where only the table is left."""
    figures = sweep.sweep(str(experiment), SweepSettings(workers=2, **settings))
    assert (figures["cells"], figures["done"], figures["failed"], figures["left"]) == (8, 8, 0, 0)
    order = ran(settings)
    assert sorted(order) == sorted([*NAMES, "base-s", "base-m"])
    for size in "sm":
        assert order.index(f"base-{size}") < min(order.index(name) for name in NAMES if name[0] == size)
    rows = rows_of(settings)
    assert [row["cell"] for row in rows] == NAMES and {row["status"] for row in rows} == {"done"}
    assert [(row["size"], row["steps"], row["seed"]) for row in rows[:3]] == [
        ("s", "2", "0"),
        ("s", "2", "1"),
        ("s", "4", "0"),
    ]
    elsewhere = settings | {"folder": settings["folder"] + "-anew"}
    for where in (settings, elsewhere):
        before = ran(where)
        assert sweep.sweep(str(experiment), SweepSettings(**where))["done"] == 8 and ran(where) == before
    assert rows_of(settings) == rows
    table = Path(settings["results"])
    table.write_text("".join(line for line in table.read_text().splitlines(True) if not line.startswith("m-2-1,")))
    again = settings | {"folder": settings["folder"] + "-again"}
    assert sweep.sweep(str(experiment), SweepSettings(**again))["done"] == 8
    assert ran(again) == ["base-m", "m-2-1"]
    assert [row["cell"] for row in rows_of(settings)] == NAMES  # the other rows stay, in order


def test_two_sweeps_at_one_time_share_the_cells(experiment, settings, stand_in):
    """As two hosts on one folder would: no cell twice, both end when all is done, one table with all rows."""
    ends = []
    threads = [
        threading.Thread(target=lambda: ends.append(sweep.sweep(str(experiment), SweepSettings(**settings))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ran(settings)) == sorted([*NAMES, "base-s", "base-m"])
    assert [figures["done"] for figures in ends] == [8, 8] and len(rows_of(settings)) == 8


def test_a_failure_is_a_row_and_ends_nothing(experiment, settings, stand_in):
    stand_in["s-2-1"] = "raise ValueError('out of luck')"
    stand_in["m-4-0"] = "import os; os.kill(os.getpid(), 9)"
    figures = sweep.sweep(str(experiment), SweepSettings(workers=2, **settings))
    assert (figures["done"], figures["failed"], figures["left"]) == (6, 2, 0)
    failed = {row["cell"]: row["error"] for row in rows_of(settings) if row["status"] == "failed"}
    assert failed == {"s-2-1": "status 1: ValueError: out of luck", "m-4-0": "status -9: no output"}
    count = len(ran(settings))
    assert sweep.sweep(str(experiment), SweepSettings(**settings))["failed"] == 2 and len(ran(settings)) == count
    stand_in.clear()
    assert sweep.sweep(str(experiment), SweepSettings(retry_failed=True, **settings))["done"] == 8
    assert sorted(ran(settings)[count:]) == ["m-4-0", "s-2-1"]
    assert {row["error"] for row in rows_of(settings)} == {""}


def test_a_stage_that_fails_fails_its_cells_alone(experiment, settings, stand_in):
    stand_in["base-s"] = "raise ValueError('no base')"
    figures = sweep.sweep(str(experiment), SweepSettings(**settings))
    assert (figures["done"], figures["failed"]) == (4, 4)
    rows = rows_of(settings)
    assert {row["error"] for row in rows[:4]} == {"its stage base-s failed: status 1: ValueError: no base"}
    stand_in.clear()
    assert sweep.sweep(str(experiment), SweepSettings(retry_failed=True, **settings))["done"] == 8


def test_a_dead_workers_cell_is_taken_over_and_a_living_ones_waited_for(experiment, settings, stand_in):
    folder = Path(settings["folder"]) / "claims" / "cells"
    dead, living = claims.take(folder, "s-2-0"), claims.take(folder, "s-2-1")
    dead.path.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))

    def finish():
        while len(ran(settings)) < 9:
            time.sleep(0.02)
        cells = sweep_cell.load_sweep(str(experiment), Path(settings["folder"]))[1]
        sweep_cell.write_result(Path(settings["folder"]), "cells", "s-2-1", sweep_cell.head_of_row(cells[1], "done"))

    other = threading.Thread(target=finish)
    other.start()
    assert sweep.sweep(str(experiment), SweepSettings(**settings))["done"] == 8
    other.join()
    assert "s-2-0" in ran(settings) and "s-2-1" not in ran(settings) and claims.holds(living)


def test_told_to_stop_it_ends_its_processes_and_leaves_their_cells_to_be_continued(experiment, settings, stand_in):
    stand_in["s-2-0"] = "import time; time.sleep(60)"

    def tell():
        while "s-2-0" not in ran(settings):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before, other, began = signal.getsignal(signal.SIGTERM), threading.Thread(target=tell), time.monotonic()
    other.start()
    figures = sweep.sweep(str(experiment), SweepSettings(**settings))
    other.join()
    assert time.monotonic() - began < 30 and signal.getsignal(signal.SIGTERM) is before
    assert (figures["done"], figures["failed"], figures["left"]) == (0, 0, 8) and figures["signal"] == signal.SIGTERM
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "sweep", lambda *_: figures)
        assert cli.main(["sweep", str(experiment)]) == 128 + signal.SIGTERM
    stand_in.clear()
    assert sweep.sweep(str(experiment), SweepSettings(**settings))["done"] == 8


def test_rows_of_other_settings_are_refused(experiment, settings, stand_in):
    sweep.sweep(str(experiment), SweepSettings(**settings))
    experiment.write_text(EXPERIMENT.replace("seed=seed)", "seed=seed, batch_size=128)"))
    with pytest.raises(InputError, match="s-2-0 has a row .* other settings"):
        sweep.sweep(str(experiment), SweepSettings(**settings))
    experiment.write_text(EXPERIMENT.replace("seed=seed)", "seed=seed, policy='elsewhere', rollouts_logged=1)"))
    assert sweep.sweep(str(experiment), SweepSettings(**settings))["done"] == 8  # the same computation


def test_some_cells_can_be_chosen(experiment, settings, stand_in):
    figures = sweep.sweep(str(experiment), SweepSettings(only=("m-2-0", "m-4-1"), **settings))
    assert figures["cells"] == figures["done"] == 2 and sorted(ran(settings)) == ["base-m", "m-2-0", "m-4-1"]
    with pytest.raises(InputError, match="no cell 'x-1'"):
        sweep.sweep(str(experiment), SweepSettings(only=("x-1",), **settings))


def test_workers_have_their_shares_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3, 5, 6}, raising=False)
    assert sweep.shares_of_cores(SweepSettings(workers=2)) == ["0,2", "3,5"]
    assert sweep.shares_of_cores(SweepSettings(workers=6)) == [""] * 6
    assert sweep.shares_of_cores(SweepSettings(workers=2, pin=False)) == ["", ""]
    assert sweep.shares_of_cores(SweepSettings(workers=1)) == [""]


def test_launch_commands_are_printed_and_nothing_runs(experiment, settings, stand_in, capsys):
    xpk = sweep_xpk.Xpk("pod", "v5litepod-16")
    figures = sweep.sweep(str(experiment), SweepSettings(print_xpk=True, xpk=xpk, only=("s-2-0", "m-4-1"), **settings))
    cells = sweep_cell.load_sweep(str(experiment), Path(settings["folder"]))[1]
    expected = sweep_xpk.commands(str(experiment), [cells[0], cells[-1]], xpk, **settings)
    assert figures == {"commands": expected} and not ran(settings)
    words = ["--print-xpk", "--xpk.cluster", "pod", "--xpk.tpu-type", "v5litepod-16", "--only", "s-2-0", "m-4-1"]
    places = ["--folder", settings["folder"], "--results", settings["results"]]
    assert cli.main(["sweep", str(experiment), *words, *places]) == 0
    assert capsys.readouterr().out.splitlines() == expected


def test_stages_can_be_made_alone(experiment, settings, stand_in):
    figures = sweep.sweep(str(experiment), SweepSettings(stages_only=True, only=tuple(NAMES[:5]), **settings))
    assert ran(settings) == ["base-s", "base-m"]
    assert (figures["stages"], figures["done"], figures["failed"], figures["left"]) == (2, 2, 0, 0)
    sweep.sweep(str(experiment), SweepSettings(**settings))
    assert sorted(ran(settings)[2:]) == sorted(NAMES)


def test_a_stage_that_fails_is_counted_when_stages_are_made_alone(experiment, settings, stand_in):
    stand_in["base-m"] = "raise ValueError('no base')"
    figures = sweep.sweep(str(experiment), SweepSettings(stages_only=True, **settings))
    assert (figures["stages"], figures["done"], figures["failed"], figures["left"]) == (2, 1, 1, 0)


def test_several_hosts_do_not_make_a_stage_together(experiment, settings, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sweep.identity, "start_together", lambda config: None)
    with pytest.raises(InputError, match="s-2-0 needs base-s.*--stages-only"):
        sweep.sweep(str(experiment), SweepSettings(cell="s-2-0", **settings))


def test_files_that_are_no_python_are_refused(experiment, settings):
    other = experiment.rename(experiment.with_suffix(".txt"))
    with pytest.raises(InputError, match="does not end in .py"):
        sweep.sweep(str(other), SweepSettings(**settings))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def cells", "def runs", "defines cells"),
        ("def prepare", "def prepared", "define prepare"),
        ('f"{size}-{steps}-{seed}"', 'f"{size}-{steps}"', "one name: s-2"),
        ('f"{size}-{steps}-{seed}"', 'f"../{size}-{steps}-{seed}"', "use letters"),
    ],
)
def test_files_that_are_no_sweep_are_refused(experiment, settings, old, new, message):
    experiment.write_text(EXPERIMENT.replace(old, new))
    with pytest.raises(InputError, match=message):
        sweep.sweep(str(experiment), SweepSettings(**settings))


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"status": "odd"}', b"\xff", b"[" * 5000])
def test_a_damaged_result_is_named(experiment, settings, content):
    place = Path(settings["folder"]) / "cells" / f"{NAMES[0]}.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    message = f"{NAMES[0]}.json(: expected| is no (JSON|result)).*delete it to run {NAMES[0]} again"
    with pytest.raises(InputError, match=message):
        sweep.sweep(str(experiment), SweepSettings(**settings))


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"cell,cell\n1,2\n", b"cell\n\xff\n", b"cell,x\na\n", b"cell\na\n"])
def test_a_damaged_table_is_named(experiment, settings, content):
    Path(settings["results"]).write_bytes(content)
    with pytest.raises(InputError, match=r"tiny\.csv"):
        sweep.sweep(str(experiment), SweepSettings(**settings))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    return [", "    return 7 or [", r"defines cells\(folder\), a list of Cell"),
        ("from rpt_jax.scaling.sweep_cell import Cell", "Cell = dict", r"line \d+: TypeError"),
        (
            "from rpt_jax.scaling.sweep_cell import Cell",
            "def Cell(*a, **b): return a",
            r"defines cells\(folder\), a list of Cell",
        ),
        ("Config(steps=steps,", "Config(steps='4',", r"cell.config.steps='4': expected int"),
        ("Config(steps=steps,", "Config(steps=0,", "cell.config.steps=0: use 1 or more"),
        ("    return [", "    return 1 / 0 or [", "line 9: ZeroDivisionError: division by zero: mend the file"),
    ],
)
def test_cells_of_another_kind_are_refused(experiment, settings, old, new, message):
    experiment.write_text(EXPERIMENT.replace(old, new))
    with pytest.raises(InputError, match=message):
        sweep.sweep(str(experiment), SweepSettings(**settings))
