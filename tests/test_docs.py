r"""Claims: every command that README, the pages and the help print would start as it stands; their examples run; what
they link to, and the files and flags that they name, are there.

A command is a line of a code block, or a code span that goes beyond a command's name. `rpt` commands go through the
command line up to where their settings are read. Experiment files that readers have to write stand in as empty ones.
"""

import configparser
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro

from rpt_jax import cli, experiment_file, help, settings
from rpt_jax.config import Config
from rpt_jax.learning.custom_judge import judged
from rpt_jax.scaling import sweep_cell, sweep_xpk

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("experiments", "rpt_jax/docs")
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")))]
PAGES.remove(ROOT / "experiments" / "LOG.md")  # tells what was true on its days
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PROGRAMS = ("rpt", "make", "pip", "python", "echo", "source", "experiments/launch/")
STAND_IN = "from rpt_jax.config import Config\n\ndef config():\n    return Config()\n"

SETTINGS = [setting for page in help.PAGES.values() for setting in settings.read(page.settings)]
FLAGS = {flag for setting in SETTINGS for flag in (setting.flag, f"--{setting.name}")}
FLAGS |= {"--version", "--json", *help.HELP, help.HELP_ALL}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of fenced and of indented blocks."""
    found = [(language, code) for language, code in FENCE.findall(text)]
    rest = FENCE.sub("", text)
    indented = [code for code in INDENTED.findall(rest) if code.strip()]
    return found + [("", re.sub(r"^ {4}", "", code, flags=re.MULTILINE)) for code in indented]


def spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text))]


def commands(text: str) -> list[str]:
    """Lines of blocks that begin with a program, all lines of bash blocks, and spans that are whole commands."""
    found = []
    for language, code in blocks(text):
        for line in re.sub(r"\\\n\s*", " ", code).splitlines():
            starts = line.startswith(tuple(f"{program} " for program in PROGRAMS)) or line.startswith(PROGRAMS[-1])
            if line.strip() and not line.startswith("#") and (language == "bash" or starts):
                found.append(line.strip())
    return found + [
        span for span in spans(text) if re.match(r"(rpt \S+ \S|make |python \S|pip |source |.*\| *rpt )", span)
    ]


def programs(line: str) -> list[list[str]]:
    """The words of each program of a line of shell."""
    parts = [[]]
    if "<(" in line:
        line = line.replace("<(", "| ").replace(")", "")
    for word in shlex.split(line, comments=True):
        if word in ("|", "&&", ";"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [[*part] for part in parts if part]


COMMANDS = [(page.relative_to(ROOT), line) for page in PAGES for line in dict.fromkeys(commands(page.read_text()))]


class Parsed(Exception):
    """The command line has read the settings."""


def settings_read(words: list[str], monkeypatch, tmp_path) -> object:
    """What `rpt` WORDS would run with; help that is shown gives None. Raises where the command would not start."""

    def parse(command, default, words):
        raise Parsed(read(command, default, words))

    read = cli.parse
    monkeypatch.setattr(cli, "parse", parse)
    words = [stand_in(word, tmp_path) for word in words]
    try:
        status = cli.main(words)
    except Parsed as parsed:
        return parsed.args[0]
    except SystemExit as ended:
        status = ended.code
    finally:
        monkeypatch.setattr(cli, "parse", read)
    assert status == 0, f"rpt {shlex.join(words)}"
    return None


def stand_in(word: str, tmp_path: Path) -> str:
    """The word, or if it names an experiment file that the reader has to write, one that is there."""
    if not word.endswith(".py") or (ROOT / word).is_file():
        return word
    assert not word.startswith("experiments/"), f"{word} is not there"
    (tmp_path / word).write_text(STAND_IN)
    return str(tmp_path / word)


def try_rpt(words: list[str], monkeypatch, tmp_path) -> None:
    chosen = settings_read(words, monkeypatch, tmp_path)
    if hasattr(chosen, "check"):
        chosen.check()
    if words[0] == "sweep":
        assert sweep_cell.load_sweep(words[1], tmp_path)[1]


def try_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"^{name} =", makefile, re.MULTILINE) if is_variable else name in targets, f"make {word}"


def try_pip(words: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {name for word in words for group in re.findall(r"\[(.*)\]", word) for name in group.split(",")}
    assert words[0] == "install" and extras <= set(setup["options.extras_require"]), words
    assert all((ROOT / words[i + 1]).is_file() for i, word in enumerate(words) if word == "-c")


def try_python(words: list[str], monkeypatch) -> None:
    assert (ROOT / words[0]).is_file(), words[0]
    module = experiment_file.load_module(words[0])
    monkeypatch.setitem(sys.modules, module.__name__, module)  # tyro looks for comments there
    if hasattr(module, "Settings"):
        tyro.cli(module.Settings, args=words[1:])


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page.name}-{line}" for page, line in COMMANDS])
def test_printed_commands_start(page, line, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for program, *words in programs(line):
        if program.startswith("experiments/launch/"):
            assert (ROOT / program).is_file(), program
            program, words = "rpt", words[words.index("rpt") + 1 :]
        if program.endswith("rpt"):
            try_rpt(words, monkeypatch, tmp_path)
        elif program == "make":
            try_make(words)
        elif program == "pip":
            try_pip(words)
        elif program == "python":
            try_python(words, monkeypatch)
        else:
            assert program in PROGRAMS, f"{page}: no check for {program}"


def test_commands_are_found():
    """The test above stands on this reading of Markdown."""
    text = "Say `rpt fit`, or `rpt fit\na.csv`.\n\n    rpt train \\\n        --steps 2\n    more\n\n"
    text += "```bash\necho x | rpt sample r\n```\n"
    assert commands(text) == ["echo x | rpt sample r", "rpt train  --steps 2", "rpt fit a.csv"]
    assert programs("echo x | rpt sample 'a b' # c") == [["echo", "x"], ["rpt", "sample", "a b"]]
    assert programs("source <(rpt fit a)") == [["source"], ["rpt", "fit", "a"]]
    assert len(COMMANDS) > 30 and {page.name for page, _ in COMMANDS} > {"README.md", "corpus.md", "pods.md"}


@pytest.mark.parametrize(
    "command", ["train --steps x", "train --update.lr 1", "trane", "train experiments/none.py", "sweep-of-none"]
)
def test_commands_that_would_not_start_are_refused(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    if command == "sweep-of-none":
        command = "sweep experiments/omnimath_14b.py"  # parses, but defines no cells
    with pytest.raises((AssertionError, ValueError)):
        try_rpt(command.split(), monkeypatch, tmp_path)


@pytest.mark.parametrize("command", help.PAGES)
def test_examples_of_the_help_start(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    *_, (program, *words) = programs(help.PAGES[command].example)
    assert program == "rpt" and shlex.join(words).startswith(command)
    try_rpt(words, monkeypatch, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"\w+://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{page}: {target}"


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and MyST name them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page):
    for span in spans(page.read_text()):
        if re.fullmatch(r"(experiments|rpt_jax|kernels|tests)/[\w./*-]+", span):
            assert any(ROOT.glob(span.rstrip("/"))), f"{page}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_that_are_named_are_there(page):
    for span in spans(page.read_text()):
        flag = re.match(r"--[a-z][\w.-]*", span)
        if flag:
            assert any(each == flag[0] or each.startswith(f"{flag[0]}.") for each in FLAGS), f"{page}: {span}"


def python_blocks(name: str) -> list[str]:
    return [code for language, code in blocks((ROOT / "rpt_jax/docs" / name).read_text()) if language == "python"]


def test_the_example_of_a_sweep_makes_runs(tmp_path):
    (code,) = python_blocks("scaling.md")
    (tmp_path / "mine.py").write_text(code)
    _, cells = sweep_cell.load_sweep(str(tmp_path / "mine.py"), tmp_path)
    assert len({cell.name for cell in cells}) == len({cell.config.seed for cell in cells}) == 12
    for cell in cells:
        cell.config.check()
        assert cell.config.evaluate.annotated  # without it no cell could make its row
    assert len(sweep_xpk.commands("mine.py", cells, sweep_xpk.Xpk("cluster", "v5litepod-16"), "/mnt/sweep")) == 12
    assert all(isinstance(cell.config, Config) for cell in cells)


def test_the_example_of_a_judge_judges(tmp_path):
    (code,) = python_blocks("rewards.md")
    (tmp_path / "my_judge.py").write_text(code)
    scores = judged(f"{tmp_path}/my_judge.py:judge", [b"a"], [[b" Yes", b"no", None]], [b"yes"])
    assert scores.tolist() == [[1.0, 0.0, 0.0]]
