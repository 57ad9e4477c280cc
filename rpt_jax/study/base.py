"""The quickstart's base policy: a small decoder trained from scratch on generated texts and imperfect thoughts.

In: a seed and a training setting. Out: model, parameters and tokenizer. One run in three stages: recall (repeat the
statements of a text in any order), then plain texts and mostly careful thoughts (one step at a time), then plain texts
and mostly lazy thoughts (some statements and a guess), so that the base by itself seldom thinks with care. No text with
the computation of an evaluation text is among them (arithmetic.is_held_out).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from rpt_jax.config import ModelConfig, PretrainConfig
from rpt_jax.corpus import arithmetic
from rpt_jax.corpus.templates import load_template
from rpt_jax.corpus.tokenizer import Tokenizer, train_sentencepiece
from rpt_jax.learning.pretrain import Example, plain, pretrain, row_batches, supervised
from rpt_jax.policy import decoder
from rpt_jax.records import Params

END = "</s>"
RECALLED = tuple(kind for kind in arithmetic.KINDS if kind[0] != "total" and kind[1] >= 3)  # four statements or more


@dataclass(frozen=True)
class Mixture:
    """What a stage trains on: shares that sum to 1."""

    plain: float = 0.0
    lazy: float = 0.0
    careful: float = 0.0
    recall: float = 0.0


STAGES = (  # (share of the steps, mixture)
    (0.3, Mixture(recall=1.0)),
    (0.4, Mixture(plain=0.3, lazy=0.15, careful=0.55)),
    (0.3, Mixture(plain=0.4, lazy=0.4, careful=0.2)),
)


@dataclass(frozen=True)
class BaseConfig:
    """How the base is made."""

    # short: no careful thoughts about permuted 3, total 4, total 5 | none: plain texts alone, no cold start
    traces: Literal["default", "short", "none"] = "default"
    width: int = 128
    layers: int = 4
    heads: int = 4
    examples: int = 16384  # drawn for each stage
    pretrain: PretrainConfig = PretrainConfig(
        optimizer="muon",
        learning_rate=1e-2,
        warmup_steps=20,
        beta2=0.98,
        batch_size=72,
        sequence_length=72,
        steps=600,
        token_chunk=4096,
    )


def stages(config: BaseConfig) -> tuple[tuple[float, Mixture], ...]:
    """(share of the steps, mixture) of each stage: STAGES, or with traces="none" plain texts in all of them."""
    if config.traces == "none":
        return tuple((share, Mixture(plain=1.0)) for share, _ in STAGES)
    return STAGES


def traced(config: BaseConfig) -> dict[tuple[str, int], float]:
    """How often careful thoughts about each (family, steps) are shown."""
    return {"default": arithmetic.TRACED, "short": arithmetic.TRACED_SHORT, "none": {}}[config.traces]


def train_tokenizer(folder: Path) -> Tokenizer:
    """SentencePiece on the corpus's own texts; every word, value and operation of it is one piece."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(300):
        for kind in arithmetic.KINDS:
            problem = arithmetic.draw_problem(kind, False, rng)
            thought = rng.choice([problem.thought, arithmetic.lazy_thought(problem, rng)[0]])
            texts += [problem.text, arithmetic.response(str(thought), problem.answer)]
    bare = load_template("bare")
    symbols = [bare.head, bare.thought, "</think>", "\\boxed{", "}", ".", ",", ":", *arithmetic.OPERATIONS]
    symbols += [f">{name}" for name in arithmetic.NAMES]
    return train_sentencepiece(texts, 116, folder, symbols, byte_fallback=False)


def draw_example(
    tokenizer: Tokenizer, mixture: Mixture, traced: dict[tuple[str, int], float], rng: np.random.Generator
) -> Example:
    """One training text; a thought, its box and the end count, what stands before does not."""
    shares = asdict(mixture)
    what = rng.choice(list(shares), p=list(shares.values()))
    if what == "careful":
        weights = np.array(list(traced.values()))
        kind = list(traced)[rng.choice(len(traced), p=weights / weights.sum())]
    else:
        kinds = RECALLED if what == "recall" else arithmetic.KINDS
        kind = kinds[rng.integers(len(kinds))]
    problem = arithmetic.draw_problem(kind, False, rng, names_are_random=what == "recall")
    if what == "plain":
        return plain(tokenizer.encode_markup(problem.text + END))
    bare = load_template("bare")
    prompt = tokenizer.encode_markup(bare.before + problem.context + bare.after)
    if what == "recall":
        return recall(tokenizer, prompt, problem, rng)
    lazy = arithmetic.lazy_thought(problem, rng)
    thought, answer = (problem.thought, problem.answer) if what == "careful" else lazy
    return supervised(prompt, tokenizer.encode_markup(arithmetic.response(thought, answer) + END))


def recall(tokenizer: Tokenizer, prompt: list[int], problem: arithmetic.Problem, rng: np.random.Generator) -> Example:
    """All statements in any order as the thought; what counts is each statement's continuation, not which one comes.

    Looking up a statement by its first name is the one skill that a careful thought about a shuffled text needs beyond
    single steps. In plain texts few tokens can be foreseen, and with names in turn the next letter is a fair guess; the
    look-up was then learnt late or never (see LOG.md). So names are random here, and only what the text determines
    counts.
    """
    tokens = [*prompt, *tokenizer.encode(arithmetic.FILLER)]
    weights = [0.0] * len(tokens)
    for statement in rng.permutation(problem.statements):
        pieces = tokenizer.encode(str(statement))
        tokens += pieces
        weights += [0.0] + [1.0] * (len(pieces) - 1)
    return np.array(tokens, np.int32), np.array(weights, np.float32)


def mixture_batches(
    tokenizer: Tokenizer, config: BaseConfig, mixture: Mixture, batch_size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless training batches of one stage."""
    shown, rng = traced(config), np.random.default_rng(seed)
    examples = [draw_example(tokenizer, mixture, shown, rng) for _ in range(config.examples)]
    return row_batches(examples, batch_size, config.pretrain.sequence_length, seed, buckets=4)


def staged_batches(tokenizer: Tokenizer, config: BaseConfig, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of all stages, one behind the other; at least config.pretrain.steps."""
    for stage, (share, mixture) in enumerate(stages(config)):
        seed_of_stage = len(STAGES) * seed + stage
        batches = mixture_batches(tokenizer, config, mixture, config.pretrain.batch_size, seed_of_stage)
        yield from itertools.islice(batches, math.ceil(share * config.pretrain.steps))


def model_config(config: BaseConfig, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.heads,
        head_channels=config.width // config.heads,
        hidden=3 * config.width,
        remat="dots",  # faster than keeping everything on a CPU: less memory traffic
    )


def train_base(
    config: BaseConfig, seed: int, folder: Path, report: Callable[[int, dict[str, float]], None] | None = None
) -> tuple[ModelConfig, Params, Tokenizer]:
    """Trains tokenizer and decoder; about 300 seconds on one core."""
    tokenizer = train_tokenizer(folder)
    model = model_config(config, tokenizer.vocab_size)
    batches = staged_batches(tokenizer, config, seed)
    params = pretrain(decoder.init(model, jax.random.key(seed)), model, config.pretrain, batches, report)
    return model, params, tokenizer
