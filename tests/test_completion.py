"""Claims: bash completes commands, settings and choices from the script as it is printed, and files elsewhere; zsh's is
the same behind bashcompinit; fish's names every setting."""

import shutil
import subprocess

import pytest

from rpt_jax import cli, completion, help, settings


def completed(*words):
    """What bash offers for the last of the words."""
    typed = " ".join(f"'{word}'" for word in ("rpt", *words))
    ask = f'COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _rpt; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", completion.script("bash") + ask], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], ["train"]),
        (["p"], ["pretrain", "patterns", "plan"]),
        (["compl"], ["completion"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["bench", ""], ["kernel", "step", "compare"]),
        (["convert", "orb"], ["orbax-to-hf"]),
        (["train", "--update.adv"], ["--update.advantage", "--update.advantage-epsilon"]),
        (["train", "exp.py", "--steps", "3", "--dynamic-sampling.f"], ["--dynamic-sampling.from-step"]),
        (["train", "--update.advantage", ""], ["std", "mean", "leave_one_out"]),
        (["train", "--reward.kind", "co"], ["conditional_dense"]),
        (["train", "--update.no"], ["--update.no-on-policy"]),
        (["bench", "step", "--remat", "l"], ["layer"]),
        (["bench", "step", "--workload.l"], ["--workload.lengths", "--workload.layers"]),
        (["fit", "--help"], ["--help", "--help-all"]),
        (["fit", "--fig"], ["--figure"]),
        (["train", "--policy", "ru"], []),
        (["train", "exp"], []),
        (["no", "--st"], []),
    ],
)  # fmt: skip
def test_bash_completes(words, offered):
    assert completed(*words) == offered


def test_files_are_offered_where_nothing_else_is():
    script = completion.script("bash") + "complete -p rpt"
    asked = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert asked.stdout == "complete -o default -F _rpt rpt\n"


def test_the_command_prints_the_script(capsys):
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == completion.script("bash")
    assert completion.script("zsh") == completion.ZSH + completion.script("bash")
    assert cli.main(["completion", "tcsh"]) == 2
    assert "bash|zsh|fish" in capsys.readouterr().err
    assert cli.main(["completion", "--help"]) == 0


def test_fish_knows_every_setting():
    lines = completion.script("fish").splitlines()
    assert all(any(f" -a {name} " in line for line in lines) for name, _, _ in help.COMMANDS)
    for command, page in help.PAGES.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.split())
        own = [line for line in lines if f"-n '{seen}' -l " in line]
        found = [line.split(" -l ")[1].split()[0] for line in own]
        assert found == [setting.flag.removeprefix("--") for setting in settings.read(page.settings)]
    assert any("-l reward.kind -x -a 'prefix first_token " in line for line in lines)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_read_it(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(completion.script(shell))
    done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
