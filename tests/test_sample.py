"""Claims: the prompt is the one that training would assemble, thoughts and predictions are the sampler's own, log-probs
are those of the tokens they are said of; a terminal is safe from what a policy says; what cannot be asked is said."""

import io
import json
import logging
import os
import pty
import subprocess
import sys
from dataclasses import replace

import fast_xla
import numpy as np
import pytest
import toy

from rpt_jax import cli
from rpt_jax.config import MeshConfig, PromptConfig, SampleConfig
from rpt_jax.corpus.positions import Position
from rpt_jax.corpus.prompts import assemble
from rpt_jax.corpus.templates import load_template
from rpt_jax.learning import run_folder
from rpt_jax.learning.policy_folder import save_policy
from rpt_jax.records import InputError
from rpt_jax.study import sample


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder, toy.model(), toy.params(), toy.tokenizer(), {})
    return folder


def give(monkeypatch, text: bytes):
    """Standard input holds this, and is no terminal."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def run(capsys, *words):
    status = cli.main(["sample", *map(str, words)])
    return status, *capsys.readouterr()


SMALL = ("--sample.max-tokens", "8", "--sample.temperature", "1.0", "--prompt.max-tokens", "32")


def test_thoughts_about_a_piped_text(capsys, monkeypatch, policy):
    """The toy policy boxes a digit at random; log-probs add up over the pieces, which are single characters."""
    give(monkeypatch, b"a\n")
    status, output, message = run(capsys, policy, *SMALL, "--samples", "6", "--json")
    assert status == 0, message
    figures = json.loads(output)
    assert figures["text"] == "a" and len(figures["samples"]) == 6
    answered = [each for each in figures["samples"] if each["prediction"] is not None]
    assert answered and sum(figures["predictions"].values()) == len(answered)
    for each in figures["samples"]:
        texts, logprobs = zip(*each["pieces"], strict=True)
        assert each["logprob"] == pytest.approx(sum(logprobs), abs=1e-5)
        assert len(texts) == each["tokens"]
    for each in answered:
        whole = "".join(text for text, _ in each["pieces"])
        assert whole.startswith(each["thought"] + "</think>") and f"\\boxed{{{each['prediction']}}}" in whole
        texts = [text for text, _ in each["pieces"]]
        box = len(texts) - texts[::-1].index("\\boxed{")  # behind the last one
        inside = each["pieces"][box : box + len(each["prediction"])]  # each character is a token
        assert each["prediction_logprob"] == pytest.approx(sum(logprob for _, logprob in inside), abs=1e-5)


def test_the_same_question_has_the_same_answer(capsys, monkeypatch, policy):
    outputs = []
    for text, seed in ((b"a", 0), (b"a\n", 0), (b"a", 1)):
        give(monkeypatch, text)
        outputs.append(run(capsys, policy, *SMALL, "--seed", seed)[1])
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith("[1] ") and "\npredictions: " in outputs[0]


def test_the_prompt_is_that_of_training(policy, caplog):
    """Ids of a document that goes on behind the text; where the text is too long its left end is lost, and said."""
    caplog.set_level(logging.INFO)
    settings = sample.SampleRun(
        str(policy), prompt=PromptConfig("bare", max_tokens=6), sample=SampleConfig(max_tokens=8)
    )
    thinker = sample.open_policy(settings)
    prompts = sample.prompt_of(thinker, "a 3.b")
    tokens = np.array(toy.tokenizer().encode("a 3.b 1."), np.int32)
    expected = assemble(toy.tokenizer(), load_template("bare"), settings.prompt, [tokens], [Position(0, 5, 0.0)])
    assert len(prompts.lengths_N) == 8  # a row for each of the tests' devices
    for row in range(8):
        np.testing.assert_array_equal(prompts.tokens_NT[row], expected.tokens_NT[0])
    assert prompts.lengths_N.tolist() == [6] * 8 and "the first 1 of 5 tokens" in caplog.text


def test_settings_are_those_of_the_run(tmp_path, policy):
    config = toy.config(tmp_path / "run", prompt=PromptConfig("bare", max_tokens=31))
    with run_folder.open_run(config, toy.tokenizer(), None, {}):
        pass
    found = sample.settings_of(str(tmp_path / "run"))
    assert (found.policy, found.prompt, found.sample) == (str(tmp_path / "run"), config.prompt, config.sample)
    assert sample.settings_of(str(policy)).prompt.template == "bare"  # its tokenizer has the marks
    assert sample.settings_of(str(tmp_path / "none")) == sample.SampleRun(str(tmp_path / "none"))


def test_describe_by_hand():
    r"""<think> was in the prompt; the last box counts; a token that reaches over the box's edge counts whole."""
    contents = [b"so \\boxed{1}", b"</think>", b" \\boxed", b"{ 4", b"2", b"}", b""]
    found = sample.describe(contents, [-1, -2, -4, -8, -16, -32, -64], b" 42")
    assert (found["thought"], found["prediction"], found["logprob"]) == ("so \\boxed{1}", " 42", -127)
    assert found["prediction_logprob"] == -24
    without = sample.describe([b"no \xe2", b"\x82\xac end"], [-1, -2], None)
    assert (without["thought"], without["prediction"], without["prediction_logprob"]) == ("no € end", None, None)
    assert without["pieces"] == [("no € end", -3)]


