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
import numpy as np
from jax.sharding import Mesh

from rpt_jax import compilation, host_memory, preemption
from rpt_jax.agreement import found_by_first, require_agreement
from rpt_jax.config import Config, ModelConfig
from rpt_jax.corpus import curriculum
from rpt_jax.corpus.positions import AnnotatedDocuments, Position, Positions
from rpt_jax.corpus.questions import Questions
from rpt_jax.corpus.templates import Template
from rpt_jax.learning import (
    checkpoints,
    identity,
    inputs,
    judge,
    progress,
    run_folder,
    text_loss,
)
from rpt_jax.learning.advantages import group_advantages
from rpt_jax.learning.batch import maybe_check, pack, shortened
from rpt_jax.learning.collect import Groups, Source, collect, end_ids
from rpt_jax.learning.inputs import Inputs, Policy
from rpt_jax.learning.run_rows import flops_spent
from rpt_jax.learning.shown import shown
from rpt_jax.learning.update import (
    TrainState,
    init_state,
    make_optimizer,
    moved_average,
    require_finite,
    response_logprobs,
    train_step,
)
from rpt_jax.mesh import make_mesh, param_shardings, place
from rpt_jax.policy import decoder, flops
from rpt_jax.records import InputError, Params

log = logging.getLogger(__name__)

Evaluate = Callable[[Params, int], dict]  # (params, updates made) -> figures that JSON can hold
LOWER_RATE = (
    "begin another run, with a lower --update.learning-rate and another --run-folder; it can start from the last "
    "checkpoint of this one, --policy RUN_FOLDER"
)
EXIT = 128  # + number of the signal: exit status of a run that was told to stop


def run(config: Config, make_evaluate: Callable[[Inputs], Evaluate] | None = None) -> TrainState:
    """train on what the config's paths lead to; make_evaluate gives its `evaluate`."""
    found = inputs.load_inputs(config)
    evaluate = make_evaluate(found) if make_evaluate else None
    policies, annotated, positions = [found.policy], found.annotated, found.positions
    config, template, mesh = found.config, found.template, found.mesh
    del found  # train makes room on the devices: nothing here may hold on to the parameters
    return train(
        config,
        policies.pop(),
        annotated=annotated,
        positions=positions,
        template=template,
        evaluate=evaluate,
        mesh=mesh,
    )


