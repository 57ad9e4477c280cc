"""Claims: scores are those of a plain float64 softmax, the best one is chosen; a boxed letter behind a thought
counts and nothing else; figures are those counted by hand; batch, devices and other questions change no answer."""

import functools
import json
import re
import tempfile
from dataclasses import replace

import jax
import numpy as np
import pytest
import toy

from rpt_jax import cli
from rpt_jax import mesh as meshes
from rpt_jax.config import MeshConfig, ModelConfig, PromptConfig, SampleConfig
from rpt_jax.corpus.choices import Question, choose, read_questions
from rpt_jax.corpus.tokenizer import load_tokenizer, train_sentencepiece
from rpt_jax.learning import run_folder
from rpt_jax.learning.policy_folder import save_policy
from rpt_jax.policy import decoder
from rpt_jax.records import InputError
from rpt_jax.study import multiple_choice
from rpt_jax.study.multiple_choice import Answered, ChoicesRun, by_logprob, by_reasoning

QUESTIONS = [
    Question("1+1?", ("two", "six", "a b"), 0, "x", "f:1"),
    Question("what is it, then?", ("x", "yy"), 1, "x", "f:2"),
    Question("2?", ("no", "yes", "so", "is"), 2, "y", "f:3"),
]
SMALL = ChoicesRun(
    prompt=PromptConfig(template="bare", max_tokens=96),
    sample=SampleConfig(group_size=6, temperature=1.0, max_tokens=8, tokens_per_call=8),
    batch_size=8,
)
BOXED = "ABC9"  # what the policy puts in its box, each as likely


@functools.cache
def tokenizer():
    texts = [multiple_choice.pairs_of(each, "letter")[0][0] for each in QUESTIONS]
    texts += ["".join(each.options) for each in QUESTIONS] + ["{}ABCDEFGHIJ 0123456789"]
    kinds = set("".join(texts)) | {*toy.SYMBOLS}
    return train_sentencepiece(
        texts, len(kinds) + 3, tempfile.mkdtemp(), toy.SYMBOLS, model_type="char", byte_fallback=False
    )


def model() -> ModelConfig:
    return replace(toy.model(width=64, head_channels=16), vocab_size=64)


@functools.cache
def params():
    """A random decoder for log-probs whose head, after a mark of the prompt or a box, has a table of what follows."""
    rng, id_of = np.random.default_rng(0), tokenizer().id_of
    tree = toy.noise(model(), 0.06, rng)
    follows_VV = 0.3 * rng.standard_normal((64, 64)).astype(np.float32)
    chain = ["<think>", "</think>", "\\boxed{", *BOXED, "}"]
    follows_VV[[id_of(piece) for piece in chain]] = 0
    follows_VV[id_of("<think>"), id_of("</think>")] = 3
    follows_VV[id_of("</think>"), id_of("\\boxed{")] = 3
    follows_VV[id_of("\\boxed{"), [id_of(letter) for letter in BOXED]] = 3
    follows_VV[[id_of(letter) for letter in BOXED], id_of("}")] = 3
    follows_VV[id_of("}"), tokenizer().end_of_text] = 3
    return tree | {"embedding": np.eye(64, dtype=np.float32), "head": follows_VV}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder, model(), params(), tokenizer(), {})
    return folder


def plain(text: str, count: int) -> float:
    """log p of the last `count` characters, each a token, by a softmax in float64."""
    return toy.plain_logprob(params(), model(), tokenizer().encode(text), count, width=96)[0]


def by_hand(question, score) -> list[float]:
    lines = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", question.options, strict=False))
    if score == "letter":
        text = f"Question: {question.text}\nOptions:{lines}\nAnswer:"
        return [plain(f"{text} {letter}", 2) for letter in "ABCD"[: len(question.options)]]
    scores = [plain(f"Question: {question.text}\nAnswer: {each}", len(each) + 1) for each in question.options]
    if score == "text":
        return scores
    return [value / len(each) for value, each in zip(scores, question.options, strict=True)]


@pytest.mark.parametrize("score", ["letter", "text", "text_per_byte"])
def test_scores_are_those_of_a_plain_softmax(score):
    answered = by_logprob(params(), model(), tokenizer(), QUESTIONS, replace(SMALL, score=score))
    for n, question in enumerate(QUESTIONS):
        expected = by_hand(question, score)
        assert answered.shown[n]["scores"] == pytest.approx(expected, abs=1e-4)
        assert answered.shown[n]["choice"] == "ABCD"[int(np.argmax(expected))]
        assert answered.right_N[n] == (np.argmax(expected) == question.answer)
    assert not answered.cut_N.any()


