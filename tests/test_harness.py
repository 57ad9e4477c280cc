"""Claims: texts become tokens and windows as lm-evaluation-harness has them, worked by hand; stop strings, limits and
settings of a task are obeyed; what cannot be answered is said. test_harness_lm.py has the harness's own tasks."""

from dataclasses import replace

import pytest
import toy

from rpt_jax.config import PromptConfig, SampleConfig
from rpt_jax.corpus.templates import Chat
from rpt_jax.learning import run_folder
from rpt_jax.records import InputError
from rpt_jax.study import harness
from rpt_jax.study.harness import Asked, HarnessRun, Wish, answer_of, generate, loglikelihoods, windows, wish_of

SMALL = HarnessRun(
    policy="toy", tasks=("t",), max_length=40, max_gen_tokens=8, batch_size=4, thought="<think>", think_tokens=4
)


def asked(**changes) -> Asked:
    tokenizer = toy.tokenizer()
    return Asked(toy.model(), toy.params(), tokenizer, replace(SMALL, **changes), (tokenizer.end_of_text,))


def plain(tokens, count) -> tuple[float, bool]:
    """log p of the last tokens by a softmax in float64, and whether each is the arg-max."""
    return toy.plain_logprob(toy.params(), toy.model(), tokens, count)


def test_loglikelihoods():
    """A context's last space goes with what follows; no context is the end-of-text token; a long one loses its left."""
    encode, end = toy.tokenizer().encode, toy.tokenizer().end_of_text
    pairs = [("a", " 3."), ("a ", "3."), ("", "b 4"), ("a<think>", "</think>\\boxed{"), ("ab" * 25, "2.")]
    policy = asked()
    found = loglikelihoods(policy, pairs)
    expected = [
        plain(encode("a 3."), 3),
        plain(encode("a 3."), 3),
        plain([end, *encode("b 4")], 3),
        plain(encode("a<think></think>\\boxed{"), 2),
        plain(encode(("ab" * 25 + "2.")[-41:]), 2),  # the last of 41 is not read
    ]
    for each, (logprob, greedy) in zip(found, expected, strict=True):
        assert each.logprob == pytest.approx(logprob, abs=1e-4) and each.greedy == greedy
    assert [each.greedy for each in found] == [False, False, False, True, False]
    assert policy.cut["loglikelihood"] == 1
    with pytest.raises(InputError, match="a continuation of 50 tokens leaves no room for context within max_length=40"):
        loglikelihoods(policy, [("a", "ab" * 25)])


def test_a_start_piece_stands_before_every_text():
    encode = toy.tokenizer().encode
    policy = asked(start="<predict>")
    found = loglikelihoods(policy, [("a", " 3"), ("", "b")])
    assert found[0].logprob == pytest.approx(plain(encode("<predict>a 3"), 2)[0], abs=1e-4)
    assert found[1].logprob == pytest.approx(plain(encode("<predict>b"), 1)[0], abs=1e-4)


@pytest.mark.parametrize(
    "start, whole", [("", "<predict>acb"), ("<predict>", "<predict>acb"), ("<think>", "<think><predict>acb")]
)
def test_a_start_that_the_chat_brings_comes_once(monkeypatch, start, whole):
    monkeypatch.setitem(harness.CHATS, "r1", Chat("<predict>a", "b"))
    policy = asked(start=start, chat="r1")
    ids = harness._prompt(policy, "c", wish_of({}, policy.config))
    assert ids == toy.tokenizer().encode_markup(whole)


def test_windows_by_hand():
    assert windows(range(10), [99], 4) == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert windows(range(8), [99], 4) == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7])]
    assert windows(range(2), [99], 4) == [([99], [0, 1])]
    assert windows(range(5), [98, 99], 4) == [([99], [0, 1, 2, 3]), ([0, 1, 2, 3], [4])]
    assert windows([], [99], 4) == []


@pytest.mark.parametrize("length", range(1, 6))
@pytest.mark.parametrize("size", range(1, 12))
def test_windows_predict_each_token_once_and_read_no_more_than_they_may(size, length):
    found = windows(range(size), [99], length)
    assert [token for _, predicted in found for token in predicted] == list(range(size))
    assert all(len(context) >= 1 and len(context) + len(predicted) - 1 <= length for context, predicted in found)
    for context, predicted in found:
        before = [99, *range(predicted[0])]
        assert context == before[-len(context) :]
    assert all(len(context) + len(predicted) - 1 == length for context, predicted in found[1:])


def test_rolling():
    """The sum over the windows; each by itself."""
    text, encode, end = "a 3." * 5 + "b", toy.tokenizer().encode, toy.tokenizer().end_of_text
    tokens = encode(text)
    found = harness.rolling_loglikelihoods(asked(max_length=8), [text, "b 4.", ""])
    parts = [([end], tokens[:8]), (tokens[7:8], tokens[8:16]), (tokens[12:16], tokens[16:])]
    expected = sum(plain([*context, *predicted], len(predicted))[0] for context, predicted in parts)
    assert found[0] == pytest.approx(expected, abs=1e-3)
    assert found[1] == pytest.approx(plain([end, *encode("b 4.")], 4)[0], abs=1e-4) and found[2] == 0


