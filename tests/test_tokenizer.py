"""The law of tokenizers: the bytes of the ids are the UTF-8 of the text, or encode says what it cannot represent."""

import json
import pickle

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rpt_jax.corpus.tokenizer import load_tokenizer, train_sentencepiece
from rpt_jax.records import InputError

PAGE = (
    "".join(map(chr, range(0xA0)))  # ASCII, C0 and C1 control characters
    + "日本語のテキスト。中文字符,漢字 한국어 \u3000全角 ｆｕｌｌ ①② ﬁ é e\u0301 ñ Ω Ω Å İıſß "
    + "😀👩‍👩‍👧‍👦🏳️‍🌈👍🏽 🇯🇵 \U0010ffff \ufeff \ufffd \u200b\u200d\u2028\u2029\u00a0 ▁▁ ▁a ▅ ⁇ \r\n\r\n   \t\t x  "
    + "<0x0A><0xE2> <s></s><unk> <|endoftext|><|im_start|> \\boxed{ {}} }"
)
TEXTS = [
    "Let s 8, s plus 3 m. So m=1.\n",
    "the cat sat on the mat\n\n\\boxed{ 7}",
    "naïve café — 日本語 😀 <think>x</think>",
]
AWKWARD = st.sampled_from(
    ["▁", " ", "<0x0A>", "<s>", "</s>", "<unk>", "<think>", "<|end|>", "\0", "\n", "日", "😀", "▅"]
)
ANY_TEXT = st.lists(st.text(max_size=8) | AWKWARD, max_size=12).map("".join)


