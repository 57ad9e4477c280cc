"""Claims: a workload a cell, that runs this cell and no other, in words that a shell reads back; names are labels."""

import shlex

import pytest

from rpt_jax.config import Config
from rpt_jax.records import InputError
from rpt_jax.scaling.sweep_cell import Cell
from rpt_jax.scaling.sweep_xpk import Xpk, commands

XPK = Xpk("pod", "v5litepod-16", 2, image="eu/rpt", zone="z")


def cell(name):
    return Cell(name, "s", 0, Config())


def test_a_workload_a_cell():
    lines = commands("my sweep.py", [cell("s-2-0"), cell("S_4.0")], XPK, "/shared/runs", "/shared/a.csv")
    words = shlex.split(lines[0])
    assert words[:7] == ["xpk", "workload", "create", "--cluster", "pod", "--workload", "s-2-0"]
    assert words[7:-2] == [
        *("--tpu-type", "v5litepod-16", "--num-slices", "2", "--max-restarts", "20"),
        *("--docker-image", "eu/rpt", "--zone", "z"),
    ]
    inner = ["rpt", "sweep", "my sweep.py", "--cell", "s-2-0", "--folder", "/shared/runs", "--results", "/shared/a.csv"]
    assert words[-2] == "--command" and shlex.split(words[-1]) == inner
    other = shlex.split(lines[1])
    assert other[6] == "s-4-0" and "--cell S_4.0 " in other[-1]


@pytest.mark.parametrize(
    ("names", "xpk", "folder", "message"),
    [
        (["a"], Xpk(), "f", "xpk.cluster"),
        (["a"], XPK, "", "needs --folder"),
        (["s-2.0", "s-2_0"], XPK, "f", "'s-2_0' and another give one workload name"),
        (["x" * 41], XPK, "f", "cannot name"),
        (["2-s"], XPK, "f", "cannot name"),
    ],
)
def test_what_xpk_would_refuse_is_refused(names, xpk, folder, message):
    with pytest.raises(InputError, match=message):
        commands("e.py", [cell(name) for name in names], xpk, folder)
