"""What a step on a TPU slice costs by its shapes alone: FLOPs, bytes, and the seconds that they take at peak speed.

In: settings and the name of a slice. Out: figures of each phase; nothing is compiled. Prompts and responses are as long
as they may be, unless response_tokens says how long responses are on average. Seconds are the slowest of arithmetic,
memory and interconnect, each at its peak, which no run reaches.
"""

import functools
import math
from dataclasses import dataclass, field

from rpt_jax.config import MeshConfig, ModelConfig, PromptConfig, RewardConfig, SampleConfig, UpdateConfig
from rpt_jax.parts import parts_of_groups
from rpt_jax.policy import flops
from rpt_jax.policy.slots import first_seating
from rpt_jax.records import InputError


@dataclass(frozen=True)
class Chip:
    """What a chip has, by Google's published tables [cloud.google.com/tpu/docs, system architecture]."""

    hbm_gib: float
    flops: float  # a second, bfloat16
    hbm: float  # bytes a second
    ici: float  # bytes a second, out of a chip


CHIPS = {
    "v4": Chip(32, 275e12, 1228e9, 300e9),
    "v5e": Chip(16, 197e12, 819e9, 200e9),
    "v5p": Chip(95, 459e12, 2765e9, 600e9),
    "v6e": Chip(32, 918e12, 1640e9, 448e9),
}


@dataclass(frozen=True)
class PlanRun:
    """Memory and seconds of each phase of a step on a TPU slice, without one."""

    topology: str = "v5e:4x4"  # chip:sizes of the slice; whole hosts: v5e:2x2 is the smallest
    choose_mesh: bool = False  # or --mesh auto: the fastest mesh that fits, by estimate
    response_tokens: int = 0  # of a response on average, for seconds; 0: sample.max_tokens
    steps: int = 1000  # updates of the run
    batch_size: int = 256  # N, prompts a step
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)

    @property
    def averaged(self) -> bool:
        """Whether the run keeps an average of its policies."""
        return self.reward.kind == "information_gain"


def chip_of(topology: str) -> Chip:
    """The chip that a slice is made of; raises InputError for one that CHIPS has not."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise InputError(f"topology={topology!r}: name a slice of {', '.join(CHIPS)}, such as v5p:4x4x4")
    return CHIPS[name]


PHASES = ("prefill", "decode", "score", "update")  # those with an estimate of time


def slots_of(config: PlanRun) -> int:
    """Rollouts decoded at one time: whole groups in every unit."""
    units = config.mesh.data * config.mesh.fsdp
    seating, _ = first_seating(config.batch_size // units, config.sample.group_size, units, config.sample.slots)
    return seating.rollouts_US.size


def _tokens(config: PlanRun) -> tuple[int, int, int, int]:
    """(prompts, their tokens, rollouts, their tokens) of a step."""
    N, G = config.batch_size, config.sample.group_size
    return N, N * config.prompt.max_tokens, N * G, N * G * (config.response_tokens or config.sample.max_tokens)


def model_flops(config: PlanRun, phase: str) -> float:
    """Useful FLOPs of a phase on the whole slice; nothing that is computed twice counts twice."""
    N, prompts, rollouts, responses = _tokens(config)
    both = flops.sampling(config.model, N, prompts, rollouts, responses)
    first = flops.forward(config.model, prompts, prompts / N / 2, N)
    rows = (config.update.next_token_sequences or N) if config.update.next_token_share else 0
    text = flops.pretraining(config.model, rows, rows * config.update.next_token_length)
    return {"prefill": first, "decode": both - first, "score": both, "update": 3 * both + text}[phase]


@functools.cache
def _weights(model: ModelConfig) -> int:
    """Parameters that a pass reads: of an embedding that is not the head only a few rows."""
    D, H, K, C, F = model.width, model.heads, model.kv_heads, model.head_channels, model.hidden
    layers = model.layers * (D * C * (2 * H + 2 * K) + 3 * D * F)
    return layers + model.vocab_size * D


def collective_bytes(config: PlanRun, phase: str) -> float:
    """Bytes that a chip sends in a phase: weights gathered over fsdp, activations summed over tensor, gradients.

    By rings: a chip sends (1 - 1/n) of what n chips gather or scatter, and twice that of what they sum up. Activations
    are summed over `tensor` behind the embedding and twice a layer, in the backward pass twice a layer again (and once
    for layers that are computed again) and before the head, in float32. Layers are gathered by each microbatch,
    forward and backward, embedding and head once. Left out: what is small beside it (softmax, draws), and the keys'
    and values' gradients of heads that several chips share, which are summed block by block.
    """
    model, mesh = config.model, config.mesh
    size = 2 if model.dtype == "bfloat16" else 4
    _, prompts, _, responses = _tokens(config)
    units, parts = mesh.data * mesh.fsdp, config.update.microbatches
    table = model.vocab_size * model.width  # the head, and the embedding where that is another
    tables = table * (1 if model.tied_head else 2)
    layers = _weights(model) - table
    once, gather = size / mesh.tensor, 1 - 1 / mesh.fsdp
    a_sum = 2 * (1 - 1 / mesh.tensor) * model.width / units  # of a token, numbers
    forward = (2 * model.layers + 1) * a_sum * size
    if phase == "prefill":
        return (layers + tables) * once * gather + prompts * forward
    if phase == "decode":
        return responses * forward
    prompts *= parts_of_groups(config.batch_size, config.sample.group_size, units * parts)  # each with its prompt
    if phase == "score":
        return (parts * layers + tables) * once * gather + (prompts + responses) * forward
    backward = (3 if model.remat == "layer" else 2) * model.layers * a_sum * size
    gathered = (2 * parts * layers + tables) * once * gather
    summed = (layers + tables - table) * size + table * 4  # the embedding's gradient in float32 (decoder.look_up)
    gradients = parts * summed / mesh.tensor * (1 - 1 / units)
    return gathered + gradients + (prompts + responses) * (forward + backward) + responses * a_sum * 4


def step_seconds(config: PlanRun) -> float:
    """Of all phases that each step has; no extra rounds of dynamic sampling, no passes of a reward by the model."""
    phases = PHASES if config.update.kl_coefficient else [phase for phase in PHASES if phase != "score"]
    return sum(seconds(config, phase) for phase in phases)


def seconds(config: PlanRun, phase: str) -> float:
    """The slowest of arithmetic, memory and interconnect, each at its peak."""
    chip, mesh = chip_of(config.topology), config.mesh
    chips = mesh.data * mesh.fsdp * mesh.tensor
    size = 2 if config.model.dtype == "bfloat16" else 4
    passes = {"score": config.update.microbatches, "update": 3 * config.update.microbatches}.get(phase, 1)
    read = _weights(config.model) * size / mesh.tensor * passes
    if phase == "decode":
        _, _, rollouts, responses = _tokens(config)
        tokens = config.response_tokens or config.sample.max_tokens
        seen = config.prompt.max_tokens / (1 if config.sample.slots else config.sample.group_size) + tokens / 2
        cached = 2 * config.model.layers * config.model.kv_heads * config.model.head_channels * size
        copies = mesh.tensor // math.gcd(mesh.tensor, config.model.kv_heads)
        calls = tokens * rollouts / slots_of(config)
        read = read * calls + responses * seen * cached * copies / chips
    return max(
        model_flops(config, phase) / chips / chip.flops,
        read / chip.hbm,
        collective_bytes(config, phase) / chip.ici,
    )
