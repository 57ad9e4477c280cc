"""Positions -> rewarded rollouts of one step, with dynamic sampling.

In: the position stream, the policy. Out: N prompts, G rollouts each, their rewards, and what the step's metrics say of
them. Paper: its training table, "dynamic sampling (drop groups that are all right or all wrong, refill)", which is
DAPO's [arXiv 2503.14476, section 3.2]; how it refills is open.

Of several processes each reads the documents of its own rows, and parses and rewards what came of them; then all hold
the whole step on the host (prompts are short, rollouts are needed whole for the update), so choices are the same
everywhere and a run resumes on any number of processes.

Dynamic sampling here. Rounds of N prompts (always N, so that nothing is compiled anew) until N groups disagree or the
rounds are used up; then groups that agree fill the batch, with advantage 0. Groups beyond N: their positions go into
a queue that the next step draws from first. The queue holds positions and not rollouts, so that every update stays
exactly on-policy; the price is that their rollouts are made again, by a policy for which they are likely to disagree.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from rpt_jax.agreement import together
from rpt_jax.config import Config, ModelConfig
from rpt_jax.corpus.positions import Position
from rpt_jax.corpus.prompts import THOUGHT_END, assemble, contexts_of, parse_answers
from rpt_jax.corpus.templates import Template
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.learning import judge as judging
from rpt_jax.learning import next_token
from rpt_jax.learning.advantages import groups_agree
from rpt_jax.learning.rewards import Outcomes, answer_logprobs, reward, right
from rpt_jax.learning.update import TrainState
from rpt_jax.mesh import all_rows, batch_rows
from rpt_jax.policy.sampler import sample
from rpt_jax.policy.stream import padded_length
from rpt_jax.records import Array, InputError, Params, Prompts, Rollouts


@dataclass(frozen=True)
class Source:
    """What stays the same from step to step."""

    config: Config
    model: ModelConfig
    tokenizer: Tokenizer
    template: Template
    documents: Mapping[int, np.ndarray] | Sequence[np.ndarray]  # [number] -> tokens
    end_ids: tuple[int, ...]
    mesh: Mesh
    judge: judging.Judge | None = None  # of the answers, where documents are questions


@dataclass(frozen=True)
class Groups:
    """Prompts with their rewarded rollouts, on the host; rows belong together."""

    positions: tuple[Position, ...]  # N
    prompts: Prompts
    rollouts: Rollouts
    answered_NG: np.ndarray  # bool, there is an answer to reward
    rewards_NG: np.ndarray
    right_NG: np.ndarray  # bool, the answer is right (rewards.right), whatever it earned
    learnt_NG: np.ndarray  # int32, the update learns from so many tokens of a response, its first ones
    flops_reward: float = 0.0  # of forward passes in which rewards were computed
    verdicts_NG: np.ndarray | None = None  # int8, of the judge of questions


def end_ids(tokenizer: Tokenizer, pieces: Sequence[str]) -> tuple[int, ...]:
    """Ids of the pieces that end a response, the tokenizer's end of text where none is named; raises InputError."""
    if not pieces:
        if tokenizer.end_of_text is None:
            raise InputError("the tokenizer names no end of text: say what ends a response with --sample.end-tokens")
        return (tokenizer.end_of_text,)
    unknown = [piece for piece in pieces if tokenizer.id_of(piece) is None]
    if unknown:
        raise InputError(f"sample.end_tokens: the tokenizer has no token {unknown[0]!r}: name one of its pieces")
    return tuple(tokenizer.id_of(piece) for piece in pieces)


