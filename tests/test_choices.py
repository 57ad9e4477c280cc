"""Claims: each format is read as its makers write it, from JSONL, gzip and Parquet alike; a wrong record is named by
file, line and field; which questions are chosen depends on seed and question alone; a box is read strictly."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from rpt_jax.corpus import choices
from rpt_jax.corpus.choices import Question, choose, parse_choice, read_questions
from rpt_jax.records import InputError

PRO = {"question": "1+1?", "options": ["1", "2", "3"], "answer": "B", "answer_index": 1, "category": "math"}
SUPER = {
    "question": "2+2?",
    "options": ["4 ", "5"],
    "answer": "4",
    "answer_letter": "A",
    "discipline": "Science",
    "field": "Mathematics",
}
PLAIN = {"question": "Is it?", "choices": ["yes", "no"], "answer": 1, "subject": "logic"}
TYPED = {"question": "Is it?", "choices": ["yes", "no"], "answer": 1, "type": "x"}


def write(folder, *records, name="a.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (str(path),)


@pytest.mark.parametrize(
    ("format", "record", "expected"),
    [
        ("mmlu_pro", PRO, ("1+1?", ("1", "2", "3"), 1, "math")),
        ("supergpqa", SUPER, ("2+2?", ("4 ", "5"), 0, "Science")),
        ("mmlu", PLAIN, ("Is it?", ("yes", "no"), 1, "logic")),
        ("mmlu", {**PLAIN, "type": "x", "subject": "y"}, ("Is it?", ("yes", "no"), 1, "y")),
        (
            "mmlu",
            {"type": "x", **{k: v for k, v in PLAIN.items() if k != "subject"}},
            ("Is it?", ("yes", "no"), 1, "x"),
        ),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet"])
def test_formats(tmp_path, format, record, expected, kind):
    """The answer by letter, index or text; a field that no format names is let alone."""
    record, path = {"id": 7, **record}, str(tmp_path / f"a.{kind}")
    if kind == "jsonl":
        write(tmp_path, record)
    elif kind == "gz":
        path = str(tmp_path / "a.jsonl.gz")
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    questions, skipped = read_questions((path,), format)
    assert (questions, skipped) == ([Question(*expected, where=f"{path}:1")], [])


def test_another_field_can_be_the_category(tmp_path):
    [question], _ = read_questions(write(tmp_path, SUPER), "supergpqa", category="field")
    assert question.category == "Mathematics"


def without(record, *names):
    return {key: value for key, value in record.items() if key not in names}


@pytest.mark.parametrize(
    ("format", "record", "message"),
    [
        ("mmlu_pro", without(PRO, "question"), "question: no such field; there are 'options', 'answer'"),
        ("mmlu_pro", PRO | {"question": " "}, "question: expected a text, got ' '"),
        ("mmlu_pro", PRO | {"options": "1 2"}, "options: expected a list of texts, got '1 2'"),
        ("mmlu_pro", PRO | {"options": ["1", 2]}, "options: expected a list of texts"),
        ("mmlu_pro", PRO | {"options": ["1"]}, "options: 1 options, a question has 2 to 26"),
        ("mmlu_pro", PRO | {"options": ["x"] * 27}, "options: 27 options"),
        ("mmlu_pro", PRO | {"answer": "D"}, "answer: 'D' names none of the 3 options by letter"),
        ("mmlu_pro", without(PRO, "answer"), "answer: None names none of the 3 options by letter"),
        ("mmlu_pro", PRO | {"answer_index": 2}, "answer_index: 2 is another option than 'answer' says"),
        ("mmlu_pro", without(PRO, "category"), "category: no such field"),
        ("supergpqa", SUPER | {"answer": "5"}, "answer: '5' is another option than 'answer_letter' says"),
        ("supergpqa", SUPER | {"answer": "6"}, "answer: '6' names none of the 2 options by text"),
        ("mmlu", PLAIN | {"answer": 2}, "answer: 2 names none of the 2 options by index"),
        ("mmlu", PLAIN | {"answer": -1}, "answer: -1 names none"),
        ("mmlu", PLAIN | {"answer": True}, "answer: True names none"),
        ("mmlu", without(PLAIN, "subject"), "subject: no such field"),
        ("mmlu", [1], "a record is an object with fields, this is a list"),
    ],
)
def test_a_wrong_record_is_named(tmp_path, format, record, message):
    good = {"mmlu_pro": PRO, "supergpqa": SUPER, "mmlu": PLAIN}[format]
    files = write(tmp_path, good, record)
    with pytest.raises(InputError) as error:
        read_questions(files, format)
    assert str(error.value).startswith(f"{files[0]}:2: {message}") and "--on-bad-record skip" in str(error.value)
    questions, skipped = read_questions(files, format, on_bad_record="skip")
    assert len(questions) == 1 and len(skipped) == 1 and skipped[0].startswith(f"{files[0]}:2: {message}")


def test_files_that_hold_no_questions(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(InputError, match=r"a.jsonl:1: not a record of JSON"):
        read_questions((str(tmp_path / "a.jsonl"),), "mmlu")
    with pytest.raises(InputError, match=r"no question in .*the first record left out: .*a.jsonl:1"):
        read_questions((str(tmp_path / "a.jsonl"),), "mmlu", on_bad_record="skip")
    with pytest.raises(InputError, match="files is empty"):
        read_questions((), "mmlu")
    with pytest.raises(InputError, match="format='arc': choose from mmlu_pro, supergpqa, mmlu"):
        read_questions(("a",), "arc")
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(InputError, match=r"b.parquet: not a readable .parquet file"):
        read_questions((str(tmp_path / "b.parquet"),), "mmlu")


def test_choice_of_questions():
    """So many of each category in file order; the same ones from shuffled files; others under another seed."""
    every = [Question(f"q{i}", ("a", "b"), 0, "xyz"[i % 3], f"f:{i}") for i in range(60)]
    chosen = choose(every, 5, seed=0)
    assert [each.where for each in chosen] == [each.where for each in every if each in chosen]
    assert {name: sum(each.category == name for each in chosen) for name in "xyz"} == {"x": 5, "y": 5, "z": 5}
    assert set(choose(every[::-1], 5, seed=0)) == set(chosen)
    assert set(choose([each for each in every if each.category != "y"], 5, seed=0)) < set(chosen)
    assert set(choose(every, 3, seed=0)) < set(chosen) and set(choose(every, 5, seed=1)) != set(chosen)
    assert choose(every, 0, seed=0) == choose(every, 100, seed=0) == every


def test_identity_is_of_question_and_options():
    question = Question("q", ("a", "b"), 0, "x", "f:1")
    assert question.identity == Question("q", ("a", "b"), 1, "y", "g:2").identity
    assert question.identity != Question("q", ("ab", ""), 0, "x", "f:1").identity
    assert all(0 <= each < 2**32 for each in question.identity)


@pytest.mark.parametrize(
    ("content", "choice"),
    [
        (b"B", 1),
        (b" (B) ", 1),
        (b"B.", 1),
        (b"B)", 1),
        (b"B:", 1),
        (b"(B).", 1),
        (b"seven", 2),
        (b" two\n", None),  # of two options
        (b"D", 3),
        (b"E", None),
        (b"b", None),
        (b"A or B", None),
        (b"AB", None),
        (b"B. 5", None),
        (b"\\text{B}", None),
        (b"", None),
        (b"\xff", None),
    ],
)
def test_reading_of_a_box(content, choice):
    assert parse_choice(content, ("two", "two ", "seven", "9")) == choice


def test_a_letter_comes_before_an_option_of_that_text():
    assert parse_choice(b"A", ("B", "A")) == 0
    assert parse_choice(b"C", ("B", "C")) == 1  # there is no option C, so it can only be the text
    assert choices.listed(("x", "y")) == "A. x\nB. y"


def test_a_name_of_a_column_that_is_no_text(tmp_path):
    """Bytes of the schema changed, so that a name is no UTF-8 any more."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["q"], "subject": ["s"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"subject", b"sub\xff\xffct"))
    with pytest.raises(InputError, match=r"a\.parquet"):
        read_questions((str(path),), "mmlu")
