"""Claims: rows come back in order; one that is none is named, but for a last one that a crash cut short."""

import pytest

from rpt_jax.learning.run_rows import flat, flops_spent, read_rows
from rpt_jax.records import InputError


def test_rows_come_back_without_what_a_crash_cut_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": "\xc3\xa4"}\n\n{"step": 2}\n{"step": 3, "a')
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "a": "ä"}, {"step": 2}]
    assert read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not a row of JSON"),
        (b"\xff", "not a row of JSON"),
        (b"[" * 5000, "not a row of JSON .brackets nest deeper"),
        (b"[1]", "a row without the number of its step"),
        (b'{"step": "1"}', "a row without the number of its step"),
        (b'{"a": 1}', "a row without the number of its step"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, line, message):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(InputError, match=rf"metrics\.jsonl:2: {message}"):
        read_rows(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        flops_spent(tmp_path, 3)


def test_names_are_joined():
    assert flat({"a": {"b": 1, "c": {"d": []}}, "e": None}) == {"a/b": 1, "a/c/d": [], "e": None}
    assert flat({"a": {"b": {"c": 1}}}, joint=".") == {"a.b.c": 1}


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1}',
        '{"step": 1, "flops_sample": 1' + "0" * 400 + ', "flops_update": 1}',
        '{"step": 1, "flops_sample": "x", "flops_update": 1}',
    ],
)
def test_rows_that_do_not_say_what_they_spent(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    assert flops_spent(tmp_path, 0) == 0
    with pytest.raises(InputError, match="does not say what it has spent"):
        flops_spent(tmp_path, 1)