def train(
    config: Config,
    policy: Policy,
    *,
    annotated: AnnotatedDocuments | Questions,
    positions: Positions,
    template: Template,
    evaluate: Evaluate | None = None,
    report: Callable[[dict], None] | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """Trains to config.steps updates or config.flops, from the newest checkpoint of config.run_folder if there is one.

    Args:
        policy: (model, params, tokenizer) to start from; params are left intact. config.model is not read.
        annotated: documents or questions, opened with the policy's tokenizer.
        positions: of those documents, for example select_positions(annotated, ...).
        evaluate: called with (params, updates made) before the first update, after every config.evaluate.every and at
            the end; the params live during the call only.
        report: called with each row of metrics.jsonl; left out, a display on stderr.

    Raises InputError before anything is compiled or written (but for folders), FloatingPointError for a loss or
    gradient that is not finite, with the last good checkpoint whole, and SystemExit after a SIGTERM or Ctrl-C, with all
    saved.
    """
    # Longer than 40 lines: what is deleted on the way, to make room on the devices, no other frame may hold.
    model, params, tokenizer = policy
    config = dataclasses.replace(config, model=model)
    identity.require_same_settings(config)
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    ends = end_ids(tokenizer, config.sample.end_tokens)
    source = Source(config, model, tokenizer, template, annotated.documents, ends, mesh)
    inputs.check(source, annotated, positions)
    params = _on_mesh(params, param_shardings(mesh, decoder.logical_axes(model), params))
    found = identity.of_inputs(source, params, positions)
    require_agreement({name.replace("_", " "): repr(value) for name, value in found.items()})
    with jax.set_mesh(mesh), preemption.watch() as told:  # by the mesh the scorer's kernel splits its work
        start = run_folder.find(config, found)
        reference = params if config.update.kl_coefficient else None
        state = init_state(
            params, make_optimizer(config.update, config.steps), averaged=config.reward.kind == "information_gain"
        )
        del policy, params  # at most the caller holds on to them now
        stream, queue, spent = iter(curriculum.stream(positions, config)), (), 0.0
        if start is not None:
            like = checkpoints.abstract_state(state)
            del state  # two would not fit
            state, host, start = checkpoints.restore_newest(checkpoints.folder_of(config), like, config.checkpoint)
            log.info("continuing %s after %d updates", config.run_folder, start)
            queue, spent = _continued(stream, host, config, start)
        with (
            run_folder.open_run(config, tokenizer, start, found) as record,
            contextlib.closing(
                checkpoints.open_checkpoints(checkpoints.folder_of(config), config.checkpoint.keep)
            ) as manager,
            progress.display(config, start or 0, spent, report) as show,
            judge.judge_of(config) as judging,
        ):
            source, windows = dataclasses.replace(source, judge=judging), text_loss.cut_for(config, annotated)
            run = Run(source, reference, windows, evaluate, show, record, manager, told)
            state = _loop(run, state, stream, queue, spent, start or 0)
            manager.wait_until_finished()  # results.json stands beside the policy that it is about
            run_folder.write_results(record, config)
            run_folder.keep_copy(record, config)
            return state


@dataclass(frozen=True)
class Run:
    """What the loop reads and writes to."""

    source: Source
    reference: Params | None  # starting policy, where the update wants a KL to it
    windows: text_loss.Windows | None  # of training text, where the update learns next tokens too
    evaluate: Evaluate | None
    show: Callable[[dict], None]
    record: run_folder.RunLog
    manager: checkpoints.Manager
    told: preemption.Preemption
    shapes: set = dataclasses.field(default_factory=set)  # of the batches that this process has updated with


def _loop(
    run: Run, state: TrainState, stream: Iterator[Position], queue: tuple[Position, ...], spent: float, done: int
) -> TrainState:
    """Updates until the run is over, `done` of them made before with `spent` FLOPs."""
    config, told = run.source.config, run.told
    shardings = jax.tree.map(lambda x: x.sharding, state)
    host = _host_state(stream, queue, spent)
    evaluated = run_folder.last_evaluation(run.record)
    try:
        while not progress.is_over(config, done, spent):
            with told.may_break_off():
                _maybe_evaluate(run, state, done, evaluated)
            with _maybe_profiled(config, done):
                with told.may_break_off():
                    policy = decoder.gathered(state.params, run.source.model)
                    groups, queue, row = collect(run.source, policy, stream, queue, done, state)
                    del policy  # the update needs the room
                state, metrics = _update(run, state, groups, done)
            state = jax.device_put(state, shardings)  # moves nothing, unless the compiler chose another layout
            done += 1
            row = with_rates({"step": done} | row | metrics, run.source.model, run.reference is not None)
            spent += row["flops_sample"] + row["flops_update"]
            row, host = row | {"flops_spent": spent}, _host_state(stream, queue, spent)
            run_folder.write_step(run.record, row, list(shown(run.source, groups, config.rollouts_logged, done)))
            run.show(row)
            if done % config.checkpoint.every == 0 or progress.is_over(config, done, spent):
                _save(run, done, state, host)
            if told.agreed():
                raise preemption.Abandoned
        with told.may_break_off():
            _maybe_evaluate(run, state, done, evaluated, is_last=True)
    except preemption.Abandoned:
        _save(run, done, state, host)
        run.manager.wait_until_finished()
        at = progress.reached(config, done, spent)
        log.warning("told to stop: saved after update %s; the same command continues", at)
        raise SystemExit(EXIT + (told.number or signal.SIGTERM)) from None
    return state


def _save(run: Run, done: int, state: TrainState, host: dict) -> None:
    """The rows first: a whole checkpoint then has all rows up to it beside it."""
    run_folder.keep_copy(run.record, run.source.config)
    checkpoints.save(run.manager, done, state, host)
    host_memory.give_back()


def _host_state(stream, queue, spent) -> dict:
    return {"stream": stream.get_state(), "queue": [dataclasses.astuple(each) for each in queue], "flops": spent}


def _continued(
    stream: Iterator[Position], host: dict, config: Config, start: int
) -> tuple[tuple[Position, ...], float]:
    """(queue, FLOPs spent) as _host_state had them; sets the stream to where it stood. Raises InputError.

    Checkpoints from before these FLOPs were saved leave them to the rows of the run.
    """
    try:
        stream.set_state(host["stream"])
        queue = tuple(Position(*values) for values in host["queue"])
        spent = float(host["flops"]) if "flops" in host else None
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"checkpoint {checkpoints.folder_of(config) / str(start)} does not say where the run stood "
            f"({type(error).__name__}: {error}): it is damaged, start the run anew"
        ) from error
    if spent is None:  # the rows may be with process 0 alone
        spent = float(found_by_first(lambda: flops_spent(Path(config.run_folder), start), np.array(0.0)))
    return queue, spent


