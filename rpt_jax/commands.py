"""What `rpt pretrain`, `annotate`, `train` and `evaluate` do: settings in, files and figures out.

Each takes a frozen dataclass, which the command line fills (cli.py), and returns what its --json prints. Together they
are the method on anyone's text: a base, the positions worth thinking about, RPT, and what it gained.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from jax.sharding import Mesh

from rpt_jax import mesh as meshes
from rpt_jax.agreement import in_first_process, require_agreement
from rpt_jax.config import (
    Config,
    CorpusConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    PositionConfig,
    PretrainConfig,
    PromptConfig,
    QuestionConfig,
    SampleConfig,
)
from rpt_jax.config_dict import to_dict
from rpt_jax.corpus.documents import Corpus, open_corpus
from rpt_jax.corpus.positions import (
    DIFFICULTIES,
    AnnotatedDocuments,
    all_positions,
    difficulty_splits,
    open_annotated,
)
from rpt_jax.corpus.questions import open_questions
from rpt_jax.corpus.segments import require_room
from rpt_jax.corpus.templates import load_template, require_fitting
from rpt_jax.corpus.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from rpt_jax.json_file import write_json
from rpt_jax.learning import identity, judge, run_folder, train
from rpt_jax.learning.collect import end_ids
from rpt_jax.learning.inputs import Inputs
from rpt_jax.learning.policy_folder import check_tokenizer, load_policy, require_policy_folder, save_policy
from rpt_jax.learning.pretrain import plain, pretrain, running_batches
from rpt_jax.policy import decoder, proxy
from rpt_jax.records import InputError, Params
from rpt_jax.study import evaluate as study
from rpt_jax.study.question_evaluation import evaluate_questions

log = logging.getLogger(__name__)

MARKS = ("<predict>", "<think>", "</think>")  # pieces of their own, no text: never a candidate for the next token
AS_BYTES = SimpleNamespace(represents_all=True, longest_token=1, encode=str.encode)  # in place of a tokenizer to come


@dataclass(frozen=True)
class PretrainRun:
    """A base policy from text: SentencePiece and a decoder, by next-token prediction."""

    output: str = "runs/base"  # policy folder to write
    vocab_size: int = 4096  # pieces of SentencePiece, where corpus.tokenizer names no tokenizer
    seed: int = 0  # the same in annotate, so that both hold out the same documents
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    model: ModelConfig = field(default_factory=ModelConfig)  # vocab_size is the tokenizer's
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class AnnotateRun:
    """Entropy and arg-max of every token under a proxy policy; where the positions to learn from come from."""

    policy: str = ""  # the proxy: a policy folder, or a run folder
    seed: int = 0  # of the split that corpus.holdout makes
    corpus: CorpusConfig = field(default_factory=CorpusConfig)  # its tokenizer may be left out: the proxy's
    positions: PositionConfig = field(default_factory=PositionConfig)  # .annotated: folder for the training documents
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)  # .annotated: folder for those held out
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class EvaluateRun:
    """Next-token accuracy on held-out positions, in both modes and by difficulty; or right answers to questions."""

    policy: str = ""  # a policy folder, or a run folder: its newest checkpoint
    seed: int = 0  # of the choice of positions and of the rollouts
    results: str = ""  # JSON file to write; empty: none
    positions: PositionConfig = field(default_factory=PositionConfig)  # minimum_context, and what bounds the target
    questions: QuestionConfig = field(default_factory=QuestionConfig)  # if files are named, those held out
    prompt: PromptConfig = field(default_factory=PromptConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)  # group size and temperature are evaluate's
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def part_of(kind: type, config: Config):
    """The settings of an experiment that a command shares, by name."""
    names = {each.name for each in fields(Config)} & {each.name for each in fields(kind)}
    return kind(**{name: getattr(config, name) for name in names})


def settings_of(folder: str) -> EvaluateRun:
    """What a run folder was trained with; for a policy folder the defaults."""
    if (Path(folder) / "config.json").is_file():
        return replace(part_of(EvaluateRun, run_folder.read_config(folder)), policy=folder)
    return EvaluateRun(policy=folder)


def run_pretrain(config: PretrainRun) -> dict:
    """Trains tokenizer and decoder and writes a policy folder; documents held out are not touched."""
    identity.start_together(config)
    mesh = meshes.make_mesh(config.mesh)
    meshes.check_batch_divides(config.pretrain.batch_size, mesh, "sequences (pretrain.batch_size)")
    require_policy_folder(config.output)
    tokenizer, corpus = _read_corpus(config)
    texts = identity.digest([corpus.documents.digest_of[corpus.train]])
    require_agreement({"tokenizer": tokenizer.fingerprint, "set of training documents": texts})
    context = config.model.context or config.pretrain.sequence_length
    model = replace(config.model, vocab_size=tokenizer.vocab_size, context=context)
    model.check()
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    examples = [plain([*tokenizer.encode(corpus.documents[i].text), *end]) for i in corpus.train]
    log.info("%d documents, %d tokens", len(examples), sum(len(tokens) for tokens, _ in examples))
    settings, began, losses = config.pretrain, time.perf_counter(), []

    def report(step, metrics):
        losses.append(metrics["loss"])
        log.info("step %d/%d  loss %.3f", step, settings.steps, metrics["loss"])

    with jax.set_mesh(mesh):  # by which the scorer's kernel splits its work
        params = pretrain(
            _init(model, config.seed, mesh),
            model,
            settings,
            running_batches(examples, settings.batch_size, settings.sequence_length, config.seed),
            report,
            place=lambda batch: meshes.place(batch, meshes.batch_sharding(mesh)),
        )
    params = meshes.to_host(params)
    figures = {
        "policy": config.output,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "vocab_size": tokenizer.vocab_size,
        "loss": losses[-1],
        "seconds": time.perf_counter() - began,
    }
    made_by = {"made_by": "rpt pretrain", "settings": to_dict(config), "figures": figures} | run_folder.provenance()
    in_first_process(lambda: save_policy(config.output, model, params, tokenizer, made_by))
    return figures


def run_annotate(config: AnnotateRun) -> dict:
    """Annotates the training documents and, where a folder is named for them, those held out."""
    if not config.positions.annotated:
        raise InputError("positions.annotated is empty: name the folder to write, --positions.annotated FOLDER")
    if config.evaluate.annotated and not config.corpus.holdout:
        raise InputError(
            f"evaluate.annotated={config.evaluate.annotated!r}, but corpus.holdout=0 holds no documents out: set how "
            "many (paper: 200)"
        )
    identity.start_together(config)
    mesh = meshes.make_mesh(config.mesh)
    model, params, tokenizer = load_policy(config.policy, mesh)
    _require_same_tokenizer(config.corpus, tokenizer)
    corpus = open_corpus(config.corpus, tokenizer, config.seed)
    texts = corpus.documents.digest_of
    require_agreement({"set of documents": identity.digest((texts[corpus.train], texts[corpus.holdout]))})
    tokenizer.warn_without_start(config.positions.start, "positions.start")
    parts = {"train": (corpus.train, config.positions.annotated)}
    if config.evaluate.annotated:
        parts["holdout"] = (corpus.holdout, config.evaluate.annotated)
    figures = {"skipped_records": len(corpus.skipped)}
    for part, (indexes, folder) in parts.items():
        began = time.perf_counter()
        proxy.annotate(
            params,
            model,
            tokenizer,
            proxy.TokenSource(corpus.documents, indexes, tokenizer),
            folder,
            config.positions,
            proxy=config.policy,
            banned_ids=marks(tokenizer),
            mesh=mesh,
            progress=_progress(f"{part} documents annotated"),
        )
        if jax.process_index() == 0:  # whose folder it is
            figures[part] = _describe(folder, tokenizer, config.positions) | {"seconds": time.perf_counter() - began}
    return figures


def run_train(config: Config) -> dict:
    """RPT; evaluates along the way where documents or questions are held out."""
    identity.start_together(config)
    has_exam = config.evaluate.annotated or config.questions.holdout or config.questions.evaluate_files
    train.run(config, held_out_evaluation if has_exam else None)
    return run_folder.read_results(config.run_folder)


def run_evaluate(config: EvaluateRun) -> dict:
    """Figures of each split; see study/evaluate.py."""
    identity.start_together(config)
    mesh = meshes.make_mesh(config.mesh)
    meshes.check_batch_divides(config.evaluate.batch_size, mesh, "positions (evaluate.batch_size)")
    model, params, tokenizer = load_policy(config.policy, mesh)
    figures = _evaluation(config, model, tokenizer, mesh)(params)
    if config.results and jax.process_index() == 0:
        write_json(Path(config.results), figures)
    return figures


def held_out_evaluation(inputs: Inputs) -> train.Evaluate:
    """What train calls: the figures of run_evaluate for the parameters of the moment."""
    model, _, tokenizer = inputs.policy
    meshes.check_batch_divides(inputs.config.evaluate.batch_size, inputs.mesh, "positions (evaluate.batch_size)")
    evaluation = _evaluation(part_of(EvaluateRun, inputs.config), model, tokenizer, inputs.mesh)
    if inputs.config.evaluate.annotated and isinstance(inputs.annotated, AnnotatedDocuments):
        _warn_of_common_documents(inputs, open_annotated(inputs.config.evaluate.annotated, tokenizer))
    return lambda params, step: evaluation(params)


def _warn_of_common_documents(inputs: Inputs, held_out: AnnotatedDocuments) -> None:
    """Two annotations of a corpus, with other seeds, hold out other documents."""
    numbers = np.intersect1d(inputs.positions.documents, sorted(held_out.record_of)).tolist()
    ours, theirs = inputs.annotated.documents, held_out.documents
    common = [number for number in numbers if np.array_equal(ours[number], theirs[number])]
    if common:
        log.warning(
            "%d of %d held-out documents are trained on, too (the first is number %d): annotate both parts with one "
            "--seed and one --corpus.holdout",
            *(len(common), len(held_out), common[0]),
        )


def marks(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the MARKS that the tokenizer has."""
    return tuple(i for i in map(tokenizer.id_of, MARKS) if i is not None)


