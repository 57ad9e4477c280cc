"""`rpt bench compare`: both are run with the same settings, and ratios follow from both sets of figures."""

import json
import sys

import pytest

from rpt_jax import cli
from rpt_jax.bench import compare as bench_compare
from rpt_jax.bench import step as bench_step

# Answers with its command line and PYTHONPATH beside the figures.
PEER = """
import json, os, sys
print("loading")
print(json.dumps({
    "asked": sys.argv[1:], "path": os.environ.get("PYTHONPATH"), "checks": {"score_mean": -5.0},
    "rollout": {"s": {"median": 6.0}, "peak_rss_mib": 300.0, "tokens_per_s": {"median": 50.0}},
    "score": {"s": {"median": 3.0}, "peak_rss_mib": 100.0},
    "e2e": {"s": {"median": 8.0}},
}))
"""
ROW = {"s": {"median": 2.0}, "peak_rss_mib": 150.0}
OURS = {"rollout": ROW | {"tokens_per_s": {"median": 75.0}}, "score": ROW, "update": ROW, "e2e": ROW}


@pytest.fixture
def peer(tmp_path):
    path = tmp_path / "peer.py"
    path.write_text(PEER)
    return path


def test_ratios_by_hand(peer, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        bench_compare, "bench_step", lambda step: asked.append(step) or OURS | {"checks": {"score_mean": -4.5}}
    )
    words = ["--workload", "tiny", "--repeats", "2", "--warmup", "0", "--cores", "0", "--peer-python", sys.executable]
    more = ["--peer-path", "/a/checkout", "--peer-arguments=--chunk 64", "--json"]
    assert cli.main(["bench", "compare", str(peer), *words, *more]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["ratios"] == {
        "rollout": {"speed": 3.0, "tokens_per_s": 1.5, "memory": 0.5},
        "score": {"speed": 1.5, "memory": 1.5},
        "e2e": {"speed": 4.0},
    }
    assert figures["score_mean_difference"] == 0.5
    assert asked == [bench_step.StepBench(bench_compare.WORKLOADS["tiny"], repeats=2, warmup=0, cores="0")]
    assert figures["ours"]["score"] == ROW and figures["peer"]["path"] == "/a/checkout"
    given = "--workload tiny --repeats 2 --warmup 0 --phases rollout,score,update,e2e --cores 0 --chunk 64"
    assert figures["peer"]["asked"] == given.split()


def test_both_are_measured_in_processes_of_their_own(peer, capsys):
    words = ["--workload", "tiny", "--phases", "score", "--repeats", "1"]
    assert cli.main(["bench", "compare", str(peer), *words]) == 0
    figures = json.loads(capsys.readouterr().out)
    ours = figures["ours"]
    assert ours["workload"] == "tiny" and ours["score"]["s"]["n"] == 1
    assert figures["ratios"] == {
        "score": {"speed": 3 / ours["score"]["s"]["median"], "memory": ours["score"]["peak_rss_mib"] / 100}
    }
    assert figures["score_mean_difference"] == ours["checks"]["score_mean"] + 5


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "import sys; sys.exit('no module named peer')",
            "status 1, no JSON object as the last line of its output:\nno module named peer",
        ),
        ("print('done')", "status 0, no JSON object"),
        ("print(3)", "status 0, no JSON object"),
        ("", "status 0, no JSON object"),
    ],
)
def test_a_peer_that_fails_is_shown_with_its_words(tmp_path, monkeypatch, capsys, script, message):
    monkeypatch.setattr(bench_compare, "bench_step", lambda step: OURS)
    (tmp_path / "peer.py").write_text(script)
    assert cli.main(["bench", "compare", str(tmp_path / "peer.py")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'peer.py'} could not be measured: {message}" in error


def test_a_peer_that_is_not_there(peer, capsys):
    assert cli.main(["bench", "compare"]) == 2
    assert "name the peer's, rpt bench compare PEER.py" in capsys.readouterr().err
    assert cli.main(["bench", "compare", str(peer), "--peer-python", "/no/python"]) == 2
    assert "peer_python='/no/python' is no program" in capsys.readouterr().err
