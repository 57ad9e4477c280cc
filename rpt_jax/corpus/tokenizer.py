"""Text to token ids and token ids to exact bytes, for SentencePiece and Hugging Face `tokenizers` files.

In: a .model file, a tokenizer.json, or a folder with either or with vocab.json + merges.txt; a
tokenizer_config.json beside it adds tokens and names the end of text. Out: a `Tokenizer`, whose one law is

    bytes_of(encode(text)) == text.encode("utf-8")        for every text that encode accepts.

Nothing is normalised, no prefix space is added, no start token comes unasked (`start_ids`), and what cannot be
represented is an error. Rewards (arXiv 2506.08007, Eq. 3) compare these bytes, so no text is ever decoded and encoded
again.
"""

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from rpt_jax.corpus.tokenizer_files import (
    SPACE,
    Parts,
    is_byte_level,
    read_description,
    sentencepiece_parts,
    tokenizer_json_parts,
    vocab_and_merges_parts,
)
from rpt_jax.records import InputError, words_of

log = logging.getLogger(__name__)

# Pieces that end a text where the files name none, if they are control pieces.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
MOST_UNUSED = 1 << 16  # ids below the highest that no piece has; each takes memory, whatever the file says


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Token ids with the exact bytes of each; made by `load_tokenizer` or `train_sentencepiece`."""

    token_bytes: tuple[bytes, ...]  # of each id; b"" for control, unknown and reserved ids
    pieces: dict[str, int]  # id of each piece as the tokenizer file spells it ("Ġword", "▁word", "<0x0A>")
    symbols: dict[str, tuple[int, ...]]  # strings that `encode` takes out of the text before anything else
    controls: dict[str, tuple[int, ...]]  # strings that only `encode_markup` takes out
    end_of_text: int | None
    start_of_text: str | None  # piece that the files put before every text; nothing here does unless it is told to
    engine: Any  # sentencepiece.SentencePieceProcessor or tokenizers.Tokenizer, knows no added token
    files: dict[str, bytes]  # name -> content, what `save` writes

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} ids, fingerprint {self.fingerprint})"

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the bytes of all ids: a checkpoint or an artefact made with another tokenizer shows by it."""
        digest = hashlib.blake2b(digest_size=8)
        for content in self.token_bytes:
            digest.update(len(content).to_bytes(4, "little") + content)
        return digest.hexdigest()

    @cached_property
    def represents_all(self) -> bool:
        """Every single byte is a token, so that `encode` fails on no text that has UTF-8."""
        return {bytes([byte]) for byte in range(256)} <= set(self.token_bytes)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of X bytes has at least X / longest_token tokens."""
        return max(map(len, self.token_bytes))

    def encode(self, text: str) -> list[int]:
        """Ids whose bytes are the UTF-8 of `text`; raises InputError naming the first thing it cannot represent."""
        ids = self._ids(text, self.symbols, self._symbol_pattern)
        if self.bytes_of(ids) != text.encode():
            raise InputError(self._complaint(text))
        return ids

    def encode_markup(self, text: str) -> list[int]:
        """As `encode`, but control pieces spelled out in `text` (<|im_start|>) become their own, byteless ids."""
        ids = self._ids(text, self._markup, self._markup_pattern)
        plain = text
        if self._markup_pattern:
            plain = self._markup_pattern.sub(lambda found: "" if found[0] in self.controls else found[0], text)
        if self.bytes_of(ids) != plain.encode():
            raise InputError(self._complaint(plain))
        return ids

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, concatenated; an id outside the vocabulary (of a padded embedding) has none."""
        known = self.token_bytes
        return b"".join([known[i] for i in ids if 0 <= i < len(known)])

    def id_of(self, piece: str) -> int | None:
        """The id of a piece as the tokenizer file spells it, or None."""
        return self.pieces.get(piece)

    def start_ids(self, piece: str, setting: str) -> list[int]:
        """[the id of `piece`], none for ""; raises InputError, naming the setting, for what is no piece."""
        if piece and piece not in self.pieces:
            advice = f"give {self.start_of_text!r}" if self.start_of_text else "give a piece of the tokenizer, or none"
            raise InputError(f"{setting}={piece!r} is no piece of the tokenizer: {advice}")
        return [self.pieces[piece]] if piece else []

    def warn_without_start(self, beginning: str, setting: str) -> None:
        """Warns where the files put a start token before every text and `beginning`, what stands there, has none."""
        if self.start_of_text and not beginning.startswith(self.start_of_text):
            log.warning(
                "the tokenizer's files put %r before every text, this does not: a model trained with it expects it, "
                "--%s %r",
                *(self.start_of_text, setting, self.start_of_text),
            )

    def save(self, folder: str | Path) -> None:
        """Writes the files it was read from, under the names that `load_tokenizer(folder)` looks for."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    @cached_property
    def _markup(self) -> dict[str, tuple[int, ...]]:
        return self.controls | self.symbols

    @cached_property
    def _symbol_pattern(self) -> re.Pattern | None:
        return _any_of(self.symbols)

    @cached_property
    def _markup_pattern(self) -> re.Pattern | None:
        return _any_of(self._markup)

    def _ids(self, text: str, special: dict[str, tuple[int, ...]], pattern: re.Pattern | None) -> list[int]:
        _require_utf8(text)
        if pattern is None:
            return self._engine_ids(text)
        ids = []
        for part in pattern.split(text):
            if part:
                ids.extend(special[part] if part in special else self._engine_ids(part))
        return ids

    def _engine_ids(self, text: str) -> list[int]:
        try:
            if isinstance(self.engine, tokenizers.Tokenizer):
                return self.engine.encode(text, add_special_tokens=False).ids
            return self.engine.encode(text)
        except Exception as error:  # the Rust side raises bare Exception
            raise InputError(
                f"the tokenizer fails on the text {text[:40]!r} ({words_of(error)}): use another one"
            ) from error

    def _complaint(self, text: str) -> str:
        """Says of a text whose bytes do not come back the first character that fails by itself, else how it begins."""

        def is_exact(piece: str) -> bool:
            return self.bytes_of(self._ids(piece, self.symbols, self._symbol_pattern)) == piece.encode()

        unfit = {character for character in set(text) if not is_exact(character)}
        place = next((i for i, character in enumerate(text) if character in unfit), 0)
        offender = text[place] if unfit else text[:40]
        codes = " ".join(f"U+{ord(character):04X}" for character in offender)
        return (
            f"the tokenizer cannot represent {offender!r} ({codes}), character {place + 1} of the text, near "
            f"{text[max(place - 20, 0) : place + 20]!r}: use a tokenizer with byte fallback or byte-level BPE, or "
            "leave this text out"
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a .model (SentencePiece) file, a tokenizer.json, or a folder with one of them or vocab.json + merges.txt.

    In a folder a byte-level tokenizer.json comes first, then tokenizer.model, another tokenizer.json, vocab.json.
    Raises InputError for a missing or foreign file and for kinds of tokenizers whose bytes are not exact.
    """
    place = Path(os.path.expanduser(path))
    if not str(path) or not place.exists():
        raise InputError(f"no tokenizer at {str(path)!r}: give a .model file, a tokenizer.json, or a folder with one")
    if place.name in ("vocab.json", "merges.txt"):
        return _assemble(vocab_and_merges_parts(place.parent))
    if place.is_file() and place.suffix == ".model":
        return _assemble(sentencepiece_parts(place))
    if place.is_file() and place.suffix == ".json":
        return _assemble(tokenizer_json_parts(place))
    description, model = place / "tokenizer.json", place / "tokenizer.model"
    if description.is_file() and (not model.is_file() or is_byte_level(read_description(description))):
        return _assemble(tokenizer_json_parts(description))
    if model.is_file():
        return _assemble(sentencepiece_parts(model))
    if (place / "vocab.json").is_file() or (place / "merges.txt").is_file():
        return _assemble(vocab_and_merges_parts(place))
    raise InputError(
        f"{place}: no tokenizer that can be read; expected a .model file, a tokenizer.json, or a folder with "
        "tokenizer.json, tokenizer.model, or both vocab.json and merges.txt"
    )


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    folder: str | Path,
    symbols: Iterable[str] = (),
    *,
    model_type: str = "bpe",
    byte_fallback: bool = True,
    **options,
) -> Tokenizer:
    """Trains SentencePiece on `texts`, writes folder/tokenizer.model and returns it loaded.

    `symbols` become single pieces that keep their text as bytes; `options` go to SentencePieceTrainer (for example
    control_symbols, split_digits). One thread, so the same texts give the same file. Raises InputError if the texts
    cannot fill `vocab_size` or the vocabulary cannot hold their characters.
    """
    settings = {
        "vocab_size": vocab_size,
        "model_type": model_type,
        "byte_fallback": byte_fallback,
        "user_defined_symbols": list(symbols),
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "max_sentence_length": 1 << 30,
        "num_threads": 1,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    # The trainer drops a whole text that holds one of its reserved characters, so texts are cut at them.
    parts = (part for text in texts for part in re.split("[\0▁▅]", text) if part)
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=parts, model_writer=model, **settings | options)
    except (RuntimeError, OSError) as error:
        raise InputError(f"SentencePiece cannot train {vocab_size} pieces on these texts: {words_of(error)}") from error
    file = Path(folder) / "tokenizer.model"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model.getvalue())
    return load_tokenizer(file)


