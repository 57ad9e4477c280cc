"""Tokenizer files to their parts: SentencePiece .model, tokenizer.json, and vocab.json + merges.txt.

In: paths. Out: `Parts`, an engine that turns text into ids changing no byte, and the exact bytes of every id. What the
original would do to the text before (Unicode normalisation, a prefix space, squeezed spaces) is switched off; kinds
whose pieces have no exact bytes (WordPiece, word suffixes, no byte level and no byte fallback) raise InputError.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, normalizers, pre_tokenizers

from rpt_jax.json_file import read_object
from rpt_jax.records import InputError, words_of

SPACE = "▁"  # U+2581, how SentencePiece writes a space
# What may stand beside a tokenizer's own file. It travels with it, so that `rpt convert` can give it back; of these
# only tokenizer_config.json is read here.
CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
COMPANIONS = (CONFIG, "special_tokens_map.json", "chat_template.jinja", GENERATION)
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a piece that is one raw byte
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Parts:
    """A tokenizer file taken apart."""

    file: Path  # for messages
    engine: Any  # sentencepiece.SentencePieceProcessor or tokenizers.Tokenizer, knows no added token
    pieces: dict[int, str]  # of each id in the vocabulary, as the file spells it
    contents: dict[int, bytes]  # exact bytes of each id
    spaced: bool  # U+2581 in a piece stands for a space
    added: tuple[tuple[int, str, bool], ...]  # (id, text, special) over the vocabulary, a later one wins
    end_of_text: str | None  # piece
    start_of_text: str | None  # piece that the files say stands before every text
    files: dict[str, bytes]  # name -> content, what a loader needs to come back here


def sentencepiece_parts(file: Path) -> Parts:
    """Reads a SentencePiece model; control and unknown pieces are special, user-defined ones keep their text."""
    raw, config = file.read_bytes(), _config_beside(file)
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(raw)
        pieces = {i: piece.piece for i, piece in enumerate(proto.pieces)}
    except (DecodeError, UnicodeDecodeError):
        pieces = {}
    if not pieces or not all(isinstance(piece, str) for piece in pieces.values()):  # bytes: no UTF-8
        raise InputError(f"{file}: not a SentencePiece model; give the .model file that its training wrote")
    kinds, spaced = type(proto.pieces[0]), proto.normalizer_spec.escape_whitespaces
    contents = {}
    for i, piece in enumerate(proto.pieces):
        text = piece.piece.replace(SPACE, " ") if spaced else piece.piece
        is_byte = piece.type == kinds.BYTE
        if is_byte and not BYTE.fullmatch(piece.piece):
            raise InputError(f"{file}: piece {i}, {piece.piece!r}, is marked as a byte and names none: copy it again")
        contents[i] = bytes([int(piece.piece[3:5], 16)]) if is_byte else text.encode()
    special = [i for i, piece in enumerate(proto.pieces) if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    added = tuple((i, pieces[i], True) for i in special) + _added_tokens(file, config)
    _switch_off_normalisation(proto)
    try:
        engine = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{file}: SentencePiece cannot use it ({words_of(error)}): train or copy it again") from error
    end = _end_of_text(config) or (pieces[engine.eos_id()] if engine.eos_id() >= 0 else None)
    start, files = _start_of_text(config), {"tokenizer.model": raw} | _companions(file)
    return Parts(file, engine, pieces, contents, spaced, added, end, start, files)


def _switch_off_normalisation(proto) -> None:
    spec = proto.normalizer_spec
    spec.name = "identity"
    spec.precompiled_charsmap = b""
    spec.add_dummy_prefix = False
    spec.remove_extra_whitespaces = False


def tokenizer_json_parts(file: Path) -> Parts:
    """Reads a tokenizer.json of byte-level BPE, or of BPE in SentencePiece's manner with byte fallback."""
    description, config = read_description(file), _config_beside(file)
    model = description.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise InputError(f"{file}: not a tokenizer.json; it has no model with a vocabulary")
    byte_level = is_byte_level(description)
    _require_exact_kind(file, description, byte_level)
    split = description.get("pre_tokenizer")
    if any(step["type"] == "Metaspace" for step in _steps(split)):
        split = None  # the normalizer below does its work, without the prefix space
    model = model | {"dropout": None}
    bare = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": _without_prefix_space(split)}
    try:
        engine = tokenizers.Tokenizer.from_str(json.dumps(bare))
    except Exception as error:  # the Rust side raises bare Exception
        raise InputError(f"{file}: `tokenizers` cannot read it: {words_of(error)}") from error
    if not byte_level:
        engine.normalizer = normalizers.Replace(" ", SPACE)
    pieces = _by_id(file, model["vocab"])
    contents = {i: (_byte_level_bytes if byte_level else _spaced_bytes)(piece) for i, piece in pieces.items()}
    added = _added_tokens(file, config, description.get("added_tokens") or ())
    files = {"tokenizer.json": file.read_bytes()} | _companions(file)
    start = _start_of_text(config, description.get("post_processor"))
    return Parts(file, engine, pieces, contents, not byte_level, added, _end_of_text(config), start, files)


