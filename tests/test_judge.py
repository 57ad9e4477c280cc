"""Claims: verdicts are those of a mathematician on cases worked by hand; answers stay in order whatever the number of
workers; no answer, however hostile, hangs, crashes or outlives the judge, and right answers among them are still right;
settings that do not belong together are named."""

import dataclasses
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rpt_jax.config import Config, PromptConfig, QuestionConfig, RewardConfig, UpdateConfig
from rpt_jax.learning import judge
from rpt_jax.learning.judge import CRASHED, RIGHT, TIMED_OUT, WRONG
from rpt_jax.records import InputError, Prompts

needs_library = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra questions")
PATIENT = QuestionConfig(seconds=60)  # a busy machine changes no verdict

CASES = [  # reference, equal answers, other answers
    ("0.5", ["1/2", "\\frac12", "\\dfrac{1}{2}", " .5 ", "\\frac{2}{4}.", "$0.5$"], ["0.05", "1/3", "-0.5", "2"]),
    ("1,234", ["1234", "1234.0"], ["1.234", "123"]),
    ("18", ["\\$18", "018", "18.", "2\\cdot 9", "\\text{18}"], ["17, 18", "17 or 18", "81", "18x", "a lot"]),
    ("(0,1)", ["(0, 1)", "\\left(0,1\\right)"], ["[0,1)", "[0,1]", "(0,2)", "(1,0)"]),
    ("[2,\\infty)", ["\\left[ 2, \\infty \\right)"], ["(2,\\infty)", "[2,3)"]),
    ("\\{1,2\\}", ["\\{2,1\\}", "\\{ 1, 2 \\}"], ["\\{1,2,3\\}", "\\{1\\}"]),
    ("\\text{Evelyn}", ["Evelyn", "\\text{Evelyn}"], ["Angela", "\\text{Eve}"]),
    ("\\text{(B)}", ["B", "(B)"], ["C", "(D)"]),
    ("3\\sqrt{13}", ["\\sqrt{117}", "3 \\sqrt{13}"], ["\\sqrt{13}", "10.8"]),
    ("p - q", ["-q+p", "p-q"], ["q-p", "p+q"]),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", ["(3,\\pi/2)"], ["(\\pi/2,3)", "(3,\\pi)"]),
    (" 9", ["9", " 9"], [" 8", "99"]),
]


