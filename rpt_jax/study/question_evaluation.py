"""Held-out questions -> the share that a policy answers right [RPT, arXiv 2506.08007, its table on RL fine-tuning].

In: a policy and questions (corpus/questions.py). Out: plain figures. Rollouts come as evaluate.py draws them, so their
keys depend on seed and question only; whether an answer is right says the judge (learning/judge.py), as in training.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from rpt_jax.config import EvaluateConfig, ModelConfig, PromptConfig, QuestionConfig, SampleConfig
from rpt_jax.corpus.questions import Questions
from rpt_jax.corpus.templates import Template
from rpt_jax.learning import judge
from rpt_jax.learning.judge import Judge
from rpt_jax.policy import decoder
from rpt_jax.records import InputError, Params
from rpt_jax.study.evaluate import Reasoning, by_position, check_settings, means_and_errors, reason, samplings, ticking
from rpt_jax.study.held_out import choose_positions

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
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict]:
    """{"questions": figures} of questions.held_out; `figures` says which.

    Args:
        limits: of the judge, which lives for this call.
        config: at most config.positions questions, config.group_size rollouts each at config.temperature, and a greedy
            one where config.greedy asks for it.
        progress, end_ids: as in evaluate.evaluate.

    Raises InputError for settings that clash and where no question is held out.
    """
    check_settings(config)
    positions, _ = choose_positions({SPLIT: questions.held_out}, config.positions, seed)
    if not len(positions):
        raise InputError("no question to evaluate on: set questions.holdout, or name files in questions.evaluate_files")
    ways = samplings(sample, config)
    tick = ticking(progress, len(ways) * -(-len(positions) // config.batch_size))
    policy = decoder.gathered(params, model), model, tokenizer
    shared = {"prompt": prompt, "seed": seed, "end_ids": end_ids, "batch_size": config.batch_size, "tick": tick}
    made = [reason(*policy, template, questions.documents, positions, sampling=way, **shared) for way in ways]
    references = [questions.answers[d] for d in positions.documents]
    with judge.open_judge(limits) as judging:
        judged = [judged_answers(judging, references, each) for each in made]
    return {SPLIT: figures(judged, config.pass_at or config.group_size)}


def judged_answers(judging: Judge, references: list[str], made: Reasoning) -> tuple[Reasoning, np.ndarray]:
    """(the same with rewards 1 for right answers and 0 for others, verdicts_NG)."""
    verdicts_NG = judge.verdicts(judging, references, made.answers)
    return dataclasses.replace(made, rewards_NG=(verdicts_NG == judge.RIGHT).astype(np.float32)), verdicts_NG


def figures(judged: list[tuple[Reasoning, np.ndarray]], pass_at: int) -> dict:
    """Figures of the sampled rollouts and, if there, of the greedy ones; fit for JSON.

    Those of positions (by_position, means_and_errors), so that reports show both: a question is a position, and its
    mean reward the share of its rollouts that are right. And judge_timeouts and judge_crashes, answers whose judging
    was stopped or broke down, which count as wrong.
    """
    sampled, greedy = judged[0][0], judged[1][0] if judged[1:] else None
    found = means_and_errors(by_position(sampled, greedy, pass_at))
    return found | judge.counts([codes_NG for _, codes_NG in judged])
