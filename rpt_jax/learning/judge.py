r"""Whether boxed answers mean what the reference says, judged by math-verify in processes that can be killed.

In: reference answers, and the contents of boxes. Out: a verdict each. `1/2`, `0.5` and `\frac12` are one number; what
such a library parses is written by a model, and sympy runs for hours on some of it (`9^{9^{9^9}}`). So each answer is
judged in a process of its own with limits of wall time, CPU time and memory (judge_worker.py), and one that exceeds
them counts as not right. Answers stay in order, and a verdict depends on nothing but the pair and, near the limit of
time, on how busy the machine is.

The workers are processes of a session of their own, so that Ctrl-C is for the run alone. They end with the run: killed
when it closes them, and at the end of their stdin when it dies.
"""

import contextlib
import importlib.util
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rpt_jax.config import Config, PromptConfig, QuestionConfig
from rpt_jax.learning import judge_worker
from rpt_jax.learning.judge_worker import CRASHED, RIGHT, TIMED_OUT, WRONG
from rpt_jax.records import InputError, Prompts

LONGEST = 1024  # bytes of an answer that is looked at; a longer one is wrong
GRACE = 120.0  # seconds beyond its limit after which a worker that says nothing is given up (the first also starts)


@dataclass(frozen=True)
class Judge:
    """An open pool of workers; every worker that is not at work waits in `idle`."""

    config: QuestionConfig
    idle: queue.SimpleQueue


def check_questions(config: Config, are_questions: bool) -> None:
    """Raises InputError unless questions, their reward and their prompt come together; see check_ready."""
    if are_questions != (config.reward.kind == "verified"):
        what = "questions" if are_questions else "positions of text"
        raise InputError(
            f"reward.kind={config.reward.kind} with {what}: answers to questions are verified and nothing else is, so "
            f"{'use --reward.kind verified' if are_questions else 'choose another kind, or give --questions.files'}"
        )
    if are_questions and config.update.next_token_share:
        raise InputError(
            f"update.next_token_share={config.update.next_token_share} with questions: there is no text whose next "
            "tokens could be learnt; use 0"
        )
    if are_questions:
        check_ready(config.prompt)
    elif config.prompt.template == "question":
        raise InputError(
            "prompt.template=question asks for the answer of a question: for positions of text use v0 to v6, bare, or "
            "a file of your own"
        )


def check_ready(prompt: PromptConfig) -> None:
    """Raises InputError for a prompt that is not for questions, and if the library that judges is not installed."""
    if re.fullmatch("v[0-6]", prompt.template):
        raise InputError(
            f"prompt.template={prompt.template} asks for the next token of a text: for questions use "
            "--prompt.template question, bare, or a file of your own"
        )
    if prompt.truth_bytes > LONGEST:
        raise InputError(
            f"prompt.truth_bytes={prompt.truth_bytes} with questions: an answer of more than {LONGEST} bytes is never "
            f"right, use {LONGEST} or less"
        )
    if importlib.util.find_spec("math_verify") is None:
        raise InputError(
            "questions need math-verify to judge answers, and it is not installed: pip install 'rpt_jax[questions]'"
        )


def judge_of(config: Config) -> contextlib.AbstractContextManager[Judge | None]:
    """The open judge that a run's reward needs, or None."""
    return open_judge(config.questions) if config.reward.kind == "verified" else contextlib.nullcontext()


@contextlib.contextmanager
def open_judge(config: QuestionConfig) -> Iterator[Judge]:
    """A judge with config.workers processes, which start in the background; none is left afterwards."""
    judge = Judge(config, queue.SimpleQueue())
    try:
        for _ in range(config.workers):
            judge.idle.put(_start(config))
        yield judge
    finally:
        while not judge.idle.empty():
            _stop(judge.idle.get())


