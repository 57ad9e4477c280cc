"""The quickstart's base: what it is trained on, and that the tokenizer gives every word one piece."""

import dataclasses

import numpy as np
import pytest

from rpt_jax.config import PretrainConfig
from rpt_jax.corpus import arithmetic
from rpt_jax.corpus.prompts import parse_answer
from rpt_jax.study.base import STAGES, BaseConfig, Mixture, draw_example, mixture_batches, train_base, train_tokenizer

TINY = BaseConfig(
    width=16, layers=1, heads=2, examples=200, pretrain=PretrainConfig(batch_size=8, sequence_length=88, steps=3)
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_words_values_and_operations_are_single_pieces(tokenizer):
    words = ["First", "Hmm", "So", "is", "in", "and", "has", "gets", "from", *map(str, range(10)), *arithmetic.NAMES]
    pieces = [f" {word}" for word in words] + ["Find", *arithmetic.PEOPLE, *arithmetic.OPERATIONS, ".", ",", ":", "}"]
    assert [piece for piece in pieces if len(tokenizer.encode(piece)) != 1] == []
    assert len(tokenizer.encode(" 4.")) == 2  # the answer is a token of its own, so that a prediction can end there


def test_every_text_is_represented_exactly(tokenizer):
    rng = np.random.default_rng(0)
    for kind in arithmetic.KINDS:
        problem = arithmetic.make_problem(*kind, rng)
        assert tokenizer.bytes_of(tokenizer.encode(problem.text)) == problem.text.encode()


@pytest.mark.parametrize("what", ["plain", "lazy", "careful"])
def test_examples_are_what_the_mixture_says(tokenizer, what):
    shares = Mixture(**{name: float(name == what) for name in ("plain", "lazy", "careful")})
    rng = np.random.default_rng(1)
    for _ in range(30):
        tokens_T, weights_T = draw_example(tokenizer, shares, arithmetic.TRACED, rng)
        text = tokenizer.bytes_of(tokens_T.tolist())
        assert tokens_T[-1] == tokenizer.end_of_text and (weights_T == 1).all()
        assert text.startswith(b"<predict>") == (what != "plain")
        assert (parse_answer(text) is not None) == (what != "plain")
        assert (arithmetic.OPENING.encode() in text) == (what == "careful")
        if what == "plain":
            assert not arithmetic.is_held_out(text.decode())


def test_no_thought_is_shown_for_untraced_texts(tokenizer):
    """Permuted texts of 4 and 5 steps never come with careful steps: none has both many operations and disorder."""
    rng = np.random.default_rng(2)
    for _ in range(300):
        tokens_T, _ = draw_example(tokenizer, Mixture(0.0, 0.0, 1.0), arithmetic.TRACED, rng)
        text = tokenizer.bytes_of(tokens_T.tolist()).decode()
        if "Find" not in text:
            continue
        context, thought = text.split("<think>")
        body = context.split(":")[1].split(".")[0].replace(" and", "").split(",")
        order = sorted(range(len(body)), key=lambda i: thought.index(body[i].strip()))
        assert arithmetic.is_nearly_in_order(order) or len(body) <= 4


def test_stages_sum_to_one_and_the_second_is_lazier():
    assert [stage.plain + stage.lazy + stage.careful for stage in STAGES] == [pytest.approx(1.0)] * 2
    assert STAGES[1].lazy > STAGES[1].careful


def test_batches_and_training_are_reproducible(tokenizer, tmp_path):
    one, two = (next(mixture_batches(tokenizer, TINY, STAGES[0], 8, 3)) for _ in range(2))
    assert (one[0] == two[0]).all()
    other = next(mixture_batches(tokenizer, TINY, STAGES[0], 8, 4))
    assert one[0].shape != other[0].shape or (one[0] != other[0]).any()
    rows = []
    model, params, trained = train_base(TINY, 0, tmp_path, lambda step, metrics: rows.append(metrics["loss"]))
    assert trained.fingerprint == tokenizer.fingerprint and model.vocab_size == tokenizer.vocab_size
    assert 3 < rows[-1] < 7 and np.isfinite(np.asarray(params["embedding"])).all()


def test_short_traces_are_fewer():
    short = dataclasses.replace(TINY, traces="short")
    assert short.traces == "short" and ("permuted", 3) not in arithmetic.TRACED_SHORT
