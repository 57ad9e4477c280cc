"""Claims: help is one screen for each command, says what is needed and shows every setting on request; it comes without
importing anything heavy."""

import subprocess
import sys

import pytest

from rpt_jax import cli, help, settings

LINES, COLUMNS = 50, 100


def shown(capsys, *words):
    status = cli.main([*words])
    output, message = capsys.readouterr()
    return status, output, message


def fits(output):
    lines = output.splitlines()
    return len(lines) <= LINES and max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize("command", help.PAGES)
def test_a_page_is_one_screen_and_says_what_is_needed(capsys, command):
    status, output, _ = shown(capsys, *command.split(), "--help")
    page = help.PAGES[command]
    assert status == 0 and fits(output), output
    needed = output.partition("often set")[0]
    assert all(f"  {name} " in needed or f"  [{name}] " in needed for name, _ in page.first)
    assert all(f"  --{name} " in needed for name in page.needs)
    assert all(word.strip("[]") in needed for word in help.row_of(command)[1].split() if word != "...]")
    assert all(f"  --{name}" in output for name in page.often) and f"\n  {page.example}\n" in output
    assert "--help-all" in output


@pytest.mark.parametrize("command", help.PAGES)
def test_every_setting_is_on_the_page_of_its_section(capsys, command):
    place, pages = help.PAGES[command].settings, ""
    for section in (help.MAIN, *settings.sections(place)):
        status, output, _ = shown(capsys, *command.split(), "--help", section)
        assert status == 0 and max(map(len, output.splitlines())) <= COLUMNS
        pages += output
    words = {line.split()[0] for line in pages.splitlines() if line.startswith("  --")}
    assert words == {setting.flag for setting in settings.read(place)}


def test_a_section_shows_comments_choices_and_defaults(capsys):
    _, output, _ = shown(capsys, "train", "--help", "update")
    assert output.startswith("rpt train, update: GRPO and its optimizer.\n")
    rows = {line.split()[0]: " ".join(line.split()) for line in output.splitlines() if line.startswith("  --")}
    assert rows["--update.learning-rate"] == "--update.learning-rate FLOAT (paper: 1e-6) [1e-06]"
    assert rows["--update.advantage"].startswith("--update.advantage {std,mean,leave_one_out} (r-mean)/(std+eps) |")


def test_help_all_shows_everything_with_the_values_that_hold(capsys, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from rpt_jax.config import Config\n\ndef config():\n    return Config(name='mine', steps=77)\n"
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(tmp_path / "mine.py"), "--help-all"])
    output = capsys.readouterr().out
    assert ended.value.code == 0 and "(default: 77)" in output and "--model.rope-scaling.beta-fast" in output


def test_an_unknown_section_is_named_with_those_that_are_there(capsys):
    status, output, message = shown(capsys, "fit", "--help", "updates")
    assert (status, output) == (2, "") and message == "rpt: fit has no settings called 'updates': ask for one of main\n"
    assert "main, model, mesh, corpus" in shown(capsys, "train", "--help", "updates")[2]


@pytest.mark.parametrize("command", ["bench", "convert"])
def test_commands_with_commands_of_their_own_list_them(capsys, command):
    for word in ("--help", "--help-all"):
        status, output, _ = shown(capsys, command, word)
        assert status == 0 and all(f"\n  {name} " in output for name, _, _ in help.KINDS[command])


def test_the_overview_comes_without_words_too(capsys):
    assert shown(capsys)[:2] == (2, shown(capsys, "--help")[1])


@pytest.mark.parametrize("words", ["--help", "train --help", "bench step --help", "completion bash"])
def test_help_imports_nothing_heavy(words):
    heavy = "print([name for name in ('jax', 'numpy', 'tyro', 'flax') if name in sys.modules])"
    code = f"import sys; from rpt_jax import cli; cli.main({words.split()}); {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
