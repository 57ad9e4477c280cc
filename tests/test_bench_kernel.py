"""`rpt bench`: the figures that are there, what they add up to, and what cannot be measured."""

import importlib.util
import json

import pytest

from rpt_jax import cli
from rpt_jax.bench import kernel as bench
from rpt_jax.bench import simulate


def test_kernel_on_this_backend(capsys):
    """Both baselines, positive times, memory below that of all logits, and the same numbers as they give."""
    small = ("--tokens", "512", "--width", "8", "--vocabulary", "4096", "--chunk", "64", "--repeats", "1", "--json")
    assert cli.main(["bench", "kernel", *small]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["target"] == "cpu" and figures["implementation"] == "xla"
    assert figures["shape"] == {"tokens": 512, "width": 8, "vocabulary": 4096, "dtype": "float32"}
    assert figures["max_relative_error"] < 1e-5
    assert set(figures["baselines"]) == {"full_logits", "chunked"}
    for row in (figures, *figures["baselines"].values()):
        assert row["forward"]["seconds"] > 0 and row["seconds"] > 0
    full, chunked = (figures["baselines"][name]["backward"]["peak_bytes"] for name in ("full_logits", "chunked"))
    assert full > 512 * 4096 * 4 > chunked
    assert figures["memory_over_full_logits"] == figures["backward"]["peak_bytes"] / full


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernel", "--chunk", "100"], "tokens=2048 does not divide into chunks of chunk=100"),
        (["kernel", "--target", "v4"], "target='v4' is none of v5e, v5p, v6e"),
        (["head"], "head cannot be measured: use `rpt bench kernel`"),
        ([], "nothing cannot be measured: use `rpt bench kernel`"),
    ],
)
def test_what_cannot_be_measured(capsys, words, message):
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_cycles_of_equal_operations_are_counted_as_often_as_they_run():
    profile = 'hlo_op_estimate {\n  hlo_op_name: "a.1"\n  estimated_cycles: 700\n  num_equivalent_hlos: 3\n}\n'
    assert simulate._profiled(profile) == 2100
    assert simulate._profiled("hlo_op_estimate {\n}\n") == 0


def test_a_dtype_that_is_none_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "kernel", "--dtype", "float33"])
    assert ended.value.code == 2 and "--dtype" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
def test_a_simulated_kernel_takes_more_cycles_for_more_columns_and_never_beats_the_peak():
    T, D = 256, 512
    few, many = (bench._simulate("v5e", "forward", T, D, V)["cycles"] for V in (1024, 2048))
    assert many - few > 2 * T * D * 1024 / simulate.PEAK_FLOPS["v5e"]
