"""Claims: help comes at once and in order; bad input ends with status 2, one message and no traceback; a figure that is
not finite ends with 1, Ctrl-C by the signal, a reader that goes away with 141 and no word; from text to an evaluated
policy, and out to other programs, by commands alone."""

import json
import os
import signal
import subprocess
import sys

import pytest
import toy

from rpt_jax import cli, commands, help
from rpt_jax.learning.policy_folder import save_policy
from rpt_jax.planning import plan


def run(capsys, *words):
    """(status, stdout, stderr) of a command in this process."""
    status = cli.main([str(word) for word in words])
    return status, *capsys.readouterr()


def test_the_overview_is_one_screen_in_order(capsys):
    status, output, _ = run(capsys, "--help")
    assert status == 0 and len(output.splitlines()) <= 24
    assert max(map(len, output.splitlines())) <= 100
    names = (
        "quickstart",
        "pretrain",
        "annotate",
        "train",
        "evaluate",
        "choices",
        "harness",
        "sweep",
        "fit",
        "sample",
        "report",
        "patterns",
        "plan",
        "convert",
        "bench",
    )
    places = [output.index(f"\n  {name}") for name in names]
    assert places == sorted(places)


def test_version_and_unknown_commands(capsys):
    assert run(capsys, "--version")[:2] == (0, "rpt_jax 0.1.0\n")
    status, output, message = run(capsys, "trian")
    assert status == 2 and output == "" and message.startswith("rpt: no command 'trian'") and "  train" in message
    assert run(capsys)[0] == 2


OWN = ("sweep", "report", "patterns", "plan", "convert", "bench")  # have no seed
COMMANDS = [(name, "--seed INT") for name, _, _ in help.COMMANDS if name not in OWN]
COMMANDS += [("sweep", "--workers INT"), ("report", "--rollouts INT"), ("patterns", "--against STR")]
COMMANDS += [("plan", "--topology STR")] + [(f"bench {name}", "--seed INT") for name, _, _ in help.BENCHES]
COMMANDS += [(f"convert {name}", "--dtype {stored") for name, _, _ in help.CONVERSIONS]


@pytest.mark.parametrize(("command", "setting"), COMMANDS)
def test_every_command_lists_its_settings(capsys, command, setting):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help-all"])
    output = capsys.readouterr().out
    assert ended.value.code == 0 and f"usage: rpt {command}" in output and setting in output


def test_bad_input_through_the_real_command(tmp_path):
    """Status 2, one line that names the file and the remedy, nothing on stdout, nothing written."""
    command = [
        sys.executable,
        "-m",
        "rpt_jax.cli",
        "train",
        "--policy",
        tmp_path / "none",
        "--run-folder",
        tmp_path / "run",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"rpt: no policy in '{tmp_path}/none': give a folder with policy.json (`rpt pretrain` makes one, and "
        "`rpt convert hf-to-orbax` of published weights) or the folder of a run that has saved a checkpoint\n"
    )
    assert not (tmp_path / "run").exists()


TABLE = (
    "-c",
    "import sys; from rpt_jax import cli, commands\n"
    "commands.run_evaluate = lambda config: {'hard': {'argmax': 0.5}}\n"
    "sys.exit(cli.main(['evaluate', 'policy']))",
)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words", [("-m", "rpt_jax.cli", "--help"), ("-m", "rpt_jax.cli", "train", "--help-all"), TABLE]
)
def test_a_reader_that_goes_away_is_no_error(words, unbuffered):
    """As in `rpt --help | head -3`: status 141 and no traceback, whether printing fails or the flush behind it."""
    reader, writer = os.pipe()
    os.close(reader)
    environ = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, *words], stdout=writer, stderr=subprocess.PIPE, text=True, env=environ)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_other_broken_pipes_are_errors(capsys, monkeypatch):
    def lose(config):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(commands, "run_train", lose)
    status, output, message = run(capsys, "train")
    assert (status, output) == (2, "") and message.startswith("rpt: [Errno 32] Broken pipe: check")


def test_fit_shows_a_table_and_ends_with_figures_by_size_and_split(capsys, tmp_path):
    columns = "size,seed,steps,flops_sample,flops_update,hard.reasoning,hard.positions"
    rows = [f"s,{seed},{steps},{steps}e9,{steps}e9,0.5,400" for steps in (1, 4, 16, 64) for seed in (0, 1)]
    (tmp_path / "a.csv").write_text("\n".join([columns, *rows]) + "\n")
    status, output, _ = run(capsys, "fit", tmp_path / "a.csv", "--sets", "100", "--json")
    figures = json.loads(output.splitlines()[-1])
    assert status == 0 and figures["s"]["hard"]["verdict"] == "constant" and "s hard" in output
    assert {"A", "alpha", "P_star", "r2", "intervals"} <= figures["s"]["hard"].keys()
    assert (tmp_path / "a.png").is_file()
    status, output, message = run(capsys, "fit", tmp_path / "none.csv")
    assert status == 2 and output == "" and "none.csv" in message


