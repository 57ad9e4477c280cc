"""Held-out questions -> the share that a policy answers right [RPT, arXiv 2506.08007, its table on RL fine-tuning].

In: a policy and questions (corpus/questions.py). Out: plain figures. Rollouts come as evaluate.py draws them, so their
keys depend on seed and question only; whether an answer is right says the judge (learning/judge.py), as in training.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import EvaluateConfig, ModelConfig, PromptConfig, QuestionConfig, SampleConfig
from rpt_jax.corpus.questions import Questions
from rpt_jax.corpus.templates import Template
from rpt_jax.learning import judge
from rpt_jax.learning.judge import Judge
from rpt_jax.policy import decoder
from rpt_jax.records import InputError, Params
from rpt_jax.study.evaluate import Reasoning, check_settings, choose_positions, pass_at_k, reason

SPLIT = "questions"  # under which figures of a run stand, where those of text stand under easy, medium and hard


def evaluate_questions(
    params: Params,
    model: ModelConfig,
    tokenizer,
    template: Template,
    questions: Questions,
    *,
    limits: QuestionConfig,
    prompt: PromptConfig,
    sample: SampleConfig,
    config: EvaluateConfig,
    seed: int,
    end_ids: tuple[int, ...],
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict]:
    """{"questions": figures} of questions.held_out; `figures` says which.

    Args:
        limits: of the judge, which lives for this call.
        config: at most config.positions questions, config.group_size rollouts each at config.temperature, and a greedy
            one where config.greedy asks for it.
        mesh, progress, end_ids: as in evaluate.evaluate.

    Raises InputError for settings that clash and where no question is held out.
    """
    check_settings(config)
    positions, _ = choose_positions({SPLIT: questions.held_out}, config.positions, seed)
    if not len(positions):
        raise InputError("no question to evaluate on: set questions.holdout, or name files in questions.evaluate_files")
    ways = [dataclasses.replace(sample, group_size=config.group_size, temperature=config.temperature)]
    if config.greedy:
        ways.append(dataclasses.replace(sample, group_size=1, temperature=0.0))
    done, batches = 0, len(ways) * -(-len(positions) // config.batch_size)

    def tick():
        nonlocal done
        done += 1
        if progress:
            progress(done, batches)

    policy, references = decoder.gathered(params, model), [questions.answers[d] for d in positions.documents]
    made = [
        reason(
            policy,
            model,
            tokenizer,
            template,
            questions.documents,
            positions,
            prompt=prompt,
            sampling=way,
            seed=seed,
            end_ids=end_ids,
            batch_size=config.batch_size,
            tick=tick,
        )
        for way in ways
    ]
    with judge.open_judge(limits) as judging:
        judged = [judged_answers(judging, references, each) for each in made]
    return {SPLIT: figures(judged, config.pass_at or config.group_size)}


def judged_answers(judging: Judge, references: list[str], made: Reasoning) -> tuple[Reasoning, np.ndarray]:
    """(the same with rewards 1 for right answers and 0 for others, verdicts_NG)."""
    verdicts_NG = judge.verdicts(judging, references, made.answers)
    return dataclasses.replace(made, rewards_NG=(verdicts_NG == judge.RIGHT).astype(np.float32)), verdicts_NG


def figures(judged: list[tuple[Reasoning, np.ndarray]], pass_at: int) -> dict:
    """Figures of the sampled rollouts and, if there, of the greedy ones; fit for JSON.

    Named as those of positions, so that reports show both: reasoning (accuracy: the mean over questions of the share of
    their rollouts that are right), its standard_error over questions as if they were independent draws, pass_at_k,
    format_rate (share with an answer), response_length (tokens), greedy and greedy_format_rate where measured, errors
    of all these under standard_errors, positions (how many questions); and judge_timeouts and judge_crashes (answers
    whose judging was stopped or broke down, which count as wrong).
    """
    sampled, verdicts_NG = judged[0]
    values = {
        "reasoning": sampled.rewards_NG.mean(axis=1, dtype=np.float64),
        "pass_at_k": pass_at_k(sampled.rewards_NG, pass_at),
        "format_rate": sampled.formatted_NG.mean(axis=1),
        "response_length": sampled.lengths_NG.mean(axis=1),
    }
    for greedy, _ in judged[1:]:
        values |= {"greedy": greedy.rewards_NG[:, 0], "greedy_format_rate": greedy.formatted_NG[:, 0]}
    count = len(verdicts_NG)
    errors = {name: float(np.std(value_N) / count**0.5) for name, value_N in values.items()}
    found = {name: float(np.mean(value_N)) for name, value_N in values.items()} | {"positions": count}
    found |= {"standard_error": errors["reasoning"], "standard_errors": errors}
    return found | judge.counts([codes_NG for _, codes_NG in judged])
