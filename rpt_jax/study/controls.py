"""What else the FLOPs of RPT buy: next-token training, supervised answers, and expert iteration.

In: a base, the positions that RPT learns from, and a budget of FLOPs. Out: the trained policy and what it took. FLOPs
are counted as RPT's are (policy/flops.py): everything that is sampled or trained on, right or wrong, padding left out.
All stop with the batch that reaches the budget.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from rpt_jax.config import Config, MeshConfig, ModelConfig, PretrainConfig
from rpt_jax.corpus.positions import AnnotatedDocuments, Position, Positions, position_stream
from rpt_jax.corpus.templates import Template
from rpt_jax.learning.collect import Groups, Source, end_ids, roll
from rpt_jax.learning.inputs import Policy
from rpt_jax.learning.pretrain import Example, pretrain, row_batches, supervised
from rpt_jax.mesh import make_mesh
from rpt_jax.policy import flops
from rpt_jax.records import InputError, Params
from rpt_jax.study.base import END, BaseConfig, mixture_batches, stages

Batch = tuple[np.ndarray, np.ndarray]  # tokens_BT, weights_BT
BATCH_SIZE = 64  # texts or answers an update
BUCKETS = 4  # widths of rows


@dataclass(frozen=True)
class Trained:
    """A policy and what it took."""

    policy: Policy
    updates: int
    flops: float


@dataclass(frozen=True)
class ExpertConfig:
    """A round of expert iteration."""

    prompts: int = 256  # sampled from, in batches of the run's batch_size
    kept: int = 4  # right rollouts of a prompt that are trained on, at most; all different
    updates: int = 24  # on right rollouts of this round, as often as they come
    batch_size: int = 32  # rollouts an update
    learning_rate: float = 3e-4  # constant after 4 steps of warm-up; moments begin anew in each round

    def check(self) -> None:
        """Raises InputError for a count below 1."""
        for name in ("prompts", "kept", "updates", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"expert.{name}={getattr(self, name)}: use 1 or more")


def next_token_control(
    policy: Policy, base: BaseConfig, budget: float, learning_rate: float, seed: int, say: Callable
) -> Trained:
    """Continued training on the base's own last mixture, thoughts kept in."""
    batches = mixture_batches(policy[2], base, stages(base)[-1][1], BATCH_SIZE, 1_000_000 + seed)
    return spend(policy, batches, budget, learning_rate, "next tokens", say)


def sft_control(
    policy: Policy,
    annotated: AnnotatedDocuments,
    positions: Positions,
    template: Template,
    sequence_length: int,
    budget: float,
    learning_rate: float,
    seed: int,
    say: Callable,
) -> Trained:
    """Supervised answers, without a thought, to the positions that RPT learns from."""
    tokenizer = policy[2]
    head, tail = tokenizer.encode_markup(template.before), tokenizer.encode_markup(template.after)
    opening, closing = tokenizer.encode_markup("</think>\\boxed{"), tokenizer.encode_markup("}" + END)
    examples = []
    for document, index in zip(positions.documents, positions.indices, strict=True):
        tokens = annotated.documents[document].tolist()
        answer = [*opening, tokens[index], *closing]
        examples.append(supervised([*head, *tokens[:index], *tail], answer))
    batches = row_batches(examples, BATCH_SIZE, sequence_length, seed, BUCKETS)
    return spend(policy, batches, budget, learning_rate, "answers", say)


def spend(
    policy: Policy, batches: Iterator[Batch], budget: float, learning_rate: float, what: str, say: Callable
) -> Trained:
    """Trains on batches until the FLOPs of `budget` are used up; say(line) hears of it."""
    model, params, tokenizer = policy
    kept, used = affordable(model, batches, budget)
    settings = PretrainConfig(
        learning_rate=learning_rate, warmup_steps=20, beta2=0.98, steps=len(kept), schedule="linear", optimizer="adamw"
    )

    def report(step, metrics):
        say(f"    {what}: step {step}/{len(kept)}  loss {metrics['loss']:.3f}", highlight=False)

    params = jax.device_get(pretrain(params, model, settings, iter(kept), report, report_every=100))
    return Trained((model, params, tokenizer), len(kept), used)