def _require_exact_kind(file: Path, description: dict, byte_level: bool) -> None:
    """Raises InputError where pieces have no exact bytes, or a step changes the text and cannot be switched off."""
    model = description["model"]
    kind = model.get("type", "BPE" if "merges" in model else "of unknown type")
    reasons = []
    if kind != "BPE":
        reasons.append(f"its model is {kind}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        reasons.append("its pieces carry a word prefix or suffix")
    if not byte_level and not model.get("byte_fallback"):
        reasons.append("it is not byte-level and has no byte fallback")
    known = ("Split", "Digits", "Punctuation", "ByteLevel") if byte_level else ("Split", "Metaspace")
    for step in _steps(description.get("pre_tokenizer")):
        if step["type"] not in known or step.get("behavior") == "Removed":
            reasons.append(f"its pre-tokenizer {step['type']} changes the text")
    for step in _steps(description.get("normalizer")):
        if step["type"] not in ("NFC", "NFD", "NFKC", "NFKD", "Replace", "Prepend"):
            reasons.append(f"its normalizer {step['type']} changes the text")
    if reasons:
        raise InputError(
            f"{file}: {words_of(reasons[0])}, so its tokens have no exact bytes; use byte-level BPE, BPE with byte "
            "fallback, or a SentencePiece .model file"
        )


def vocab_and_merges_parts(folder: Path) -> Parts:
    """Reads vocab.json + merges.txt, byte-level BPE split as Qwen2 does, or GPT-2 by tokenizer_config.json."""
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    for file in (vocab_file, merges_file):
        if not file.is_file():
            raise InputError(f"{file} is missing: vocab.json and merges.txt belong together in one folder")
    vocab, config = read_object(vocab_file, remedy="copy it again"), _config_beside(vocab_file)
    maker = str(config.get("tokenizer_class", "Qwen2Tokenizer"))
    if "GPT2" in maker:
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif "Qwen2" in maker:
        words = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
        split = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        raise InputError(
            f"{folder}: how {words_of(maker)} splits text is not known here; give its tokenizer.json instead"
        )
    try:
        engine = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab_file), str(merges_file)))
    except Exception as error:  # the Rust side raises bare Exception
        raise InputError(f"{folder}: vocab.json and merges.txt make no BPE tokenizer: {words_of(error)}") from error
    engine.pre_tokenizer = split
    pieces = _by_id(vocab_file, vocab)
    contents = {i: _byte_level_bytes(piece) for i, piece in pieces.items()}
    end = "<|endoftext|>"  # GPT-2 has it in the vocabulary and lists it nowhere
    added = (((vocab[end], end, True),) if end in vocab else ()) + _added_tokens(vocab_file, config)
    files = {file.name: file.read_bytes() for file in (vocab_file, merges_file)} | _companions(vocab_file)
    ends = _end_of_text(config), _start_of_text(config)
    return Parts(vocab_file, engine, pieces, contents, False, added, *ends, files)