def test_a_long_question_loses_its_left_end_and_is_counted():
    short = replace(SMALL, prompt=PromptConfig(template="bare", max_tokens=40))
    answered = by_logprob(params(), model(), tokenizer(), QUESTIONS, short)
    text = multiple_choice.pairs_of(QUESTIONS[2], "letter")[0][0]
    assert answered.cut_N.tolist() == [True, True, True] and len(text) > 39
    assert answered.shown[2]["scores"][1] == pytest.approx(plain(text[-39:] + " B", 2), abs=1e-4)
    thought = by_reasoning(
        params(), model(), tokenizer(), QUESTIONS, replace(SMALL, prompt=PromptConfig("bare", max_tokens=28))
    )
    frame = 2  # <predict> and <think>
    lengths = [len(f"{q.text}\n\n" + "\n".join(f"A. {each}" for each in q.options)) for q in QUESTIONS]
    assert thought.cut_N.tolist() == [length + frame > 28 for length in lengths] == [False, True, True]


def test_the_start_piece_stands_before_the_question():
    config = replace(SMALL, start="<predict>")
    answered = by_logprob(params(), model(), tokenizer(), QUESTIONS[:1], config)
    text = multiple_choice.pairs_of(QUESTIONS[0], "letter")[0][0]
    assert answered.shown[0]["scores"][0] == pytest.approx(plain(f"<predict>{text} A", 2), abs=1e-4)


@functools.cache
def reasoned(seed=0):
    config = replace(SMALL, seed=seed)
    return by_reasoning(params(), model(), tokenizer(), QUESTIONS * 3, config)


def test_boxed_letters_count():
    """Right and formatted are counted from the responses by another reading of them."""
    answered, outcomes = reasoned(), set()
    for n, question in enumerate(QUESTIONS * 3):
        boxes = [re.search(r"</think>\\boxed\{(.)\}$", response) for response in answered.shown[n]["responses"]]
        letters = [found[1] if found else None for found in boxes]
        known = [letter if letter and letter in "ABCD"[: len(question.options)] else None for letter in letters]
        assert answered.shown[n]["choices"] == known
        assert answered.right_N[n] == np.mean([letter == "ABCD"[question.answer] for letter in known])
        assert answered.formatted_N[n] == np.mean([letter is not None for letter in known])
        outcomes |= {(letter is None, letter == "ABCD"[question.answer]) for letter in known}
    assert outcomes == {(True, False), (False, True), (False, False)}


def test_answers_depend_on_seed_and_question_alone():
    """The same question has the same thoughts, whatever it is asked beside; another seed gives others."""
    shown = [each["responses"] for each in reasoned().shown]
    assert shown[:3] * 3 == shown
    alone = by_reasoning(params(), model(), tokenizer(), QUESTIONS[1:2], SMALL)
    assert alone.shown[0]["responses"] == shown[1]
    assert [each["responses"] for each in reasoned(seed=1).shown] != shown


def test_on_a_mesh():
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = meshes.place(params(), meshes.param_shardings(mesh, decoder.logical_axes(model()), params()))
    given = model(), tokenizer(), QUESTIONS, SMALL
    one, many = by_logprob(params(), *given), by_logprob(placed, *given, mesh)
    for left, right in zip(one.shown, many.shown, strict=True):
        assert left["scores"] == pytest.approx(right["scores"], abs=1e-4)
    assert by_reasoning(placed, *given, mesh).shown == [reasoned().shown[n] for n in range(3)]


def test_figures_by_hand():
    """Category x: 1, 0.5; y: 0. Micro 0.5, macro (0.75 + 0) / 2."""
    answered = Answered(np.array([1, 0.5, 0]), np.array([1, 0.5, 1]), np.array([True, False, False]), [])
    figures = answered.figures(QUESTIONS)
    assert figures["by_category"]["x"] == {
        "accuracy": 0.75,
        "standard_error": pytest.approx(0.25 / 2**0.5),
        "questions": 2,
    }
    assert figures["by_category"]["y"] == {"accuracy": 0.0, "standard_error": 0.0, "questions": 1}
    assert (figures["accuracy"], figures["questions"], figures["cut"]) == (0.5, 3, 1)
    assert figures["standard_error"] == pytest.approx((1 / 6) ** 0.5 / 3**0.5)
    assert figures["macro"] == 0.375 and figures["format_rate"] == pytest.approx(2.5 / 3)
    assert figures["macro_standard_error"] == pytest.approx(0.25 / 2**0.5 / 2)
    assert multiple_choice.describe(QUESTIONS) == {
        "questions": 3,
        "categories": 2,
        "chance": pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3),
    }


def write(folder, questions=QUESTIONS):
    rows = [
        {"question": q.text, "options": q.options, "answer": "ABCD"[q.answer], "category": q.category}
        for q in questions
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "questions.jsonl")


WORDS = [
    "--prompt.template",
    "bare",
    "--prompt.max-tokens",
    "96",
    "--sample.max-tokens",
    "8",
    "--sample.tokens-per-call",
    "8",
]


