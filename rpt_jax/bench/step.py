"""`rpt bench step`: time and memory of one step of RPT and of its parts, on a workload that others can draw, too.

In: sizes. Out: figures of rollout (N prompts, G responses each), score (log-probs of given responses), update (one GRPO
update on given responses) and e2e (rollout, rewards at random, advantages, update), with values to check them by.
"""

import dataclasses
import importlib.metadata
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

import rpt_jax
from rpt_jax.bench.stopwatch import measure
from rpt_jax.bench.workload import WORKLOADS, Data, Workload, draw_data, draw_params
from rpt_jax.config import MeshConfig, ModelConfig, SampleConfig, UpdateConfig
from rpt_jax.config_dict import from_dict, to_dict
from rpt_jax.learning.advantages import group_advantages
from rpt_jax.learning.batch import pack
from rpt_jax.learning.update import init_state, make_optimizer, require_finite, train_step
from rpt_jax.mesh import batch_sharding, make_mesh, place, replicated
from rpt_jax.parts import parts_of_groups
from rpt_jax.policy import flops, sampler
from rpt_jax.policy.scorer import score
from rpt_jax.policy.stream import Stream, packed
from rpt_jax.records import Array, InputError, Params, Rollouts

log = logging.getLogger(__name__)

Phase = Literal["rollout", "score", "update", "e2e"]
TEMPERATURE = 0.8
UPDATE = UpdateConfig(
    learning_rate=1e-4, weight_decay=0.01, max_gradient_norm=1.0, on_policy=False, aggregate="sequence_mean"
)
STEPS = 1  # of the schedule, which is constant: any number would do, but each is compiled anew
CHECKED_UPDATES = 5  # after which log-probs are compared, so that the value does not depend on `repeats`


@dataclass(frozen=True)
class StepBench:
    """Rollout, scoring, GRPO update and the whole step: time, memory, share of the matmul peak."""

    workload: Workload = field(default_factory=Workload)
    phases: tuple[Phase, ...] = ("rollout", "score", "update", "e2e")
    repeats: int = 5  # timed calls of each phase
    warmup: int = 1  # calls before them, after the first, which compiles
    cores: str = ""  # CPUs to run on, e.g. 0,1; "": those of this process
    devices: int = 1  # that prompts are split over; a CPU is made into so many
    microbatches: int = 1  # of an update
    remat: Literal["none", "layer", "dots"] = "dots"  # kept for the backward pass: all | layer inputs | matmul outputs
    slots: int = 0  # rollouts decoded at one time, the others wait; 0: all
    refill: bool = True  # slots of finished rollouts; False: each batch of `slots` goes on until its longest has ended
    seed: int = 0  # of sampling, and of the rewards of e2e; weights and data have seeds of their own

    def check(self) -> None:
        """Raises InputError for what cannot be measured."""
        self.workload.check()
        if not self.phases or self.repeats < 1 or self.warmup < 0:
            raise InputError(
                f"bench: phases={list(self.phases)}, repeats={self.repeats}, warmup={self.warmup}: use one phase or "
                "more, repeats of 1 or more and warmup of 0 or more"
            )
        prompts, what = self.workload.prompts, f"devices={self.devices} times microbatches={self.microbatches}"
        if min(self.devices, self.microbatches) < 1 or prompts % self.devices:
            raise InputError(
                f"bench: workload.prompts={prompts}, {what}: use 1 or more of each, and devices that divide the prompts"
            )
        parts_of_groups(prompts, self.workload.group, self.devices * self.microbatches, f"{what} = ")
        rollouts, group = prompts * self.workload.group, self.workload.group
        if self.slots < 0 or not (self.refill or self.slots and rollouts % self.slots == self.slots % group == 0):
            raise InputError(
                f"bench: slots={self.slots}, refill={self.refill}: use 0 or more, and without refill a divisor of the "
                f"{rollouts} rollouts that is a multiple of workload.group={group}"
            )
        if self.cores and not hasattr(os, "sched_setaffinity"):
            raise InputError(f"bench: cores={self.cores!r} cannot be chosen on this system: leave it empty")
        known = [str(core) for core in range(os.cpu_count() or 1)]
        if self.cores and not set(self.cores.split(",")) <= set(known):
            raise InputError(f"bench: cores={self.cores!r}: use some of {','.join(known)}")


def bench_step(config: StepBench) -> dict:
    """Figures of each phase, taken in a fresh process: its memory and its threads are those of the step alone."""
    config.check()
    log.info("bench: measuring %s in a process of its own", ", ".join(config.phases))
    command = [sys.executable, "-m", "rpt_jax.bench.step", json.dumps(to_dict(config))]
    return run_for_json(command, "the step")


