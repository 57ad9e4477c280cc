"""Annotated documents (token ids, entropies, arg-maxes on disk) -> the positions that are worth thinking about.

The artefact is a folder: header.json (tokenizer and settings of the annotation) and ArrayRecord parts, one
record a document. Which positions count is decided when it is loaded, so one annotation serves every threshold,
the random baseline and the nested easy/medium/hard splits [RPT, arXiv 2506.08007, sections 3 and 4].
"""

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from rpt_jax.config import PositionConfig
from rpt_jax.corpus import segments
from rpt_jax.corpus.annotated_record import Annotated, pack, unpack
from rpt_jax.json_file import read_object, write_json
from rpt_jax.records import InputError, words_of

DIFFICULTIES = {"easy": 0.5, "medium": 1.0, "hard": 1.5}  # nats; a position is in a split if its entropy is above
FORMAT = 1
READ_BLOCK = 1024  # documents


@dataclass(frozen=True)
class Position:
    """A place to predict: token `index` of document `document` and what follows, from the tokens before it."""

    document: int
    index: int  # t
    entropy: float  # nats
    length: int = 0  # tokens of the target, a segment predicted whole; 0: it has no end, any tokens of it will do


@dataclass(frozen=True)
class Positions:
    """Many positions, one row each: 12 or 16 bytes a position. Indexing gives a Position, or Positions for an array."""

    documents: np.ndarray  # int32
    indices: np.ndarray  # int32
    entropies: np.ndarray  # float32 nats
    lengths: np.ndarray | None = None  # int32, tokens of the targets; None: all 0

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, key):
        documents, indices, entropies = self.documents[key], self.indices[key], self.entropies[key]
        lengths = None if self.lengths is None else self.lengths[key]
        if np.ndim(documents):
            return Positions(documents, indices, entropies, lengths)
        return Position(int(documents), int(indices), float(entropies), 0 if lengths is None else int(lengths))


@dataclass(frozen=True)
class AnnotatedDocuments:
    """The artefact opened: [i] is the i-th record, `documents[d]` the tokens of the corpus's document d."""

    folder: Path
    header: dict
    records: Sequence[bytes]
    bytes_V: np.ndarray | None = None  # int, bytes of each token, where the tokenizer was given
    pieces_V: Sequence[bytes] | None = None  # the bytes themselves

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self):
        """Documents in stored order, read a block at a time."""
        for start in range(0, len(self), READ_BLOCK):
            block = range(start, min(start + READ_BLOCK, len(self)))
            for record, packed in zip(block, self._read(block), strict=True):
                yield self._unpacked(record, packed)

    def __getitem__(self, record: int) -> Annotated:
        return self._unpacked(record, self._read([record])[0])

    def _read(self, records: Sequence[int]) -> Sequence[bytes]:
        try:
            return self.records.__getitems__(records)
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(
                f"{self.folder}: a part is damaged ({words_of(error)}): delete it and annotate again"
            ) from error

    def _unpacked(self, record: int, packed: bytes) -> Annotated:
        return unpack(packed, f"{self.folder}, record {record}", self.header["vocab_size"])

    @property
    def start(self) -> str:
        """The piece that the proxy saw before every text, "" for none."""
        start = self.header.get("start", "")
        if not isinstance(start, str):
            raise InputError(f"{self.folder}/header.json: start={start!r} is no piece: annotate again")
        return start

    @functools.cached_property
    def documents(self) -> "DocumentTokens":
        return DocumentTokens(self)

    @functools.cached_property
    def record_of(self) -> dict[int, int]:
        """Document number -> record; reads the artefact once. Raises InputError for a document that is there twice."""
        records = {}
        for record, annotated in enumerate(self):
            if annotated.document in records:
                raise InputError(
                    f"{self.folder}: records {records[annotated.document]} and {record} both annotate document "
                    f"{annotated.document}: two annotations were mixed, so delete the folder and annotate again"
                )
            records[annotated.document] = record
        return records


@dataclass(frozen=True)
class DocumentTokens:
    """Tokens by document number, read when asked for."""

    annotated: AnnotatedDocuments

    def __getitem__(self, document: int) -> np.ndarray:
        record = self.annotated.record_of.get(int(document))
        if record is None:
            raise InputError(f"{self.annotated.folder} holds no document {document}: annotate the corpus to its end")
        return self.annotated[record].tokens_T


def make_header(tokenizer, config: PositionConfig, proxy: str) -> dict:
    """What an artefact must agree on with its reader."""
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "proxy": proxy,
        "top_candidates": config.top_candidates,
        "renormalise": config.renormalise,
        "log_base": "nats",
    }


