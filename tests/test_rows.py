"""Claims of experiments/rows.py: rows come back as text in their order, a row takes the place of its like and of no
other, and a table is changed as a whole or not at all."""

from pathlib import Path

import pytest

from rpt_jax.experiment_file import load_module

tables = load_module(str(Path(__file__).resolve().parent.parent / "experiments" / "rows.py"))


def test_columns_of_some_rows_are_empty_in_the_others(tmp_path, capsys):
    path = tmp_path / "results" / "table.csv"
    assert tables.read_rows(path) == []
    tables.append_row(path, {"seed": 0, "a": 1.5})
    tables.append_row(path, {"seed": 1, "b": "x, y"})
    assert tables.read_rows(path) == [{"seed": "0", "a": "1.5", "b": ""}, {"seed": "1", "a": "", "b": "x, y"}]
    assert capsys.readouterr().out == '{"seed": 0, "a": 1.5}\n{"seed": 1, "b": "x, y"}\n'


def test_a_row_takes_the_place_of_its_like(tmp_path):
    """Alike in all columns that are named; the new ones come last, the others keep their order."""
    path = tmp_path / "table.csv"
    rows = [{"seed": seed, "policy": policy, "right": 0} for seed in (0, 1) for policy in ("base", "rpt")]
    tables.replace_rows(path, rows, keys=("seed", "policy"))
    tables.replace_rows(path, [{"seed": 0, "policy": "rpt", "right": 1}], keys=("seed", "policy"))
    found = [(row["seed"], row["policy"], row["right"]) for row in tables.read_rows(path)]
    assert found == [("0", "base", "0"), ("1", "base", "0"), ("1", "rpt", "0"), ("0", "rpt", "1")]


class Unwritable:
    def __str__(self):
        raise OSError("half written")


def test_a_table_stays_whole_where_a_change_fails(tmp_path):
    path = tmp_path / "table.csv"
    tables.append_row(path, {"seed": 0})
    with pytest.raises(ZeroDivisionError):
        tables.change_rows(path, lambda rows: [*rows, 1 / 0])
    with pytest.raises(OSError, match="half written"):
        tables.change_rows(path, lambda rows: [*rows, {"seed": 1}, {"seed": Unwritable()}])
    assert tables.read_rows(path) == [{"seed": "0"}] and [each.name for each in tmp_path.iterdir()] == ["table.csv"]
    tables.change_rows(path, lambda rows: [])
    assert tables.read_rows(path) == []
    tables.append_row(path, {"seed": 2})
    assert tables.read_rows(path) == [{"seed": "2"}]
