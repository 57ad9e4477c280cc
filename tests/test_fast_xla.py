"""Claim: a run of the toy comes out the same under the suite's flags and under none."""

import fast_xla
import numpy as np
import pytest
import toy
import toy_run


def test_a_run_as_users_compile_it_is_the_same_to_rounding(tmp_path):
    """Rollouts that are shown are the same; loss, gradient norm, entropy and reward to 1e-4; Adam's moments to a
    thousandth of the largest. Where a gradient is hardly more than rounding Adam makes part of a step of it, so
    parameters are within half of one."""
    for name, flags in (("fast", fast_xla.FLAGS), ("plain", "")):
        running = toy_run.start(tmp_path / name, processes=1, devices=1, mesh=(1, 1, 1), steps=4, flags=flags)
        errors = toy_run.finish(running)
        assert running[0].returncode == 0, errors
    shown = (toy.rows_of(tmp_path / name, "rollouts.jsonl") for name in ("fast", "plain"))
    fast, plain = ([[piece for piece, _ in row["pieces"]] for row in rows] for rows in shown)
    assert fast == plain and plain
    fast, plain = (toy.rows_of(tmp_path / name) for name in ("fast", "plain"))
    for name in ("loss", "gradient_norm", "entropy", "reward"):
        expected = pytest.approx([row[name] for row in plain], rel=1e-4)
        assert [row[name] for row in fast] == expected, name
    fast, plain = (np.load(tmp_path / name / "state.npz") for name in ("fast", "plain"))
    half = toy_run.settings(tmp_path).update.learning_rate / 2
    for name in plain.files:
        tolerance = half if name.startswith("0/") else 1e-3 * np.abs(plain[name]).max()
        np.testing.assert_allclose(fast[name], plain[name], rtol=0, atol=tolerance, err_msg=name)
