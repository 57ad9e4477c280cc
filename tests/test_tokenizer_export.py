"""Claims: a written tokenizer.json gives our ids and our text, by the library that transformers reads it with; files
that came from there go back as they are; what travels with a tokenizer is kept."""

import dataclasses
import json
import random

import pytest
import tokenizers
import toy
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer_files import byte_level_description, write

from rpt_jax.corpus.tokenizer import load_tokenizer, train_sentencepiece
from rpt_jax.corpus.tokenizer_export import GENERATION, end_ids, export_tokenizer
from rpt_jax.records import InputError

WORDS = ["the cat sat on the mat", "a  dog (it barked) 12345 times", "  ärger, naïve €5!", "\n\tthen thee theme"]
SYMBOLS = ("<think>", "</think>", "\\boxed{", "▁1", " 2", "the")  # SentencePiece never finds the one with a space
PARTS = [
    *" ".join(WORDS).split(" "),
    *SYMBOLS[:3],
    " 1",
    " 2",
    " ",
    "é",
    "日本",
    *"aenst" * 4,
    *"thecasonmdgi 12€ä\n<>/k{}\\boxed",
]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """(ours, what the `tokenizers` library makes of the export, its folder)."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    draw = random.Random(0)  # words of few letters, so that many merges compete for the same ones
    words = ["".join(draw.choices("aenst", k=draw.randint(2, 7))) for _ in range(400)]
    ours = train_sentencepiece([*WORDS * 20, " ".join(words)], 500, folder / "ours", SYMBOLS)
    export_tokenizer(ours, folder / "theirs")
    return ours, tokenizers.Tokenizer.from_file(str(folder / "theirs" / "tokenizer.json")), folder / "theirs"


def same(ours, theirs, text) -> bool:
    ids = theirs.encode(text, add_special_tokens=False).ids
    return ids == ours.encode(text) and theirs.decode(ids) == text


@given(st.lists(st.sampled_from(PARTS), max_size=40).map("".join))
def test_sentencepiece_gives_the_same_ids_and_the_text_back(sentencepiece, text):
    assert same(*sentencepiece[:2], text), text


def test_merges_make_pieces_of_several_characters(sentencepiece):
    """The property above would hold of single characters, too, if ours had no others."""
    ours = sentencepiece[0]
    assert len(ours.encode("then theme barked times")) < 16
    assert ours.encode("\\boxed{ 1") == [ours.id_of("\\boxed{"), ours.id_of("▁1")]


def test_a_vocabulary_of_characters(tmp_path):
    export_tokenizer(toy.tokenizer(), tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*toy.TEXTS, "<predict><think></think>\\boxed{ 3}", "  "):
        assert same(toy.tokenizer(), theirs, text), text


def test_the_end_of_text_is_special_and_named(sentencepiece):
    ours, theirs, folder = sentencepiece
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert theirs.token_to_id(config["eos_token"]) == ours.end_of_text == end_ids(ours)
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": ours.end_of_text}
    assert theirs.decode([*ours.encode("cat"), ours.end_of_text]) == "cat"


def test_what_was_written_loads_here(sentencepiece):
    ours, _, folder = sentencepiece
    assert load_tokenizer(folder).fingerprint == ours.fingerprint
    assert load_tokenizer(folder).encode("the cat") == ours.encode("the cat")


def test_published_files_go_back_as_they_are_with_what_travels_along(tmp_path):
    """Also by way of a folder of ours; several ends of a text are kept, which chat models have."""
    content = {
        "tokenizer.json": byte_level_description(),
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|endoftext|>"},
        "generation_config.json": {"eos_token_id": [256, 3], "temperature": 0.6},
        "special_tokens_map.json": {"eos_token": "<|endoftext|>"},
        "chat_template.jinja": "{{ messages }}",
    }
    for name, value in content.items():
        write(tmp_path / "theirs", name, value)
    load_tokenizer(tmp_path / "theirs").save(tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "run")
    export_tokenizer(tokenizer, tmp_path / "back")
    assert end_ids(tokenizer) == [256, 3]
    assert {file.name for file in (tmp_path / "back").iterdir()} == set(content)
    for name, value in content.items():
        text = (tmp_path / "back" / name).read_text()
        assert (text if isinstance(value, str) else json.loads(text)) == value


def test_sentencepiece_of_another_kind_is_named(tmp_path):
    tokenizer = train_sentencepiece(WORDS * 20, 300, tmp_path / "a", model_type="unigram", hard_vocab_limit=False)
    with pytest.raises(InputError, match="neither BPE nor characters"):
        export_tokenizer(tokenizer, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\xff", b'{"eos_token_id": "7"}', b'{"eos_token_id": [7, null]}', b'{"eos_token_id": -1}']
)
def test_a_damaged_generation_config_is_named(sentencepiece, content):
    tokenizer = dataclasses.replace(sentencepiece[0], files=sentencepiece[0].files | {GENERATION: content})
    with pytest.raises(InputError, match="generation_config.json beside the tokenizer"):
        end_ids(tokenizer)
