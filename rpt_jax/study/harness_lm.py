"""A policy as a model of lm-evaluation-harness, and its tasks on it (extra `harness`); imports the harness.

In: HarnessRun. Out: the harness's own results, fit for JSON. All processes of a run ask for the same things at the same
time, so that to the harness they are one.
"""

import logging
import os
from pathlib import Path

import jax
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from rpt_jax.json_file import write_json
from rpt_jax.records import InputError
from rpt_jax.study import harness
from rpt_jax.study.harness import Asked, HarnessRun

log = logging.getLogger(__name__)

KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")  # of what the harness returns


class PolicyLM(LM):
    """The three kinds of requests that lm_eval.api.model.LM names, handed to harness.py."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-prob in nats, whether greedy decoding gives it) of each (context, continuation)."""
        return self._kept("loglikelihood", requests, map(tuple, harness.loglikelihoods(self.asked, _args(requests))))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log-prob in nats of each (text,)."""
        texts = [text for (text,) in _args(requests)]
        return self._kept("loglikelihood_rolling", requests, harness.rolling_loglikelihoods(self.asked, texts))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text after each (context, generation settings)."""
        return self._kept("generate_until", requests, harness.generate(self.asked, _args(requests)))

    def _kept(self, kind: str, requests, answers) -> list:
        """The answers, which the harness's cache is told of."""
        answers = list(answers)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


def run(config: HarnessRun) -> dict:
    """Runs the tasks; returns what the harness found, and how many contexts lost their left end, by kind of request."""
    config.check()
    manager = _manager(config)
    asked = harness.open_policy(config)
    found = lm_eval.simple_evaluate(
        model=PolicyLM(asked),
        tasks=list(config.tasks),
        num_fewshot=None if config.fewshot < 0 else config.fewshot,
        limit=config.limit or None,
        task_manager=manager,
        log_samples=False,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    figures = {"policy": config.policy, "lm_eval": lm_eval.__version__}
    figures |= {name: _plain(found[name]) for name in KEPT if name in found}
    figures["cut_contexts"] = dict(asked.cut)
    if any(asked.cut.values()):
        log.warning(
            "contexts that lost their left end to max_length=%d: %s", config.max_length, figures["cut_contexts"]
        )
    if config.results and jax.process_index() == 0:
        write_json(Path(config.results), figures)
    return figures


def _manager(config: HarnessRun) -> TaskManager:
    """The tasks by name; raises InputError for one that there is not."""
    if config.include_path and not os.path.isdir(config.include_path):
        raise InputError(f"include_path={config.include_path!r} is no folder: name one with the YAML files of tasks")
    if not (config.include_path or config.catalogue):
        raise InputError("catalogue is off and include_path empty, so there are no tasks: name a folder of YAML files")
    manager = TaskManager(include_path=config.include_path or None, include_defaults=config.catalogue)
    unknown = [name for name in config.tasks if name not in manager.task_index]
    if unknown:
        raise InputError(f"tasks: no task, group or tag {unknown[0]!r}: `lm-eval ls tasks` lists the harness's own")
    return manager


def _args(requests: list[Instance]) -> list[tuple]:
    return [request.args for request in requests]


def _plain(value):
    """Plain values, fit for JSON: the harness's dicts may be of kinds of its own and hold numpy's numbers."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.item() if hasattr(value, "item") else value