def _evaluation(config: EvaluateRun, model: ModelConfig, tokenizer: Tokenizer, mesh: Mesh):
    """params -> figures; opens and checks everything before."""
    are_questions = bool(config.questions.files or config.questions.evaluate_files)
    if not config.evaluate.annotated and not are_questions:
        raise InputError(
            "evaluate.annotated is empty: name the folder of held-out documents that `rpt annotate` has written, or "
            "questions.files"
        )
    policy = model, tokenizer, load_template(config.prompt.template, config.prompt.chat)
    shared = {"prompt": config.prompt, "sample": config.sample, "config": config.evaluate, "seed": config.seed}
    shared |= {"end_ids": end_ids(tokenizer, config.sample.end_tokens), "progress": _progress("batches evaluated")}
    if are_questions:
        config.questions.check(config.evaluate.annotated)
        judge.check_ready(config.prompt)
        questions = open_questions(config.questions, config.prompt, tokenizer, config.seed)
        texts = identity.digest_of_texts(questions.documents)
        agreed = {"set of questions to evaluate": repr((texts, questions.answers)), "template": repr(policy[2])}
        require_agreement(agreed)
        return lambda params: evaluate_questions(params, *policy, questions, limits=config.questions, **shared)
    annotated = open_annotated(config.evaluate.annotated, tokenizer)
    splits, banned = difficulty_splits(annotated, config.positions), marks(tokenizer)
    columns = ((split.documents, split.indices, split.entropies, split.lengths) for split in splits.values())
    positions = identity.digest(chain.from_iterable(columns))
    require_agreement({"set of positions to evaluate": positions, "template": repr(policy[2])})
    require_fitting(policy[2], config.positions.target)
    for split in splits.values():
        require_room(annotated.documents, tokenizer.token_bytes, split, config.prompt.truth_bytes)
    start_ids = tokenizer.start_ids(annotated.start, f"{config.evaluate.annotated}/header.json: start")
    tokenizer.warn_without_start(annotated.start, "positions.start")
    exam, shared = (annotated.documents, splits), shared | {"start_ids": start_ids, "banned_ids": banned}
    return lambda params: study.evaluate(params, *policy, *exam, mesh=mesh, **shared).summary()