def greedy_text(context: str, count: int) -> str:
    """Greedy decoding one forward pass a token."""
    tokens, made = toy.tokenizer().encode(context), []
    while len(made) < count:
        made.append(int(toy.plain_logits(toy.params(), toy.model(), [*tokens, *made])[-1].argmax()))
        if made[-1] == toy.tokenizer().end_of_text:
            made.pop()
            break
    return toy.tokenizer().bytes_of(made).decode()


def test_generation_is_greedy_decoding_up_to_a_stop():
    """All of a batch beside each other, with different stops; a stop that spans tokens and one that never comes."""
    requests = [
        ("a<think>", {"until": []}),
        ("b<think>", {"until": ["}"]}),
        ("b<think>", {"until": ["k></th", "zzz"], "do_sample": False, "temperature": 0.7}),
        ("a 3.", {"until": "never", "max_gen_toks": 5}),
        ("a 3.b", {"until": ["\n\n"], "max_new_tokens": 3, "num_beams": 1}),
        ("", {"until": []}),
    ]
    whole = [greedy_text(context or "", 8) for context, _ in requests[:5]]
    found = generate(asked(), requests)
    assert found[0] == whole[0] and found[0].startswith("</think>\\boxed{") and found[0].endswith("}")
    assert found[1] == whole[1].partition("}")[0] and "}" in whole[1]
    assert found[3] == greedy_text("a 3.", 5) and found[4] == greedy_text("a 3.b", 3)
    assert generate(asked(batch_size=1), requests[::-1])[::-1] == found
    assert generate(asked(), [("b<think>", {"until": ["think>\\b"]})]) == ["</"]


def test_sampled_answers_depend_on_seed_context_and_repeat():
    settings = {"do_sample": True, "temperature": 1.0, "until": []}
    requests = [("a<think>", settings)] * 6 + [("b<think>", settings)]
    found = generate(asked(), requests)
    assert len(set(found[:6])) > 1  # repeats of a task's question differ
    assert generate(asked(batch_size=7), requests[::-1]) == [found[6], *found[:6]]
    assert generate(asked(seed=1), requests) != found


def test_thinking():
    """The answer is what follows the thought; a stop string inside the thought is none; no thought's end, no answer."""
    found = generate(asked(think=True, max_gen_tokens=6), [("a", {"until": ["}", "</think>"]}), ("b", {"until": []})])
    assert found[0].startswith("\\boxed{") and len(found[0]) == len("\\boxed{1")
    assert found[1].startswith("\\boxed{") and found[1].endswith("}")
    assert answer_of(b"one\n</think> A", ["\n"], True) == (" A", False)
    assert answer_of(b"one\n", ["\n"], True) == ("", False)
    assert answer_of(b"one\ntwo, three", [",", "\n", "x"], False) == ("one", True)
    assert answer_of(b"\xe2\x82", [], False) == ("\ufffd", False)


def test_long_contexts_are_cut_and_counted():
    policy = asked(max_length=16)
    assert generate(policy, [("ab" * 20 + "<think>", {}), ("b<think>", {})])[0] == greedy_text("abababa<think>"[-8:], 8)
    assert policy.cut["generate_until"] == 1
    with pytest.raises(InputError, match="answers of up to 40 tokens and 0 of markers leave no room for a context"):
        generate(policy, [("a", {"max_gen_toks": 40})])


def test_wishes():
    config = replace(SMALL, max_gen_tokens=9)
    assert wish_of({}, config) == Wish((), 9, 0.0, 0, 1.0, 0.0)
    assert wish_of({"until": "x", "do_sample": True}, config) == Wish(("x",), 9, 1.0, 0, 1.0, 0.0)
    assert wish_of({"until": ["x", ""], "temperature": 0.5, "top_k": 3, "top_p": 0.9}, config) == Wish(
        ("x",), 9, 0.5, 3, 0.9, 0.0
    )
    assert wish_of({"temperature": 0.5, "do_sample": False, "max_tokens": 4}, config).temperature == 0
    assert wish_of({"max_tokens": 4, "max_gen_toks": 5}, config).max_tokens == 5
    with pytest.raises(InputError, match="generation setting num_beams=4 is not known"):
        wish_of({"num_beams": 4}, config)
    for wrong in ({"temperature": "warm"}, {"top_k": [3]}, {"max_tokens": float("inf")}, {"until": 3}):
        with pytest.raises(InputError, match="of a wrong kind .*: mend the task's YAML"):
            wish_of(wrong, config)


def test_settings_come_from_a_run(tmp_path):
    run = toy.config(
        tmp_path / "run", prompt=PromptConfig("bare", chat="chatml"), sample=SampleConfig(end_tokens=("}",))
    )
    with run_folder.open_run(run, toy.tokenizer(), None, {}):
        pass
    found = harness.settings_of(str(tmp_path / "run"))
    assert (found.chat, found.end_tokens) == ("chatml", ("}",))
    assert harness.settings_of("none") == HarnessRun("none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": ""}, "no policy named"),
        ({"tasks": ()}, "tasks is empty"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"limit": -1}, "limit=-1"),
        ({"batch_size": 3}, "batch of 3 contexts"),
        ({"policy": "nowhere", "batch_size": 8}, "no policy in 'nowhere'"),
    ],
)
def test_what_cannot_be_done_is_said(changes, message):
    with pytest.raises(InputError, match=message):
        harness.open_policy(replace(SMALL, **changes))


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e .\[harness\]"):
        harness.require_installed()