def write_header(folder: Path, header: dict) -> None:
    """Writes header.json; raises InputError where the folder was begun with another header."""
    path = Path(folder) / "header.json"
    if path.exists():
        there = _read_header(path)
        for key in sorted(there.keys() | header.keys()):
            if there.get(key) != header.get(key):
                raise InputError(
                    f"{path} was begun with {key}={there.get(key)!r}, this annotation has {header.get(key)!r}: "
                    "use the same settings to continue it, or another folder"
                )
        return
    write_json(path, header)


def write_annotated(folder: Path, part: int, documents: Sequence[Annotated]) -> Path:
    """Writes one part, whole or not at all: it gets its name when it is complete, so a stop leaves only whole parts."""
    path = Path(folder) / f"part-{part:05d}.arrayrecord"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    writer = ArrayRecordWriter(str(temporary), "group_size:1")  # 1: records are read in any order
    for document in documents:
        writer.write(pack(document))
    writer.close()
    os.replace(temporary, path)
    return path


def written_parts(folder: Path) -> list[int]:
    """Numbers of the whole parts in a folder: what an interrupted annotation need not make again."""
    matches = (re.fullmatch(r"part-(\d{5,})\.arrayrecord", path.name) for path in Path(folder).glob("part-*"))
    return sorted(int(match[1]) for match in matches if match)


def open_annotated(folder: Path, tokenizer=None) -> AnnotatedDocuments:
    """Opens what write_header and write_annotated made.

    With a tokenizer, positions whose target has no bytes (a control token) are left out of every selection: no
    answer in a box could name it. Raises InputError for a folder without artefact, a broken part, or a tokenizer
    whose ids mean other bytes than those of the annotation.
    """
    folder = Path(folder)
    header = _read_header(folder / "header.json")
    if header.get("format") != FORMAT:
        raise InputError(f"{folder}/header.json has format {header.get('format')!r}, this version reads {FORMAT}")
    if tokenizer is not None and tokenizer.fingerprint != header["tokenizer"]:
        raise InputError(
            f"{folder} was annotated with tokenizer {words_of(header['tokenizer'])} ({header['vocab_size']} tokens), "
            f"the one given is {tokenizer.fingerprint} ({tokenizer.vocab_size} tokens): use that one or annotate again"
        )
    parts = [str(folder / f"part-{part:05d}.arrayrecord") for part in written_parts(folder)]
    if not parts:
        raise InputError(f"{folder} has a header and no finished part yet: run `rpt annotate` again to continue")
    for part in parts:
        try:
            ArrayRecordReader(part).close()
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{part} is no readable ArrayRecord ({words_of(error)}): delete it and annotate again"
            ) from error
    pieces_V = None if tokenizer is None else tokenizer.token_bytes
    bytes_V = None if pieces_V is None else np.array([len(piece) for piece in pieces_V])
    return AnnotatedDocuments(folder, header, grain.sources.ArrayRecordDataSource(parts), bytes_V, pieces_V)


