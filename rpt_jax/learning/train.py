"""Reinforcement pre-training [RPT, arXiv 2506.08007, section 3.2, Eq. 4]: the loop.

In: a config, a starting policy, annotated documents and the positions of them to learn from. Out: the last TrainState,
and a run folder with everything that was measured (run_folder.py). A run goes on where its newest checkpoint stands,
bitwise on the same mesh: parameters, optimizer, position stream, dynamic-sampling queue and step are in it, and the
random keys are functions of seed, step and position.
"""

import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from rpt_jax import compilation, preemption
from rpt_jax.agreement import require_agreement
from rpt_jax.config import Config, ModelConfig, parts_of_groups
from rpt_jax.corpus.positions import (
    AnnotatedDocuments,
    Position,
    Positions,
    open_annotated,
    position_stream,
    select_positions,
)
from rpt_jax.corpus.prompts import Template, assemble, load_template
from rpt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.learning import checkpoints, identity, progress, run_folder
from rpt_jax.learning.advantages import group_advantages
from rpt_jax.learning.batch import maybe_check, pack, shortened
from rpt_jax.learning.collect import Groups, Source, collect, end_ids, shown
from rpt_jax.learning.update import (
    TrainState,
    init_state,
    make_optimizer,
    moved_average,
    require_finite,
    response_logprobs,
    train_step,
)
from rpt_jax.mesh import batch_parts, check_batch_divides, make_mesh, param_shardings, place
from rpt_jax.policy import decoder, flops
from rpt_jax.records import InputError, Params

log = logging.getLogger(__name__)

Policy = tuple[ModelConfig, Params, Tokenizer]
Evaluate = Callable[[Params, int], dict]  # (params, updates made) -> figures that JSON can hold
OF_THE_RUN = ("dtype", "param_dtype", "remat")  # settings of the model that a run chooses, whatever its policy had
EXIT = 128  # + number of the signal: exit status of a run that was told to stop


@dataclass(frozen=True)
class Inputs:
    """What a config's paths lead to; the arguments of train."""

    config: Config
    policy: Policy
    annotated: AnnotatedDocuments
    positions: Positions
    template: Template
    mesh: Mesh


def load_inputs(config: Config) -> Inputs:
    """Opens everything that a config names; raises InputError for what is missing or does not fit together.

    The shape of the model comes with the policy; config.model says its numerics (OF_THE_RUN).
    """
    config.check()
    run_folder.require_wandb(config)
    mesh = make_mesh(config.mesh)
    check_divides(config, mesh)
    model, params, tokenizer = checkpoints.load_policy(config.policy, mesh)
    if config.corpus.tokenizer:
        given = load_tokenizer(config.corpus.tokenizer)
        checkpoints.check_tokenizer(given, tokenizer.vocab_size, tokenizer.fingerprint, config.corpus.tokenizer)
    model = with_numerics(config.model, model)
    params = jax.tree.map(lambda x: x.astype(model.param_dtype), params)
    annotated = open_annotated(config.positions.annotated, tokenizer)
    positions = select_positions(annotated, config.positions, config.seed)
    template = load_template(config.prompt.template, config.prompt.chat)
    return Inputs(config, (model, params, tokenizer), annotated, positions, template, mesh)


def with_numerics(asked: ModelConfig, policy: ModelConfig) -> ModelConfig:
    """The policy's shape with the numerics asked for; raises InputError if another shape was asked for."""
    default = ModelConfig()
    for field in dataclasses.fields(ModelConfig):
        there, here = getattr(policy, field.name), getattr(asked, field.name)
        if field.name not in OF_THE_RUN and here not in (there, getattr(default, field.name)):
            raise InputError(f"model.{field.name}={here}, but the policy has {there}: leave it out, the policy says it")
    return dataclasses.replace(policy, **{name: getattr(asked, name) for name in OF_THE_RUN})