def collect(
    source: Source,
    params: Params,
    stream: Iterator[Position],
    queue: Sequence[Position],
    step: int,
    state: TrainState | None = None,
) -> tuple[Groups, tuple[Position, ...], dict]:
    """(the step's N groups, queue for the next step, metrics) of step `step`, counted from 0.

    params: the policy as sampling wants it. state: what a reward that scores needs (information_gain), left intact.

    Metrics tell of all rollouts sampled in the step, those of dropped groups too: reward, accuracy (share of rollouts
    whose answer is right whatever the reward: by prefix matching, of a segment all of it, of questions as the judge
    says), format_rate (share with an answer), solved_share (of groups with a right answer), all_right_share and
    all_wrong_share (of groups), zero_variance_share (of groups whose rewards agree), length and length_max (tokens),
    unfinished_share (stopped by the limit), sampled_prompts, sampled_rollouts, sampled_prompt_tokens, sampled_tokens,
    live_slot_share (of all slots of all decode steps, those that made a token that counts), rounds, queued, refilled
    (groups in the batch that agree although dynamic sampling is on), flops_reward (of forward passes for rewards),
    seconds of sampling and of rewarding; of questions judge_timeouts and judge_crashes (answers whose judging was
    stopped, or ended itself).
    """
    dynamic = source.config.dynamic_sampling
    is_dynamic = 0 <= dynamic.from_step <= step
    key = jax.random.fold_in(jax.random.key(source.config.seed), step)
    N = source.config.batch_size
    rounds: list[Groups] = []
    spent: list[tuple[float, float]] = []
    kept: list[tuple[int, int]] = []  # (round, row)
    dropped: list[tuple[int, int]] = []
    while not rounds or (is_dynamic and len(kept) < N and len(rounds) <= dynamic.max_rounds):
        positions, queue = draw(stream, queue, N)
        # Of a round, too: where positions are few they come again, and the same rollouts would say nothing new.
        own_key = jax.random.fold_in(key, len(rounds)) if rounds else key
        made, seconds = roll(source, params, positions, own_key, state)
        rounds.append(made)
        spent.append(seconds)
        agree_N = np.asarray(groups_agree(made.rewards_NG)) & is_dynamic
        for row in range(N):
            (dropped if agree_N[row] else kept).append((len(rounds) - 1, row))
    surplus = tuple(rounds[r].positions[row] for r, row in kept[N:])
    groups = take(rounds, (kept + dropped)[:N])
    counts = {"rounds": len(rounds), "queued": len(queue) + len(surplus), "refilled": max(0, N - len(kept))}
    seconds_sample, seconds_reward = map(sum, zip(*spent, strict=True))
    spent_on = {"flops_reward": sum(part.flops_reward for part in rounds)}
    spent_on |= {"seconds_sample": seconds_sample, "seconds_reward": seconds_reward}
    return groups, (*queue, *surplus), describe(rounds) | counts | spent_on


def draw(
    stream: Iterator[Position], queue: Sequence[Position], count: int
) -> tuple[tuple[Position, ...], tuple[Position, ...]]:
    """(count positions, what is queued then): the queue first, then the stream.

    One that comes again, as at the end of an epoch, waits in the queue for the next round: in one round it would get
    the same rollouts twice. No more than `count` wait so, for a stream of fewer positions has no others.
    """
    queue, drawn, places, again = deque(queue), [], set(), []
    while len(drawn) < count:
        position = queue.popleft() if queue else next(stream)
        place = position.document, position.index
        (again if place in places and len(again) < count else drawn).append(position)
        places.add(place)
    return tuple(drawn), (*again, *queue)


def roll(
    source: Source, params: Params, positions: tuple[Position, ...], key: Array, state: TrainState | None = None
) -> tuple[Groups, tuple[float, float]]:
    """One round: prompts, G rollouts each, answers, rewards; and the seconds of sampling and of rewarding.

    params, state: as in collect.
    """
    config, N = source.config, len(positions)
    start = time.perf_counter()
    rows = batch_rows(N, source.mesh)
    with together():
        mine = [positions[row] for row in rows]
        own = assemble(source.tokenizer, source.template, config.prompt, source.documents, mine)
    wide = own.replace(tokens_NT=_resize(own.tokens_NT, config.prompt.max_tokens))  # in all processes alike
    prompts = all_rows(wide, rows, N)
    prompts = prompts.replace(tokens_NT=_fit(prompts.tokens_NT, prompts.lengths_N))
    rollouts = sample(params, source.model, config.sample, prompts, key, source.end_ids)
    sampled = time.perf_counter()
    with jax.profiler.TraceAnnotation("reward"):
        groups = _rewarded(source, positions, prompts, rollouts, own, rows, state)
    return groups, (sampled - start, time.perf_counter() - sampled)


