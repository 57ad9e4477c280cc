"""Claims: a command takes from an experiment what it shares with it; a tokenizer is trained on documents that are not
held out; what would make a command's work useless is said before it begins."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy

from rpt_jax import commands
from rpt_jax.commands import AnnotateRun, EvaluateRun, PretrainRun
from rpt_jax.config import Config, CorpusConfig, EvaluateConfig, MeshConfig, PositionConfig, PretrainConfig
from rpt_jax.corpus.documents import open_corpus
from rpt_jax.corpus.templates import load_template
from rpt_jax.learning import run_folder
from rpt_jax.learning.inputs import Inputs
from rpt_jax.learning.policy_folder import load_policy, save_policy
from rpt_jax.mesh import make_mesh
from rpt_jax.records import InputError


def test_a_command_takes_what_it_shares_with_an_experiment():
    config = Config(policy="p", seed=3, corpus=CorpusConfig(files=("a.txt",)), positions=PositionConfig(annotated="x"))
    assert commands.part_of(AnnotateRun, config) == AnnotateRun(
        policy="p", seed=3, corpus=config.corpus, positions=config.positions
    )
    assert commands.part_of(EvaluateRun, config) == EvaluateRun(policy="p", seed=3, positions=config.positions)


def test_settings_of_a_run_and_of_a_policy(tmp_path):
    config = toy.config(tmp_path / "run", seed=5, evaluate=EvaluateConfig(positions=7))
    with run_folder.open_run(config, toy.tokenizer(), None, {}):
        pass
    settings = commands.settings_of(str(tmp_path / "run"))
    assert settings.policy == str(tmp_path / "run") and settings.evaluate.positions == 7
    assert (settings.seed, settings.prompt, settings.sample) == (5, config.prompt, config.sample)
    assert commands.settings_of(str(tmp_path / "other")) == EvaluateRun(policy=str(tmp_path / "other"))


def test_marks_are_those_of_the_tokenizer():
    tokenizer = toy.tokenizer()
    assert commands.marks(tokenizer) == tuple(tokenizer.id_of(piece) for piece in ("<predict>", "<think>", "</think>"))


def test_a_tokenizer_is_trained_on_what_is_not_held_out(tmp_path, monkeypatch):
    texts = [f"word{i} and more of it, number {i * i}" for i in range(30)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    seen = []
    train = commands.train_sentencepiece
    monkeypatch.setattr(commands, "train_sentencepiece", lambda texts, *rest: train(seen.extend(texts) or seen, *rest))
    corpus = CorpusConfig(files=(str(tmp_path / "text.jsonl"),), holdout=10)
    tokenizer, opened = commands._read_corpus(PretrainRun(corpus=corpus, seed=4, vocab_size=300))
    assert tokenizer.vocab_size == 300 and len(commands.marks(tokenizer)) == 3
    held_out = {opened.documents[i].text for i in opened.holdout}
    assert len(held_out) == 10 and set(seen) == set(texts) - held_out
    assert [*opened.holdout] == [*open_corpus(corpus, commands.AS_BYTES, 4).holdout]


def test_a_policy_is_not_written_over_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match="is no policy folder and not empty"):
        commands.run_pretrain(PretrainRun(output=str(tmp_path), pretrain=PretrainConfig(batch_size=8)))


def test_pretrain_tells_the_kernel_of_its_mesh(tmp_path, monkeypatch):
    """Without jax.set_mesh CPUs would split its plain operations by themselves, but a TPU cannot split Pallas."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text * 9}) + "\n" for text in toy.TEXTS))
    toy.train_sentencepiece(toy.TEXTS, 18, tmp_path / "tokenizer", model_type="char", byte_fallback=False)
    settings = PretrainRun(
        output=str(tmp_path / "base"),
        corpus=CorpusConfig(files=(str(tmp_path / "text.jsonl"),), tokenizer=str(tmp_path / "tokenizer")),
        model=toy.model(layers=1),
        pretrain=PretrainConfig(batch_size=4, sequence_length=8, steps=1),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    )
    meshes = toy.watch_kernel(monkeypatch)
    figures = commands.run_pretrain(settings)
    assert meshes and all(mesh == {"data": 2, "fsdp": 2, "tensor": 2} for mesh in meshes)
    assert figures["loss"] == pytest.approx(np.log(18), rel=0.2)
    assert load_policy(tmp_path / "base")[0].context == 8  # for which the model was made, as others will want to know


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AnnotateRun(), "positions.annotated is empty"),
        (
            AnnotateRun(positions=PositionConfig(annotated="a"), evaluate=EvaluateConfig(annotated="b")),
            "evaluate.annotated='b', but corpus.holdout=0",
        ),
    ],
)
def test_annotate_says_what_is_missing(settings, message):
    with pytest.raises(InputError, match=message):
        commands.run_annotate(settings)