def verdicts(judge: Judge, references: Sequence[str], answers: Sequence[Sequence[bytes | None]]) -> np.ndarray:
    """WRONG, RIGHT, TIMED_OUT or CRASHED for each answer, int8 [N, G].

    references: N texts; answers: N rows of G contents of a box, None for no answer, which is WRONG. A pair that occurs
    several times is judged once. White space around both and a full stop behind them count for nothing; one longer
    than LONGEST bytes, or no UTF-8 text, is WRONG.

    Raises RuntimeError where a worker cannot start; what it said is on stderr.
    """
    codes_NG = np.full((len(answers), len(answers[0]) if len(answers) else 0), WRONG, np.int8)
    places: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for n, g in np.ndindex(*codes_NG.shape):
        reference, answer = stripped(references[n]), readable(answers[n][g])
        code = at_once(reference, answer)
        if code is None:
            places.setdefault((reference, answer), []).append((n, g))
        else:
            codes_NG[n, g] = code
    for code, where in zip(_ask_all(judge, list(places)), places.values(), strict=True):
        codes_NG[tuple(zip(*where, strict=True))] = code
    return codes_NG


def counts(verdicts: Sequence[np.ndarray]) -> dict[str, int]:
    """judge_timeouts and judge_crashes of arrays of verdicts; nothing where there is none."""
    names = {"judge_timeouts": TIMED_OUT, "judge_crashes": CRASHED} if verdicts else {}
    return {name: sum(int((codes == code).sum()) for codes in verdicts) for name, code in names.items()}


def references_of(prompts: Prompts) -> list[str]:
    """The answers that stand behind the prompts of questions: N texts."""
    return [truth_X.tobytes().rstrip(b"\0").decode() for truth_X in np.asarray(prompts.truth_NX)]


def readable(answer: bytes | None) -> str | None:
    """The text to judge; None for what is wrong unseen."""
    if answer is None or len(answer) > LONGEST or b"\0" in answer:
        return None
    try:
        return stripped(answer.decode()) or None
    except UnicodeDecodeError:
        return None


def stripped(text: str) -> str:
    """Without white space around it and a full stop behind it."""
    return text.strip().removesuffix(".").rstrip()


def at_once(reference: str, answer: str | None) -> int | None:
    """The verdict where it takes no library: nothing to read, the same text, or two whole numbers; None elsewhere."""
    if answer is None:
        return WRONG
    if answer == reference:
        return RIGHT
    if all(re.fullmatch(r"-?[0-9]+", text) for text in (reference, answer)):
        return RIGHT if _plain(answer) == _plain(reference) else WRONG
    return None


def _plain(whole: str) -> str:
    """A whole number without what it can do without; int() refuses thousands of digits."""
    digits = whole.removeprefix("-").lstrip("0") or "0"
    return f"-{digits}" if whole.startswith("-") and digits != "0" else digits


def _ask_all(judge: Judge, pairs: list[tuple[str, str]]) -> list[int]:
    """A verdict for each pair, in order; as many at one time as there are workers."""
    if not pairs:
        return []
    askers = ThreadPoolExecutor(judge.config.workers)
    try:
        return list(askers.map(lambda pair: _ask(judge, pair), pairs))
    finally:
        askers.shutdown(cancel_futures=True)  # of a run that was told to stop; waits for those that are being judged


def _ask(judge: Judge, pair: tuple[str, str]) -> int:
    worker, seconds = judge.idle.get(), judge.config.seconds
    try:
        request = json.dumps(pair).encode()
        with contextlib.suppress(BrokenPipeError):  # the reply will be missing, too
            worker.stdin.write(len(request).to_bytes(4, "big") + request)
        is_ready = bool(select.select([worker.stdout], [], [], seconds + GRACE)[0])
        reply = worker.stdout.read(1) if is_ready else b""
        if reply:
            return reply[0]
        status = worker.wait() if is_ready else 0
        _stop(worker)
        if status > 0:
            raise RuntimeError(
                f"a worker of the judge could not start, or broke (exit status {status}); what it said is on stderr"
            )
        worker = _start(judge.config)
        return CRASHED if is_ready else TIMED_OUT
    finally:
        judge.idle.put(worker)


def _start(config: QuestionConfig) -> subprocess.Popen:
    command = [sys.executable, "-P", str(Path(judge_worker.__file__)), str(config.seconds), str(config.memory_mib)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=os.environ | {"PYTHONHASHSEED": "0"},  # the order of sets, and so the way sympy takes, is always the same
        start_new_session=True,
    )


def _stop(worker: subprocess.Popen) -> None:
    """Kills a worker and the process in which it is judging, and waits for its end."""
    if worker.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
    worker.stdin.close()
    worker.stdout.close()
    worker.wait()