def test_the_command(tmp_path, capsys, policy):
    """Both modes, results and answers in files; the figures are those of the functions."""
    files = write(tmp_path)
    words = ["--files", files, *WORDS, "--batch-size", "8", "--results", tmp_path / "r.json"]
    status = cli.main(["choices", str(policy), *map(str, words), "--answers", str(tmp_path / "a.jsonl"), "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0 and figures == json.loads((tmp_path / "r.json").read_text())
    questions, _ = read_questions((files,), "mmlu_pro")
    config = replace(SMALL, sample=replace(SMALL.sample, group_size=1, temperature=0.8))
    given = params(), model(), tokenizer(), questions, config
    scored, thought = by_logprob(*given), by_reasoning(*given)
    assert figures["logprob"] == scored.figures(questions) and figures["reasoning"] == thought.figures(questions)
    assert (figures["questions"], figures["categories"], figures["skipped_records"]) == (3, 2, 0)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(row["where"], row["answer"]) for row in rows] == [(q.where, "ABCD"[q.answer]) for q in questions]
    assert [row["reasoning"] for row in rows] == thought.shown


def test_one_mode_and_few_questions(tmp_path, policy):
    files = write(tmp_path)
    config = replace(SMALL, policy=str(policy), files=(files,), mode="logprob", per_category=1)
    figures = multiple_choice.run(config)
    assert "reasoning" not in figures and figures["questions"] == 2
    chosen = choose(read_questions((files,), "mmlu_pro")[0], 1, config.seed)
    scored = by_logprob(params(), model(), tokenizer(), chosen, config)
    assert figures["logprob"]["accuracy"] == scored.right_N.mean()


def test_what_the_tokenizer_cannot_represent_is_named_or_counted(tmp_path, policy):
    files = write(tmp_path, [*QUESTIONS, Question("ä?", ("x", "yy"), 0, "x", "")])
    config = replace(SMALL, policy=str(policy), files=(files,), mode="logprob")
    with pytest.raises(InputError, match=r"questions.jsonl:4: .* cannot represent 'ä'.*--on-bad-record skip"):
        multiple_choice.run(config)
    figures = multiple_choice.run(replace(config, on_bad_record="skip"))
    assert (figures["questions"], figures["skipped_records"]) == (3, 1)


def test_settings_come_from_a_run(tmp_path, policy):
    """Chat markers, ends and mesh; its template is for next tokens and its limit for their thoughts."""
    run = toy.config(
        tmp_path / "run", prompt=PromptConfig("bare", chat="chatml"), sample=SampleConfig(end_tokens=("}",))
    )
    with run_folder.open_run(run, toy.tokenizer(), None, {}):
        pass
    found = multiple_choice.settings_of(str(tmp_path / "run"))
    assert (found.prompt, found.sample.end_tokens) == (PromptConfig("question", chat="chatml"), ("}",))
    assert (found.sample.max_tokens, found.sample.temperature, found.sample.group_size) == (12288, 0.8, 1)
    assert multiple_choice.settings_of(str(policy)) == ChoicesRun(str(policy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": ""}, "no policy named"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 7}, "batch of 7 questions"),
        ({"sample": SampleConfig(group_size=2, temperature=0.0)}, "makes all sample.group_size=2 rollouts"),
        ({"files": ()}, "files is empty"),
        ({"prompt": PromptConfig(template="none")}, "prompt.template='none'"),
        ({"prompt": PromptConfig(template="bare", max_tokens=1), "mode": "logprob"}, "leaves no room for context"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, policy, changes, message):
    config = replace(SMALL, policy=str(policy), files=(write(tmp_path),), mode="reasoning")
    with pytest.raises(InputError, match=message):
        multiple_choice.run(replace(config, **changes))


def test_the_projects_own_words():
    """Question and options stand inside the chat markers, before an opened thought."""
    template = multiple_choice.template_of(PromptConfig(template="question", chat="chatml"))
    assert template.before.startswith("<|im_start|>user\nAnswer the following multiple-choice question.")
    assert (
        template.before.endswith("Question: ") and template.after == "\n\n<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


@pytest.mark.realdata
def test_real_questions_by_a_random_policy(tmp_path, real_data):
    """MMLU's STEM part under Mistral's tokenizer: all records are read, and a random policy is at chance."""
    files = (str(real_data / "mmlu-stem" / "test.jsonl"),)
    every, skipped = read_questions(files, "mmlu")
    assert len(every) == 3018 and not skipped and {len(each.options) for each in every} == {4}
    mistral = load_tokenizer(real_data / "tokenizers" / "mistral" / "tokenizer.model")
    shape = replace(toy.model(), vocab_size=mistral.vocab_size)
    save_policy(tmp_path / "random", shape, decoder.init(shape, jax.random.key(0)), mistral, {})
    config = ChoicesRun(str(tmp_path / "random"), files, "mmlu", mode="logprob", per_category=8)
    figures = multiple_choice.run(config)
    assert figures["chance"] == 0.25 and figures["logprob"]["cut"] == 0
    assert figures["questions"] == 8 * figures["categories"] == 8 * len({each.category for each in every})
    assert abs(figures["logprob"]["accuracy"] - 0.25) < 5 * 0.25**0.5 / figures["questions"] ** 0.5