def _assemble(parts: Parts) -> Tokenizer:
    """Puts the added tokens over the vocabulary."""
    pieces, contents, controls, symbols = dict(parts.pieces), dict(parts.contents), {}, {}
    for i, (text, special) in {i: (text, special) for i, text, special in parts.added}.items():  # the last one wins
        if pieces.setdefault(i, text) != text:
            raise InputError(
                f"{parts.file}: id {i} is {pieces[i]!r} in the vocabulary and {text!r} among the added tokens; use "
                "the tokenizer_config.json that belongs to this vocabulary"
            )
        if special:
            contents[i], controls[text] = b"", (i,)
        elif not (parts.spaced and SPACE in text):
            contents[i], symbols[text] = text.encode(), (i,)
    if not pieces or max(pieces) - len(pieces) > MOST_UNUSED:
        raise InputError(
            f"{parts.file}: {len(pieces)} pieces with ids up to {max(pieces, default=0)}: a vocabulary has a piece or "
            f"more, and at most {MOST_UNUSED} ids without one; copy its files again"
        )
    ids = {piece: i for i, piece in pieces.items()}
    if parts.spaced:  # a literal U+2581 must not come out as a space: its three bytes, or nothing, which encode reports
        fallback = [ids.get(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        symbols[SPACE] = () if None in fallback else tuple(fallback)
    end = parts.end_of_text or next((name for name in END_OF_TEXT if name in controls), None)
    if end is not None and not (isinstance(end, str) and end in ids):
        raise InputError(
            f"{parts.file}: the eos_token {end!r} of tokenizer_config.json is not in the vocabulary; use the "
            "tokenizer_config.json that belongs to it"
        )
    start = parts.start_of_text
    return Tokenizer(
        token_bytes=tuple(contents.get(i, b"") for i in range(max(pieces) + 1)),
        pieces=ids,
        symbols={text: i for text, i in symbols.items() if text},
        controls={text: i for text, i in controls.items() if text},
        end_of_text=None if end is None else ids[end],
        start_of_text=start if isinstance(start, str) and start in ids else None,
        engine=parts.engine,
        files=parts.files,
    )


def _any_of(strings: Iterable[str]) -> re.Pattern | None:
    """Matches any of the strings, the longest first, as one group so that `split` keeps them."""
    choices = "|".join(re.escape(string) for string in sorted(strings, key=len, reverse=True))
    return re.compile(f"({choices})") if choices else None


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start + 1} of the text is the lone surrogate U+{ord(text[error.start]):04X}, which "
            "has no UTF-8: take it out of the text"
        ) from error