def run(config: Config, make_evaluate: Callable[[Inputs], Evaluate] | None = None) -> TrainState:
    """train on what the config's paths lead to; make_evaluate gives its `evaluate`."""
    inputs = load_inputs(config)
    arguments = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return train(**arguments, evaluate=make_evaluate(inputs) if make_evaluate else None)


def train(
    config: Config,
    policy: Policy,
    *,
    annotated: AnnotatedDocuments,
    positions: Positions,
    template: Template,
    evaluate: Evaluate | None = None,
    report: Callable[[dict], None] | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """Trains to config.steps updates, from the newest checkpoint of config.run_folder if there is one.

    Args:
        policy: (model, params, tokenizer) to start from; params are left intact. config.model is not read.
        annotated: documents, opened with the policy's tokenizer.
        positions: of those documents, for example select_positions(annotated, ...).
        evaluate: called with (params, updates made) before the first update, after every config.evaluate.every and at
            the end; the params live during the call only.
        report: called with each row of metrics.jsonl; left out, a display on stderr.

    Raises InputError before anything is compiled or written, FloatingPointError for a loss or gradient that is not
    finite, with the last good checkpoint whole, and SystemExit after a SIGTERM or Ctrl-C, with all saved.
    """
    model, params, tokenizer = policy
    config, mesh = dataclasses.replace(config, model=model), make_mesh(config.mesh) if mesh is None else mesh
    ends = end_ids(tokenizer, config.sample.end_tokens)
    source = Source(config, model, tokenizer, template, annotated.documents, ends, mesh)
    check(source, annotated, positions)
    params = _on_mesh(params, param_shardings(mesh, decoder.logical_axes(model), params))
    found = identity.of_inputs(source, params, positions)
    require_agreement(identity.of_host(config, found))
    with jax.set_mesh(mesh), preemption.watch() as told:  # by the mesh the scorer's kernel splits its work
        start = run_folder.find(config, found)
        reference = params if config.update.kl_coefficient else None
        state = init_state(
            params, make_optimizer(config.update, config.steps), averaged=config.reward.kind == "information_gain"
        )
        del policy, params  # at most the caller holds on to them now
        stream, queue = iter(position_stream(positions, seed=config.seed)), ()
        if start is not None:
            like = checkpoints.abstract_state(state)
            del state  # two would not fit
            state, host, start = checkpoints.restore_newest(checkpoints.folder_of(config), like, config.checkpoint)
            log.info("continuing %s after %d updates", config.run_folder, start)
            stream.set_state(host["stream"])
            queue = tuple(Position(*values) for values in host["queue"])
        with (
            run_folder.open_run(config, tokenizer, start, found) as record,
            contextlib.closing(
                checkpoints.open_checkpoints(checkpoints.folder_of(config), config.checkpoint.keep)
            ) as manager,
            progress.display(config.name, start or 0, config.steps, report) as show,
        ):
            run = Run(source, reference, evaluate, show, record, manager, told)
            state = _loop(run, state, stream, queue, start)
            run_folder.write_results(record, config)
            run_folder.keep_copy(record, config)
            return state


@dataclass(frozen=True)
class Run:
    """What the loop reads and writes to."""

    source: Source
    reference: Params | None  # starting policy, where the update wants a KL to it
    evaluate: Evaluate | None
    show: Callable[[dict], None]
    record: run_folder.RunLog
    manager: checkpoints.Manager
    told: preemption.Preemption
    shapes: set = dataclasses.field(default_factory=set)  # of the batches that this process has updated with


def _loop(
    run: Run, state: TrainState, stream: Iterator[Position], queue: tuple[Position, ...], start: int | None
) -> TrainState:
    """Updates from `start` to config.steps."""
    config, told = run.source.config, run.told
    shardings = jax.tree.map(lambda x: x.sharding, state)
    done, host = start or 0, _host_state(stream, queue)
    evaluated = run_folder.last_evaluation(run.record)
    try:
        for step in range(done, config.steps):
            with told.may_break_off():
                _maybe_evaluate(run, state, step, evaluated)
            with _maybe_profiled(config, step):
                with told.may_break_off():
                    policy = decoder.gathered(state.params, run.source.model)
                    groups, queue, row = collect(run.source, policy, stream, queue, step, state)
                    del policy  # the update needs the room
                state, metrics = _update(run, state, groups, step)
            state = jax.device_put(state, shardings)  # moves nothing, unless the compiler chose another layout
            done, host = step + 1, _host_state(stream, queue)
            row = with_rates({"step": done} | row | metrics, run.source.model)
            run_folder.write_step(run.record, row, list(shown(run.source, groups, config.rollouts_logged, done)))
            run.show(row)
            if done % config.checkpoint.every == 0 or done == config.steps:
                _save(run, done, state, host)
            if told.agreed():
                raise preemption.Abandoned
        with told.may_break_off():
            _maybe_evaluate(run, state, done, evaluated)
    except preemption.Abandoned:
        _save(run, done, state, host)
        run.manager.wait_until_finished()
        log.warning("told to stop: saved after %d of %d updates; the same command continues", done, config.steps)
        raise SystemExit(EXIT + (told.number or signal.SIGTERM)) from None
    return state


def _save(run: Run, done: int, state: TrainState, host: dict) -> None:
    """The rows first: a whole checkpoint then has all rows up to it beside it."""
    run_folder.keep_copy(run.record, run.source.config)
    checkpoints.save(run.manager, done, state, host)


def _host_state(stream, queue) -> dict:
    return {"stream": stream.get_state(), "queue": [dataclasses.astuple(position) for position in queue]}


def _maybe_evaluate(run: Run, state: TrainState, step: int, evaluated: int) -> None:
    """Evaluates if it is time to after `step` updates; `evaluated` is the last step for which that was done before."""
    config = run.source.config
    is_time = step == config.steps or (config.evaluate.every > 0 and step % config.evaluate.every == 0)
    if run.evaluate is None or not is_time or step <= evaluated:
        return
    began = time.perf_counter()
    figures = run.evaluate(state.params, step)
    seconds = time.perf_counter() - began
    run_folder.write_evaluation(run.record, {"step": step} | figures | {"seconds_evaluate": seconds})


def _maybe_profiled(config: Config, step: int):
    """A context in which jax.profiler writes down the run's second update, whose programs the first has compiled."""
    if not config.profile or step != 1:
        return contextlib.nullcontext()
    return jax.profiler.trace(Path(config.run_folder) / "profile")


def _update(run: Run, state: TrainState, groups: Groups, step: int) -> tuple[TrainState, dict]:
    """(next state, metrics as Python numbers); raises FloatingPointError."""
    config, model, began = run.source.config, run.source.model, time.perf_counter()
    with jax.profiler.TraceAnnotation("host"):
        advantages_NG = group_advantages(groups.rewards_NG, config.update.advantage, config.update.advantage_epsilon)
        rollouts = shortened(groups.rollouts, groups.learnt_NG)
        batch = pack(groups.prompts, rollouts, advantages_NG, config.update, run.source.mesh)
    limit = config.sample.max_tokens if config.update.aggregate == "constant" else None
    reference_NGR = None
    if run.reference is not None:
        reference_NGR = response_logprobs(
            run.reference, batch, config.sample.temperature, model=model, config=config.update
        )
    maybe_check(run.shapes, state.params, batch, config.sample.temperature, model, config.update, run.source.mesh)
    state, metrics = train_step(
        state,
        batch,
        config.sample.temperature,
        limit,
        reference_NGR,
        model=model,
        config=config.update,
        steps=config.steps,
    )
    row = {name: value.item() for name, value in jax.device_get(metrics).items()}
    require_finite(row, step + 1)
    if state.average is not None:
        state = state.replace(average=moved_average(state.average, state.params, config.reward.ema_decay))
    row["prompt_tokens"] = int(groups.prompts.lengths_N.sum())  # a prompt whose group is split counts once
    return state, row | {"seconds_update": time.perf_counter() - began, "programs_compiled": compilation.programs()}


def with_rates(row: dict, model: ModelConfig) -> dict:
    """The row with its seconds, response tokens per second (of sampling alone and of the whole step), and matmul FLOPs.

    Sampling is counted with all rounds of dynamic sampling and the passes in which a reward is computed (flops_reward),
    the update with the batch; padding with neither.
    """
    seconds = row["seconds_sample"] + row["seconds_reward"] + row["seconds_update"]
    group_size = row["sampled_rollouts"] // row["sampled_prompts"]
    sampled = (row["sampled_prompts"], row["sampled_prompt_tokens"], row["sampled_rollouts"], row["sampled_tokens"])
    prompts = row["sampled_prompts"] // row["rounds"]
    more = {
        "seconds": seconds,
        "sample_tokens_per_second": row["sampled_tokens"] / row["seconds_sample"],
        "tokens_per_second": row["sampled_tokens"] / seconds,
        "flops_sample": flops.sampling(model, *sampled) + row["flops_reward"],
        "flops_update": flops.update(
            model, prompts, row["prompt_tokens"], prompts * group_size, row["response_tokens"]
        ),
    }
    return {name: value for name, value in row.items() if name != "finite"} | more


def check(source: Source, annotated: AnnotatedDocuments, positions: Positions) -> None:
    """Raises InputError, with the remedy, for whatever would stop the run or make it meaningless later."""
    config, tokenizer = source.config, source.tokenizer
    config.check()
    run_folder.require_wandb(config)
    check_divides(config, source.mesh)
    checkpoints.check_vocabulary(source.model, tokenizer, "the starting policy")
    header = annotated.header
    checkpoints.check_tokenizer(tokenizer, header["vocab_size"], header["tokenizer"], "positions.annotated")
    if config.sample.temperature == 0:
        raise InputError("sample.temperature=0: greedy rollouts of a prompt are all the same; use 0.8 (paper) or so")
    if config.steps < 1 or config.dynamic_sampling.max_rounds < 0:
        raise InputError(
            f"steps={config.steps}, dynamic_sampling.max_rounds={config.dynamic_sampling.max_rounds}: use 1 or more "
            "steps, 0 or more rounds"
        )
    for name in ("every", "keep"):
        if getattr(config.checkpoint, name) < 1:
            raise InputError(f"checkpoint.{name}={getattr(config.checkpoint, name)}: use 1 or more")
    if len(positions) < config.batch_size:
        raise InputError(
            f"{len(positions)} positions are fewer than batch_size={config.batch_size} prompts a step: lower it, or "
            "select more with a lower --positions.threshold"
        )
    if config.reward.kind == "information_gain" and not positions.indices.all():
        raise InputError(
            "reward.kind=information_gain at the first token of a document: without a thought nothing predicts it; "
            "use --positions.minimum-context of 1 or more"
        )
    assemble(tokenizer, source.template, config.prompt, source.documents, [positions[0]])


def check_divides(config: Config, mesh: Mesh) -> None:
    """Raises InputError for a batch, or a microbatch, that does not divide over the mesh."""
    config.check()
    check_batch_divides(config.batch_size, mesh)
    units, microbatches = batch_parts(mesh), config.update.microbatches
    what = f"update.microbatches={microbatches} on each of {units} devices, which together is "
    parts_of_groups(config.batch_size, config.sample.group_size, units * microbatches, what)


def _on_mesh(params: Params, shardings: Params) -> Params:
    """Places what does not lie there yet; spares a copy of what does."""
    return jax.tree.map(lambda x, s: x if getattr(x, "sharding", None) == s else place(x, s), params, shardings)
