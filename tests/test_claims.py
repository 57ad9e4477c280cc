"""Claims: one of many who try gets a thing; it can be had again when it was given back, its process has ended, or
nobody has touched it for long enough; who was asleep notices, and ends."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from rpt_jax.scaling import claims


def test_one_of_many_gets_it(tmp_path):
    """16 threads at one time, 20 things."""
    got, start = [], threading.Barrier(16)

    def grab():
        start.wait()
        for number in range(20):
            if claims.take(tmp_path, f"cell{number}"):
                got.append(number)

    threads = [threading.Thread(target=grab) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(20))


def test_it_can_be_had_again_when_given_back(tmp_path):
    first = claims.take(tmp_path, "a")
    assert claims.take(tmp_path, "a") is None and claims.holds(first)
    claims.give_back(first)
    second = claims.take(tmp_path, "a")
    assert (second.number, claims.holds(second), claims.holds(first)) == (1, True, False)


def test_names_that_begin_alike_are_apart(tmp_path):
    assert claims.take(tmp_path, "a") and claims.take(tmp_path, "a.1") and claims.take(tmp_path, "a-1")
    assert claims.take(tmp_path, "a.1") is None and claims.take(tmp_path, "a") is None


def test_that_of_a_dead_process_here_is_free_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from rpt_jax.scaling import claims; claims.take(Path(sys.argv[1]), 'a');"
        "print('taken', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) as process:
        assert process.stdout.readline() == "taken\n"
        assert claims.take(tmp_path, "a") is None  # it lives
        process.kill()
        process.wait()
        assert claims.take(tmp_path, "a").number == 1


def test_elsewhere_only_time_tells(tmp_path):
    first = claims.take(tmp_path, "a")
    first.path.write_text(json.dumps({"host": "another", "pid": 2**22 + 1}))
    assert claims.take(tmp_path, "a", stale=60) is None
    old = time.time() - 61
    os.utime(first.path, (old, old))
    second = claims.take(tmp_path, "a", stale=60)
    assert second.number == 1 and not claims.holds(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.0", "a.1"]  # no probe is left behind


def test_an_empty_claim_is_being_written(tmp_path):
    (tmp_path / "a.0").touch()
    assert claims.take(tmp_path, "a", stale=60) is None
    assert claims.take(tmp_path, "a", stale=-1).number == 1


def test_a_claim_that_is_kept_does_not_age(tmp_path):
    claim = claims.take(tmp_path, "a")
    with claims.kept(claim, beat=0.02):
        os.utime(claim.path, (0, 0))
        deadline = time.monotonic() + 10
        while claim.path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - claim.path.stat().st_mtime < 5
    os.utime(claim.path, (0, 0))
    time.sleep(0.1)
    assert claim.path.stat().st_mtime == 0  # the thread has ended


KEEPER = """
import sys, time
from pathlib import Path
from rpt_jax.scaling import claims
with claims.kept(claims.Claim(Path(sys.argv[1]), "a", 0), beat=0.02):
    print("kept", flush=True)
    try:
        time.sleep(60)
    finally:
        (Path(sys.argv[1]) / "saved").touch()
"""


def test_a_process_whose_claim_is_lost_ends_and_saves_nothing(tmp_path):
    """Whether another took over while it worked, or before it began."""
    first = claims.take(tmp_path, "a")
    with subprocess.Popen([sys.executable, "-c", KEEPER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "kept\n" and process.poll() is None
        (tmp_path / "a.1").touch()
        assert process.wait(30) == claims.LOST == 143
    with pytest.raises(SystemExit) as ended, claims.kept(first):
        (tmp_path / "saved").touch()
    assert ended.value.code == claims.LOST and not (tmp_path / "saved").exists()


def test_two_that_see_the_same_number_do_not_both_get_the_next(tmp_path, monkeypatch):
    """The instant between looking and creating, held still."""
    monkeypatch.setattr(claims, "_highest", lambda folder, name: -1)
    assert claims.take(tmp_path, "a").number == 0 and claims.take(tmp_path, "a") is None


@pytest.mark.parametrize(
    "content", [b"[]", b"\xff", b"{", b'{"host": "HERE"}', b'{"host": "HERE", "pid": -1}', b"[" * 5000]
)
def test_a_damaged_claim_goes_by_its_time(tmp_path, content):
    claim = claims.take(tmp_path, "a")
    claim.path.write_bytes(content.replace(b"HERE", socket.gethostname().encode()))
    assert claims.take(tmp_path, "a") is None
    assert claims.take(tmp_path, "a", stale=-1).number == 1