def _rewarded(
    source: Source,
    positions: tuple[Position, ...],
    prompts: Prompts,
    rollouts: Rollouts,
    own: Prompts,
    rows: np.ndarray,
    state: TrainState | None,
) -> Groups:
    """All rows, in all processes; `own` are the prompts of this one's `rows`, whose responses it parses and rewards."""
    config, tokenizer = source.config, source.tokenizer
    responses = rollouts.tokens_NGR[rows], rollouts.lengths_NG[rows], rollouts.finished_NG[rows]
    answers = parse_answers(tokenizer, *responses)
    outcomes, learnt_NG, cost = Outcomes(answers, own, whole=is_whole(config)), rollouts.lengths_NG, 0.0
    if config.reward.kind in ("dense", "conditional_dense"):
        first_NG = answer_logprobs(tokenizer.bytes_of, *responses[:2], rollouts.logprobs_NGR[rows])
        outcomes = dataclasses.replace(outcomes, first_logprobs_NG=first_NG)
    elif config.reward.kind == "information_gain":
        mine = [positions[row] for row in rows]
        after_NG, plain_N, learnt_NG, cost = _next_token(source, state, prompts, rollouts, rows, mine)
        outcomes = dataclasses.replace(outcomes, thought_logprobs_NG=after_NG[rows], plain_logprobs_N=plain_N[rows])
    answered_NG = np.array([[answer is not None for answer in group] for group in answers])
    with together():
        if config.reward.kind == "verified":
            verdicts_NG = judging.verdicts(source.judge, judging.references_of(own), answers)
            outcomes = dataclasses.replace(outcomes, verdicts_NG=verdicts_NG)
        elif config.reward.kind == "judged":
            outcomes = dataclasses.replace(outcomes, contexts_N=contexts_of(tokenizer, source.template, own))
        made = answered_NG, reward(config.reward, outcomes), right(outcomes), outcomes.verdicts_NG
    *made, verdicts_NG = all_rows(made, rows, len(positions))
    return Groups(positions, prompts, rollouts, *made, learnt_NG, cost, verdicts_NG)


def is_whole(config: Config) -> bool:
    """Targets are segments, which are predicted whole."""
    return config.positions.target != "next_token"


