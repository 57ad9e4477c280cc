"""Claims: runs on whole segments and on masked spans learn, pay and count what their docstrings say, and continue to
the bit; so does a run in rising order; prompts show what they should; what does not fit together is named."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from toy import Stop, rows_of, stop_at

from rpt_jax import commands
from rpt_jax.config import EvaluateConfig, MeshConfig, PositionConfig, RewardConfig, SampleConfig
from rpt_jax.corpus import positions
from rpt_jax.corpus.positions import Annotated, Position, open_annotated, select_positions
from rpt_jax.corpus.prompts import assemble, contexts_of
from rpt_jax.corpus.templates import FITTING, load_template, require_fitting
from rpt_jax.learning import train
from rpt_jax.learning.policy_folder import save_policy
from rpt_jax.mesh import make_mesh
from rpt_jax.records import InputError
from rpt_jax.study import evaluate as study

TEXTS = tuple(f"{letter}. {(3 * i + 1) % 5}. {letter}." for i, letter in enumerate(toy.LETTERS))
TEMPLATE = {"next_segment": "bare", "masked_span": "bare_span", "next_token": "bare"}
STEPS = 8


@functools.cache
def policy():
    """The toy's with quieter layers, which answers " 3" or " 3." in its box, the digit at random."""
    id_of, head = toy.tokenizer().id_of, toy.params()["head"].copy()
    space, stop, end = toy.tokenizer().encode("a b.")[1], toy.tokenizer().encode("a.")[1], id_of("}")
    digits = [id_of(str(digit)) for digit in range(5)]
    head[id_of("\\boxed{")] = 0
    head[id_of("</think>"), id_of("\\boxed{")] = head[id_of("\\boxed{"), space] = head[stop, end] = 4
    head[space, digits] = head[digits, stop] = head[digits, end] = 3
    quiet = jax.tree.map(lambda x: 0.5 * x if x.ndim > 2 else x, toy.params())
    return quiet | {"head": head}


@functools.cache
def folder():
    """Digits have entropy ln 5, all else 0: of " 3." the mean is a third of that."""
    path, documents = Path(tempfile.mkdtemp()), []
    for number, text in enumerate(TEXTS):
        tokens_T = np.array(toy.tokenizer().encode(text), np.int32)
        entropies_T = np.where(np.arange(len(tokens_T)) == 3, np.log(5), 0.0).astype(np.float32)
        entropies_T[0] = np.nan
        documents.append(Annotated(number, f"toy.txt:{number + 1}", tokens_T, entropies_T, tokens_T))
    positions.write_header(path, positions.make_header(toy.tokenizer(), PositionConfig(), "toy"))
    positions.write_annotated(path, 0, documents)
    return path


@functools.cache
def annotated():
    return open_annotated(folder(), toy.tokenizer())


def settings(run_folder, target, reward="exact", **options):
    """Segments of three tokens and a mean entropy above half a nat: the one with the digit."""
    chosen = PositionConfig(target=target, shortest_target=3, longest_target=3, threshold=0.5)
    sample = SampleConfig(group_size=8, temperature=1.0, max_tokens=8, tokens_per_call=8)
    changes = {"seed": 4, "steps": STEPS, "positions": chosen, "reward": RewardConfig(reward), "sample": sample}
    changes |= {"rollouts_logged": 64}
    config = toy.config(run_folder, **changes | options)
    return dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, template=TEMPLATE[target]))


def run(config, **options):
    given = {
        "policy": (toy.model(), policy(), toy.tokenizer()),
        "annotated": annotated(),
        "positions": select_positions(annotated(), config.positions, config.seed),
        "template": load_template(config.prompt.template),
        "report": lambda row: None,
        "mesh": make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]),
    }
    return train.train(config, **given | options)


@functools.cache
def finished(target):
    path = Path(tempfile.mkdtemp()) / "run"
    return path, run(settings(path, target))