def test_a_terminal_is_safe_and_predictions_are_exact():
    """Spaces and line breaks of a prediction can be seen, and no escape sequence gets through."""
    each = {"thought": "one\x1b[2J\ntwo\x9b", "prediction": " 9\n", "prediction_logprob": -0.25, "finished": True}
    none = {"thought": "", "prediction": None, "prediction_logprob": None, "finished": False}
    text = sample.shown({"samples": [each, none], "predictions": {" 9\n": 1}})
    assert text.split("\n") == [
        '[1] " 9\\n"   log-prob -0.250',
        "    one\\x1b[2J",
        "    two\\x9b",
        "",
        "[2] no answer within sample.max_tokens",
        "",
        'predictions: " 9\\n" 1 (of 2)',
    ]


def test_letters_keep_their_direction():
    ruling = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    assert sample.harmless("".join(map(chr, ruling))) == "".join(f"\\u{code:04x}" for code in ruling)
    assert sample.harmless("\u05d0\u2029\u202f\u2065\u206a€") == "\u05d0\u2029\u202f\u2065\u206a€"


def test_ctrl_c_at_the_prompt_ends_it_as_ctrl_d_does(monkeypatch):
    def ask(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", ask)
    assert sample.typed() is None


def test_a_run_of_another_slice_is_asked_on_the_devices_here(tmp_path, caplog, policy):
    """Its sizes and its processes are those of where it was trained; sizes given by hand are an error."""
    trained = MeshConfig(data=1, fsdp=16, coordinator="10.0.0.2:8476", processes=4, process=1)
    with run_folder.open_run(toy.config(tmp_path / "run", mesh=trained), toy.tokenizer(), None, {}):
        pass
    found = sample.settings_of(str(tmp_path / "run"))
    assert found.mesh == MeshConfig(data=1, fsdp=16, coordinator="none")
    with caplog.at_level("WARNING", logger="rpt_jax.study.sample"):
        assert sample.mesh_here(found).shape == {"data": 8, "fsdp": 1, "tensor": 1}
    assert "trained on another slice" in caplog.text
    with pytest.raises(InputError, match="there are 8 devices"):
        sample.mesh_here(replace(found, mesh=MeshConfig(data=3)))


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (b"", (), "no text to think about"),
        (b"\n", (), "no text to think about"),
        ("aä".encode(), (), "the tokenizer cannot represent 'ä'"),
        (b"a\xff", (), "the text is not UTF-8 (byte 2)"),
        (b"a", ("--samples", "0"), "samples=0: use 1 or more"),
        (b"a", ("--sample.temperature", "0"), "makes all 4 samples equal"),
        (b"a", ("--prompt.template", "none"), "prompt.template='none'"),
        (b"a", ("--policy", "nowhere"), "no policy in 'nowhere'"),
        (b"a", ("--policy", ""), "no policy named"),
    ],
)
def test_what_cannot_be_asked_is_said(capsys, monkeypatch, policy, text, words, message):
    give(monkeypatch, text)
    status, output, said = run(capsys, policy, *words)
    assert status == 2 and output == "" and message in said


def test_a_conversation_at_a_terminal(policy):
    """Lines are asked for, answered one by one, a wrong one is said and forgotten, and the end of input ends it."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "rpt_jax.cli", "sample", str(policy), *SMALL, "--samples", "2"]
    environment = os.environ | {"XLA_FLAGS": fast_xla.FLAGS}
    child = subprocess.Popen(
        words, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(theirs)
    os.write(ours, "a\nä\nb 4.\n\x04".encode())
    output, said = child.communicate()
    os.close(ours)
    assert child.returncode == 0, said
    assert output.count("text> ") == 4 and output.count("predictions: ") == 2
    assert said.count("the tokenizer cannot represent 'ä'") == 1