def byte_level(folder, **changes):
    """A tokenizer.json of byte-level BPE with a few merges, some of which join parts of characters."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("Ģ", "x"), ("Ċ", "Ċ"), ("æ", "Ĺ")]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    model = tokenizers.models.BPE(vocab=vocab, merges=merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.add_special_tokens(["<|end|>", "<|end|>of"])
    tokenizer.add_tokens(["<think>"])
    folder.mkdir(parents=True, exist_ok=True)
    description = json.loads(tokenizer.to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A byte-fallback SentencePiece, a byte-level BPE and a byte-fallback BPE in tokenizer.json, all tiny."""
    folder = tmp_path_factory.mktemp("tokenizers")
    trained = train_sentencepiece(
        TEXTS * 20, 330, folder / "sentencepiece", symbols=("<think>",), control_symbols=["<|end|>"]
    )
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {piece: 256 + i for i, piece in enumerate("▁abcthe")} | {"▁t": 263, "he": 264, "▁the": 265}
    model = tokenizers.models.BPE(vocab, [("▁", "t"), ("h", "e"), ("▁t", "he")], byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens(["<|end|>"])
    (folder / "fallback").mkdir()
    tokenizer.save(str(folder / "fallback" / "tokenizer.json"))
    byte_level_one = load_tokenizer(byte_level(folder / "byte_level"))
    return {"sentencepiece": trained, "byte_level": byte_level_one, "fallback": load_tokenizer(folder / "fallback")}


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level", "fallback"])
@settings(max_examples=150)
@given(text=ANY_TEXT)
@example(text=PAGE)
@example(text=" ")
@example(text="")
def test_bytes_of_encode_are_the_text(small, name, text):
    """Any text at all, for each kind that has a token for every byte."""
    assert small[name].bytes_of(small[name].encode(text)) == text.encode()


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level", "fallback"])
@settings(max_examples=50)
@given(texts=st.lists(ANY_TEXT.filter(lambda text: "<|end|>" not in text), min_size=1, max_size=4))
def test_markup_gives_control_pieces_their_ids_and_no_bytes(small, name, texts):
    tokenizer = small[name]
    texts = [text.replace("<", "") for text in texts]  # nothing but our own marker is markup
    ids = tokenizer.encode_markup("<|end|>".join(texts))
    assert ids.count(tokenizer.id_of("<|end|>")) == len(texts) - 1
    assert tokenizer.bytes_of(ids) == "".join(texts).encode()


def test_encode_spells_control_pieces_out(small):
    """Text that looks like markup is text: only encode_markup may put control ids into a prompt."""
    for tokenizer in small.values():
        ids = tokenizer.encode("a<|end|>b")
        assert tokenizer.id_of("<|end|>") not in ids and tokenizer.bytes_of(ids) == b"a<|end|>b"


def test_longer_marker_wins(small):
    tokenizer = small["byte_level"]
    assert tokenizer.encode_markup("<|end|>of") == [tokenizer.id_of("<|end|>of")]
    assert tokenizer.bytes_of(tokenizer.encode_markup("<|end|>on")) == b"on"


def test_characters_split_across_tokens(small):
    """U+1F600 is F0 9F 98 80: one merge takes its first three bytes, the last is a token of its own."""
    tokenizer = small["byte_level"]
    ids = tokenizer.encode("😀")
    assert [tokenizer.token_bytes[i] for i in ids] == [b"\xf0\x9f\x98", b"\x80"]
    assert [small["fallback"].token_bytes[i] for i in small["fallback"].encode("é")] == [b"\xc3", b"\xa9"]


def test_pieces_have_their_bytes(small):
    byte_level_one, trained = small["byte_level"], small["sentencepiece"]
    assert byte_level_one.token_bytes[byte_level_one.id_of("Ġthe")] == b" the"
    assert byte_level_one.token_bytes[byte_level_one.id_of("ĊĊ")] == b"\n\n"
    assert byte_level_one.token_bytes[byte_level_one.id_of("<think>")] == b"<think>"
    assert trained.token_bytes[trained.id_of("▁m")] == b" m"
    assert trained.token_bytes[trained.id_of("<0x0A>")] == b"\n"
    assert [trained.token_bytes[trained.id_of(piece)] for piece in ("<unk>", "<s>", "</s>", "<|end|>")] == [b""] * 4
    assert trained.token_bytes[trained.id_of("<think>")] == b"<think>"
    assert trained.encode("<think>") == [trained.id_of("<think>")]
    assert trained.id_of("no such piece") is None
    fallback = small["fallback"]
    assert fallback.encode(" the") == [fallback.id_of("▁the")]


def test_literal_lower_block_is_no_space(small):
    """U+2581 is SentencePiece's spelling of a space; in the text itself it goes out as its three bytes."""
    for name in ("sentencepiece", "fallback"):
        tokenizer = small[name]
        assert [tokenizer.token_bytes[i] for i in tokenizer.encode("▁")] == [b"\xe2", b"\x96", b"\x81"]
        assert tokenizer.encode("▁") != tokenizer.encode(" ")


def test_no_prefix_space_is_added(small):
    """The files ask for one (add_prefix_space, Prepend); positions would shift by a byte."""
    for tokenizer in small.values():
        assert tokenizer.token_bytes[tokenizer.encode("the")[0]][:1] == b"t"


def test_ids_outside_the_vocabulary_have_no_bytes(small):
    """A padded embedding lets the policy sample them."""
    tokenizer = small["byte_level"]
    assert tokenizer.bytes_of([*tokenizer.encode("a"), tokenizer.vocab_size, -1, *tokenizer.encode("b")]) == b"ab"


def test_lone_surrogate_is_named(small):
    for tokenizer in small.values():
        with pytest.raises(InputError, match=r"character 3 of the text is the lone surrogate U\+D800"):
            tokenizer.encode("ab\ud800")


def test_without_byte_fallback_encode_is_exact_or_names_the_character(tmp_path):
    tokenizer = train_sentencepiece(["abc abd\n\nabc"] * 20, 14, tmp_path, byte_fallback=False)
    assert not tokenizer.represents_all
    assert tokenizer.bytes_of(tokenizer.encode("abd  cab\n")) == b"abd  cab\n"
    with pytest.raises(InputError, match=r"cannot represent 'é' \(U\+00E9\), character 5 of the text, near 'abc éa'"):
        tokenizer.encode("abc éa")
    with pytest.raises(InputError, match=r"cannot represent '▁' \(U\+2581\), character 2"):
        tokenizer.encode("a▁b")
    with pytest.raises(InputError, match=r"cannot represent 'é' .*, character 2"):
        tokenizer.encode_markup("</s>aé")


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level", "fallback"])
def test_save_load_and_pickle_keep_everything(small, name, tmp_path):
    tokenizer = small[name]
    tokenizer.save(tmp_path / "new" / "folder")
    for copy in (load_tokenizer(tmp_path / "new" / "folder"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.token_bytes == tokenizer.token_bytes and copy.fingerprint == tokenizer.fingerprint
        assert copy.pieces == tokenizer.pieces and copy.end_of_text == tokenizer.end_of_text
        assert copy.encode(PAGE) == tokenizer.encode(PAGE) and copy.vocab_size == tokenizer.vocab_size
        assert copy.encode_markup("x<|end|>") == tokenizer.encode_markup("x<|end|>")


def test_fingerprint_follows_the_bytes(small, tmp_path):
    assert len({tokenizer.fingerprint for tokenizer in small.values()}) == 3
    again = train_sentencepiece(TEXTS * 20, 330, tmp_path / "again", symbols=("<think>",), control_symbols=["<|end|>"])
    assert again.fingerprint == small["sentencepiece"].fingerprint
    assert again.files == small["sentencepiece"].files  # training is deterministic to the byte


def test_training_keeps_texts_with_reserved_characters(tmp_path):
    """SentencePiece would drop a whole text for one NUL, and strip newlines at its end."""
    tokenizer = train_sentencepiece(["zebra zebra\0zebra\t▅zebra\n\nzebra"] * 20, 275, tmp_path)
    assert tokenizer.id_of("zebra") is not None


def test_training_is_quiet(tmp_path, capfd):
    train_sentencepiece(TEXTS * 5, 320, tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("texts", "vocab_size", "found"),
    [
        (TEXTS, 5000, "cannot train 5000 pieces on these texts: .*too high"),
        (TEXTS, 100, "cannot train 100 pieces on these texts: .*smaller than required_chars"),
        ([], 300, "cannot train 300 pieces"),
    ],
)
def test_training_that_cannot_work(tmp_path, texts, vocab_size, found):
    with pytest.raises(InputError, match=found):
        train_sentencepiece(texts, vocab_size, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.realdata
def test_qwen2_ids(real_data):
    """Golden ids of the published tokenizer, its split of digits and of runs of white space among them."""
    tokenizer = load_tokenizer(real_data / "tokenizers" / "qwen2")
    assert tokenizer.encode("Hello world!") == [9707, 1879, 0]
    assert tokenizer.vocab_size == 151643 and tokenizer.end_of_text is None
    assert [tokenizer.token_bytes[i] for i in tokenizer.encode("a  b 123\n\n x")] == [
        *[b"a", b" ", b" b", b" ", b"1", b"2", b"3", b"\n\n", b" x"]
    ]
    assert tokenizer.encode("e\u0301") != tokenizer.encode("\u00e9")  # the published NFC would make them equal


@pytest.mark.realdata
def test_qwen3_added_tokens(real_data, tmp_path):
    """tokenizer_config.json beside vocab.json and merges.txt adds tokens: special ones without bytes, <think> with."""
    source = real_data / "tokenizers" / "qwen2"
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(source / name)
    (tmp_path / "tokenizer_config.json").symlink_to(source / "qwen3_tokenizer_config.json")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.id_of("<|im_end|>") == tokenizer.end_of_text == 151645
    assert tokenizer.encode_markup("<|im_start|>user\n") == [151644, 872, 198]
    assert 151644 not in tokenizer.encode("<|im_start|>")
    assert tokenizer.token_bytes[151644] == b"" and tokenizer.token_bytes[tokenizer.id_of("<think>")] == b"<think>"
    assert tokenizer.encode("a<think>")[1:] == [151667]
    for name in ("encode", "encode_markup"):
        assert tokenizer.bytes_of(getattr(tokenizer, name)("</think>\\boxed{ x}")) == b"</think>\\boxed{ x}"


def documents(real_data):
    """Every document of omni-math and gsm8k, and the page."""
    for path in sorted([*real_data.glob("omni-math/*.jsonl"), *real_data.glob("gsm8k/*.jsonl")]):
        with open(path, encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                yield record.get("problem", record.get("question")) + "\n\n" + record.get("solution", record["answer"])
    yield PAGE


@pytest.mark.realdata
@pytest.mark.parametrize("path", ["qwen2", "mistral/tokenizer.model"])
def test_every_real_document_is_exact(real_data, path):
    """Counted here from the table, not by encode's own check."""
    tokenizer = load_tokenizer(real_data / "tokenizers" / path)
    assert tokenizer.represents_all
    count = 0
    for text in documents(real_data):
        assert b"".join(tokenizer.token_bytes[i] for i in tokenizer.encode(text)) == text.encode()
        count += 1
    assert count == 2821 + 7473 + 1319 + 1


@pytest.mark.realdata
def test_sentencepiece_test_is_exact_on_what_it_can_represent(real_data):
    """It has no byte fallback: exact if every character is a piece, otherwise the first one that is not is named.

    It has no newline either, so lines are tried beside whole documents (every seventh, for time).
    """
    tokenizer = load_tokenizer(real_data / "tokenizers" / "sentencepiece-test" / "test_model.model")
    known = {piece.replace("▁", " ") for piece in tokenizer.pieces if len(piece) == 1}
    outcomes = {True: 0, False: 0}
    sample = list(documents(real_data))[::7]
    for text in [*sample, *(line for document in sample for line in document.split("\n"))]:
        foreign = next((character for character in text if character not in known), None)
        try:
            assert tokenizer.bytes_of(tokenizer.encode(text)) == text.encode() and foreign is None
        except InputError as error:
            assert f"cannot represent {foreign!r} " in str(error)
        outcomes[foreign is None] += 1
    assert outcomes[True] > 100 and outcomes[False] > 100
