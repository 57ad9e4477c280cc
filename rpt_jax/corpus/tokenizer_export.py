"""A tokenizer as files that Hugging Face `transformers` opens, with the ids that `Tokenizer.encode` gives.

Files that came from there go back as they are. A SentencePiece model gets a tokenizer.json beside it: the same pieces,
its merges put down one by one, nothing normalised and no prefix space, as everywhere in this project.
"""

import dataclasses
import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.corpus.tokenizer_files import CONFIG, GENERATION, SPACE
from rpt_jax.json_file import parsed_text
from rpt_jax.records import InputError

BPE, CHARACTERS = 2, 4  # of SentencePiece's model types


def export_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes the tokenizer and what travels with it; raises InputError for a SentencePiece model of another kind.

    A literal U+2581 in a text comes out of the written tokenizer.json as a space, which ours keeps.
    """
    files = dict(tokenizer.files)
    config = json.loads(files.get(CONFIG, b"{}"))
    if "tokenizer.model" in files:
        description = tokenizer_json(files["tokenizer.model"])
        files["tokenizer.json"] = json.dumps(description, ensure_ascii=False, indent=1).encode()
        unknown = {"unk_token": description["model"]["unk_token"]} if description["model"]["unk_token"] else {}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | unknown
    elif "tokenizer.json" in files:
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    if tokenizer.end_of_text is not None:
        end = next(piece for piece, i in tokenizer.pieces.items() if i == tokenizer.end_of_text)
        config.setdefault("eos_token", end)
        files.setdefault(GENERATION, json.dumps({"eos_token_id": tokenizer.end_of_text}).encode())
    files[CONFIG] = json.dumps(config, ensure_ascii=False, indent=2).encode()
    dataclasses.replace(tokenizer, files=files).save(folder)


def end_ids(tokenizer: Tokenizer) -> int | list[int] | None:
    """What ends a text: as the published generation_config.json says, where there is one; chat models have several.

    Raises InputError for a generation_config.json that is no JSON object or says something else than ids.
    """
    try:
        content = parsed_text(tokenizer.files.get(GENERATION, b"{}"))
        published = content.get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{GENERATION} beside the tokenizer is no JSON object ({error}): copy it again") from error
    every = published if isinstance(published, list) else [published]
    if published is not None and not all(type(each) is int and each >= 0 for each in every):
        raise InputError(
            f"{GENERATION} beside the tokenizer: eos_token_id={published!r} is no id and no list of ids: copy it again"
        )
    return tokenizer.end_of_text if published is None else published


def tokenizer_json(model: bytes) -> dict:
    """The content of a tokenizer.json for a SentencePiece model of BPE or of single characters."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    if proto.trainer_spec.model_type not in (BPE, CHARACTERS):
        raise InputError(
            "the tokenizer is a SentencePiece model of neither BPE nor characters, for which no tokenizer.json is "
            "written: keep the original's tokenizer files beside the exported weights, or train one with BPE"
        )
    kinds, spaced = type(proto.pieces[0]), proto.normalizer_spec.escape_whitespaces
    added = []
    for i, piece in enumerate(proto.pieces):
        own = piece.type == kinds.USER_DEFINED  # looked for where spaces are U+2581 already, so one with " " is dead
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN) or (own and not (spaced and " " in piece.piece)):
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": own, "special": not own}
            added.append({"id": i, "content": piece.piece} | flags)
    restore = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}] if spaced else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE} if spaced else None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*restore, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((piece.piece for piece in proto.pieces if piece.type == kinds.UNKNOWN), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type == kinds.BYTE for piece in proto.pieces),
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(proto.pieces)},
            "merges": _merges(proto) if proto.trainer_spec.model_type == BPE else [],
        },
    }


def _merges(proto) -> list[list[str]]:
    """Every pair of pieces that makes a third, the piece of the highest score first, as SentencePiece joins them."""
    normal = type(proto.pieces[0]).NORMAL
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == normal}
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [[left, right] for left, right in halves if left in scores and right in scores]
    return merges
