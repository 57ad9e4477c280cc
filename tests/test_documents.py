"""Documents are what the template makes of the records, those held out depend on seed and text, faults are named."""

import dataclasses
import json
import os
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import toy
from array_record.python.array_record_module import ArrayRecordWriter

from rpt_jax.config import CorpusConfig
from rpt_jax.corpus.documents import open_corpus, parse_template, read_documents
from rpt_jax.corpus.tokenizer import load_tokenizer, train_sentencepiece
from rpt_jax.records import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return toy.bytewise(tmp_path_factory.mktemp("tokenizer"))


def write(path, *lines):
    """JSONL of dicts, and of raw lines where bytes are given."""
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return CorpusConfig(files=(str(path),))


def corpus_of(path, count):
    return write(path, *({"text": f"document {i}"} for i in range(count)))


def texts(corpus, indexes):
    return {corpus.documents[i].text for i in indexes}


def test_documents_follow_the_template(tmp_path):
    config = write(
        tmp_path / "a.jsonl", {"problem": "1+1?", "solution": "2 \\frac"}, {"problem": "日本", "solution": ""}
    )
    config = dataclasses.replace(config, template="Q: {problem}\n\n{solution} {{end}}")
    documents = read_documents(config)
    assert [documents[i].text for i in range(2)] == ["Q: 1+1?\n\n2 \\frac {end}", "Q: 日本\n\n {end}"]
    assert [documents[i].name for i in range(2)] == [f"{tmp_path}/a.jsonl:{i}" for i in (1, 2)]
    assert len(documents) == 2 and documents.skipped == ()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"{a}\n\n{b}", "A\n\nB"),
        ("{a}\n{b}", "A\nB"),
        (r"{a}\t{b}{a}", "A\tBA"),
        (r"{a}\\n{b}", r"A\nB"),
        (r"\frac{a}\{b}", r"\fracA\B"),
        ("{a}{b}\\", "AB\\"),
        ("{{{a}}}", "{A}"),
    ],
)
def test_templates_typed_on_a_command_line(typed, meant):
    r"""Shells pass \n as two characters; values are never unescaped."""
    assert parse_template(typed).fill({"a": "A", "b": "B"}) == meant
    assert parse_template("{a}").fill({"a": r"\n{b}"}) == r"\n{b}"


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{a", "write a brace of the text itself twice"),
        ("a}", "write a brace of the text itself twice"),
        ("{}", "only plain {field} can be used"),
        ("{a:3}", "only plain {field} can be used"),
        ("{a!r}", "only plain {field} can be used"),
        ("text", "names no field"),
    ],
)
def test_templates_that_cannot_be_used(template, found):
    with pytest.raises(InputError, match=f"corpus.template=.*{found}"):
        parse_template(template)


def test_all_kinds_in_one_corpus(tmp_path):
    """Files come in the order given; every name says where to look."""
    corpus_of(tmp_path / "a.jsonl", 2)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row 1", "row 2"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("page")
    writer = ArrayRecordWriter(str(tmp_path / "d.arrayrecord"), "group_size:1")
    writer.write(b'{"text": "record"}')
    writer.close()
    config = CorpusConfig(files=(f"{tmp_path}/*.*",))
    documents = read_documents(config)
    wanted = ["document 0", "document 1", "row 1", "row 2", "page", "record"]
    assert [documents[i].text for i in range(6)] == wanted
    assert documents[3].name == f"{tmp_path}/b.parquet:2"
    assert [pickle.loads(pickle.dumps(documents))[i].text for i in range(6)] == wanted


BAD_LINES = {
    "malformed": (b'{"text": "a"\n', r"malformed JSON: Expecting ',' delimiter \(character 14 of the line\)"),
    "list": (b"[1, 2]\n", "expected a JSON object with fields, found list"),
    "field": ({"body": "a", "n": 1}, "no field 'text', which corpus.template names; there are 'body', 'n'"),
    "number": ({"text": 3.5}, "field 'text' is float, not text"),
    "null": ({"text": None}, "field 'text' is NoneType, not text"),
    "empty": ({"text": " \n"}, "empty document: nothing but white space in text"),
    "latin1": (b'{"text": "caf\xe9"}\n', "wrong UTF-8 at byte 14 of the record"),
    "surrogate": (b'{"text": "ab\\ud83d"}\n', "wrong UTF-8: character 3 of the document is half of a surrogate pair"),
    "nested": (b"[" * 100_000 + b"\n", "JSON that cannot be read"),
    "digits": (b"9" * 5000 + b"\n", "JSON that cannot be read"),
}


@pytest.mark.parametrize("fault", BAD_LINES)
def test_bad_records_stop_or_are_skipped(tmp_path, fault, tokenizer):
    line, found = BAD_LINES[fault]
    config = write(tmp_path / "a.jsonl", {"text": "first"}, b"\n", line, {"text": "last"})
    with pytest.raises(InputError, match=rf"a\.jsonl:3: {found}.*; mend it, or .* --corpus.on-bad-record skip"):
        read_documents(config)
    config = dataclasses.replace(config, on_bad_record="skip")
    documents = read_documents(config)
    assert [documents[i].text for i in range(len(documents))] == ["first", "last"]
    assert documents[1].name.endswith("a.jsonl:4")
    assert len(documents.skipped) == 1 and "a.jsonl:3: " in documents.skipped[0]
    assert open_corpus(config, tokenizer, 0).skipped == documents.skipped