def read_description(file: Path) -> dict:
    """The object in a tokenizer.json; raises InputError where `_steps` could not take its parts apart."""
    description = read_object(file, remedy="copy it again")
    for name in ("normalizer", "pre_tokenizer"):
        part = description.get(name) or {"type": "none"}
        steps = _steps(part) if isinstance(part, dict) else [part]
        known = isinstance(steps, list) and all(isinstance(step, dict) for step in steps)
        if not known or not all(isinstance(step.get("type"), str) for step in steps):
            raise InputError(f"{file}: its {name} is no step, or sequence of steps, of a type: copy the file again")
    return description


def is_byte_level(description: dict) -> bool:
    """Whether a tokenizer.json spells bytes in the byte alphabet."""
    return any(step["type"] == "ByteLevel" for step in _steps(description.get("pre_tokenizer")))


def _config_beside(file: Path) -> dict:
    beside = file.with_name(CONFIG)
    return read_object(beside, remedy="copy it again") if beside.is_file() else {}


def _companions(file: Path) -> dict[str, bytes]:
    return {name: file.with_name(name).read_bytes() for name in COMPANIONS if file.with_name(name).is_file()}


def _by_id(file: Path, vocab) -> dict[int, str]:
    """The pieces of a vocabulary by id; raises InputError where it is none."""
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise InputError(f"{file}: its vocabulary does not give each piece a whole number from 0: copy the file again")
    return {i: piece for piece, i in vocab.items()}


def _end_of_text(config: dict) -> str | None:
    return _content(config.get("eos_token"))


def _start_of_text(config: dict, processor=None) -> str | None:
    """What a text begins with: bos_token where add_bos_token asks for it, else what the post-processor puts first."""
    asked = config.get("add_bos_token")
    if isinstance(asked, bool):
        return _content(config.get("bos_token")) if asked else None
    every = processor.get("processors") if isinstance(processor, dict) else None
    for step in every if isinstance(every, list) else [processor]:
        parts = step.get("single") if isinstance(step, dict) else None
        first = parts[0] if isinstance(parts, list) and parts else None
        special = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(special, dict):
            return special.get("id")
    return None


def _content(token) -> str | None:
    """A token of tokenizer_config.json, which stands there as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(file: Path, config: dict, described=()) -> tuple[tuple[int, str, bool], ...]:
    """(id, text, special) of a tokenizer.json's added tokens, then of a tokenizer_config.json's."""
    try:
        listed = [(int(token["id"]), token) for token in described]
        listed += [(int(i), token) for i, token in config.get("added_tokens_decoder", {}).items()]
        if any(i < 0 for i, _ in listed):
            raise ValueError("an id below 0")
        return tuple((i, str(token["content"]), bool(token.get("special"))) for i, token in listed)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{file} or tokenizer_config.json beside it: an added token needs a whole-number id and a `content` "
            f"({error!r}): copy it again"
        ) from error


def _steps(part: dict | None) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer, out of their Sequence."""
    if part and part.get("type") == "Sequence":
        return part.get("pretokenizers") or part.get("normalizers") or []
    return [part] if part else []


def _without_prefix_space(part: dict | None) -> dict | None:
    if part and part["type"] == "Sequence":
        return part | {"pretokenizers": [_without_prefix_space(step) for step in _steps(part)]}
    return part | {"add_prefix_space": False} if part and part["type"] == "ByteLevel" else part


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE: itself if it prints, else from U+0100 in turn."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    """Bytes of a byte-level piece; none for a piece outside the alphabet, which no text gives."""
    try:
        return bytes([BYTE_ALPHABET[character] for character in piece])
    except KeyError:
        return b""


def _spaced_bytes(piece: str) -> bytes:
    """Bytes of a piece in SentencePiece's manner: <0xNN> is one byte, U+2581 a space."""
    if BYTE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()
