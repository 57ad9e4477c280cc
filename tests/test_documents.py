"""Documents are what the template makes of the records, the stream is the same however it is cut, faults are named."""

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
from rpt_jax.corpus.documents import open_corpus, parse_template, read_documents, token_documents
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


def texts(tokenizer, stream, count=None):
    items = iter(stream)
    items = [next(items) for _ in range(count)] if count else list(items)
    return [tokenizer.bytes_of(tokens).decode() for _, tokens in items]


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


def test_all_kinds_in_one_corpus(tmp_path, tokenizer):
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
    assert sorted(texts(tokenizer, token_documents(config, tokenizer, epochs=1))) == sorted(wanted)


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
        token_documents(config, tokenizer)
    config = dataclasses.replace(config, on_bad_record="skip")
    corpus = open_corpus(config, tokenizer, 0)
    assert corpus.train.tolist() == [0, 2] and len(corpus.skipped) == 1
    assert "skipped 1 of 3 records; the first: " in caplog.text
    stream = token_documents(config, tokenizer, shuffle=False, epochs=1, corpus=corpus)
    assert [(i, tokenizer.bytes_of(tokens)) for i, tokens in stream] == [(0, b"four"), (2, b"three")]
    with pytest.raises(InputError, match="no document left: the tokenizer can use none of 3, the first is .*a.jsonl:1"):
        token_documents(dataclasses.replace(config, minimum_tokens=9), tokenizer)


def test_text_that_the_tokenizer_lacks(tmp_path):
    """Found at the start, even in a long document, not in the middle of a run."""
    small = train_sentencepiece(["abc abd abc"] * 20, 12, tmp_path, byte_fallback=False)
    config = write(tmp_path / "a.jsonl", {"text": "abc" * 99}, {"text": "abc " * 99 + "é"})
    with pytest.raises(InputError, match=r"a\.jsonl:2: the tokenizer cannot represent 'é'.*on-bad-record skip"):
        token_documents(config, small)
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


def test_every_epoch_has_every_document_in_a_new_order(tmp_path, tokenizer):
    config = corpus_of(tmp_path / "a.jsonl", 20)
    found = texts(tokenizer, token_documents(config, tokenizer, seed=1), 60)
    everything = {f"document {i}" for i in range(20)}
    epochs = [tuple(found[i : i + 20]) for i in (0, 20, 40)]
    assert all(set(epoch) == everything for epoch in epochs) and len(set(epochs)) == 3
    assert texts(tokenizer, token_documents(config, tokenizer, seed=1, epochs=2)) == found[:40]
    assert texts(tokenizer, token_documents(config, tokenizer, seed=2, epochs=1)) != found[:20]
    plain = texts(tokenizer, token_documents(config, tokenizer, shuffle=False, epochs=1))
    assert plain == [f"document {i}" for i in range(20)]