def workers() -> set[int]:
    """Processes of all judges that this process has started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = b"judge_worker.py" in (path / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if is_worker and os.getpid() in (parent := parent_of(int(path.name)), parent_of(parent)):  # forked by one, too
            found.add(int(path.name))
    return found


@pytest.fixture(scope="module")
def patient():
    with judge.open_judge(PATIENT) as opened:
        yield opened


@needs_library
def test_verdicts_by_hand(patient):
    for reference, equal, other in CASES:
        answers = [[text.encode() for text in (*equal, *other)]]
        expected = [RIGHT] * len(equal) + [WRONG] * len(other)
        found = judge.verdicts(patient, [reference], answers)[0].tolist()
        assert found == expected, (reference, list(zip(answers[0], found, expected, strict=True)))


@needs_library
def test_order_is_kept_whatever_the_number_of_workers(patient, capfd):
    """Every answer is right for its own reference alone: a swap of two would show; workers start silently."""
    references = [f"\\frac{{{n}}}{{7}}" for n in range(1, 7)]
    answers = [[f"{n}/7".encode(), f"{n + 1}/7".encode(), None, f"{2 * n}/14".encode()] for n in range(1, 7)]
    expected = [[RIGHT, WRONG, WRONG, RIGHT]] * 6
    np.testing.assert_array_equal(judge.verdicts(patient, references, answers), expected)
    with judge.open_judge(dataclasses.replace(PATIENT, workers=1)) as alone:
        np.testing.assert_array_equal(judge.verdicts(alone, references, answers), expected)
    assert judge.verdicts(patient, [], []).shape == (0, 0)
    assert capfd.readouterr() == ("", "")


def test_what_needs_no_library():
    with_none = judge.Judge(PATIENT, None)  # asking a worker would fail
    answers = [b"7", b" 07. ", b"8", None, b"", b"-7", b"\xff7", b"7\0", b"7" * 1025]
    found = judge.verdicts(with_none, ["7"], [answers])[0].tolist()
    assert found == [RIGHT, RIGHT] + [WRONG] * 7
    assert judge.at_once("x", "y") is None and judge.at_once("1.0", "1") is None


def hostile(count: int, touched: Path) -> list[bytes]:
    """Answers that break parsers, evaluators, memory, time and protocols; the same in every run."""
    draw = random.Random(7)
    letters = [
        "{",
        "}",
        "\\",
        "(",
        "[",
        "^",
        "_",
        "!",
        "9",
        "x",
        ",",
        "$",
        "&",
        "=",
        "<",
        " ",
        "\\frac",
        "\\sqrt",
        "\n",
    ]
    injected = '__import__("os").system("touch {}")'

    def deep(j: int, most: int) -> int:
        return most if j % 20 == 10 else j % 5

    kinds = [
        lambda j: b"{" * deep(j, 900) + b"%d" % j,
        lambda j: b"}" * (j % 40) + b"3/7",
        lambda j: b"(" * deep(j, 500) + b"%d" % j + b")" * deep(j, 500),
        lambda j: b"\\frac{%d}{" % j * deep(j, 60) + b"2" + b"}" * deep(j, 60),
        lambda j: b"\\sqrt{" * deep(j, 90) + b"x_%d" % j,
        lambda j: b"9" * (17 * j),
        lambda j: b"\0" * j + b"7",
        lambda j: bytes(draw.randrange(128, 256) for _ in range(j + 1)),
        lambda j: b"1" * (1 << 20),
        lambda j: injected.format(touched).encode() + b"+%d" % j,
        lambda j: b"\\text{" + injected.format("x").encode() + b"}+%d" % j,
        lambda j: b'exec("import sys; sys.exit(%d)")' % j,
        lambda j: b"\\boxed{" * (j % 20) + b"%d" % j,
        lambda j: b"\\begin{pmatrix}" * (j % 9) + b"1&2\\\\%d" % j,
        lambda j: b"\\int_0^{" + b"x" * (j % 30) + b"}",
        lambda j: b"1e" + b"9" * deep(j, 400),
        lambda j: "".join(draw.choice(letters) for _ in range(draw.randrange(1, 24))).encode(),
    ]
    return [kinds[i % len(kinds)](i // len(kinds)) for i in range(count)]


HANGING = [b"9^{9^{9^{9^9}}}", b"(10^{10})!", b"2^{2^{2^{2^{2^2}}}}+1", b"\\sum_{k=1}^{10^{12}} \\frac{\\sin k}{k!}"]


@needs_library
def test_a_thousand_hostile_answers(tmp_path):
    """No hang, no crash of the judge, nothing left over, and the judge still right, before, among and after."""
    before = workers()
    answers = [*hostile(992, tmp_path / "touched"), *(b"%d+" % i + text for i in range(2) for text in HANGING)]
    rows = [[b"%d/41" % (n + 1), *answers[25 * n : 25 * n + 25]] for n in range(40)]
    references = [f"\\frac{{{n + 1}}}{{41}}" for n in range(40)]
    with judge.open_judge(QuestionConfig(seconds=1.0)) as opened:
        found_NG = judge.verdicts(opened, references, rows)
        assert found_NG[:, 1:].size == 1000 and (found_NG[:, 0] == RIGHT).all()
        assert not (found_NG[:, 1:] == RIGHT).any()
        assert (found_NG[-1, -8:] == TIMED_OUT).all()
        assert judge.verdicts(opened, ["0.5"], [[b"\\frac{3}{6}", b"0.6"]]).tolist() == [[RIGHT, WRONG]]
        assert len(workers() - before) == 2
    assert workers() == before
    assert not (tmp_path / "touched").exists()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A module in the place of math-verify, in which an answer says what happens: quick to load and always the same."""
    (tmp_path / "math_verify.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(judge.importlib.util, "find_spec", lambda name: True)


STAND_IN = """
import os
def LatexExtractionConfig(**_): pass
def parse(text, kinds, parsing_timeout): return text[7:-1]
def verify(reference, answer, timeout_seconds):
    while answer == "hangs": pass
    if answer == "aborts": os.abort()
    if answer == "eats": bytearray(1 << 31)  # 2 GiB
    if answer == "prints": print("x" * 100000), os.write(1, b"0" * 100000)
    return answer in ("eats", "prints", "right")
"""


def test_what_hangs_costs_itself_alone_and_is_counted(stand_in):
    with judge.open_judge(QuestionConfig(seconds=1.0)) as opened:
        answers = [[b"right", b"hangs"], [b"aborts", b"right"], [b"prints", b"hangs"]]
        found_NG = judge.verdicts(opened, ["r", "r", "r"], answers)
    assert found_NG.tolist() == [[RIGHT, TIMED_OUT], [CRASHED, RIGHT], [RIGHT, TIMED_OUT]]
    assert judge.counts([found_NG, np.array([[CRASHED]])]) == {"judge_timeouts": 2, "judge_crashes": 2}
    assert judge.counts([]) == {}


def test_memory_is_limited(stand_in):
    for mebibytes, verdict in ((512, CRASHED), (4096, RIGHT)):
        with judge.open_judge(QuestionConfig(seconds=60, memory_mib=mebibytes)) as opened:
            assert judge.verdicts(opened, ["r"], [[b"eats"]]).tolist() == [[verdict]]


def only_worker(opened: judge.Judge) -> int:
    """The process of an idle worker."""
    worker = opened.idle.get()
    opened.idle.put(worker)
    return worker.pid


def test_a_worker_that_is_killed_is_replaced(stand_in):
    """It costs the answer that it was given; then all is well again."""
    before = workers()
    with judge.open_judge(dataclasses.replace(PATIENT, workers=1)) as opened:
        os.killpg(only_worker(opened), signal.SIGKILL)
        assert judge.verdicts(opened, ["r"], [[b"right"]]).tolist() == [[CRASHED]]
        assert judge.verdicts(opened, ["r"], [[b"right"]]).tolist() == [[RIGHT]]
    assert workers() == before


def test_a_worker_that_says_nothing_is_given_up(stand_in, monkeypatch):
    """Stopped where it cannot keep its own time."""
    monkeypatch.setattr(judge, "GRACE", 1.0)
    before = workers()
    with judge.open_judge(QuestionConfig(seconds=1.0, workers=1)) as opened:
        os.kill(only_worker(opened), signal.SIGSTOP)
        assert judge.verdicts(opened, ["r"], [[b"right"]]).tolist() == [[TIMED_OUT]]
    assert workers() == before


def test_a_worker_that_cannot_start_ends_the_run(tmp_path, stand_in, capfd):
    (tmp_path / "math_verify.py").write_text("raise ImportError('half of it is missing')")
    before = workers()
    with judge.open_judge(PATIENT) as opened, pytest.raises(RuntimeError, match="could not start.*on stderr"):
        judge.verdicts(opened, ["r"], [[b"right"]])
    assert "half of it is missing" in capfd.readouterr().err and workers() == before


def test_workers_end_when_the_process_dies(stand_in):
    """One idle and one at work; the process is killed without a chance to close anything."""
    code = (
        "from rpt_jax.config import QuestionConfig; from rpt_jax.learning import judge\n"
        "with judge.open_judge(QuestionConfig(seconds=3)) as opened:\n"
        "    judge.verdicts(opened, ['r'], [[b'right', b'wrong']]); print('ready', flush=True)\n"
        "    judge.verdicts(opened, ['r'], [[b'hangs']])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.5)
    theirs = [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent_of(p) == parent.pid]
    parent.kill()
    parent.communicate()
    assert len(theirs) == 2
    deadline = time.monotonic() + 60
    while any(map(parent_of, theirs)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(parent_of, theirs))


def parent_of(process: int) -> int:
    """0 where there is no such process, or only what is left of one."""
    try:
        state, parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state == "Z" else int(parent)


def test_workers_import_no_jax():
    """They are many, and start while the accelerator is busy."""
    code = "import sys; sys.argv = ['x', '1', '512']; import rpt_jax.learning.judge_worker\n"
    code += "print([name for name in sys.modules if name.split('.')[0] in ('jax', 'numpy', 'flax')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_references_are_the_truth_behind_the_prompts():
    truth_NX = np.array([[*b"12", 0, 0], [*b"\xc3\xa9", 0, 0]], np.uint8)
    nothing = np.zeros((2, 1), np.int32)
    prompts = Prompts(nothing, nothing[:, 0], nothing, truth_NX, truth_NX > 0, nothing[:, 0])
    assert judge.references_of(prompts) == ["12", "é"]


def test_what_does_not_belong_together_is_named(monkeypatch):
    asked = Config(reward=RewardConfig("verified"), prompt=PromptConfig(template="question"))
    judge.check_questions(Config(), are_questions=False)
    with pytest.raises(InputError, match="reward.kind=verified with positions of text.*give --questions.files"):
        judge.check_questions(asked, are_questions=False)
    with pytest.raises(InputError, match="reward.kind=prefix with questions.*use --reward.kind verified"):
        judge.check_questions(Config(), are_questions=True)
    sharing = dataclasses.replace(asked, update=UpdateConfig(next_token_share=0.1))
    with pytest.raises(InputError, match="update.next_token_share=0.1 with questions"):
        judge.check_questions(sharing, are_questions=True)
    with pytest.raises(InputError, match="prompt.template=v0 asks for the next token"):
        judge.check_questions(dataclasses.replace(asked, prompt=PromptConfig()), are_questions=True)
    with pytest.raises(InputError, match="prompt.template=question asks for the answer of a question"):
        judge.check_questions(Config(prompt=PromptConfig(template="question")), are_questions=False)
    long = dataclasses.replace(asked, prompt=PromptConfig(template="question", truth_bytes=1025))
    with pytest.raises(InputError, match="prompt.truth_bytes=1025 with questions.*use 1024 or less"):
        judge.check_questions(long, are_questions=True)
    monkeypatch.setattr(judge.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'rpt_jax\[questions\]'"):
        judge.check_questions(asked, are_questions=True)
    with pytest.raises(InputError, match="questions.seconds=0"):
        QuestionConfig(seconds=0).check()


def test_whole_numbers_of_any_length():
    """Beyond the thousands of digits that Python turns into a number."""
    long = "9" * 5000
    assert judge.at_once(long, "9") == WRONG and judge.at_once(f"-00{long}", f"-{long}") == RIGHT
    assert (
        judge.at_once("0", "-000") == RIGHT
        and judge.at_once("7", "-7") == WRONG
        and judge.at_once("-07", "-7") == RIGHT
    )