def test_an_unknown_flag_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--learning-rate", "1"])
    assert ended.value.code == 2 and "--update.learning-rate" in capsys.readouterr().err


def test_a_figure_that_is_not_finite_ends_with_status_1(capsys, monkeypatch):
    def diverge(config):
        raise FloatingPointError("step 7: loss nan")

    monkeypatch.setattr(commands, "run_train", diverge)
    assert run(capsys, "train") == (1, "", "rpt: step 7: loss nan\n")


def test_one_process_of_several_shows_what_nobody_foresaw(capsys, monkeypatch):
    """Its traceback is said here, since Python may not come to it."""

    def fail(config):
        raise LookupError("unforeseen")

    monkeypatch.setattr(commands, "run_train", fail)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    status, output, said = run(capsys, "train")
    assert (status, output) == (1, "") and "Traceback" in said and said.endswith("LookupError: unforeseen\n\n")


@pytest.mark.parametrize("place", ["rpt_jax.commands.run_train", "rpt_jax.compilation.keep_on_disk"])
def test_ctrl_c_is_no_traceback(place):
    """While it runs and before it has begun; ended by the signal, as a shell's loop wants it."""
    module, _, function = place.rpartition(".")
    code = (
        f"import sys; from rpt_jax import cli; import {module} as module\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        f"module.{function} = interrupted; sys.exit(cli.main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "rpt: broken off\n")


def test_experiments_give_the_defaults_and_flags_change_them(capsys, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from rpt_jax.config import Config, UpdateConfig\n"
        "def config():\n"
        "    return Config(name='mine', steps=7, update=UpdateConfig(beta2=0.5))\n"
    )
    seen = []
    monkeypatch.setattr(commands, "run_train", lambda config: seen.append(config) or {"done": 1})
    status, output, _ = run(capsys, "train", tmp_path / "mine.py", "--update.learning-rate", "2e-6", "--json")
    assert status == 0 and json.loads(output) == {"done": 1}
    assert (seen[0].name, seen[0].steps, seen[0].update.beta2, seen[0].update.learning_rate) == ("mine", 7, 0.5, 2e-6)
    status, _, message = run(capsys, "train", tmp_path / "none.py")
    assert status == 2 and message.startswith(f"rpt: no experiment file {tmp_path}/none.py")


@pytest.fixture
def text(tmp_path):
    """64 texts of two letters, each with its digit."""
    pairs = [a[:-1] + b for a in toy.TEXTS for b in toy.TEXTS]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": pair}) + "\n" for pair in pairs))
    toy.tokenizer().save(tmp_path / "tokenizer")
    return path


def test_from_text_to_an_evaluated_policy(capsys, tmp_path, text):
    """The second letter of a text is its one hard position, among eight; its digit follows from it."""

    def figures(*words):
        status, output, message = run(capsys, *words, "--json")
        assert status == 0, message
        return json.loads(output.splitlines()[-1])

    corpus = ["--corpus.files", text, "--corpus.tokenizer", tmp_path / "tokenizer", "--corpus.holdout", "16"]
    annotated = ["--positions.annotated", tmp_path / "train", "--evaluate.annotated", tmp_path / "held-out"]
    shape = "--model.width 32 --model.layers 1 --model.heads 2 --model.kv-heads 2 --model.head-channels 16"
    small = "--pretrain.steps 90 --pretrain.batch-size 16 --pretrain.sequence-length 9 --pretrain.learning-rate 1e-2"
    made = figures(
        "pretrain",
        "--output",
        tmp_path / "base",
        *corpus,
        *shape.split(),
        *small.split(),
        "--pretrain.warmup-steps",
        "5",
    )
    assert made["vocab_size"] == 24 and made["loss"] < 1.5
    assert json.loads((tmp_path / "base" / "policy.json").read_text())["provenance"]["made_by"] == "rpt pretrain"

    filtered = figures(
        "annotate", "--policy", tmp_path / "base", *corpus, *annotated, "--positions.batch-tokens", "128"
    )
    assert [filtered[part]["documents"] for part in ("train", "holdout")] == [48, 16]
    assert [filtered[part]["hard"] for part in ("train", "holdout")] == [48, 16]

    figures("convert", "orbax-to-hf", tmp_path / "base", tmp_path / "published", "--context", "64")
    figures("convert", "hf-to-orbax", tmp_path / "published", tmp_path / "start")
    (tmp_path / "x.py").write_text(
        "from rpt_jax.config import *\n"
        "def config():\n"
        f"    return Config(policy={str(tmp_path / 'start')!r}, steps=2, batch_size=8, rollouts_logged=1,\n"
        "        prompt=PromptConfig('bare', max_tokens=32, truth_bytes=8),\n"
        "        sample=SampleConfig(group_size=2, max_tokens=8), evaluate=EvaluateConfig(every=0, batch_size=16))\n"
    )
    trained = figures("train", tmp_path / "x.py", "--run-folder", tmp_path / "run", *annotated)
    assert trained["steps"] == 2 and trained["last_step"]["step"] == 2
    evaluated = figures("evaluate", tmp_path / "run", "--results", tmp_path / "figures.json")
    assert evaluated == json.loads((tmp_path / "figures.json").read_text())
    assert evaluated == {split: trained["evaluation"][split] for split in ("easy", "medium", "hard")}
    assert evaluated["hard"]["positions"] == 16 and 0 <= evaluated["hard"]["argmax"] < 0.5
    assert {"argmax", "reasoning", "pass_at_k", "format_rate", "positions", "standard_error"} <= evaluated[
        "hard"
    ].keys()

    exported = figures("convert", "orbax-to-hf", tmp_path / "run", tmp_path / "trained", "--dtype", "bfloat16")
    assert (exported["parameters"], exported["dtype"], exported["context"]) == (made["parameters"], "bfloat16", 64)

    status, output, _ = run(capsys, "evaluate", tmp_path / "base", "--evaluate.annotated", tmp_path / "none")
    assert status == 2 and output == ""


def test_mesh_auto_is_a_pair_of_words(monkeypatch):
    """Not the word auto wherever it stands."""
    seen = []
    monkeypatch.setattr(plan, "plan", lambda config: seen.append(config) or {"fits": True})
    monkeypatch.setattr(plan, "shown", lambda figures: "")
    assert cli.main(["plan", "--mesh", "auto", "--mesh.coordinator", "auto"]) == 0
    assert seen[0].choose_mesh and seen[0].mesh.coordinator == "auto"


def test_figures_for_people(capsys):
    cli.show(
        {"hard": {"argmax": 0.25, "positions": 8, "errors": {"argmax": 1}}, "easy": {"argmax": None, "positions": 0}},
        False,
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["argmax", "positions"], ["hard", "0.250", "8"], ["easy", "None", "0"]]
    cli.show({"steps": 2, "more": {}}, False)
    assert json.loads(capsys.readouterr().out) == {"steps": 2, "more": {}}


def test_names_in_a_table_are_no_markup(capsys):
    cli.show({"1.5b[bf16] hard": {"law [/b]": "a[/]"}}, False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["law", "[/b]"], ["1.5b[bf16]", "hard", "a[/]"]]


def test_a_tokenizer_of_another_vocabulary_is_named_with_both_numbers(capsys, tmp_path):
    save_policy(tmp_path / "policy", toy.model(), toy.params(), toy.tokenizer(), {})
    toy.train_sentencepiece(["abc 01"] * 3, 9, tmp_path / "other", model_type="char", byte_fallback=False)
    words = ("--batch-size", "8", "--policy", tmp_path / "policy", "--corpus.tokenizer", tmp_path / "other")
    status, output, message = run(capsys, "train", *words)
    assert status == 2 and output == "" and "9 ids" in message and "24 ids" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --steps 0", "rpt: steps=0: use 1 or more"),
        ("train --seed 99999999999999999999", "rpt: seed=99999999999999999999: use"),
        ("train --update.learning-rate nan", "rpt: update.learning_rate=nan: use a finite number"),
        ("train --sample.temperature inf", "rpt: sample.temperature=inf: use a finite number"),
        ("train --prompt.truth-bytes -1", "rpt: prompt.truth_bytes=-1: use 1 or more"),
        ("train --policy {long}", "rpt: "),
        ("train --prompt.template {long} --policy {tmp}", "no policy in"),
        ("pretrain --pretrain.steps 0", "rpt: pretrain.steps=0: use 1 or more"),
        ("pretrain --corpus.files {tmp}", "is a folder; name the files in it"),
        ("evaluate {long}", "rpt: "),
        ("evaluate --mesh.data 4611686018427387904", "rpt: mesh.data=4611686018427387904: use"),
        ("sample --text \udcff", r"rpt: text='\udcff': use UTF-8"),
        ("choices --questions 7", ""),
        ("report {tmp}/a.json", "rpt: {tmp}/a.json has no fit"),
        ("patterns {long}", "rpt: "),
        ("fit {tmp}", "rpt: no table"),
        ("convert hf-to-orbax {long} {tmp}/x", "rpt: "),
    ],
)
def test_no_words_end_in_a_traceback(capsys, tmp_path, words, message):
    """One line for what cannot be used, or the flags' own complaint."""
    (tmp_path / "a.json").write_text("{}")
    places = {"long": "x" * 5000, "tmp": tmp_path}
    try:
        status = cli.main([word.format(**places) for word in words.split()])
    except SystemExit as ended:
        status = ended.code
    output, said = capsys.readouterr()
    assert status == 2 and output == "" and message.format(**places) in said
    assert len(said.splitlines()) == 1 or not message


def test_memory_that_is_not_there_is_said(capsys, monkeypatch):
    def allocate(config):
        raise MemoryError("Unable to allocate 8 EiB")

    monkeypatch.setattr(commands, "run_train", allocate)
    assert run(capsys, "train") == (
        2,
        "",
        "rpt: not enough memory (Unable to allocate 8 EiB): lower the sizes that were asked for\n",
    )
