"""Claims: a signal breaks off what may be broken off, waits for what may not, and leaves the process as it was; a
cloud's notice counts as one; several processes stop where all of them pass."""

import http.server
import signal
import threading
import time

import jax
import numpy as np
import pytest
import toy

from rpt_jax import preemption
from rpt_jax.config import SampleConfig
from rpt_jax.policy import sampler
from rpt_jax.records import Prompts
from rpt_jax.study import evaluate


def test_a_signal_breaks_off_only_inside():
    with preemption.watch() as told:
        assert not told.agreed()
        with pytest.raises(preemption.Abandoned), told.may_break_off():
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("went on")
        assert told.number == signal.SIGTERM and told.agreed()


def test_a_signal_outside_is_noted_and_breaks_off_the_next_phase():
    with preemption.watch() as told:
        signal.raise_signal(signal.SIGINT)
        assert told.agreed()
        with pytest.raises(preemption.Abandoned), told.may_break_off():
            pytest.fail("began")


def test_a_second_ctrl_c_kills():
    with preemption.watch() as told:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert told.number == signal.SIGTERM


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with pytest.raises(ZeroDivisionError), preemption.watch():
        assert [signal.getsignal(number) for number in preemption.SIGNALS] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


def test_another_thread_watches_nothing_and_fails_not():
    seen = []

    def run():
        with preemption.watch() as told, told.may_break_off():
            seen.append(told.agreed())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.fixture
def metadata(monkeypatch):
    """A metadata server; what it says of the machine."""
    says = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(says[self.path.removeprefix("/computeMetadata/v1/instance/")].encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Answer) as server:
        monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
        monkeypatch.setattr(preemption, "POLLED", 0.01)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield says
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "said"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_a_clouds_notice_breaks_off_like_a_signal(metadata, name, said):
    with preemption.watch() as told:
        time.sleep(0.1)
        assert told.number == 0
        with pytest.raises(preemption.Abandoned), told.may_break_off():
            metadata[name] = said
            time.sleep(60)
            pytest.fail("went on")
        assert told.number == signal.SIGTERM


def test_without_a_metadata_server_only_signals_tell(monkeypatch, caplog):
    caplog.set_level("INFO", preemption.log.name)
    monkeypatch.setenv("GCE_METADATA_HOST", "localhost:1")
    monkeypatch.setattr(preemption, "POLLED", 0.01)
    with preemption.watch() as told:
        while not caplog.records:
            time.sleep(0.01)
        assert not told.agreed()
    assert "no metadata server tells of preemption" in caplog.text


def test_a_server_that_fails_in_between_is_asked_again(metadata, monkeypatch):
    """What it says of nothing known is an error of the connection here."""
    with preemption.watch() as told, pytest.raises(preemption.Abandoned), told.may_break_off():
        time.sleep(0.1)
        kept = metadata.pop("preempted")
        time.sleep(0.1)
        metadata["preempted"] = kept.replace("FALSE", "TRUE")
        time.sleep(60)
        pytest.fail("went on")


def test_several_stop_where_all_pass(monkeypatch):
    """One is told; the signal itself breaks nothing off, the next common place does, and only inside."""
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption.multihost_utils, "process_allgather", lambda number: np.stack([number, 0 * number]))
    with preemption.watch() as told:
        with pytest.raises(preemption.Abandoned), told.may_break_off():
            preemption.passing()
            signal.raise_signal(signal.SIGTERM)
            passed = True
            preemption.passing()
            pytest.fail("went on")
        assert passed and told.agreed()
        preemption.passing()


@pytest.mark.parametrize("place", ["sampler", "evaluate"])
def test_sampler_and_evaluation_are_such_places(monkeypatch, place):
    """Between two calls of the sampler, and between batches of the arg-max."""
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption.multihost_utils, "process_allgather", lambda number: np.stack([number, 0 * number]))
    told = preemption.Preemption(number=signal.SIGTERM)
    model = toy.model()
    monkeypatch.setattr(sampler, "to_host", lambda tree: jax.tree.map(np.asarray, tree))
    with pytest.raises(preemption.Abandoned), told.may_break_off():
        if place == "sampler":
            prompts = Prompts(np.ones((1, 4), np.int32), np.array([4]), np.zeros((1, 2), np.uint32), None, None, None)
            sampler.sample(toy.params(), model, SampleConfig(group_size=2), prompts, jax.random.key(0), (0,))
        else:
            options = {"limit": 8, "batch_size": 8}
            evaluate.argmax_tokens(toy.params(), model, toy.annotated().documents, toy.targets(), **options)
        pytest.fail("went on")
