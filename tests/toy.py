"""A run small enough for tests: documents "a 3." whose digit depends on the letter, and a policy that answers in the
right form with a digit at random, so that groups disagree and there is something to learn."""

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from rpt_jax.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    ModelConfig,
    PromptConfig,
    SampleConfig,
    UpdateConfig,
)
from rpt_jax.corpus import positions
from rpt_jax.corpus.positions import Annotated, Positions
from rpt_jax.corpus.templates import load_template
from rpt_jax.corpus.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from rpt_jax.learning import checkpoints, run_folder, run_rows
from rpt_jax.policy import decoder, scorer

LETTERS = "abcdefgh"
TEXTS = tuple(f"{letter} {(3 * i + 1) % 5}." for i, letter in enumerate(LETTERS))
SYMBOLS = ("<predict>", "<think>", "</think>", "\\boxed{")
TIMES = ("seconds", "tokens_per_second", "programs_compiled")  # what differs from run to run, or ends so
TARGET = 2  # token of the digit: letter, space, digit, full stop


@functools.cache
def tokenizer() -> Tokenizer:
    folder = Path(tempfile.mkdtemp())
    texts = [*TEXTS, "{}01234 "]
    return train_sentencepiece(texts, 24, folder, SYMBOLS, model_type="char", byte_fallback=False)