def run_for_json(command: list[str], what: str, environment: dict[str, str] | None = None) -> dict:
    """The JSON object on the last line that a command prints; raises InputError with the end of its stderr.

    SIGTERM ends the command, too, though not what it has started itself. For the main thread, which signals reach.
    """
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: not set from Python
    lines = done.stdout.splitlines()
    try:
        figures = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    except json.JSONDecodeError:
        figures = None
    if not isinstance(figures, dict):
        raise InputError(
            f"bench: {what} could not be measured: status {done.returncode}, "
            f"no JSON object as the last line of its output:\n{done.stderr[-1500:]}"
        )
    return figures


def measure_here(config: StepBench) -> dict:
    """What bench_step returns, measured in this process and on the cores that it has."""
    data, mesh = draw_data(config.workload), _mesh(config)
    params = place(draw_params(config.workload), replicated(mesh))
    phases = {"rollout": _rollout, "score": _score, "update": _update, "e2e": _whole_step}
    figures, checks = {}, {}
    with jax.set_mesh(mesh):
        for phase in dict.fromkeys(config.phases):
            figures[phase], found = phases[phase](config, params, data)
            checks |= found
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "workload": next((name for name, each in WORKLOADS.items() if each == config.workload), "custom"),
        "shape": dataclasses.asdict(config.workload),
        "params": sum(x.size for x in jax.tree.leaves(params)),
        "backend": jax.default_backend(),
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "versions": {"rpt_jax": rpt_jax.__version__} | {name: importlib.metadata.version(name) for name in packages},
        "devices": config.devices,
        "microbatches": config.microbatches,
        "remat": config.remat,
        "slots": config.slots,
        "refill": config.refill,
        "repeats": config.repeats,
        "warmup": config.warmup,
        "checks": checks,
        **figures,
    }


def _measure(config: StepBench, count: Callable, data: Data, call, after=lambda index: None) -> dict:
    return measure(call, config.warmup, config.repeats, _work(config, count, data), after)


def _work(config: StepBench, count: Callable, data: Data) -> float:
    """`count` gives the phase's FLOPs from what runs once a prompt and what runs for each response."""
    sizes = (len(data.lengths_NG), data.prompts.lengths_N.sum(), data.lengths_NG.size, data.lengths_NG.sum())
    return count(config.workload.model, *map(int, sizes), config.workload.distinct_prompt_tokens)


def _sample(config: StepBench, params: Params, data: Data, index: int) -> Rollouts:
    """Rollouts as long as the data's responses: no token ends one, limits do."""
    model, (N, G) = config.workload.model, data.lengths_NG.shape
    sampling = SampleConfig(
        group_size=G, temperature=TEMPERATURE, max_tokens=config.workload.tokens, slots=config.slots
    )
    key, never = jax.random.fold_in(jax.random.key(config.seed), index), (config.workload.vocabulary,)
    if config.refill:
        return sampler.sample(params, model, sampling, data.prompts, key, never, limits_NG=data.lengths_NG)
    parts = []
    for rows in np.arange(N).reshape(-1, config.slots // G):
        prompts, lengths_NG = jax.tree.map(lambda a, rows=rows: a[rows], data.prompts), data.lengths_NG[rows]
        longest_NG = np.full_like(lengths_NG, lengths_NG.max())
        parts.append(sampler.sample(params, model, sampling, prompts, key, never, limits_NG=longest_NG))
    joined = jax.tree.map(lambda *each: np.concatenate(each), *(part.replace(slot_steps=0) for part in parts))
    live_NGR = np.arange(config.workload.tokens)[None, None, :] < data.lengths_NG[:, :, None]
    return joined.replace(
        tokens_NGR=np.where(live_NGR, joined.tokens_NGR, 0),
        logprobs_NGR=np.where(live_NGR, joined.logprobs_NGR, 0),
        lengths_NG=data.lengths_NG,
        slot_steps=sum(part.slot_steps for part in parts),
    )


def _rollout(config, params, data):
    newest = {}

    def call(index):
        newest["rollouts"] = _sample(config, params, data, index)

    figures = _measure(config, flops.sampling, data, call)
    rollouts = newest["rollouts"]
    tokens, seconds = int(rollouts.lengths_NG.sum()), figures["s"]
    slow, usual, fast = (tokens / seconds[name] for name in ("max", "median", "min"))
    figures["tokens_per_s"] = {"min": slow, "median": usual, "max": fast}
    figures |= {"tokens": tokens, "slot_steps": rollouts.slot_steps}
    checks = {
        "rollout_lengths": sorted({int(length) for length in rollouts.lengths_NG.ravel()}),
        "rollout_distinct_in_group": len({tuple(tokens_R) for tokens_R in rollouts.tokens_NGR[0].tolist()}),
    }
    return figures, checks


@partial(jax.jit, static_argnames="model")
def _logprobs(params: Params, data: Data, stream: Stream, model) -> Array:
    prompts, responses = (data.prompts.tokens_NT, data.prompts.lengths_N), (data.tokens_NGR, data.lengths_NG)
    return score(params, model, *prompts, *responses, TEMPERATURE, stream=stream)[0]


def _mesh(config: StepBench) -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[: config.devices])


