"""Claims: a record becomes the question and answer that a reader of the file would name; which questions are held out
or trained on depends on seed and texts alone, and none is both; what cannot be used is named with its line."""

import dataclasses
import json
import re

import numpy as np
import pytest
import toy

from rpt_jax.config import Config, PositionConfig, PromptConfig, QuestionConfig
from rpt_jax.corpus import questions
from rpt_jax.corpus.prompts import assemble
from rpt_jax.corpus.questions import Question, make_questions, open_questions
from rpt_jax.corpus.templates import load_template
from rpt_jax.corpus.tokenizer import load_tokenizer
from rpt_jax.records import InputError

PROMPT = PromptConfig(template="question", max_tokens=300, truth_bytes=16)
GSM8K = {"question": "question", "answer_after": "####"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return toy.bytewise(tmp_path_factory.mktemp("tokenizer"))


def write(path, *records) -> tuple[str, ...]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (str(path),)


def sums(path, count, start=0):
    return write(path, *({"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(start, start + count)))


def texts_of(tokenizer, opened, positions):
    rows = zip(positions.documents, positions.indices, strict=True)
    return [tokenizer.bytes_of(opened.documents[document][:index].tolist()).decode() for document, index in rows]


def test_formats_by_hand(tmp_path, tokenizer):
    worked = "He has 3*4=<<3*4=12>>12 and #### signs.\n#### 1,012"
    gsm8k = write(tmp_path / "gsm8k.jsonl", {"question": " How many? ", "answer": worked})
    (found,) = questions.read_questions(QuestionConfig(gsm8k, **GSM8K), gsm8k, [])
    assert found == Question(f"{gsm8k[0]}:1", "How many?", "1,012")
    other = write(tmp_path / "math.jsonl", {"problem": "x?", "answer": "\\frac{1}{2}"}, {"problem": "y?", "answer": -7})
    assert [q.answer for q in questions.read_questions(QuestionConfig(other), other, [])] == ["\\frac{1}{2}", "-7"]


def test_a_question_is_a_document_whose_position_is_the_answer(tokenizer):
    """The prompt holds the question whole and nothing of the answer; the truth behind it is the answer."""
    made = make_questions(tokenizer, [Question("a:1", "1+1 =", "2")], [Question("a:2", "Name?", "\\text{Ann}")])
    assert made.answers == ("2", "\\text{Ann}") and made.names == ("a:1", "a:2")
    assert (len(made.train), len(made.held_out), made.held_out[0].document) == (1, 1, 1)
    positions = [made.train[0], made.held_out[0]]
    prompts = assemble(tokenizer, load_template("question"), PROMPT, made.documents, positions)
    rows = zip(prompts.tokens_NT, prompts.lengths_N, strict=True)
    shown = [tokenizer.bytes_of(tokens_T[:length].tolist()) for tokens_T, length in rows]
    assert b"### Problem\n1+1 =\n\n" in shown[0] and b"2" not in shown[0] and b"Ann" not in shown[1]
    assert [truth_X.tobytes().rstrip(b"\0") for truth_X in prompts.truth_NX] == [b"2", b"\\text{Ann}"]


def test_the_split_depends_on_seed_and_texts_alone(tmp_path, tokenizer):
    files, config = sums(tmp_path / "a.jsonl", 40), QuestionConfig(train=12, holdout=9)

    def split(config, seed=0):
        opened = open_questions(config, PROMPT, tokenizer, seed)
        return tuple(sorted(texts_of(tokenizer, opened, part)) for part in (opened.train, opened.held_out))

    first = split(dataclasses.replace(config, files=files))
    assert (len(first[0]), len(first[1])) == (12, 9) and not set(first[0]) & set(first[1])
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(lines[::-1] + lines[:5]))  # another order, and some twice
    assert split(dataclasses.replace(config, files=(str(tmp_path / "b.jsonl"),))) == first
    assert split(dataclasses.replace(config, files=files), seed=1) != first
    more = split(dataclasses.replace(config, files=files, train=0))
    assert more[1] == first[1] and len(more[0]) == 31 and set(first[0]) < set(more[0])


def test_questions_of_the_exam_are_never_trained_on(tmp_path, tokenizer):
    files, exam = sums(tmp_path / "a.jsonl", 10), sums(tmp_path / "exam.jsonl", 4, start=8)
    opened = open_questions(QuestionConfig(files=files, evaluate_files=exam), PROMPT, tokenizer, 0)
    assert len(opened.train) == 8 and len(opened.held_out) == 4
    assert not set(texts_of(tokenizer, opened, opened.train)) & set(texts_of(tokenizer, opened, opened.held_out))
    alone = open_questions(QuestionConfig(evaluate_files=exam), PROMPT, tokenizer, 0)
    assert len(alone.train) == 0 and len(alone.held_out) == 4


BAD = [
    ({"problem": "x?"}, "a.jsonl:2: no field 'answer', which questions names"),
    ({"problem": "x?", "answer": None}, "a.jsonl:2: field 'answer' is NoneType, not text"),
    ({"problem": "x?", "answer": True}, "a.jsonl:2: field 'answer' is bool"),
    ({"problem": " ", "answer": "1"}, "a.jsonl:2: nothing but white space in field 'problem'"),
    ({"problem": "x?", "answer": "1" * 17}, "a.jsonl:2: its answer has 17 bytes, prompt.truth_bytes=16"),
    ({"problem": "x?", "answer": "1\0"}, "a.jsonl:2: character 2 of its answer is U+0000"),
    ({"problem": "x" * 300, "answer": "1"}, "a.jsonl:2: it has 300 tokens, and prompt.max_tokens leaves room for "),
    ({"problem": "\ud800", "answer": "1"}, "a.jsonl:2: wrong UTF-8"),
    (["x?", "1"], "a.jsonl:2: expected a JSON object"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_question_is_named_or_skipped(tmp_path, tokenizer, record, message):
    files = write(tmp_path / "a.jsonl", {"problem": "y?", "answer": "1"}, record, {"problem": "z?", "answer": "2"})
    with pytest.raises(InputError, match=re.escape(message) + ".*on-bad-record skip"):
        open_questions(QuestionConfig(files), PROMPT, tokenizer, 0)
    opened = open_questions(QuestionConfig(files, on_bad_record="skip"), PROMPT, tokenizer, 0)
    assert opened.answers == ("1", "2") and len(opened.skipped) == 1 and message in opened.skipped[0]


def test_files_without_a_good_question(tmp_path, tokenizer):
    """What is counted and shown is of these files alone."""
    exam = write(tmp_path / "exam.jsonl", {"problem": "y?", "answer": None}, {"problem": "y?", "answer": "1"})
    bad = write(tmp_path / "bad.jsonl", {"problem": "x?", "answer": None})
    empty = write(tmp_path / "empty.jsonl")
    config = QuestionConfig(bad, evaluate_files=exam, on_bad_record="skip")
    with pytest.raises(InputError, match="questions.files: .*bad.jsonl, 1 were skipped, the first is .*bad.jsonl:1: "):
        open_questions(config, PROMPT, tokenizer, 0)
    with pytest.raises(InputError, match="questions.files: .*empty.jsonl, 0 were skipped; name files with records"):
        open_questions(dataclasses.replace(config, files=empty), PROMPT, tokenizer, 0)


def test_settings_that_clash_are_named(tmp_path, tokenizer):
    files = sums(tmp_path / "a.jsonl", 5)
    with pytest.raises(InputError, match="questions.train=3 and questions.holdout=3 of 5 questions"):
        open_questions(QuestionConfig(files, train=3, holdout=3), PROMPT, tokenizer, 0)
    with pytest.raises(InputError, match="questions.holdout=5 of 5"):
        open_questions(QuestionConfig(files, holdout=5), PROMPT, tokenizer, 0)
    with pytest.raises(InputError, match="questions.holdout=1 and questions.evaluate_files"):
        open_questions(QuestionConfig(files, holdout=1, evaluate_files=files), PROMPT, tokenizer, 0)
    with pytest.raises(InputError, match="questions.files: no file matches"):
        open_questions(QuestionConfig(("nowhere/*.jsonl",)), PROMPT, tokenizer, 0)
    with pytest.raises(InputError, match="a.jsonl:1: no '####' .questions.answer_after. in field 'answer'"):
        open_questions(QuestionConfig(files, answer_after="####"), PROMPT, tokenizer, 0)
    with pytest.raises(InputError, match="questions.files and annotated text .'here'."):
        Config(questions=QuestionConfig(files), positions=PositionConfig(annotated="here")).check()


def test_a_run_learns_from_what_its_config_names(tmp_path):
    files = write(tmp_path / "a.jsonl", {"problem": "a", "answer": "1"}, {"problem": "b", "answer": "{4}"})
    config = toy.config(tmp_path / "run", questions=QuestionConfig(files))
    found, positions = questions.to_learn_from(config, toy.tokenizer())
    assert found.answers == ("1", "{4}") and positions is found.train
    same = toy.config(tmp_path / "run", questions=QuestionConfig(files, evaluate_files=files))
    with pytest.raises(InputError, match="all of questions.files are among the 2 questions of"):
        questions.to_learn_from(same, toy.tokenizer())
    folder = toy.annotate(tmp_path / "annotated")
    text = PositionConfig(annotated=str(folder), threshold=1.0)
    found, positions = questions.to_learn_from(toy.config(tmp_path / "run", positions=text), toy.tokenizer())
    assert len(found) == len(positions) == len(toy.TEXTS)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "options", "count", "some"),
    [
        ("gsm8k/train.jsonl", GSM8K, 7473, {"72", "10", "42"}),
        ("gsm8k/test.jsonl", GSM8K, 1319, {"18", "3", "70000"}),
        (
            "omni-math/omni_math_rule.jsonl",
            {},
            2816,
            {"115440", "\\frac{38}{7}"},
        ),  # of 2,821 five are there twice
        ("math500/test.jsonl", {}, 500, {"\\left( 3, \\frac{\\pi}{2} \\right)", "\\text{Evelyn}"}),
    ],
)
def test_real_questions_are_read_whole(real_data, name, options, count, some):
    qwen = load_tokenizer(real_data / "tokenizers" / "qwen2")
    config = QuestionConfig((str(real_data / name),), **options)
    opened = open_questions(config, PromptConfig(template="question"), qwen, 0)
    assert len(opened.train) == count and some <= set(opened.answers) and not opened.skipped
    if options:
        assert all(re.fullmatch(r"-?[0-9,]+(\.[0-9]+)?", answer) for answer in opened.answers)
        assert not any(b"<<" in qwen.bytes_of(tokens_T.tolist()) for tokens_T in opened.documents[:500])
    number = np.random.default_rng(0).integers(count)
    tokens_T, start = opened.documents[number], opened.train[number].index
    assert qwen.bytes_of(tokens_T[start:].tolist()).decode() == opened.answers[number]