def bytewise(folder: Path) -> Tokenizer:
    """Byte-level without merges: a token is a byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def model(**options) -> ModelConfig:
    shape = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_channels": 8, "hidden": 32}
    return ModelConfig(vocab_size=32, **shape | options)  # 32: eight rows of padding, divides over devices


def noise(model: ModelConfig, scale: float, rng: np.random.Generator):
    """Parameters drawn by numpy, which compiles nothing; norms are 1."""
    tree = jax.tree.map(lambda x: (scale * rng.standard_normal(x.shape)).astype(np.float32), decoder.shapes(model))
    return jax.tree.map_with_path(lambda path, x: np.ones_like(x) if path[-1].key == "scale" else x, tree)


@functools.cache
def params():
    """Made by hand, which compiles nothing: <think> </think> \\boxed{ digit } end, the digit at random.

    The embedding is the identity and the head a table of what follows each token; the layers add little noise.
    """
    tree = noise(model(), 0.1, np.random.default_rng(0))
    id_of, end = tokenizer().id_of, tokenizer().end_of_text
    follows_VV = np.zeros((32, 32), np.float32)
    digits = [id_of(str(digit)) for digit in range(5)]
    follows_VV[id_of("<think>"), id_of("</think>")] = 1
    follows_VV[id_of("</think>"), id_of("\\boxed{")] = 1
    follows_VV[id_of("\\boxed{"), digits] = 1
    follows_VV[digits, id_of("}")] = 1
    follows_VV[id_of("}"), end] = 1
    return tree | {"embedding": np.eye(32, dtype=np.float32), "head": 2 * follows_VV}


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, model, tokens_1T, length):
    positions_1T = decoder.positions_from_lengths(length[None], tokens_1T.shape[1])
    hidden_1TD, _ = decoder.forward(params, model, tokens_1T, positions_1T)
    return decoder.logits(params, model, hidden_1TD)[0]


def plain_logits(params, model: ModelConfig, tokens, width: int = 48) -> np.ndarray:
    """All logits [T, V] of one sequence by itself, in float64; padded to `width`, so that lengths share a program."""
    tokens_1T = np.pad(np.array([tokens], np.int32), ((0, 0), (0, width - len(tokens))))
    logits_TV = _logits(params, model, tokens_1T, np.int32(len(tokens)))
    return np.asarray(logits_TV, np.float64)[: len(tokens)]


def plain_logprob(params, model: ModelConfig, tokens, count: int, width: int = 48) -> tuple[float, bool]:
    """(log p of the last `count` tokens by a softmax in float64, whether each is the arg-max)."""
    rows_RV, last_R = plain_logits(params, model, tokens, width)[-count - 1 : -1], tokens[-count:]
    rows_RV = rows_RV - rows_RV.max(axis=1, keepdims=True)
    logprobs_RV = rows_RV - np.log(np.exp(rows_RV).sum(axis=1, keepdims=True))
    return logprobs_RV[np.arange(count), last_R].sum(), bool((rows_RV.argmax(axis=1) == last_R).all())


def annotate(folder: Path, texts=TEXTS) -> Path:
    """An artefact in which the digit has entropy ln 5 and all else 0."""
    documents = []
    for number, text in enumerate(texts):
        tokens_T = np.array(tokenizer().encode(text), np.int32)
        entropies_T = np.where(np.arange(len(tokens_T)) == TARGET, np.log(5), 0.0).astype(np.float32)
        entropies_T[0] = np.nan
        argmaxes_T = np.full(len(tokens_T), tokens_T[-1], np.int32)
        argmaxes_T[0] = -1
        documents.append(Annotated(number, f"toy.txt:{number + 1}", tokens_T, entropies_T, argmaxes_T))
    positions.write_header(folder, positions.make_header(tokenizer(), config(folder).positions, "toy"))
    positions.write_annotated(folder, 0, documents)
    return folder


def config(folder: Path, **options) -> Config:
    """Eight prompts of four rollouts a step; ends in `folder`."""
    settings = {
        "steps": 4,
        "batch_size": 8,
        "run_folder": str(folder),
        "prompt": PromptConfig(template="bare", max_tokens=32, truth_bytes=8),
        "sample": SampleConfig(group_size=4, temperature=1.0, max_tokens=8, tokens_per_call=8),
        "update": UpdateConfig(learning_rate=3e-3, weight_decay=0.0, token_chunk=256),
        "checkpoint": CheckpointConfig(every=2, keep=2),
        "evaluate": EvaluateConfig(every=0),
        "rollouts_logged": 2,
    }
    return Config(**settings | options)


@functools.cache
def annotated() -> positions.AnnotatedDocuments:
    return positions.open_annotated(annotate(Path(tempfile.mkdtemp())), tokenizer())


def targets(repeat: int = 1) -> Positions:
    """The digits of all documents, each `repeat` times."""
    numbers = np.tile(np.arange(len(TEXTS), dtype=np.int32), repeat)
    return Positions(numbers, np.full_like(numbers, TARGET), np.full(len(numbers), np.log(5), np.float32))


class Stop(Exception):
    pass


def stop_at(step):
    """A report that ends the run as a crash would, before the checkpoint of that step."""

    def report(row):
        if row["step"] == step:
            raise Stop

    return report


def assert_continues(run, settings, whole, folder, stopped: int, saved: int, streams=run_folder.STREAMS):
    """A run that ends as in a crash within the step `stopped`, after a checkpoint at `saved`, and goes on, is the run
    that was not broken off: parameters and optimizer state to the bit, and every row.

    run: run(config, **options) -> state; settings: settings(folder) -> config; whole: (its folder, its state).
    """
    path, state = whole
    with pytest.raises(Stop):
        run(settings(folder), report=stop_at(stopped))
    assert checkpoints.newest_step(folder / "checkpoints") == saved
    continued = run(settings(folder))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(continued), jax.device_get(state))
    for name in streams:
        assert rows_of(folder, name) == rows_of(path, name), name
    return continued


def rows_of(folder, name="metrics.jsonl") -> list[dict]:
    """Rows of a run without what differs from one run to its like: times, and programs compiled."""
    rows = run_rows.read_rows(Path(folder) / name)
    return [{k: v for k, v in row.items() if not k.startswith("seconds") and not k.endswith(TIMES)} for row in rows]


def watch_kernel(monkeypatch) -> list[dict[str, int]]:
    """Filled with the mesh of jax.set_mesh, axes and sizes, each time that the scorer's kernel is traced."""
    meshes, kernel = [], scorer.grouped_logprob

    def watched(*arguments, **options):
        meshes.append(dict(jax.sharding.get_abstract_mesh().shape))
        return kernel(*arguments, **options)

    monkeypatch.setattr(scorer, "grouped_logprob", watched)
    return meshes


def arguments(**options) -> dict:
    """What train takes beside the config."""
    settings = {
        "policy": (model(), params(), tokenizer()),
        "annotated": annotated(),
        "positions": targets(),
        "template": load_template("bare"),
        "report": lambda row: None,
    }
    return settings | options