TARGETS = pytest.mark.parametrize("target", ["next_segment", "masked_span"])


@TARGETS
def test_positions_are_the_segments_with_the_digit(target):
    chosen = select_positions(annotated(), settings("x", target).positions, 0)
    assert chosen.documents.tolist() == list(range(8)) and set(chosen.indices.tolist()) == {2}
    assert set(chosen.lengths.tolist()) == {3} and chosen[0] == Position(0, 2, pytest.approx(np.log(5) / 3), 3)
    every = dataclasses.replace(settings("x", target).positions, threshold=-1.0)
    both = select_positions(annotated(), every, 0)  # the last segment has nothing behind it
    assert both.indices.tolist() == ([2, 5] * 8 if target == "next_segment" else [2] * 8)
    splits = positions.difficulty_splits(annotated(), every)
    assert {name: len(split) for name, split in splits.items()} == {"all": len(both), "easy": 8, "medium": 0, "hard": 0}


@pytest.mark.parametrize(
    ("target", "shown", "room"),
    [
        ("next_segment", b"<predict>a.<think>", 32),
        ("masked_span", b"a.<predict> a.<think>", 32),
        ("masked_span", b".<predict> <think>", 4),
    ],
)
def test_prompts_show_what_they_should(target, shown, room):
    tokenizer, template = toy.tokenizer(), load_template(TEMPLATE[target])
    config = dataclasses.replace(settings("x", target).prompt, max_tokens=room)
    prompts = assemble(tokenizer, template, config, annotated().documents, [Position(0, 2, 0.5, 3)])
    assert tokenizer.bytes_of(prompts.tokens_NT[0, : prompts.lengths_N[0]].tolist()) == shown
    text = shown.removeprefix(b"<predict>").removesuffix(b"<think>")
    assert contexts_of(tokenizer, template, prompts) == [text]
    assert bytes(prompts.truth_NX[0]) == b" 1.\0\0\0\0\0"
    assert np.flatnonzero(prompts.boundaries_NX[0]).tolist() == [0, 1, 2]


@TARGETS
def test_a_run_learns_and_counts_whole_segments(target):
    """Paid and right is who names all of it; " 3." and not " 3", which is right by prefix matching alone."""
    path, _ = finished(target)
    rows, rollouts = rows_of(path), rows_of(path, "rollouts.jsonl")
    assert np.mean([row["reward"] for row in rows[-4:]]) > 1.2 * np.mean([row["reward"] for row in rows[:2]]) > 0
    assert all(row["reward"] == row["accuracy"] and row["gradient_norm"] > 0 for row in rows)
    assert {row["prediction"] in (None, row["truth"]) for row in rollouts} == {True, False}
    for row in rollouts:
        assert row["truth"] == TEXTS[row["document"]][2:5] and row["context"] == TEXTS[row["document"]][:2]
        is_right = row["prediction"] is not None and row["prediction"].strip() == row["truth"].strip()
        assert row["right"] == is_right == (row["reward"] == 1)
    assert any(
        row["prediction"] and row["truth"].startswith(row["prediction"]) and not row["right"] for row in rollouts
    )


@TARGETS
def test_a_continued_run_is_the_run_that_was_not_broken_off(tmp_path, target):
    toy.assert_continues(run, lambda folder: settings(folder, target), finished(target), tmp_path, stopped=5, saved=4)