def _next_token(
    source: Source, state: TrainState, prompts: Prompts, rollouts: Rollouts, rows: np.ndarray, mine: Sequence[Position]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(log-prob of the next token after each thought [N, G], without one [N], tokens of thoughts [N, G], FLOPs).

    All rows, in all processes; each reads the documents and responses of its own.
    """
    config, tokenizer, model, (N, G) = source.config, source.tokenizer, source.model, rollouts.lengths_NG.shape
    with together():
        read = next_token.thought_lengths(tokenizer.bytes_of, rollouts.tokens_NGR[rows], rollouts.lengths_NG[rows])
        texts = next_token.plain_contexts(source.documents, mine, config.prompt.max_tokens)
    (thoughts_NG, closed_NG), (plain, targets_N) = all_rows((read, texts), rows, N)
    closing, opening = (tokenizer.encode_markup(text) for text in (THOUGHT_END.decode(), config.reward.opening))
    after = next_token.after_thoughts(prompts, rollouts, thoughts_NG, closed_NG, closing, opening)
    chunk = config.update.token_chunk
    after_B = next_token.next_logprobs(
        state.params, model, after, np.repeat(targets_N, G), source.mesh, config.update.microbatches, chunk
    )
    plain_N = next_token.next_logprobs(state.average, model, plain, targets_N, source.mesh, 1, chunk)
    cost = next_token.scoring_flops(model, after, prompts, plain)
    return after_B.reshape(N, G), plain_N, thoughts_NG, cost


def take(rounds: Sequence[Groups], rows: Sequence[tuple[int, int]]) -> Groups:
    """The groups at (round, row), their prompts padded to one length; without what describe reads of whole rounds."""
    T = max(part.prompts.tokens_NT.shape[1] for part in rounds)

    def gather(pick: Callable[[Groups], Array], width: int | None = None) -> np.ndarray:
        lines = [np.asarray(pick(rounds[r])[row]) for r, row in rows]
        return np.stack(lines if width is None else [_resize(line, width) for line in lines])

    others = [field.name for field in dataclasses.fields(Prompts) if field.name != "tokens_NT"]
    prompts = Prompts(
        **{name: gather(lambda part, name=name: getattr(part.prompts, name)) for name in others},
        tokens_NT=gather(lambda part: part.prompts.tokens_NT, T),
    )
    rollouts = Rollouts(
        lengths_NG=gather(lambda part: part.rollouts.lengths_NG),
        finished_NG=gather(lambda part: part.rollouts.finished_NG),
        tokens_NGR=gather(lambda part: part.rollouts.tokens_NGR),
        logprobs_NGR=gather(lambda part: part.rollouts.logprobs_NGR),
    )
    return Groups(
        tuple(rounds[r].positions[row] for r, row in rows),
        prompts,
        rollouts,
        gather(lambda part: part.answered_NG),
        gather(lambda part: part.rewards_NG),
        gather(lambda part: part.right_NG),
        gather(lambda part: part.learnt_NG),
    )


def describe(rounds: Sequence[Groups]) -> dict:
    """Metrics of all groups sampled in a step; see collect."""
    rewards_NG = np.concatenate([part.rewards_NG for part in rounds])
    lengths_NG = np.concatenate([part.rollouts.lengths_NG for part in rounds])
    finished_NG = np.concatenate([part.rollouts.finished_NG for part in rounds])
    answered_NG = np.concatenate([part.answered_NG for part in rounds])
    right_NG = np.concatenate([part.right_NG for part in rounds])
    slot_steps = sum(part.rollouts.slot_steps for part in rounds)
    return {
        "reward": float(rewards_NG.mean()),
        "accuracy": float(right_NG.mean()),
        "format_rate": float(answered_NG.mean()),
        "solved_share": float(right_NG.any(axis=1).mean()),
        "zero_variance_share": float(np.asarray(groups_agree(rewards_NG)).mean()),
        "all_right_share": float(right_NG.all(axis=1).mean()),
        "all_wrong_share": float((~right_NG.any(axis=1)).mean()),
        "length": float(lengths_NG.mean()),
        "length_max": int(lengths_NG.max()),
        "unfinished_share": float(1 - finished_NG.mean()),
        "sampled_prompts": len(rewards_NG),
        "sampled_rollouts": rewards_NG.size,
        "sampled_prompt_tokens": int(sum(part.prompts.lengths_N.sum() for part in rounds)),
        "sampled_tokens": int(lengths_NG.sum()),
        "live_slot_share": float(lengths_NG.sum() / max(1, lengths_NG.sum(), slot_steps)),
    } | judging.counts([part.verdicts_NG for part in rounds if part.verdicts_NG is not None])


def _fit(tokens_NT: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """Padded to one of few lengths."""
    return _resize(tokens_NT, padded_length(max(64, int(lengths_N.max()))))


def _resize(line: np.ndarray, width: int) -> np.ndarray:
    """Last axis cut or padded with 0 to `width`."""
    padding = [(0, 0)] * (line.ndim - 1) + [(0, max(0, width - line.shape[-1]))]
    return np.pad(line[..., :width], padding)