def all_positions(annotated: AnnotatedDocuments, minimum_context: int, above: float = -np.inf) -> Positions:
    """Every position with at least `minimum_context` tokens before it and entropy above `above`, in stored order."""
    rows = [(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))]
    for document in annotated:
        eligible_T = document.entropies_T > above  # false for nan, the first token
        eligible_T[: max(minimum_context, 1)] = False
        if annotated.bytes_V is not None:
            eligible_T &= annotated.bytes_V[document.tokens_T] > 0
        index = np.flatnonzero(eligible_T).astype(np.int32)
        rows.append((np.full(len(index), document.document, np.int32), index, document.entropies_T[index]))
    return Positions(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def candidates(annotated: AnnotatedDocuments, config: PositionConfig, above: float = -np.inf) -> Positions:
    """all_positions, or as config.target says the beginnings of segments (segments.targets), entropy above `above`.

    The entropy of a segment is the mean of its tokens'. Raises InputError for segments without the tokenizer's bytes.
    """
    if config.target == "next_token":
        return all_positions(annotated, config.minimum_context, above)
    config.check()
    if annotated.pieces_V is None:
        raise InputError(f"positions.target={config.target}: segments are found by bytes, open with the tokenizer")
    rows = [(np.zeros(0, np.int32), np.zeros((0, 2), np.int32), np.zeros(0, np.float32))]
    for document in annotated:
        bounds = segments.targets([annotated.pieces_V[token] for token in document.tokens_T.tolist()], config)
        entropies = segments.mean_entropies(document.entropies_T, bounds)
        keep = entropies > above
        rows.append((np.full(int(keep.sum()), document.document, np.int32), bounds[keep], entropies[keep]))
    documents, bounds, entropies = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Positions(documents, bounds[:, 0], entropies, bounds[:, 1] - bounds[:, 0])


def select_positions(annotated: AnnotatedDocuments, config: PositionConfig, seed: int) -> Positions:
    """Positions to train on: entropy above a threshold, the top share by entropy, or a random share of `candidates`.

    In stored order whatever the kind; `seed` matters to "random" only. Ties at the edge of the top share go to
    the earlier position. Raises InputError where settings clash with the annotation, where that was broken off, and
    where no position is left.
    """
    _check_settings(annotated, config)
    _check_start(annotated, config)
    _require_finished(annotated)
    if config.select == "threshold":
        chosen = candidates(annotated, config, above=config.threshold)
        if len(chosen):
            return chosen
    pool = candidates(annotated, config)
    if not len(pool):
        size = f"a segment of {config.shortest_target} to {config.longest_target} tokens"
        raise InputError(
            f"{annotated.folder}: none of its {len(annotated)} documents has a position with positions.minimum_context="
            f"{config.minimum_context} tokens before it{'' if config.target == 'next_token' else ' and ' + size}: "
            "lower it, or annotate longer documents"
        )
    if config.select == "threshold":
        largest = pool.entropies.max()
        raise InputError(
            f"{annotated.folder}: no position has entropy above positions.threshold={config.threshold} nats; the "
            f"largest of {len(pool)} is {largest:.4g}: use a threshold below that, or --positions.select top_share"
        )
    count = max(1, round(config.share * len(pool)))
    if config.select == "top_share":
        keep = np.argsort(-pool.entropies, kind="stable")[:count]
    else:
        keep = np.random.default_rng(seed % 2**64).choice(len(pool), count, replace=False)
    return pool[np.sort(keep)]


def difficulty_splits(annotated: AnnotatedDocuments, config: PositionConfig | None = None) -> dict[str, Positions]:
    """Positions with entropy above 0.5, 1.0 and 1.5 nats: easy contains medium contains hard. A split may be empty.

    Segments have a split `all`, too: RLPT takes them whatever their entropy. Raises InputError for an annotation that
    was broken off.
    """
    _require_finished(annotated)
    config = PositionConfig() if config is None else config
    _check_start(annotated, config)
    limits = DIFFICULTIES if config.target == "next_token" else {"all": -np.inf} | DIFFICULTIES
    pool = candidates(annotated, config, above=min(limits.values()))
    return {name: pool[pool.entropies > entropy] for name, entropy in limits.items()}


def position_stream(positions: Positions, *, seed: int) -> grain.IterDataset:
    """Endless stream of Position, a new order each epoch from the seed; iterators have get_state and set_state.

    Raises InputError for no positions.
    """
    if not len(positions):
        raise InputError("no positions to stream: select some with a lower positions.threshold or a larger share")
    return in_order(grain.MapDataset.source(positions).seed(seed % 2**32).shuffle().repeat())


def in_order(positions: grain.MapDataset) -> grain.IterDataset:
    """A stream of what lies in memory, without the threads that would cost more than they hide."""
    return positions.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def _check_settings(annotated: AnnotatedDocuments, config: PositionConfig) -> None:
    """Raises InputError where the entropies were made with other settings than the run's, or the share is none."""
    for name in ("top_candidates", "renormalise"):
        there, here = annotated.header.get(name), getattr(config, name)
        if there != here:
            raise InputError(
                f"{annotated.folder} was annotated with {name}={there!r}, the run says positions.{name}={here}: "
                "entropies of the two differ, so annotate again or set it to what the annotation used"
            )
    if config.select != "threshold" and not 0 < config.share <= 1:
        raise InputError(f"positions.share={config.share} must be above 0 and at most 1 for {config.select}")


def _check_start(annotated: AnnotatedDocuments, config: PositionConfig) -> None:
    if config.start and config.start != annotated.start:
        raise InputError(
            f"{annotated.folder} was annotated with start={annotated.start!r}, the run says positions.start="
            f"{config.start!r}: annotate again, or leave it out to take the annotation's"
        )


def _require_finished(annotated: AnnotatedDocuments) -> None:
    """Raises InputError where the header knows of more documents than the parts hold."""
    wanted = annotated.header.get("documents", 0)
    if type(wanted) is int and len(annotated) < wanted:
        raise InputError(
            f"{annotated.folder} has {len(annotated)} of {wanted} documents: run the same `rpt annotate` again, which "
            "makes the others"
        )


def _read_header(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"no annotated documents in {path.parent} (no header.json): make them with `rpt annotate`")
    header = read_object(path, remedy="delete the folder and annotate again")
    if type(header.get("vocab_size")) is not int or "tokenizer" not in header:
        raise InputError(f"{path} does not name the tokenizer and its vocab_size: delete the folder and annotate again")
    return header
