"""The quickstart's base: what it is trained on, and that the tokenizer gives every word one piece."""

import dataclasses
import hashlib
import re

import numpy as np
import pytest

from rpt_jax.config import PretrainConfig
from rpt_jax.corpus import arithmetic
from rpt_jax.corpus.prompts import parse_answer
from rpt_jax.study import base
from rpt_jax.study.base import (
    STAGES,
    BaseConfig,
    Mixture,
    draw_example,
    mixture_batches,
    staged_batches,
    train_base,
    train_tokenizer,
)

TINY = BaseConfig(
    width=16, layers=1, heads=2, examples=200, pretrain=PretrainConfig(batch_size=8, sequence_length=88, steps=3)
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_words_values_and_operations_are_single_pieces(tokenizer):
    words = ["First", "Hmm", "So", "is", "and", "has", "gets", "from", *map(str, range(10)), *arithmetic.NAMES]
    pieces = [f" {word}" for word in words] + ["Find", *arithmetic.PEOPLE, *arithmetic.OPERATIONS, ".", ",", ":", "}"]
    pieces += [f">{name}" for name in arithmetic.NAMES]
    assert [piece for piece in pieces if len(tokenizer.encode(piece)) != 1] == []
    assert len(tokenizer.encode(" 4.")) == 2  # the answer is a token of its own, so that a prediction can end there


def test_every_text_is_represented_exactly(tokenizer):
    rng = np.random.default_rng(0)
    for kind in arithmetic.KINDS:
        problem = arithmetic.make_problem(*kind, rng)
        assert tokenizer.bytes_of(tokenizer.encode(problem.text)) == problem.text.encode()


@pytest.mark.parametrize("what", ["plain", "lazy", "careful"])
def test_examples_are_what_the_mixture_says(tokenizer, what):
    """A text counts whole; of a thought and its box every token counts and of what comes before none."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        tokens_T, weights_T = draw_example(tokenizer, Mixture(**{what: 1.0}), arithmetic.TRACED, rng)
        text = tokenizer.bytes_of(tokens_T.tolist())
        counted = tokenizer.bytes_of(tokens_T[weights_T == 1].tolist())
        assert tokens_T[-1] == tokenizer.end_of_text and set(weights_T) <= {0.0, 1.0}
        assert text.startswith(b"<predict>") == (what != "plain")
        assert counted == (text if what == "plain" else text.partition(b"<think>")[2])
        assert (parse_answer(text) is not None) == (what != "plain")
        assert (arithmetic.OPENING.encode() in text) == (what == "careful")


def test_no_example_computes_what_an_evaluation_text_computes(tokenizer, monkeypatch):
    drawn = []
    draw = arithmetic.draw_problem
    monkeypatch.setattr(arithmetic, "draw_problem", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    rng = np.random.default_rng(3)
    for what in ("plain", "lazy", "careful", "recall"):
        for _ in range(100):
            draw_example(tokenizer, Mixture(**{what: 1.0}), arithmetic.TRACED, rng)
    assert len(drawn) == 400 and not any(arithmetic.is_held_out(problem) for problem in drawn)


def test_recall_counts_only_what_the_text_determines(tokenizer):
    """Each statement once, in an order that the text does not give away: the first token of each does not count."""
    rng = np.random.default_rng(4)
    in_turn = []
    for _ in range(30):
        tokens_T, weights_T = draw_example(tokenizer, Mixture(recall=1.0), arithmetic.TRACED, rng)
        context, _, thought = tokenizer.bytes_of(tokens_T.tolist()).decode().partition("<think>")
        statements = re.findall(r" (?:from )?\w>\w(?:[-+*]\d)?", context)
        assert len(statements) >= 4
        assert sorted(re.findall(r" (?:from )?\w>\w(?:[-+*]\d)?", thought)) == sorted(statements)
        counted = tokenizer.bytes_of(tokens_T[weights_T == 1].tolist()).decode()
        assert re.fullmatch(r"(>\w[-+*]\d| \d>\w)+", counted)
        assert counted.count(">") == len(statements)
        assert tokens_T.tolist() == tokenizer.encode_markup(f"{context}<think>{thought}")
        names = "".join(dict.fromkeys(re.findall(r"\b[a-m]\b", context)))
        in_turn.append(names in 2 * arithmetic.NAMES)
    assert np.mean(in_turn) < 0.2


def test_no_thought_is_shown_for_untraced_texts(tokenizer):
    """Permuted texts of 4 and 5 steps never come with careful steps: none has both many operations and disorder."""
    rng = np.random.default_rng(2)
    for _ in range(300):
        tokens_T, _ = draw_example(tokenizer, Mixture(careful=1.0), arithmetic.TRACED, rng)
        text = tokenizer.bytes_of(tokens_T.tolist()).decode()
        if "Find" not in text:
            continue
        context, thought = text.split("<think>")
        body = context.split(":")[1].split(".")[0].replace(" and", "").split(",")
        order = sorted(range(len(body)), key=lambda i: thought.index(body[i].strip()))
        assert arithmetic.is_nearly_in_order(order) or len(body) <= 4


def test_stages_sum_to_one_and_the_last_is_lazier():
    assert sum(share for share, _ in STAGES) == pytest.approx(1.0)
    for _, mixture in STAGES:
        assert sum(dataclasses.astuple(mixture)) == pytest.approx(1.0)
    assert STAGES[-1][1].lazy > STAGES[-1][1].careful


def test_stages_follow_each_other_with_their_shares(tokenizer, monkeypatch):
    """20 steps: 6 of recall, 8 of mostly careful thoughts, 6 of mostly lazy ones, each drawn with a seed of its own."""
    monkeypatch.setattr(base, "mixture_batches", lambda t, c, mixture, size, seed: iter([(mixture, seed)] * 100))
    config = dataclasses.replace(TINY, pretrain=dataclasses.replace(TINY.pretrain, steps=20))
    mixtures = [mixture for _, mixture in STAGES]
    expected = [(mixtures[0], 15)] * 6 + [(mixtures[1], 16)] * 8 + [(mixtures[2], 17)] * 6
    assert list(staged_batches(tokenizer, config, 5)) == expected
    assert mixtures[0].recall == 1 and mixtures[1].careful > mixtures[1].lazy


def test_every_example_fits_a_row(tokenizer):
    rng = np.random.default_rng(8)
    longest = 0
    for what in ("plain", "lazy", "careful", "recall"):
        for _ in range(300):
            longest = max(longest, len(draw_example(tokenizer, Mixture(**{what: 1.0}), arithmetic.TRACED, rng)[0]))
    assert 60 < longest <= BaseConfig().pretrain.sequence_length


def test_batches_and_training_are_reproducible(tokenizer, tmp_path):
    one, two = (next(mixture_batches(tokenizer, TINY, STAGES[1][1], 8, 3)) for _ in range(2))
    assert (one[0] == two[0]).all()
    other = next(mixture_batches(tokenizer, TINY, STAGES[1][1], 8, 4))
    assert one[0].shape != other[0].shape or (one[0] != other[0]).any()
    rows = []
    model, params, trained = train_base(TINY, 0, tmp_path, lambda step, metrics: rows.append(metrics["loss"]))
    assert trained.fingerprint == tokenizer.fingerprint and model.vocab_size == tokenizer.vocab_size
    assert 3 < rows[-1] < 7 and np.isfinite(np.asarray(params["embedding"])).all()


def test_short_traces_are_of_fewer_kinds(tokenizer, monkeypatch):
    kinds = set()
    draw = arithmetic.draw_problem
    monkeypatch.setattr(arithmetic, "draw_problem", lambda kind, *a, **k: kinds.add(kind) or draw(kind, *a, **k))
    for traces, expected in (("default", arithmetic.TRACED), ("short", arithmetic.TRACED_SHORT)):
        kinds.clear()
        next(mixture_batches(tokenizer, dataclasses.replace(TINY, traces=traces), Mixture(careful=1.0), 8, 3))
        assert kinds == set(expected)
    assert not {("permuted", 3), ("total", 4), ("total", 5)} & set(arithmetic.TRACED_SHORT)


def test_without_a_cold_start_texts_are_plain(tokenizer):
    """In all stages, which keep their shares and seeds: no prompt, no thought, no box."""
    config = dataclasses.replace(TINY, traces="none", pretrain=dataclasses.replace(TINY.pretrain, steps=20))
    ids = {tokenizer.id_of(piece) for piece in ("<predict>", "<think>", "</think>", "\\boxed{")}
    batches = list(staged_batches(tokenizer, config, 5))
    assert len(batches) == 20 and not any(ids & set(tokens_BT.ravel().tolist()) for tokens_BT, _ in batches)
    assert all((weights_BT == (tokens_BT > 0)).all() for tokens_BT, weights_BT in batches)
    assert base.traced(config) == {} and [share for share, _ in base.stages(config)] == [share for share, _ in STAGES]


def test_what_recorded_bases_were_trained_on_has_not_moved(tokenizer):
    """The shipped base and the recorded tables rest on these very batches."""
    digest = hashlib.sha256()
    for traces in ("default", "short"):
        for tokens_BT, weights_BT in staged_batches(tokenizer, dataclasses.replace(TINY, traces=traces), 0):
            digest.update(tokens_BT.astype("<i4").tobytes() + weights_BT.astype("<f4").tobytes())
    assert digest.hexdigest()[:16] == "0b4aea213904eb4f"