def _read_corpus(config: PretrainRun) -> tuple[Tokenizer, Corpus]:
    """The tokenizer, trained where none is named (on documents that are not held out), and the corpus under it."""
    if config.corpus.tokenizer:
        tokenizer = load_tokenizer(config.corpus.tokenizer)
    else:
        first = open_corpus(config.corpus, AS_BYTES, config.seed)
        texts = (first.documents[i].text for i in first.train)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = train_sentencepiece(texts, config.vocab_size, folder, (*MARKS, "\\boxed{"))
        log.info("trained a tokenizer of %d pieces", tokenizer.vocab_size)
    return tokenizer, open_corpus(config.corpus, tokenizer, config.seed)


def _require_same_tokenizer(corpus: CorpusConfig, tokenizer: Tokenizer) -> None:
    if corpus.tokenizer:
        given = load_tokenizer(corpus.tokenizer)
        check_tokenizer(given, tokenizer.vocab_size, tokenizer.fingerprint, corpus.tokenizer)


def _init(model: ModelConfig, seed: int, mesh: Mesh) -> Params:
    params = jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(seed))
    return meshes.place(params, meshes.param_shardings(mesh, decoder.logical_axes(model), params))


def _describe(folder: str, tokenizer: Tokenizer, config: PositionConfig) -> dict:
    """Counts of an artefact: documents, positions, and of them those above each threshold."""
    annotated = open_annotated(folder, tokenizer)
    entropies = all_positions(annotated, config.minimum_context).entropies
    above = {name: int((entropies > entropy).sum()) for name, entropy in DIFFICULTIES.items()}
    return {"folder": str(folder), "documents": len(annotated), "positions": len(entropies)} | above


def _progress(what: str) -> Callable[[int, int], None]:
    """Logs how far something is, every ten seconds at the most."""
    last, said = time.monotonic(), -1

    def report(done: int, total: int) -> None:
        nonlocal last, said
        if done != said and (done == total or time.monotonic() - last > 10):
            last, said = time.monotonic(), done
            log.info("%d of %d %s", done, total, what)

    return report