def test_bad_text_file_and_row(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"a\.txt:1: wrong UTF-8 at byte 4 of the record"):
        read_documents(CorpusConfig(files=(str(tmp_path / "a.txt"),)))
    (tmp_path / "a.txt").write_text("page")
    with pytest.raises(InputError, match=r"a\.txt:1: no field 'body', .*; there are 'text'"):
        read_documents(CorpusConfig(files=(str(tmp_path / "a.txt"),), template="{body}"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet:2: field 'text' is NoneType"):
        read_documents(CorpusConfig(files=(str(tmp_path / "b.parquet"),)))


def test_files_without_documents(tmp_path):
    with pytest.raises(InputError, match=r"a\.jsonl: no record in it; take the file out of corpus.files"):
        read_documents(write(tmp_path / "a.jsonl", b"\n\n"))
    config = dataclasses.replace(write(tmp_path / "a.jsonl", {"body": "a"}, {"body": "b"}), on_bad_record="skip")
    with pytest.raises(InputError, match=r"no document left: all 2 records were skipped, the first is .*a\.jsonl:1"):
        read_documents(config)


def test_short_documents_stop_or_are_skipped(tmp_path, tokenizer, caplog):
    config = write(tmp_path / "a.jsonl", {"text": "four"}, {"text": "日"}, {"text": "three"})
    config = dataclasses.replace(config, minimum_tokens=4)
    with pytest.raises(InputError, match=r"a\.jsonl:2: 3 tokens are fewer than corpus\.minimum_tokens=4; mend it"):
        open_corpus(config, tokenizer, 0)
    config = dataclasses.replace(config, on_bad_record="skip")
    corpus = open_corpus(config, tokenizer, 0)
    assert corpus.train.tolist() == [0, 2] and len(corpus.skipped) == 1
    assert "skipped 1 of 3 records; the first: " in caplog.text
    assert texts(corpus, corpus.train) == {"four", "three"}
    with pytest.raises(InputError, match="no document left: the tokenizer can use none of 3, the first is .*a.jsonl:1"):
        open_corpus(dataclasses.replace(config, minimum_tokens=9), tokenizer, 0)


def test_text_that_the_tokenizer_lacks(tmp_path):
    """Found at the start, even in a long document, not in the middle of a run."""
    small = train_sentencepiece(["abc abd abc"] * 20, 12, tmp_path, byte_fallback=False)
    config = write(tmp_path / "a.jsonl", {"text": "abc" * 99}, {"text": "abc " * 99 + "é"})
    with pytest.raises(InputError, match=r"a\.jsonl:2: the tokenizer cannot represent 'é'.*on-bad-record skip"):
        open_corpus(config, small, 0)
    config = dataclasses.replace(config, on_bad_record="skip")
    assert open_corpus(config, small, 0).train.tolist() == [0]


def test_file_that_changes_while_it_is_read(tmp_path):
    config = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    documents = read_documents(config)
    write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "c"})
    assert documents[0].text == "a"
    with pytest.raises(InputError, match=r"a\.jsonl:2: the file changed while it was in use"):
        documents[1]


def test_lines_stay_on_disk(tmp_path):
    """A document is found by its byte offset: what is pickled to a reader process holds no text."""
    config = write(tmp_path / "a.jsonl", *({"text": "日" * 5000} for _ in range(50)))
    documents = read_documents(config)
    assert documents.place_of.dtype == np.int64  # files of more than 2 GB
    assert len(pickle.dumps(documents)) < 10_000 < os.path.getsize(tmp_path / "a.jsonl") / 50


def test_holdout_is_apart_and_depends_on_seed_and_text_only(tmp_path, tokenizer):
    config = dataclasses.replace(corpus_of(tmp_path / "a.jsonl", 40), holdout=8)
    corpus = open_corpus(config, tokenizer, seed=5)
    assert len(corpus.holdout) == 8 and len(corpus.train) == 32 and not set(corpus.train) & set(corpus.holdout)
    assert corpus.holdout.tolist() != list(range(32, 40))
    held = texts(corpus, corpus.holdout)
    assert texts(corpus, corpus.train) == {f"document {i}" for i in range(40)} - held and len(held) == 8
    lines = [{"text": f"document {i}"} for i in reversed(range(40))]
    write(tmp_path / "x.jsonl", *lines[:7]), write(tmp_path / "y.jsonl", *lines[7:])
    turned = dataclasses.replace(config, files=(f"{tmp_path}/x.jsonl", f"{tmp_path}/y.jsonl"))
    again, other = open_corpus(turned, tokenizer, seed=5), open_corpus(config, tokenizer, seed=6)
    assert texts(again, again.holdout) == held != texts(other, other.holdout)


def test_twins_of_held_out_documents_are_not_trained_on(tmp_path, tokenizer):
    config = write(tmp_path / "a.jsonl", *({"text": f"document {i % 10}"} for i in range(30)))
    corpus = open_corpus(dataclasses.replace(config, holdout=4), tokenizer, seed=0)
    held = texts(corpus, corpus.holdout)
    assert len(corpus.holdout) == len(held) == 4 and len(corpus.train) == 18
    assert not held & texts(corpus, corpus.train)


def test_holdout_that_leaves_nothing(tmp_path, tokenizer):
    config = corpus_of(tmp_path / "a.jsonl", 5)
    for holdout in (5, -1):
        with pytest.raises(InputError, match=f"corpus.holdout={holdout} of 5 distinct documents: use 0 to 4"):
            open_corpus(dataclasses.replace(config, holdout=holdout), tokenizer, seed=0)


@pytest.mark.realdata
def test_omni_math(real_data):
    """All 2,821 problems read, 200 held out as in the paper."""
    config = CorpusConfig(
        files=(str(real_data / "omni-math" / "*.jsonl"),), template=r"{problem}\n\n{solution}", holdout=200
    )
    mistral = load_tokenizer(real_data / "tokenizers" / "mistral")
    corpus = open_corpus(config, mistral, seed=0)
    assert len(corpus.documents) == 2821 and len(corpus.holdout) == 200 and 2600 < len(corpus.train) <= 2621
