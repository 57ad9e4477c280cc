"""The quickstart's base policy: a small decoder trained from scratch on generated texts and imperfect thoughts.

In: a seed and a training setting. Out: model, parameters and tokenizer. One run in two stages over a mixture of plain
texts, lazy thoughts (a guess after a filler) and careful ones (one step at a time); the second stage has mostly lazy
ones, so that the base by itself seldom thinks with care. No text of the evaluation side is among them
(but short ones that differ from it in names only are, see arithmetic.is_held_out).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from rpt_jax.config import ModelConfig, PretrainConfig
from rpt_jax.corpus import arithmetic
from rpt_jax.corpus.prompts import load_template
from rpt_jax.corpus.tokenizer import Tokenizer, train_sentencepiece
from rpt_jax.learning.pretrain import Example, plain, pretrain, row_batches
from rpt_jax.policy import decoder
from rpt_jax.records import Params

END = "</s>"


@dataclass(frozen=True)
class Mixture:
    """Shares of what a stage trains on; they sum to 1."""

    plain: float
    lazy: float
    careful: float


@dataclass(frozen=True)
class BaseConfig:
    """How the base is made."""

    traces: Literal["default", "short"] = "default"  # short: no careful thoughts about permuted 3, total 4, total 5
    width: int = 128
    layers: int = 4
    heads: int = 4
    first_share: float = 0.7  # of the steps, in the first stage
    examples: int = 16384  # drawn for each stage
    pretrain: PretrainConfig = PretrainConfig(
        optimizer="muon", learning_rate=3e-3, warmup_steps=20, beta2=0.98, batch_size=56, sequence_length=88, steps=600
    )


STAGES = (Mixture(plain=0.2, lazy=0.05, careful=0.75), Mixture(plain=0.3, lazy=0.45, careful=0.25))


def train_tokenizer(folder: Path) -> Tokenizer:
    """SentencePiece on the corpus's own texts; every word, value and operation of it is one piece."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(300):
        for kind in arithmetic.KINDS:
            problem = arithmetic.draw_problem(kind, False, rng)
            thought = rng.choice([problem.thought, arithmetic.lazy_thought(rng)[0]])
            texts += [problem.text, arithmetic.response(str(thought), problem.answer)]
    bare = load_template("bare")
    symbols = [bare.head, bare.thought, "</think>", "\\boxed{", "}", ".", ",", ":", *arithmetic.OPERATIONS]
    return train_sentencepiece(texts, 116, folder, symbols, byte_fallback=False)


def draw_example(
    tokenizer: Tokenizer, mixture: Mixture, traced: dict[tuple[str, int], float], rng: np.random.Generator
) -> Example:
    """One training text; every token counts, a thought's context included."""
    kinds = list(traced)
    what = rng.choice(["plain", "lazy", "careful"], p=[mixture.plain, mixture.lazy, mixture.careful])
    if what == "careful":
        weights = np.array(list(traced.values()))
        kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
    else:
        kind = arithmetic.KINDS[rng.integers(len(arithmetic.KINDS))]
    problem = arithmetic.draw_problem(kind, False, rng)
    if what == "plain":
        return plain(tokenizer.encode_markup(problem.text + END))
    thought, answer = (problem.thought, problem.answer) if what == "careful" else arithmetic.lazy_thought(rng)
    bare = load_template("bare")
    prompt = bare.before + problem.context + bare.after
    return plain(tokenizer.encode_markup(prompt + arithmetic.response(thought, answer) + END))


def mixture_batches(
    tokenizer: Tokenizer, config: BaseConfig, mixture: Mixture, batch_size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless training batches of one stage."""
    traced = arithmetic.TRACED if config.traces == "default" else arithmetic.TRACED_SHORT
    rng = np.random.default_rng(seed)
    examples = [draw_example(tokenizer, mixture, traced, rng) for _ in range(config.examples)]
    return row_batches(examples, batch_size, config.pretrain.sequence_length, seed, buckets=4)


def model_config(config: BaseConfig, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.heads,
        head_channels=config.width // config.heads,
        hidden=3 * config.width,
        tied_head=True,
        remat="dots",  # faster than keeping everything on a CPU: less memory traffic
    )


def train_base(
    config: BaseConfig, seed: int, folder: Path, report: Callable[[int, dict[str, float]], None] | None = None
) -> tuple[ModelConfig, Params, Tokenizer]:
    """Trains tokenizer and decoder; 274 to 384 seconds on one core."""
    tokenizer = train_tokenizer(folder)
    model = model_config(config, tokenizer.vocab_size)
    first = round(config.first_share * config.pretrain.steps)
    size = config.pretrain.batch_size
    stages = [mixture_batches(tokenizer, config, mixture, size, 2 * seed + i) for i, mixture in enumerate(STAGES)]
    batches = itertools.chain(itertools.islice(stages[0], first), stages[1])
    params = pretrain(decoder.init(model, jax.random.key(seed)), model, config.pretrain, batches, report)
    return model, params, tokenizer