def test_a_judge_pays_and_right_stays_right(tmp_path):
    """The judge is shown what the policy saw; it pays half for any answer with a full stop."""
    (tmp_path / "judge.py").write_text(
        "def stops(contexts, predictions, truths):\n"
        "    assert all(c[:2] == c[-2:] and b'<predict>' in c and t[:1] == b' ' for c, t in zip(contexts, truths))\n"
        "    return [0.5 * p.endswith(b'.') for p in predictions]\n"
    )
    reward = RewardConfig("judged", judge=f"{tmp_path}/judge.py:stops")
    config = dataclasses.replace(settings(tmp_path / "run", "masked_span"), reward=reward, steps=1, rollouts_logged=32)
    run(config)
    rows = rows_of(tmp_path / "run", "rollouts.jsonl")
    assert {(row["reward"], row["right"]) for row in rows} >= {(0.5, True), (0.5, False), (0.0, False)}
    for row in rows:
        assert row["reward"] == 0.5 * ((row["prediction"] or "").endswith("."))
        assert row["right"] == ((row["prediction"] or "").strip() == row["truth"].strip())
    (tmp_path / "judge.py").write_text((tmp_path / "judge.py").read_text() + "# mended")
    with pytest.raises(InputError, match="holds a run with another judge"):
        run(config)
    with pytest.raises(InputError, match="defines no function none"):
        run(
            dataclasses.replace(
                config,
                run_folder=str(tmp_path / "x"),
                reward=dataclasses.replace(reward, judge=reward.judge[:-5] + "none"),
            )
        )
    assert not (tmp_path / "x").exists()


@TARGETS
def test_evaluation_counts_whole_segments_and_prefixes_and_has_no_argmax(target):
    """Replayed from the answers."""
    config = settings("x", target)
    splits = positions.difficulty_splits(annotated(), config.positions)
    evaluation = study.evaluate(
        policy(),
        toy.model(),
        toy.tokenizer(),
        load_template(config.prompt.template),
        annotated().documents,
        splits,
        prompt=config.prompt,
        sample=config.sample,
        config=EvaluateConfig(positions=0, group_size=8, temperature=1.0, batch_size=16, greedy=True),
        seed=0,
        end_ids=(toy.tokenizer().end_of_text,),
    )
    figures = evaluation.summary()["easy"]
    assert evaluation.argmax_tokens_N is None and "argmax" not in figures and figures["positions"] == 8
    answers = [
        (evaluation.positions[n], answer) for n, group in enumerate(evaluation.sampled.answers) for answer in group
    ]
    where = {document: text.encode() for document, text in enumerate(TEXTS)}
    truths = [(where[p.document][p.index : p.index + p.length], answer) for p, answer in answers]
    easy = [(truth, a) for (truth, a), (p, _) in zip(truths, answers, strict=True) if p.entropy > 0.5]
    exact = np.mean([a is not None and a.strip() == truth.strip() for truth, a in easy])
    prefix = np.mean([bool(a) and truth.startswith(a) for truth, a in easy])
    assert figures["reasoning"] == pytest.approx(exact) and figures["prefix"] == pytest.approx(prefix)
    assert 0 < exact < prefix < 1 and set(figures["standard_errors"]) >= {"reasoning", "prefix", "greedy"}


def test_a_run_in_rising_order_continues_and_meets_harder_positions(tmp_path):
    """Half of 16 positions are easy: the first half of the draws has no other."""
    repeated = select_positions(
        annotated(), dataclasses.replace(settings("x", "next_segment").positions, threshold=-1.0), 0
    )
    config = settings(tmp_path / "a", "next_segment", rollouts_logged=64)
    rising = dataclasses.replace(config.positions, order="easy_to_hard", stages=2)
    config = dataclasses.replace(config, positions=rising)
    state = run(config, positions=repeated)
    entropies = np.array([row["entropy"] for row in rows_of(tmp_path / "a", "rollouts.jsonl")]).reshape(2, -1)
    assert not entropies[0].any() and 0.3 < (entropies[1] > 0.5).mean() < 0.7
    other = dataclasses.replace(config, run_folder=str(tmp_path / "b"))
    with pytest.raises(Stop):
        run(other, positions=repeated, report=stop_at(6))
    with pytest.raises(InputError, match="steps=8, this one has 9"):
        run(dataclasses.replace(other, steps=9), positions=repeated)
    continued = run(other, positions=repeated)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(continued), jax.device_get(state))
    assert rows_of(tmp_path / "b", "rollouts.jsonl") == rows_of(tmp_path / "a", "rollouts.jsonl")