def test_annotate_refuses_another_tokenizer(tmp_path):
    save_policy(tmp_path / "policy", toy.model(), toy.params(), toy.tokenizer(), {})
    other = CorpusConfig(tokenizer=str(tmp_path / "other"))
    toy.train_sentencepiece(["abc 01"] * 3, 9, tmp_path / "other", model_type="char", byte_fallback=False)
    settings = AnnotateRun(
        policy=str(tmp_path / "policy"), corpus=other, positions=PositionConfig(annotated=str(tmp_path / "new"))
    )
    with pytest.raises(InputError, match="this tokenizer has 9 ids .* made with one of 24 ids"):
        commands.run_annotate(settings)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("shift", [0, 3])
def test_held_out_documents_that_are_trained_on_are_told(tmp_path, caplog, shift):
    """By number and tokens: documents of another corpus may have the same numbers."""
    held_out = toy.annotate(tmp_path / "held_out", toy.TEXTS[shift:] + toy.TEXTS[:shift])
    config = toy.config(tmp_path / "run", evaluate=EvaluateConfig(annotated=str(held_out), batch_size=8))
    policy = toy.model(), toy.params(), toy.tokenizer()
    inputs = Inputs(config, policy, toy.annotated(), toy.targets(), load_template("bare"), make_mesh(MeshConfig()))
    commands.held_out_evaluation(inputs)
    number = len(toy.TEXTS)
    assert (f"{number} of {number} held-out documents are trained on, too" in caplog.text) == (shift == 0)


def test_evaluate_says_what_is_missing(tmp_path):
    save_policy(tmp_path / "policy", toy.model(), toy.params(), toy.tokenizer(), {})
    settings = EvaluateRun(policy=str(tmp_path / "policy"))
    with pytest.raises(InputError, match="evaluate.annotated is empty"):
        commands.run_evaluate(settings)
    batch = dataclasses.replace(settings, evaluate=EvaluateConfig(batch_size=12), mesh=MeshConfig(data=8))
    assert jax.device_count() == 8
    with pytest.raises(InputError, match="batch of 12 positions .* does not divide over data=8 devices: use 8 or 16"):
        commands.run_evaluate(batch)


def test_evaluate_begins_texts_as_the_annotation_did(tmp_path, monkeypatch):
    save_policy(tmp_path / "policy", toy.model(), toy.params(), toy.tokenizer(), {})
    held_out, seen = toy.annotate(tmp_path / "held_out"), []
    settings = EvaluateRun(
        policy=str(tmp_path / "policy"),
        prompt=toy.config(tmp_path).prompt,
        evaluate=EvaluateConfig(annotated=str(held_out), batch_size=8),
    )
    monkeypatch.setattr(
        commands.study, "evaluate", lambda *_, start_ids, **__: seen.append(start_ids) or SimpleNamespace(summary=dict)
    )
    header = json.loads((held_out / "header.json").read_text())
    piece = "<predict>"
    for start in ({}, {"start": piece}):
        (held_out / "header.json").write_text(json.dumps(header | start))
        commands.run_evaluate(settings)
    assert seen == [[], [toy.tokenizer().id_of(piece)]]
    commands.run_evaluate(dataclasses.replace(settings, positions=PositionConfig(start=piece)))
    with pytest.raises(InputError, match=r"annotated with start='<predict>', the run says positions.start='a'"):
        commands.run_evaluate(dataclasses.replace(settings, positions=PositionConfig(start="a")))
    for start, message in (
        (7, "start=7 is no piece: annotate again"),
        ("absent", "'absent' is no piece of the tokenizer"),
    ):
        (held_out / "header.json").write_text(json.dumps(header | {"start": start}))
        with pytest.raises(InputError, match=message):
            commands.run_evaluate(settings)
