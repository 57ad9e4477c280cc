"""Documents -> entropy and arg-max of every next-token distribution under a proxy policy, on disk.

In: any policy of this project and a random-access source of (document number, name, tokens). Out: the artefact that
corpus/positions.py reads. This is the paper's position filter [RPT, arXiv 2506.08007, section 3.2: entropy over the
proxy's best 16 tokens], with the choices it leaves open as options.

Long documents. The proxy sees `window` tokens. A longer document goes through in windows that start every half window;
each token is predicted in the first window that can, so it is given all tokens before it, or at least half a window
of them (and a whole one at best). What is before a window does not exist for it: places count from its start, where
config.start puts a token that counts as one of the window.

Resuming. Parts of the artefact appear whole or not at all, and those that are there are skipped. The header holds
what a part depends on, so a folder begun with another proxy, corpus size or setting is refused.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.agreement import found_by_first, in_first_process
from rpt_jax.config import ModelConfig, PositionConfig
from rpt_jax.config_dict import to_dict
from rpt_jax.corpus.documents import Documents
from rpt_jax.corpus.positions import (
    Annotated,
    make_header,
    open_annotated,
    write_annotated,
    write_header,
    written_parts,
)
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.mesh import batch_sharding, laid_out, place, to_host
from rpt_jax.policy import decoder
from rpt_jax.policy.fingerprint import fingerprint
from rpt_jax.policy.stream import padded_length
from rpt_jax.records import Array, InputError, Params

Source = Sequence[tuple[int, str, np.ndarray]]  # document number, name, tokens_T


@dataclass(frozen=True, eq=False)
class TokenSource:
    """Documents of a corpus with their tokens, made when asked for; what annotate reads."""

    documents: Documents
    indexes: np.ndarray  # which documents, for example Corpus.train or Corpus.holdout
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.indexes)

    def __getitem__(self, place: int) -> tuple[int, str, np.ndarray]:
        document = self.documents[self.indexes[place]]
        return int(self.indexes[place]), document.name, np.asarray(self.tokenizer.encode(document.text), np.int32)


@dataclass(frozen=True)
class Window:
    """Tokens start..stop-1 of a document go in; the predictions of tokens first..stop are kept."""

    document: int  # place in the part
    start: int
    stop: int
    first: int


def annotate(
    params: Params,
    model: ModelConfig,
    tokenizer: Tokenizer,
    documents: Source,
    folder: str | Path,
    config: PositionConfig,
    *,
    proxy: str,
    banned_ids: tuple[int, ...] = (),
    part_documents: int = 1024,
    token_chunk: int = 1024,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes entropies and arg-maxes of all documents to `folder`; goes on where an interrupted call stopped.

    H = -sum_i p_i log p_i in nats over the config.top_candidates most probable tokens, their p_i scaled to sum to 1
    with config.renormalise and as they are without. entropies_T[t] belongs to the prediction of token t from the
    tokens before it: nan at 0, where the arg-max is -1.

    Args:
        documents: has len and [i]; a part's documents are in memory at one time.
        proxy: name of the policy, for the header.
        banned_ids: tokens that are no text (such as <think>): impossible, the others' probabilities sum to 1.
        part_documents: documents of a part, what an interruption can cost at the most.
        token_chunk: tokens whose logits exist at one time.
        mesh: rows are split over its data and fsdp axes; every process calls alike and process 0 writes.
        progress: called with (documents done, documents in all).

    Raises InputError where tokenizer, model, settings or what is in the folder do not fit together, and
    FloatingPointError when the proxy gives an entropy that is not finite.
    """
    # Over 40 lines for its arguments and what they mean; the work is done by what it calls.
    _check(model, tokenizer, config, banned_ids)
    start_ids = tokenizer.start_ids(config.start, "positions.start")
    total = len(documents)
    architecture = {name: value for name, value in to_dict(model).items() if name not in ("remat", "context")}
    made_by = {"parameters": fingerprint(params), "model": architecture}
    made_by |= {"window": config.window, "banned_ids": sorted(banned_ids)}
    made_by |= {"start": config.start} if config.start else {}
    size = {"documents": total, "part_documents": part_documents}
    header = make_header(tokenizer, config, proxy) | made_by | size
    in_first_process(lambda: write_header(folder, header))
    parts = np.arange(-(-total // part_documents))

    def written() -> np.ndarray:
        there = written_parts(folder)
        _check_written(folder, there, documents, part_documents)
        return np.isin(parts, there)

    is_written = found_by_first(written, np.zeros(len(parts), bool))  # in the folder of process 0
    report = progress or (lambda done, total: None)
    settings = model, config.top_candidates, config.renormalise, tuple(banned_ids), token_chunk

    def run(*batch):
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return to_host(predict(params, *settings, *(place(batch, batch_sharding(mesh)) if mesh else batch)))

    for part, start in enumerate(range(0, total, part_documents)):
        stop = min(start + part_documents, total)
        if not is_written[part]:
            kept = [_unpredicted(*documents[i], model.vocab_size) for i in range(start, stop)]
            _fill(kept, run, config, start_ids, mesh, lambda done, start=start: report(start + done, total))
            in_first_process(functools.partial(write_annotated, folder, part, kept))
        report(stop, total)


def _unpredicted(document: int, name: str, tokens, vocab_size: int) -> Annotated:
    tokens_T = np.asarray(tokens, np.int32)
    if tokens_T.size and not 0 <= tokens_T.min() <= tokens_T.max() < vocab_size:
        raise InputError(
            f"{name}: token ids from {tokens_T.min()} to {tokens_T.max()}, but model.vocab_size={vocab_size}: use the "
            "tokenizer that the proxy was made for"
        )
    count = len(tokens_T)
    return Annotated(document, name, tokens_T, np.full(count, np.nan, np.float32), np.full(count, -1, np.int32))


def _fill(
    kept: Sequence[Annotated],
    run: Callable,
    config: PositionConfig,
    start_ids: Sequence[int],
    mesh: Mesh | None,
    report: Callable,
):
    """Puts the predictions into a part's documents, windows of like length together."""
    ahead = len(start_ids)
    spans = (windows(len(there.tokens_T), config.window - ahead) for there in kept)
    rows = [Window(document, *span) for document, each in enumerate(spans) for span in each]
    waiting = np.bincount([row.document for row in rows], minlength=len(kept))  # windows of each document to come
    multiple = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    for tokens_BT, lengths_B, batch in _batches(rows, kept, start_ids, config.batch_tokens, multiple):
        entropies_BT, argmaxes_BT = run(tokens_BT, lengths_B)
        for b, row in enumerate(batch):
            there, targets = kept[row.document], slice(row.first, row.stop + 1)
            places = slice(ahead + row.first - row.start - 1, ahead + row.stop - row.start)
            there.entropies_T[targets], there.argmaxes_T[targets] = entropies_BT[b, places], argmaxes_BT[b, places]
            if not np.isfinite(there.entropies_T[targets]).all():
                raise FloatingPointError(
                    f"{there.name}: an entropy among tokens {row.first} to {row.stop} is not finite: the proxy's "
                    "parameters are broken, give another policy"
                )
            waiting[row.document] -= 1
        report(int(np.sum(waiting == 0)))


def windows(tokens: int, window: int) -> list[tuple[int, int, int]]:
    """(start, stop, first) of the windows of a document, see Window; together they predict each of tokens 1.. once."""
    spans, start, first = [], 0, 1
    while first < tokens:
        stop = min(start + window, tokens - 1)  # nothing is predicted from the last token
        spans.append((start, stop, first))
        start, first = start + window // 2, stop + 1
    return spans


def _batches(
    rows: Sequence[Window], kept: Sequence[Annotated], start_ids: Sequence[int], batch_tokens: int, multiple: int
) -> Iterator[tuple[np.ndarray, np.ndarray, list[Window]]]:
    """(tokens_BT, lengths_B, the windows in it): one B for each T, unused rows have length 0."""
    by_length: dict[int, list[Window]] = {}
    for row in rows:
        by_length.setdefault(padded_length(len(start_ids) + row.stop - row.start), []).append(row)
    for T, group in sorted(by_length.items()):
        B = -(-max(1, batch_tokens // T) // multiple) * multiple
        for start in range(0, len(group), B):
            batch = group[start : start + B]
            tokens_BT, lengths_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
            for b, row in enumerate(batch):
                seen = kept[row.document].tokens_T[row.start : row.stop]
                lengths_B[b] = len(start_ids) + len(seen)
                tokens_BT[b, : lengths_B[b]] = np.concatenate([np.array(start_ids, np.int32), seen])
            yield tokens_BT, lengths_B, batch


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def predict(
    params: Params,
    model: ModelConfig,
    top_candidates: int,
    renormalise: bool,
    banned_ids: tuple[int, ...],
    token_chunk: int,
    tokens_BT: Array,
    lengths_B: Array,
) -> tuple[Array, Array]:
    """(entropies_BT, argmaxes_BT) of the distribution that follows each token of right-padded rows.

    The head runs over a few places of every row at a time, so that logits of at most token_chunk tokens (one a row
    where there are more rows) exist at once and rows stay on their devices.
    """
    B, T = tokens_BT.shape
    hidden_BTD, _ = decoder.forward(params, model, tokens_BT, decoder.positions_from_lengths(lengths_B, T))
    places = next(t for t in range(max(1, min(T, token_chunk // B)), 0, -1) if T % t == 0)

    def of_chunk(hidden_BTD):
        return candidates(text_logits(params, model, hidden_BTD, banned_ids), top_candidates, renormalise)

    chunks = hidden_BTD.reshape(B, T // places, places, -1).swapaxes(0, 1)
    return tuple(chunk.swapaxes(0, 1).reshape(B, T) for chunk in jax.lax.map(of_chunk, chunks))


def candidates(logits_BTV: Array, top: int, renormalise: bool) -> tuple[Array, Array]:
    """(entropies_BT, argmaxes_BT): -sum p log p over the `top` most probable tokens; of equal ones the lowest id."""
    # Rows whole: where their vocabulary is spread over devices, XLA ends the process at the barrier. That is for speed
    # alone: with the slice below right behind top_k, XLA on CPU sorts whole rows instead.
    logits_BTV = laid_out(logits_BTV, "batch")
    best_BTZ, tokens_BTZ = jax.lax.optimization_barrier(jax.lax.top_k(logits_BTV, min(top, logits_BTV.shape[-1])))
    among = best_BTZ if renormalise else logits_BTV
    logp_BTZ = best_BTZ - jax.nn.logsumexp(among, axis=-1, keepdims=True)
    terms_BTZ = jnp.where(logp_BTZ == -jnp.inf, 0.0, jnp.exp(logp_BTZ) * logp_BTZ)
    return jnp.maximum(-jnp.sum(terms_BTZ, axis=-1), 0.0), tokens_BTZ[..., 0]  # rounding could give -1e-8


def text_logits(params: Params, model: ModelConfig, hidden: Array, banned_ids: tuple[int, ...]) -> Array:
    """decoder.logits with -inf for tokens that are no text."""
    logits = decoder.logits(params, model, hidden)
    return logits.at[..., jnp.array(banned_ids, jnp.int32)].set(-jnp.inf) if banned_ids else logits


def _check(model: ModelConfig, tokenizer: Tokenizer, config: PositionConfig, banned_ids: tuple[int, ...]) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the proxy model.vocab_size={model.vocab_size}: use the "
            "tokenizer that the proxy was made for"
        )
    for name, least in (("top_candidates", 1), ("window", 3 if config.start else 2), ("batch_tokens", 1)):
        if getattr(config, name) < least:
            raise InputError(f"positions.{name}={getattr(config, name)}: use {least} or more")
    wrong = [token for token in banned_ids if not 0 <= token < model.vocab_size]
    if wrong:
        raise InputError(
            f"banned token {wrong[0]} is outside model.vocab_size={model.vocab_size}: give ids of this model"
        )


def _check_written(folder: str | Path, written: Sequence[int], documents: Source, part_documents: int) -> None:
    """Compares all documents of the parts that are there with the source's; the header vouches for their number."""
    if not written:
        return
    there, places = iter(open_annotated(folder)), range(len(documents))
    for part in written:
        for i in places[part * part_documents : (part + 1) * part_documents]:
            document, name, tokens_T = documents[i]
            old = next(there, None)
            if old is None or old.document != document or not np.array_equal(old.tokens_T, tokens_T):
                raise InputError(
                    f"{folder}: part {part} was made from other documents than those given now ({name} differs): give "
                    "the same corpus to continue it, or another folder"
                )
