"""Held-out positions -> next-token accuracy in both modes, on the same positions [RPT, arXiv 2506.08007, section 4].

In: a policy, documents as token ids, and named sets of positions (easy, medium and hard, a family of problems, ...).
Out: `Evaluation`, one row a position, and from it plain figures for each set. A position that is in several sets is
evaluated once.

    arg-max     one forward pass over the document before the position, no prompt around it but the start token that
                the annotation had, if any: the most probable token is right if it is the true one
    reasoning   rollouts from the prompt, their answers parsed and rewarded by prefix matching as in training. Most of
                the paper's 3.31 % before training is failure of format, so the format rate stands beside it

Where the targets are segments (positions.target), reasoning is right that names all of the segment, as in training;
prefix matching within it stands beside that, and there is no arg-max.

The key of a rollout depends on the seed and its position only: policies evaluated with one seed are compared under
the same noise, and neither the batch size nor the other positions change a result.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax import preemption
from rpt_jax.config import EvaluateConfig, ModelConfig, PromptConfig, SampleConfig
from rpt_jax.corpus.positions import Positions
from rpt_jax.corpus.prompts import assemble, parse_answers
from rpt_jax.corpus.templates import Template
from rpt_jax.learning.rewards import Outcomes, prefix_matching, right
from rpt_jax.mesh import batch_sharding, place, to_host
from rpt_jax.policy import decoder
from rpt_jax.policy.proxy import text_logits
from rpt_jax.policy.sampler import sample as sample_rollouts
from rpt_jax.policy.stream import padded_length
from rpt_jax.records import Array, InputError, Params, Prompts, Rollouts
from rpt_jax.study.continuations import padded_rows
from rpt_jax.study.held_out import Splits, choose_positions

KEY = 2**31 - 1  # folded into the seed's key where training folds its step in, so that the two never share a key

Documents = Mapping[int, np.ndarray] | Sequence[np.ndarray]  # [document number] -> token ids


@dataclass(frozen=True)
class Reasoning:
    """What the rollouts of each position came to."""

    rewards_NG: np.ndarray  # float32, 1 where the answer is right
    lengths_NG: np.ndarray  # int32 tokens sampled, the end token included
    answers: list[list[bytes | None]]  # N rows of G; None: nothing that can be parsed
    responses: list[list[np.ndarray]]  # token ids, a prefill included
    prefix_NG: np.ndarray  # float32, prefix matching; that of a next token is rewards_NG

    @property
    def formatted_NG(self) -> np.ndarray:
        """bool: the response has an answer, right or wrong."""
        formatted = [answer is not None for group in self.answers for answer in group]
        return np.array(formatted, bool).reshape(self.rewards_NG.shape)


@dataclass(frozen=True)
class Evaluation:
    """Results of all distinct positions, one row each, and the rows of each split."""

    positions: Positions
    splits: dict[str, np.ndarray]  # int rows, ascending
    argmax_tokens_N: np.ndarray | None  # int32; None for segments
    argmax_right_N: np.ndarray | None  # bool
    sampled: Reasoning
    greedy: Reasoning | None
    pass_at: int  # k of Pass@k

    def figures(self, rows) -> dict:
        """Accuracies over some rows (indexes or a mask), fit for JSON.

        argmax, or for segments, which have none, prefix: the mean of prefix matching within the segment; and what
        by_position and means_and_errors name.
        """
        if self.argmax_right_N is None:
            values = {"prefix": self.sampled.prefix_NG.mean(axis=1, dtype=np.float64)}
        else:
            values = {"argmax": self.argmax_right_N}
        values |= by_position(self.sampled, self.greedy, self.pass_at)
        return means_and_errors({name: value_N[rows] for name, value_N in values.items()})

    def summary(self) -> dict[str, dict]:
        """The figures of each split."""
        return {name: self.figures(rows) for name, rows in self.splits.items()}


def evaluate(
    params: Params,
    model: ModelConfig,
    tokenizer,
    template: Template,
    documents: Documents,
    splits: Splits,
    *,
    prompt: PromptConfig,
    sample: SampleConfig,
    config: EvaluateConfig,
    seed: int,
    end_ids: tuple[int, ...],
    prefill: Sequence[int] = (),
    start_ids: Sequence[int] = (),
    banned_ids: tuple[int, ...] = (),
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Next-token accuracy of a policy at the positions of `splits`; `.summary()` has the figures by split.

    Args:
        prompt: its max_tokens is the longest context of the arg-max, too.
        sample: cuts (top-k, ...) and limits of the rollouts; group size and temperature are config's.
        config: at most config.positions of each split are used, see choose_positions.
        end_ids: tokens that end a response (learning/collect.end_ids).
        prefill: token ids put behind every prompt, the first of the response: they force a way of thinking.
        start_ids: tokens put before the contexts of the arg-max.
        banned_ids: tokens that are no text (such as <think>), never the arg-max.
        mesh: batches are split over its data and fsdp axes; params lie on it.
        progress: called with (batches done, batches in all).

    Raises InputError for settings that clash and for positions without a token before them.
    """
    # Over 40 lines for its arguments and what is to be said of them; its steps pass on nearly all of them.
    check_settings(config)
    positions, rows_of = choose_positions(splits, config.positions, seed)
    if not len(positions):
        raise InputError(f"no position to evaluate in {', '.join(splits) or 'no split'}: give held-out positions")
    whole, ways = positions.lengths is not None, samplings(sample, config)
    around = {"start_ids": start_ids, "limit": prompt.max_tokens, "banned_ids": banned_ids, "mesh": mesh}
    batches = ((not whole) + len(ways)) * -(-len(positions) // config.batch_size)
    shared = {"batch_size": config.batch_size, "tick": ticking(progress, batches)}
    tokens_N = right_N = None
    if not whole:
        tokens_N = argmax_tokens(params, model, documents, positions, **around, **shared)
        truth_N = [documents[d][t] for d, t in zip(positions.documents, positions.indices, strict=True)]
        right_N = tokens_N == np.array(truth_N, np.int32)
    policy = decoder.gathered(params, model), model, tokenizer
    think = partial(reason, *policy, template, documents, positions, prompt=prompt, seed=seed)
    shared |= {"end_ids": end_ids, "prefill": prefill}
    sampled, *greedy = [think(sampling=way, **shared) for way in ways]
    return Evaluation(
        positions=positions,
        splits=rows_of,
        argmax_tokens_N=tokens_N,
        argmax_right_N=right_N,
        sampled=sampled,
        greedy=greedy[0] if greedy else None,
        pass_at=config.pass_at or config.group_size,
    )


def samplings(sample: SampleConfig, config: EvaluateConfig) -> list[SampleConfig]:
    """How rollouts are drawn: config.group_size at config.temperature, and a greedy one where config.greedy asks."""
    ways = [dataclasses.replace(sample, group_size=config.group_size, temperature=config.temperature)]
    if config.greedy:
        ways.append(dataclasses.replace(sample, group_size=1, temperature=0.0))
    return ways


def ticking(progress: Callable[[int, int], None] | None, batches: int) -> Callable[[], None]:
    """What is called after each batch: it tells `progress`, if any, how many are done and how many there are."""
    done = itertools.count(1)
    return lambda: progress(next(done), batches) if progress else None


def argmax_tokens(
    params: Params,
    model: ModelConfig,
    documents: Documents,
    positions: Positions,
    *,
    limit: int,
    batch_size: int,
    start_ids: Sequence[int] = (),
    banned_ids: tuple[int, ...] = (),
    mesh: Mesh | None = None,
    tick: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Most probable token at each position given start_ids and the last tokens before it, `limit` in all; int32 [N]."""
    start_S, places = np.array(start_ids, np.int32), zip(positions.documents, positions.indices, strict=True)
    contexts = [np.concatenate([start_S, documents[d][max(0, t + len(start_S) - limit) : t]]) for d, t in places]
    tokens_NT, lengths_N = padded_rows(contexts)
    if not positions.indices.all():
        document = positions.documents[np.argmin(positions.indices)]
        raise InputError(
            f"position 0 of document {document} has no token before it to predict from: use positions.minimum_context "
            "of 1 or more"
        )
    best_N = np.zeros(len(contexts), np.int32)
    for rows, filled, T in _batches(lengths_N, batch_size):
        preemption.passing()
        batch = _on(mesh, (tokens_NT[filled, :T], lengths_N[filled]))
        best_N[rows] = to_host(most_probable(params, model, tuple(banned_ids), *batch))[: len(rows)]
        tick()
    return best_N


@partial(jax.jit, static_argnums=(1, 2))
def most_probable(
    params: Params, model: ModelConfig, banned_ids: tuple[int, ...], tokens_BT: Array, lengths_B: Array
) -> Array:
    """The arg-max of what follows each right-padded row, int32 [B]; of equal ones the lowest id."""
    positions_BT = decoder.positions_from_lengths(lengths_B, tokens_BT.shape[1])
    hidden_BTD, _ = decoder.forward(params, model, tokens_BT, positions_BT)
    last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return jnp.argmax(text_logits(params, model, last_BD, banned_ids), axis=-1).astype(jnp.int32)


def reason(
    params: Params,
    model: ModelConfig,
    tokenizer,
    template: Template,
    documents: Documents,
    positions: Positions,
    *,
    prompt: PromptConfig,
    sampling: SampleConfig,
    seed: int,
    end_ids: tuple[int, ...],
    batch_size: int,
    prefill: Sequence[int] = (),
    tick: Callable[[], None] = lambda: None,
) -> Reasoning:
    """Rollouts at each position (of choose_positions), their answers and rewards; prefill as in evaluate."""
    sampling.check()
    prefill_R = np.asarray(prefill, np.int32)
    prompts = _prompts(tokenizer, template, prompt, documents, positions, prefill_R)
    key = jax.random.fold_in(jax.random.key(seed), KEY)
    N, G = len(positions), sampling.group_size
    scores_NG = np.zeros((N, G), np.float32)
    made = Reasoning(scores_NG, np.zeros((N, G), np.int32), [[]] * N, [[]] * N, scores_NG.copy())
    for rows, filled, T in _batches(prompts.lengths_N, batch_size):
        batch = jax.tree.map(lambda leaf, filled=filled: leaf[filled], prompts)
        batch = batch.replace(tokens_NT=batch.tokens_NT[:, :T])
        rollouts = _with_prefill(sample_rollouts(params, model, sampling, batch, key, end_ids), prefill_R)
        answers = parse_answers(tokenizer, rollouts.tokens_NGR, rollouts.lengths_NG, rollouts.finished_NG)
        made.prefix_NG[rows] = prefix_matching(answers, batch)[: len(rows)]
        made.rewards_NG[rows] = right(Outcomes(answers, batch, whole=positions.lengths is not None))[: len(rows)]
        made.lengths_NG[rows] = rollouts.lengths_NG[: len(rows)] - len(prefill_R)
        for n, row in enumerate(rows):
            made.answers[row] = answers[n]
            made.responses[row] = [
                tokens_R[:length].copy()
                for tokens_R, length in zip(rollouts.tokens_NGR[n], rollouts.lengths_NG[n], strict=True)
            ]
        tick()
    return made


def by_position(sampled: Reasoning, greedy: Reasoning | None, pass_at: int) -> dict[str, np.ndarray]:
    """What each position came to, [N], by the name of the figure.

    reasoning (mean reward over its rollouts), pass_at_k, format_rate (share with an answer), response_length (tokens);
    greedy and greedy_format_rate where measured.
    """
    values = {
        "reasoning": sampled.rewards_NG.mean(axis=1, dtype=np.float64),
        "pass_at_k": pass_at_k(sampled.rewards_NG, pass_at),
        "format_rate": sampled.formatted_NG.mean(axis=1),
        "response_length": sampled.lengths_NG.mean(axis=1),
    }
    if greedy is not None:
        values |= {"greedy": greedy.rewards_NG[:, 0], "greedy_format_rate": greedy.formatted_NG[:, 0]}
    return values


def means_and_errors(values: Mapping[str, np.ndarray]) -> dict:
    """The mean over positions of each of values, [N]; fit for JSON, None where there are no positions.

    Beside them positions, their number; standard_errors, std / sqrt(N) (binomial where a position has one outcome), as
    if positions were independent, which those of one document are not quite; standard_error, that of reasoning.
    """
    count = len(values["reasoning"])
    means = {name: float(np.mean(value_N)) if count else None for name, value_N in values.items()}
    errors = {name: float(np.std(value_N) / count**0.5) if count else None for name, value_N in values.items()}
    return means | {"positions": count, "standard_error": errors["reasoning"], "standard_errors": errors}


def pass_at_k(rewards_NG: np.ndarray, k: int) -> np.ndarray:
    """Chance that of k rollouts drawn from the G one is right, per position: 1 - C(G - c, k) / C(G, k) for c right.

    Unbiased for k below G [Codex, arXiv 2107.03374, Eq. 1]; for k = G it says whether any is right. Right is a
    reward of 1. Returns float64 [N].
    """
    G = rewards_NG.shape[1]
    wrong_N1 = np.sum(rewards_NG < 1, axis=1, keepdims=True)
    drawn_1K = np.arange(k)[None, :]
    return 1.0 - np.prod(np.maximum(wrong_N1 - drawn_1K, 0) / (G - drawn_1K), axis=1)


def _batches(lengths_N: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(rows, the same filled up to batch_size by repeats, padded length): rows of like length together.

    Lengths are that of the longest row, a half or a quarter of it, so that at most three shapes are compiled.
    """
    order = np.argsort(lengths_N, kind="stable")
    widest = padded_length(int(lengths_N.max(initial=1)))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        T = next(width for width in (widest // 4, widest // 2, widest) if width >= lengths_N[rows].max())
        yield rows, np.resize(rows, batch_size), T


def _on(mesh: Mesh | None, batch):
    return batch if mesh is None else place(batch, batch_sharding(mesh))


def _prompts(tokenizer, template, config: PromptConfig, documents, positions, prefill_R: np.ndarray) -> Prompts:
    """Prompts with the prefill behind them, config.max_tokens at the most."""
    shorter = dataclasses.replace(config, max_tokens=config.max_tokens - len(prefill_R))
    prompts = assemble(tokenizer, template, shorter, documents, [positions[i] for i in range(len(positions))])
    lengths_N = prompts.lengths_N + np.int32(len(prefill_R))
    tokens_NT = np.zeros((len(lengths_N), padded_length(int(lengths_N.max(initial=1)))), np.int32)
    for tokens_T, bare_T, length in zip(tokens_NT, prompts.tokens_NT, prompts.lengths_N, strict=True):
        tokens_T[: length + len(prefill_R)] = np.concatenate([bare_T[:length], prefill_R])
    return prompts.replace(tokens_NT=tokens_NT, lengths_N=lengths_N)


def _with_prefill(rollouts: Rollouts, prefill_R: np.ndarray) -> Rollouts:
    """The responses with the prefill as their first tokens."""
    front_NGR = np.broadcast_to(prefill_R, (*rollouts.lengths_NG.shape, len(prefill_R)))
    tokens_NGR = np.concatenate([front_NGR, rollouts.tokens_NGR], axis=2)
    return rollouts.replace(tokens_NGR=tokens_NGR, lengths_NG=rollouts.lengths_NG + len(prefill_R))


def check_settings(config: EvaluateConfig) -> None:
    """Raises InputError for settings that clash."""
    if config.batch_size < 1 or config.group_size < 1:
        raise InputError(
            f"evaluate.batch_size={config.batch_size}, evaluate.group_size={config.group_size}: use 1 or more of each"
        )
    if not 0 <= config.pass_at <= config.group_size:
        raise InputError(
            f"evaluate.pass_at={config.pass_at} with evaluate.group_size={config.group_size}: Pass@k needs k rollouts "
            "or more, so use a k from 1 to group_size, or 0 for group_size itself"
        )
    if config.temperature == 0 and config.group_size > 1:
        raise InputError(
            f"evaluate.temperature=0 makes all evaluate.group_size={config.group_size} rollouts of a position equal: "
            "use group_size 1"
        )