@pytest.mark.parametrize("cut", [0, 1, 7, 33])
def test_resumed_iterator_goes_on_as_the_uninterrupted(tmp_path, tokenizer, cut):
    """Through JSON, as a checkpoint keeps it, into an iterator of a newly opened corpus."""
    config = corpus_of(tmp_path / "a.jsonl", 10)
    whole = texts(tokenizer, token_documents(config, tokenizer, seed=3), 50)
    before = iter(token_documents(config, tokenizer, seed=3))
    for _ in range(cut):
        next(before)
    state = json.loads(json.dumps(before.get_state()))
    after = iter(token_documents(config, tokenizer, seed=3))
    after.set_state(state)
    assert [tokenizer.bytes_of(next(after)[1]).decode() for _ in range(50 - cut)] == whole[cut:]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_one_stream(tmp_path, tokenizer, count):
    """Their shards partition every epoch, and dealt together again they are the stream of a single process."""
    config = corpus_of(tmp_path / "a.jsonl", 11)
    whole = texts(tokenizer, token_documents(config, tokenizer, seed=4, epochs=3))
    shards = [
        texts(tokenizer, token_documents(config, tokenizer, seed=4, epochs=3, process_index=p, process_count=count))
        for p in range(count)
    ]
    assert [shards[i % count][i // count] for i in range(33)] == whole
    first = [text for shard in shards for text in shard[: 11 // count]]
    assert len(set(first)) == len(first)


def test_holdout_is_apart_and_depends_on_seed_and_text_only(tmp_path, tokenizer):
    config = dataclasses.replace(corpus_of(tmp_path / "a.jsonl", 40), holdout=8)
    corpus = open_corpus(config, tokenizer, seed=5)
    assert len(corpus.holdout) == 8 and len(corpus.train) == 32 and not set(corpus.train) & set(corpus.holdout)
    assert corpus.holdout.tolist() != list(range(32, 40))
    parts = {
        part: set(texts(tokenizer, token_documents(config, tokenizer, seed=5, part=part, epochs=1)))
        for part in ("train", "holdout", "all")
    }
    assert not parts["train"] & parts["holdout"] and parts["train"] | parts["holdout"] == parts["all"]
    lines = [{"text": f"document {i}"} for i in reversed(range(40))]
    write(tmp_path / "x.jsonl", *lines[:7]), write(tmp_path / "y.jsonl", *lines[7:])
    turned = dataclasses.replace(config, files=(f"{tmp_path}/x.jsonl", f"{tmp_path}/y.jsonl"))
    again = texts(tokenizer, token_documents(turned, tokenizer, seed=5, part="holdout", epochs=1))
    assert set(again) == parts["holdout"]
    other = texts(tokenizer, token_documents(config, tokenizer, seed=6, part="holdout", epochs=1))
    assert set(other) != parts["holdout"]


def test_twins_of_held_out_documents_are_not_trained_on(tmp_path, tokenizer):
    config = write(tmp_path / "a.jsonl", *({"text": f"document {i % 10}"} for i in range(30)))
    corpus = open_corpus(dataclasses.replace(config, holdout=4), tokenizer, seed=0)
    held = {corpus.documents[i].text for i in corpus.holdout}
    assert len(corpus.holdout) == len(held) == 4 and len(corpus.train) == 18
    assert not held & {corpus.documents[i].text for i in corpus.train}


def test_holdout_that_leaves_nothing(tmp_path, tokenizer):
    config = corpus_of(tmp_path / "a.jsonl", 5)
    for holdout in (5, -1):
        with pytest.raises(InputError, match=f"corpus.holdout={holdout} of 5 distinct documents: use 0 to 4"):
            open_corpus(dataclasses.replace(config, holdout=holdout), tokenizer, seed=0)
    with pytest.raises(InputError, match="no holdout documents: corpus.holdout=0"):
        token_documents(config, tokenizer, part="holdout")


def test_fingerprint_follows_texts_and_order(tmp_path):
    one = read_documents(write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})).fingerprint
    assert read_documents(write(tmp_path / "b.jsonl", {"text": "a", "n": 1}, {"text": "b"})).fingerprint == one
    assert read_documents(write(tmp_path / "c.jsonl", {"text": "b"}, {"text": "a"})).fingerprint != one


@pytest.mark.realdata
def test_omni_math(real_data):
    """All 2,821 problems read, 200 held out as in the paper, tokens exact."""
    config = CorpusConfig(
        files=(str(real_data / "omni-math" / "*.jsonl"),), template=r"{problem}\n\n{solution}", holdout=200
    )
    mistral = load_tokenizer(real_data / "tokenizers" / "mistral")
    corpus = open_corpus(config, mistral, seed=0)
    assert len(corpus.documents) == 2821 and len(corpus.holdout) == 200 and 2600 < len(corpus.train) <= 2621
    stream = iter(token_documents(config, mistral, corpus=corpus))
    for _ in range(20):
        index, tokens = next(stream)
        assert tokens.dtype == np.int32
        assert mistral.bytes_of(tokens) == corpus.documents[index].text.encode()