def test_the_commands_train_and_evaluate_on_segments(tmp_path):
    """From folders alone, on eight devices: results by split, an empty one without figures, and no arg-max."""
    save_policy(tmp_path / "policy", toy.model(), policy(), toy.tokenizer(), {})
    config = settings(tmp_path / "run", "masked_span", policy=str(tmp_path / "policy"), steps=1)
    evaluation = EvaluateConfig(annotated=str(folder()), every=0, positions=0, batch_size=8)
    chosen = dataclasses.replace(config.positions, annotated=str(folder()))
    config = dataclasses.replace(config, positions=chosen, evaluate=evaluation)
    figures = commands.run_train(config)["evaluation"]
    assert {name for name, split in figures.items() if isinstance(split, dict)} == {"all", "easy", "medium", "hard"}
    assert figures["all"]["positions"] == figures["easy"]["positions"] == 8 and figures["medium"]["reasoning"] is None
    assert 0 <= figures["all"]["reasoning"] <= figures["all"]["prefix"] <= 1 and "argmax" not in figures["all"]
    again = commands.run_evaluate(dataclasses.replace(commands.settings_of(config.run_folder), seed=config.seed))
    assert again["all"] == figures["all"]
    wrong = dataclasses.replace(
        commands.settings_of(config.run_folder), prompt=dataclasses.replace(config.prompt, template="bare")
    )
    with pytest.raises(InputError, match="template=bare does not ask for what positions.target=masked_span wants"):
        commands.run_evaluate(wrong)


def test_templates_fit_their_targets(tmp_path):
    for target, names in FITTING.items():
        for name in names:
            require_fitting(load_template(name), target)
    for name, target in (
        ("v0", "next_segment"),
        ("segment", "next_token"),
        ("span", "next_token"),
        ("bare", "masked_span"),
    ):
        with pytest.raises(InputError, match=f"prompt.template={name} does not ask .*target={target}"):
            require_fitting(load_template(name), target)
    path = tmp_path / "mine.txt"
    path.write_text("Fill: {context}___{after}!\n<think>")
    mine = load_template(str(path), chat="chatml")
    assert (mine.head, mine.gap, mine.tail, mine.thought) == ("Fill: ", "___", "!\n", "<think>")
    require_fitting(mine, "masked_span")
    with pytest.raises(InputError, match=r"or a file without \{after\}"):
        require_fitting(mine, "next_segment")
    for text in ("{after} {context}", "{context} {after} {after}"):
        path.write_text(text)
        with pytest.raises(InputError, match="stands once, behind {context}"):
            load_template(str(path))


BAD = [
    ({"template": load_template("v1")}, "template=v1 does not ask"),
    ({"positions": toy.targets()}, "target=next_segment, but the positions given are no segments"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_does_not_fit_together_is_named(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(settings(tmp_path / "run", "next_segment"), **options)
    assert not (tmp_path / "run").exists()


def test_settings_that_clash_are_named(tmp_path):
    config = settings(tmp_path / "run", "next_segment")
    with pytest.raises(InputError, match="8 of 8 targets are longer than prompt.truth_bytes=2"):
        run(dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, truth_bytes=2)))
    gain = RewardConfig("information_gain")
    with pytest.raises(InputError, match="information_gain with positions.target=next_segment"):
        gain.check("leave_one_out", "next_segment")
    with pytest.raises(InputError, match="a segment of 30 to 40 tokens"):
        chosen = PositionConfig(target="masked_span", select="random", shortest_target=30, longest_target=40)
        select_positions(annotated(), chosen, 0)
    with pytest.raises(InputError, match="shortest_target=5, longest_target=4"):
        PositionConfig(shortest_target=5, longest_target=4).check()
    with pytest.raises(InputError, match="found by bytes"):
        select_positions(open_annotated(folder()), config.positions, 0)