def _stream(config: StepBench, data: Data) -> Stream:
    prompts, responses = (data.prompts.tokens_NT, data.prompts.lengths_N), (data.tokens_NGR, data.lengths_NG)
    return place(packed(*prompts, *responses, units=config.devices), batch_sharding(_mesh(config)))


def _score(config, params, data):
    model = _model(config)

    def call(_=0):
        return jax.block_until_ready(_logprobs(params, data, _stream(config, data), model))

    figures = _measure(config, flops.sampling, data, call)
    logprobs_NGR = np.asarray(call(), np.float64)
    mean = float(logprobs_NGR.sum() / data.lengths_NG.sum())
    return figures, {"score_mean": mean, "score_seq0": logprobs_NGR[0, 0, :3].tolist()}


def _update(config, params, data):
    model, stream, update = _model(config), _stream(config, data), _update_config(config)
    old_NGR = np.asarray(_logprobs(params, data, stream, model))
    rollouts = Rollouts(data.tokens_NGR, data.lengths_NG, old_NGR, None)
    batch = pack(data.prompts, rollouts, data.advantages_NG, update, _mesh(config))
    state, metrics = init_state(params, make_optimizer(update, STEPS)), None
    checks = {"checked_updates": min(1 + config.warmup + config.repeats, CHECKED_UPDATES)}

    def call(_):
        nonlocal state, metrics
        state, metrics = train_step(state, batch, TEMPERATURE, model=model, config=update, steps=STEPS)
        jax.block_until_ready((state, metrics))

    def check(index):
        require_finite(metrics, index + 1)
        if index + 1 == checks["checked_updates"]:
            gained_NGR = data.advantages_NG[:, :, None] * (_logprobs(state.params, data, stream, model) - old_NGR)
            checks["update_adv_dlogp"] = float(gained_NGR.sum() / data.lengths_NG.sum())

    return _measure(config, flops.update, data, call, check) | _stream_sizes(batch.stream), checks


def _stream_sizes(stream: Stream) -> dict:
    """Its distinct tokens, and the places that run: its sizes are rounded up."""
    places_UT = np.asarray(stream.positions_UT)
    return {"stream_tokens": int((places_UT >= 0).sum()), "stream_places": places_UT.size}


def _whole_step(config, params, data):
    """On-policy, as RPT is trained: each step samples from the policy that the one before has made."""
    model = _model(config)
    update = dataclasses.replace(_update_config(config), on_policy=True)
    state, metrics = init_state(params, make_optimizer(update, STEPS)), None

    def call(index):
        nonlocal state, metrics
        rollouts = _sample(config, state.params, data, index)
        rewards_NG = np.random.default_rng((config.seed, index)).integers(0, 2, rollouts.lengths_NG.shape)
        advantages_NG = group_advantages(rewards_NG, update.advantage, update.advantage_epsilon)
        batch = pack(data.prompts, rollouts, advantages_NG, update, _mesh(config))
        state, metrics = train_step(state, batch, TEMPERATURE, model=model, config=update, steps=STEPS)
        jax.block_until_ready((state, metrics))

    def both(*counts):
        return flops.sampling(*counts) + flops.update(*counts)

    figures = _measure(config, both, data, call, lambda index: require_finite(metrics, index + 1))
    return figures, {"e2e_mismatch_max": float(metrics["mismatch_max"])}


def _update_config(config: StepBench) -> UpdateConfig:
    return dataclasses.replace(UPDATE, microbatches=config.microbatches)


def _model(config: StepBench) -> ModelConfig:
    return dataclasses.replace(config.workload.model, remat=config.remat)


def _main(job: str) -> None:
    """What the fresh process does: cores first, since the backend makes its threads when it starts."""
    config = from_dict(StepBench, json.loads(job), "bench")
    if config.cores:
        os.sched_setaffinity(0, {int(core) for core in config.cores.split(",")})
    if config.devices > 1:
        jax.config.update("jax_num_cpu_devices", config.devices)
    print(json.dumps(measure_here(config)))


if __name__ == "__main__":
    _main(sys.argv[1])