def _maybe_evaluate(run: Run, state: TrainState, step: int, evaluated: int, is_last: bool = False) -> None:
    """Evaluates if it is time to after `step` updates; `evaluated` is the last step for which that was done before."""
    config = run.source.config
    is_time = is_last or (config.evaluate.every > 0 and step % config.evaluate.every == 0)
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
        text=text_loss.of_step(run.windows, config, step, run.source.mesh),
        model=model,
        config=config.update,
        steps=config.steps,
    )
    row = {name: value.item() for name, value in jax.device_get(metrics).items()}
    require_finite(row, step + 1, LOWER_RATE)
    if state.average is not None:
        state = state.replace(average=moved_average(state.average, state.params, config.reward.ema_decay))
    row["prompt_tokens"] = int(groups.prompts.lengths_N.sum())  # a prompt whose group is split counts once
    return state, row | {"seconds_update": time.perf_counter() - began, "programs_compiled": compilation.programs()}


def with_rates(row: dict, model: ModelConfig, has_reference: bool = False) -> dict:
    """The row with its seconds, response tokens per second (of sampling alone and of the whole step), and matmul FLOPs.

    Sampling is counted with all rounds of dynamic sampling and the passes in which a reward is computed (flops_reward),
    the update with the batch, and with a forward pass of a reference; padding with neither. `finite` is left out: a row
    is of an update that was made.
    """
    seconds = row["seconds_sample"] + row["seconds_reward"] + row["seconds_update"]
    group_size = row["sampled_rollouts"] // row["sampled_prompts"]
    sampled = (row["sampled_prompts"], row["sampled_prompt_tokens"], row["sampled_rollouts"], row["sampled_tokens"])
    prompts = row["sampled_prompts"] // row["rounds"]
    batch = prompts, row["prompt_tokens"], prompts * group_size, row["response_tokens"]
    more = {
        "seconds": seconds,
        "sample_tokens_per_second": row["sampled_tokens"] / row["seconds_sample"],
        "tokens_per_second": row["sampled_tokens"] / seconds,
        "flops_sample": flops.sampling(model, *sampled) + row["flops_reward"],
        "flops_update": flops.update(model, *batch)
        + (flops.sampling(model, *batch) if has_reference else 0)
        + flops.pretraining(model, row.get("next_token_rows", 0), row.get("next_token_tokens", 0)),
    }
    return {name: value for name, value in row.items() if name != "finite"} | more


def _on_mesh(params: Params, shardings: Params) -> Params:
    """Places what does not lie there yet; spares a copy of what does."""
    return jax.tree.map(lambda x, s: x if getattr(x, "sharding", None) == s else place(x, s), params, shardings)