def affordable(
    model: ModelConfig, batches: Iterator[Batch], budget: float, most: float = float("inf")
) -> tuple[list[Batch], float]:
    """(batches, their FLOPs) up to the one that reaches `budget`, `most` of them; tokens in padding are not counted."""
    kept, used = [], 0.0
    while used < budget and len(kept) < most:
        batch = next(batches)
        used += flops.pretraining(model, len(batch[0]), int((batch[0] != 0).sum()))
        kept.append(batch)
    return kept, used


def expert_iteration(
    policy: Policy,
    config: Config,
    annotated: AnnotatedDocuments,
    positions: Positions,
    template: Template,
    budget: float,
    expert: ExpertConfig,
    say: Callable,
) -> Trained:
    """Rounds of sampling and of supervised training on what came out right  [RAFT, arXiv 2304.06767].

    Maximises sum log p(o | prompt) over right rollouts o (prefix matching), drawn from the policy of the round before;
    wrong ones are paid for and thrown away. A round goes on from the last policy, where ReST-EM [arXiv 2312.06585]
    trains the base anew. Prompts, their order, group size and temperature are those of an RPT run with `config`. A
    round without a right rollout trains on nothing. On one device.
    """
    expert.check()
    model, params, tokenizer = policy
    mesh, ends = make_mesh(MeshConfig(data=1), jax.devices()[:1]), end_ids(tokenizer, config.sample.end_tokens)
    source = Source(config, model, tokenizer, template, annotated.documents, ends, mesh)
    stream, sampled, updates, used = iter(position_stream(positions, seed=config.seed)), 0, 0, 0.0
    while used < budget:
        rounds, cost = sample_round(source, params, stream, sampled, budget - used, expert.prompts)
        sampled, used = sampled + len(rounds), used + cost
        examples = [example for groups in rounds for example in right_examples(groups, expert.kept)]
        share = np.mean([groups.right_NG for groups in rounds])
        say(f"    expert iteration: {used / budget:.0%} spent, {share:.3f} right, {len(examples)} to learn from")
        if examples and used < budget:
            width = config.prompt.max_tokens + config.sample.max_tokens
            batches = row_batches(examples, expert.batch_size, width, config.seed + sampled, BUCKETS)
            batches, cost = affordable(model, batches, budget - used, expert.updates)
            params = train_on(params, model, batches, expert)
            updates, used = updates + len(batches), used + cost
    return Trained((model, jax.device_get(params), tokenizer), updates, used)


def sample_round(
    source: Source, params: Params, stream: Iterator[Position], before: int, budget: float, prompts: int
) -> tuple[list[Groups], float]:
    """(groups, FLOPs) of batches until there are `prompts` or `budget` is reached; `before` batches came before."""
    rounds, used, N = [], 0.0, source.config.batch_size
    while used < budget and len(rounds) * N < prompts:
        key = jax.random.fold_in(jax.random.key(source.config.seed), before + len(rounds))
        groups, _ = roll(source, params, tuple(next(stream) for _ in range(N)), key)
        lengths_N, lengths_NG = groups.prompts.lengths_N, groups.rollouts.lengths_NG
        used += flops.sampling(source.model, N, int(lengths_N.sum()), lengths_NG.size, int(lengths_NG.sum()))
        rounds.append(groups)
    return rounds, used


def right_examples(groups: Groups, kept: int) -> list[Example]:
    """Prompt and response of right rollouts: up to `kept` of a prompt, the first members, none twice."""
    examples = []
    for n, length in enumerate(groups.prompts.lengths_N):
        members = np.flatnonzero(groups.right_NG[n])
        responses = [tuple(groups.rollouts.tokens_NGR[n, g, : groups.rollouts.lengths_NG[n, g]]) for g in members]
        different = list(dict.fromkeys(responses))[:kept]
        examples += [supervised(groups.prompts.tokens_NT[n, :length], response) for response in different]
    return examples


def train_on(params: Params, model: ModelConfig, batches: list[Batch], expert: ExpertConfig) -> Params:
    """One update a batch."""
    settings = PretrainConfig(
        learning_rate=expert.learning_rate, schedule="constant", warmup_steps=4, beta2=0.98, steps=len(batches)
    )
    return pretrain(params, model, settings, iter(batches))
