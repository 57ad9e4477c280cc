"""What tokenizer files may be, and what is said about those that cannot be used."""

import json
import shutil

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from rpt_jax.corpus.tokenizer import load_tokenizer, train_sentencepiece
from rpt_jax.corpus.tokenizer_files import BYTE_ALPHABET
from rpt_jax.records import InputError


def byte_level_description(**model):
    vocab = {piece: i for i, piece in enumerate(sorted(BYTE_ALPHABET))}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 256, "content": "<|endoftext|>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": []} | model,
    }


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def test_byte_alphabet_is_the_published_one():
    assert set(BYTE_ALPHABET) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_ALPHABET.values()) == list(range(256))
    assert [BYTE_ALPHABET[character] for character in "aĠĊĉ"] == [*b"a \n\t"]


def test_normalising_sentencepiece_becomes_exact(tmp_path):
    """A model trained with NFKC, a dummy prefix and squeezed spaces loads with all of it switched off."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two ｔｈｒｅｅ four"] * 20),
        model_prefix=str(tmp_path / "plain"),
        vocab_size=270,
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "plain.model")
    for text in ("ｔｈｒｅｅ", "  two   one ", "ﬁ①", "one"):
        assert tokenizer.bytes_of(tokenizer.encode(text)) == text.encode()
    assert tokenizer.token_bytes[tokenizer.encode("two")[0]][:1] == b"t"


def test_sentencepiece_without_escaped_spaces(tmp_path):
    """Where the model keeps plain spaces, U+2581 is a character like any other."""
    train_sentencepiece(["one two"] * 20, 270, tmp_path)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    proto.normalizer_spec.escape_whitespaces = False
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bytes_of(tokenizer.encode("one▁two one")) == "one▁two one".encode()


def test_folder_prefers_what_is_exact(tmp_path):
    """A tokenizer.json that is not byte-level gives way to the SentencePiece model it was made from."""
    trained = train_sentencepiece(["one two"] * 20, 270, tmp_path)
    write(tmp_path, "tokenizer.json", {"model": {"type": "Unigram", "vocab": []}})
    assert load_tokenizer(tmp_path).fingerprint == trained.fingerprint
    write(tmp_path, "tokenizer.json", byte_level_description())
    assert load_tokenizer(tmp_path).vocab_size == 257


def test_end_of_text(tmp_path):
    """eos_token of tokenizer_config.json, as text or as a record; otherwise a known control piece; otherwise none."""
    write(tmp_path / "a", "tokenizer.json", byte_level_description())
    assert load_tokenizer(tmp_path / "a").end_of_text == 256
    added = {"257": {"content": "<end>", "special": True}}
    for eos in ("<end>", {"content": "<end>"}):
        write(tmp_path / "a", "tokenizer_config.json", {"eos_token": eos, "added_tokens_decoder": added})
        tokenizer = load_tokenizer(tmp_path / "a")
        assert tokenizer.end_of_text == 257 and tokenizer.token_bytes[257] == b""
        tokenizer.save(tmp_path / "b")
        assert load_tokenizer(tmp_path / "b" / "tokenizer.json").end_of_text == 257
    plain = byte_level_description(vocab=byte_level_description()["model"]["vocab"] | {"</s>": 256})
    write(tmp_path / "c", "tokenizer.json", plain | {"added_tokens": []})  # an ordinary piece ends no text
    assert load_tokenizer(tmp_path / "c").end_of_text is None
    assert load_tokenizer(write_gpt2(tmp_path / "d")).end_of_text == 256


STARTS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
BARE = STARTS | {"single": STARTS["single"][1:]}


@pytest.mark.parametrize(
    "processor, config, found",
    [
        (None, {}, None),
        (STARTS, {}, "<s>"),
        (BARE, {"bos_token": "<s>"}, None),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, STARTS]}, {}, "<s>"),
        (STARTS, {"add_bos_token": False}, None),
        (None, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, "<s>"),
        (None, {"add_bos_token": True}, None),
        (None, {"add_bos_token": True, "bos_token": ["<s>"]}, None),
        (["lies"], {"add_bos_token": "yes"}, None),
        ({"processors": [7, {"single": 7}, {"single": [7]}, {"single": [{"SpecialToken": 7}]}]}, {}, None),
        (STARTS | {"single": [{"SpecialToken": {"id": "<absent>"}}]}, {}, None),
    ],
)
def test_start_of_text(tmp_path, caplog, processor, config, found):
    """What the files put before every text is known, is said where nothing is put there, and comes if it is named."""
    description = byte_level_description() | {"post_processor": processor}
    description["added_tokens"].append({"id": 257, "content": "<s>", "special": True})
    write(tmp_path, "tokenizer.json", description)
    write(tmp_path, "tokenizer_config.json", config)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.start_of_text == found
    assert tokenizer.start_ids("<s>", "start") == [257] and tokenizer.start_ids("", "start") == []
    tokenizer.warn_without_start("<s>and more", "start")
    assert not caplog.records
    tokenizer.warn_without_start("", "start")
    assert [record.args for record in caplog.records] == [(found, "start", found)] * (found is not None)
    assert 257 not in tokenizer.encode("<s>")
    with pytest.raises(InputError, match="start='<t>' is no piece of the tokenizer: give"):
        tokenizer.start_ids("<t>", "start")


def write_gpt2(folder, **config):
    vocab = byte_level_description()["model"]["vocab"] | {"<|endoftext|>": 256}
    write(folder, "merges.txt", "#version: 0.2\n")
    write(folder, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"} | config)
    return write(folder, "vocab.json", vocab)


def test_config_beside_wins_over_tokenizer_json(tmp_path):
    write(tmp_path, "tokenizer.json", byte_level_description())
    shown = {"256": {"content": "<|endoftext|>", "special": False}}
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": shown})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_bytes[256] == b"<|endoftext|>" and tokenizer.encode("<|endoftext|>") == [256]


def test_ids_without_a_piece_have_no_bytes(tmp_path):
    description = byte_level_description()
    description["added_tokens"][0]["id"] = 260
    tokenizer = load_tokenizer(write(tmp_path, "tokenizer.json", description))
    assert tokenizer.vocab_size == 261 and tokenizer.token_bytes[256:] == (b"",) * 5


def changed(**parts):
    return byte_level_description() | parts


@pytest.mark.parametrize(
    ("description", "found"),
    [
        (changed(model={"type": "WordPiece", "vocab": {"a": 0}}), "its model is WordPiece"),
        (changed(model={"type": "Unigram", "vocab": [["a", 0]]}), "its model is Unigram"),
        (changed(pre_tokenizer=None), "it is not byte-level and has no byte fallback"),
        (byte_level_description(end_of_word_suffix="</w>"), "its pieces carry a word prefix or suffix"),
        (changed(normalizer={"type": "Lowercase"}), "its normalizer Lowercase changes the text"),
        (
            changed(
                pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {"type": "Whitespace"}]}
            ),
            "its pre-tokenizer Whitespace changes the text",
        ),
        (
            changed(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Split", "behavior": "Removed"}, {"type": "ByteLevel"}],
                }
            ),
            "its pre-tokenizer Split changes the text",
        ),
    ],
)
def test_kinds_without_exact_bytes(tmp_path, description, found):
    file = write(tmp_path, "tokenizer.json", description)
    with pytest.raises(InputError, match=rf"tokenizer.json: {found}, so .* no exact bytes; use byte-level BPE"):
        load_tokenizer(file)


def test_missing_or_foreign_files(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer at '/no/such/place': give a \.model file"):
        load_tokenizer("/no/such/place")
    with pytest.raises(InputError, match=r"no tokenizer at ''"):
        load_tokenizer("")
    with pytest.raises(InputError, match="no tokenizer that can be read; expected"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="notes.txt: no tokenizer that can be read"):
        load_tokenizer(write(tmp_path, "notes.txt", "hello"))
    for content in ("hello, I am no model", ""):
        with pytest.raises(InputError, match=r"x\.model: not a SentencePiece model"):
            load_tokenizer(write(tmp_path, "x.model", content))
    for content, found in [
        ("{", r"x\.json is no JSON"),
        ("[]", r"x\.json: expected a JSON object, found list"),
        ("{}", r"x\.json: not a tokenizer\.json"),
        (byte_level_description(merges=["a b c d"]), r"x\.json: `tokenizers` cannot read it"),
    ]:
        with pytest.raises(InputError, match=found):
            load_tokenizer(write(tmp_path, "x.json", content))


def test_vocab_and_merges_that_do_not_fit(tmp_path):
    file = write_gpt2(tmp_path / "a")
    assert load_tokenizer(file).encode("a b") == load_tokenizer(tmp_path / "a").encode("a b")
    write_gpt2(tmp_path / "a", tokenizer_class="CLIPTokenizer")
    with pytest.raises(InputError, match="how CLIPTokenizer splits text is not known here; give its tokenizer.json"):
        load_tokenizer(tmp_path / "a")
    write(write_gpt2(tmp_path / "b").parent, "merges.txt", "#version: 0.2\nqq zz\n")
    with pytest.raises(InputError, match="make no BPE tokenizer"):
        load_tokenizer(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c" / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"merges\.txt is missing"):
        load_tokenizer(tmp_path / "c")


def test_added_tokens_that_do_not_fit(tmp_path):
    write(tmp_path, "tokenizer.json", byte_level_description())
    for config, found in [
        (
            {"added_tokens_decoder": {"0": {"content": "<x>"}}},
            "id 0 is '!' in the vocabulary and '<x>' among the added",
        ),
        ({"added_tokens_decoder": {"one": {"content": "<x>"}}}, "needs a whole-number id and a `content`"),
        ({"added_tokens_decoder": {"300": {}}}, "needs a whole-number id and a `content`"),
        ({"eos_token": "<gone>"}, "the eos_token '<gone>' .* is not in the vocabulary"),
    ]:
        write(tmp_path, "tokenizer_config.json", config)
        with pytest.raises(InputError, match=found):
            load_tokenizer(tmp_path)


def with_ids(*added):
    description = byte_level_description()
    description["added_tokens"] = [{"id": i, "content": f"<{n}>", "special": True} for n, i in enumerate(added)]
    return description


@pytest.mark.parametrize(
    ("description", "found"),
    [
        (
            with_ids(2**31),
            "257 pieces with ids up to 2147483648: a vocabulary has a piece or more, and at most 65536 ids",
        ),
        (with_ids(-1), "an added token needs a whole-number id"),
        (with_ids(None), "an added token needs a whole-number id"),
        (with_ids(float("inf")), "an added token needs a whole-number id"),
        (byte_level_description(vocab=["a"]), "cannot read it|does not give each piece a whole number"),
        (byte_level_description(vocab={"a": 1.5}), "cannot read it|does not give each piece a whole number"),
        (changed(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]), "0 pieces with ids up to 0"),
        (changed(pre_tokenizer="ByteLevel"), "its pre_tokenizer is no step"),
        (changed(pre_tokenizer={"add_prefix_space": True}), "its pre_tokenizer is no step"),
        (changed(pre_tokenizer={"type": "Sequence", "pretokenizers": ["ByteLevel"]}), "its pre_tokenizer is no step"),
        (changed(pre_tokenizer={"type": "Sequence", "pretokenizers": 7}), "its pre_tokenizer is no step"),
        (changed(normalizer=[{"type": "NFC"}]), "its normalizer is no step"),
        (changed(added_tokens=[{"id": 256, "content": "\ud83d"}]), "is no JSON .*surrogates"),
        ('{"model": ' + "[" * 100_000, "is no JSON .brackets nest deeper"),
    ],
)
def test_descriptions_that_lie(tmp_path, description, found):
    """Whatever stands in a tokenizer.json, nothing of the size that it claims is made."""
    with pytest.raises(InputError, match=rf"x\.json.*({found})"):
        load_tokenizer(write(tmp_path, "x.json", description))


def test_configs_beside_that_lie(tmp_path):
    file = write_gpt2(tmp_path)
    for change, found in [
        ({"eos_token": ["<|endoftext|>"]}, r"the eos_token \['<\|endoftext\|>'\] .* is not in the vocabulary"),
        ({"eos_token": 7}, "the eos_token 7 .* is not in the vocabulary"),
        ({"tokenizer_class": 7}, "how 7 splits text is not known here"),
        ({"added_tokens_decoder": {"-3": {"content": "<x>"}}}, "an id below 0"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "<x>"}}}, "needs a whole-number id"),
        ({"added_tokens_decoder": None}, "needs a whole-number id"),
    ]:
        write_gpt2(tmp_path, **change)
        with pytest.raises(InputError, match=found):
            load_tokenizer(file)
    write_gpt2(tmp_path)
    write(tmp_path, "vocab.json", {"a": "0"})
    with pytest.raises(InputError, match="make no BPE tokenizer|does not give each piece a whole number"):
        load_tokenizer(file)


def test_sentencepiece_models_that_lie(tmp_path):
    """Bytes that name no byte, pieces that are there twice: what SentencePiece says, or we do, in one line."""
    train_sentencepiece(["one two"] * 20, 270, tmp_path)
    whole = sentencepiece_model_pb2.ModelProto()
    whole.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    byte = next(i for i, piece in enumerate(whole.pieces) if piece.piece == "<0x41>")
    (tmp_path / "tokenizer.model").write_bytes(whole.SerializeToString().replace(b"<0x41>", b"<0x4\xff>"))
    with pytest.raises(InputError, match="not a SentencePiece model"):  # a piece that is no UTF-8
        load_tokenizer(tmp_path)
    for name, found in [("<0xZZ>", "'<0xZZ>', is marked as a byte and names none"), ("<0x42>", "SentencePiece cannot")]:
        proto = sentencepiece_model_pb2.ModelProto()
        proto.CopyFrom(whole)
        proto.pieces[byte].piece = name
        (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
        with pytest.raises(InputError, match=found):
            load_tokenizer(tmp_path)


def test_templates_of_chats_are_carried_along_and_never_run(tmp_path):
    """Neither Jinja nor a class that the config names: nothing is imported or rendered."""
    write_gpt2(tmp_path, auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}, trust_remote_code=True)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    jinja = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(10**12) %}{% endfor %}"
    write(tmp_path, "chat_template.jinja", jinja)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "chat_template.jinja").read_text() == jinja and not (tmp_path / "ran").exists()


def test_homes_that_nobody_has(tmp_path):
    with pytest.raises(InputError, match="no tokenizer at '~nobody-of-that-name/x.model'"):
        load_tokenizer("~nobody-of-that-name/x.model")
