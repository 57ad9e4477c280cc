"""What `rpt --help` and `rpt COMMAND --help` print: one screen each, at once.

In: the words that were typed. Out: text of at most 50 lines and 100 columns. A command's page names what it needs, the
settings that are changed most, an example, and its sections; `--help SECTION` lists one, `--help-all` everything, with
the values that hold behind an experiment or run (tyro's page, which cli.py shows). Nothing heavy is imported: settings
are read from the source (settings.py).
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rpt_jax import settings
from rpt_jax.settings import Setting

WIDTH = 100  # columns
BRIEF = 110  # characters about a setting, on the page of a command
HELP = ("-h", "--help")
HELP_ALL = "--help-all"
MAIN = "main"  # stands for the settings that are in no section

# In the order in which a newcomer needs them: name, what it takes first, what it does.
COMMANDS = (
    ("quickstart", "", "see the whole method on generated text, in minutes, with honest controls"),
    ("pretrain", "", "text files -> a base policy: tokenizer and decoder from scratch"),
    ("annotate", "[EXPERIMENT.py]", "text files -> entropy of every next token under a proxy policy"),
    ("train", "[EXPERIMENT.py]", "hard positions -> a policy that thinks before it predicts (RPT)"),
    ("evaluate", "[FOLDER]", "a policy or run -> next-token accuracy on held-out positions, both modes"),
    ("choices", "[FOLDER]", "questions with options -> zero-shot accuracy, at once and by reasoning"),
    ("harness", "[FOLDER]", "a policy or run -> tasks of lm-evaluation-harness (extra harness)"),
    ("sweep", "EXPERIMENT.py", "sizes x compute budgets x seeds -> a row a run, side by side, resumable"),
    ("fit", "RESULTS.csv", "a sweep's rows -> the scaling law, if they support one"),
    ("sample", "[FOLDER]", "a policy or run, and a text -> thoughts about what comes next"),
    ("report", "RUN [RUN ...]", "run folders -> one page to read offline: curves, figures, rollouts"),
    ("patterns", "RUN", "thoughts of a run -> shares that show each pattern of reasoning"),
    ("plan", "[EXPERIMENT.py]", "an experiment -> memory and seconds on a TPU slice, without one"),
    ("convert", "HOW FROM TO", "published weights (Llama, Qwen2, Qwen3) -> a policy, and back"),
    ("bench", "WHAT", "speed and memory: the log-prob kernel, a step, a step beside a peer's"),
)
CONVERSIONS = (
    ("hf-to-orbax", "MODEL OUTPUT", "a folder or repository of published weights -> a policy"),
    ("orbax-to-hf", "POLICY OUTPUT", "a policy or run -> weights and tokenizer that transformers opens"),
)
BENCHES = (
    ("kernel", "", "speed and memory of the log-prob kernel, here or on a simulated TPU"),
    ("step", "", "speed and memory of a step's rollout, scoring and update, and of all of it"),
    ("compare", "PEER.py", "the same beside another implementation, measured by its script"),
)
KINDS = {"convert": CONVERSIONS, "bench": BENCHES}  # commands that have commands of their own
USAGE = "rpt: train a language model to think before it predicts the next token.\n\n  rpt COMMAND [options]\n"
HINTS = """
  COMMAND --help, --help-all: its main settings, all of them    --json: figures as one last line
  completion bash|zsh|fish: a script that completes these words    --version

Start with `rpt quickstart`. What has been run, and with which settings, is in experiments/."""


class NoSection(ValueError):
    """Help was asked for about a section that a command has not; the message names those that it has."""


@dataclass(frozen=True)
class Page:
    """What the page of a command says beyond its settings."""

    settings: str  # the dataclass, module:Class
    needs: tuple[str, ...]  # settings without which it does not run, by name
    often: tuple[str, ...]  # settings that are changed most
    example: str
    first: tuple[tuple[str, str], ...] = ()  # what comes first, and what that is


EXPERIMENT = ("EXPERIMENT.py", "a file whose config() returns the settings to begin with; may be left out")
FOLDER = ("FOLDER", "of a policy or run, as --policy; a run's own settings are the defaults then")
PAGES = {
    "quickstart": Page(
        "rpt_jax.study.quickstart:QuickstartConfig",
        (),
        ("seed", "from-scratch", "run-folder", "steps", "batch-size", "group-size", "temperature", "learning-rate"),
        "rpt quickstart --steps 40 --run-folder runs/short",
    ),
    "pretrain": Page(
        "rpt_jax.commands:PretrainRun",
        ("corpus.files",),
        (
            "output",
            "seed",
            "vocab-size",
            "corpus.template",
            "corpus.holdout",
            "model.width",
            "model.layers",
            "pretrain.steps",
            "pretrain.learning-rate",
        ),
        "rpt pretrain --corpus.files 'data/*.jsonl' --corpus.holdout 200 --output runs/base",
    ),
    "annotate": Page(
        "rpt_jax.commands:AnnotateRun",
        ("policy", "corpus.files", "positions.annotated"),
        (
            "seed",
            "corpus.template",
            "corpus.holdout",
            "evaluate.annotated",
            "positions.start",
            "positions.window",
            "positions.batch-tokens",
        ),
        "rpt annotate --policy runs/base --corpus.files 'data/*.jsonl' --positions.annotated runs/annotated",
        (EXPERIMENT,),
    ),
    "train": Page(
        "rpt_jax.config:Config",
        ("policy", "positions.annotated"),
        (
            "run-folder",
            "steps",
            "batch-size",
            "seed",
            "evaluate.annotated",
            "positions.threshold",
            "prompt.template",
            "prompt.max-tokens",
            "sample.group-size",
            "sample.max-tokens",
            "reward.kind",
            "update.learning-rate",
            "update.microbatches",
            "checkpoint.folder",
        ),
        "rpt train --policy runs/start --positions.annotated runs/annotated --run-folder runs/rpt",
        (EXPERIMENT,),
    ),
    "evaluate": Page(
        "rpt_jax.commands:EvaluateRun",
        ("policy", "evaluate.annotated"),
        ("results", "seed", "evaluate.positions", "evaluate.group-size", "evaluate.temperature", "evaluate.greedy"),
        "rpt evaluate runs/rpt --evaluate.positions 2048 --results runs/rpt/held_out.json",
        (FOLDER,),
    ),
    "choices": Page(
        "rpt_jax.study.multiple_choice:ChoicesRun",
        ("policy", "files"),
        ("format", "mode", "per-category", "score", "results", "answers", "seed", "batch-size", "sample.max-tokens"),
        "rpt choices runs/rpt --files 'mmlu_pro/*.parquet' --format mmlu_pro --results choices.json",
        (FOLDER,),
    ),
    "harness": Page(
        "rpt_jax.study.harness:HarnessRun",
        ("policy", "tasks"),
        ("include-path", "limit", "fewshot", "think", "max-gen-tokens", "chat", "results", "seed", "batch-size"),
        "rpt harness runs/rpt --tasks gsm8k arc_easy --limit 100",
        (FOLDER,),
    ),
    "sweep": Page(
        "rpt_jax.scaling.sweep:SweepSettings",
        (),
        ("folder", "results", "workers", "only", "stages-only", "retry-failed", "print-xpk"),
        "rpt sweep experiments/scaling_tiny.py --workers 2",
        (("EXPERIMENT.py", "a file that defines cells(folder), the runs, and prepare(stage, folder)"),),
    ),
    "fit": Page(
        "rpt_jax.scaling.fit:FitSettings",
        (),
        ("figure", "splits", "sets", "seed", "plot"),
        "rpt fit experiments/results/scaling_tiny.csv",
        (("RESULTS.csv", "the table that `rpt sweep` has written"),),
    ),
    "sample": Page(
        "rpt_jax.study.sample:SampleRun",
        ("policy",),
        ("text", "samples", "seed", "prompt.template", "sample.temperature", "sample.max-tokens"),
        "echo 'Find a: d>a*7, and from 4>g, g>d+3. So a is' | rpt sample runs/rpt",
        (FOLDER,),
    ),
    "report": Page(
        "rpt_jax.study.report:ReportConfig",
        (),
        ("output", "rollouts", "megabytes"),
        "rpt report runs/rpt runs/other experiments/results/scaling_tiny.fit.json",
        (("RUN", "a run folder, or several to see side by side; files of `rpt fit` may stand among them"),),
    ),
    "patterns": Page(
        "rpt_jax.study.patterns:PatternsRun",
        (),
        ("against", "field", "against-field", "from-step", "to-step"),
        "rpt patterns runs/rpt --against other.jsonl",
        (("RUN", "a run folder, or a .jsonl file of responses"),),
    ),
    "plan": Page(
        "rpt_jax.planning.estimate:PlanRun",
        (),
        ("topology", "choose-mesh", "steps", "batch-size", "response-tokens", "mesh.data", "mesh.fsdp", "mesh.tensor"),
        "rpt plan experiments/omnimath_14b.py --topology v5p:4x4x4",
        (EXPERIMENT,),
    ),
    "convert hf-to-orbax": Page(
        "rpt_jax.convert:FromPublished",
        (),
        ("dtype", "revision"),
        "rpt convert hf-to-orbax Qwen3-1.7B runs/start",
        (("MODEL", "a folder with config.json and safetensors, or a repository (extra hub)"), ("OUTPUT", "new folder")),
    ),
    "convert orbax-to-hf": Page(
        "rpt_jax.convert:ToPublished",
        (),
        ("dtype", "context", "file-gib"),
        "rpt convert orbax-to-hf runs/rpt published",
        (("POLICY", "a policy folder, or a run folder: its newest checkpoint"), ("OUTPUT", "folder to write")),
    ),
    "bench kernel": Page(
        "rpt_jax.bench.kernel:KernelBench",
        (),
        ("target", "tokens", "width", "vocabulary", "dtype", "repeats", "seed", "no-baselines"),
        "rpt bench kernel --tokens 2048 --width 256 --vocabulary 32768",
    ),
    "bench step": Page(
        "rpt_jax.bench.step:StepBench",
        (),
        ("phases", "repeats", "cores", "devices", "microbatches", "remat", "slots", "workload.lengths", "seed"),
        "rpt bench step --devices 2 --microbatches 4",
    ),
    "bench compare": Page(
        "rpt_jax.bench.compare:CompareBench",
        (),
        ("workload", "phases", "repeats", "cores", "devices", "microbatches", "peer-python", "seed"),
        "rpt bench compare PEER.py --peer-python PEER_VENV/bin/python --cores 0,1",
        (("PEER.py", "the other implementation's script; rpt_jax/bench/compare.py says what it takes and prints"),),
    ),
}


def overview() -> str:
    """The commands on one screen."""
    return "\n".join([USAGE, *_rows(COMMANDS), HINTS])


def row_of(command: str) -> tuple[str, str, str]:
    """(name, what it takes first, what it does) of a command, or of one within another, such as `bench step`."""
    within = [(f"{kind} {name}", takes, does) for kind, rows in KINDS.items() for name, takes, does in rows]
    return next(row for row in (*COMMANDS, *within) if row[0] == command)


def wanted(words: Sequence[str]) -> str | None:
    """The page that a command line asks for with --help; None where it does not.

    words: a command and what follows it. Raises NoSection.
    """
    at = next((i for i, word in enumerate(words) if word in HELP), None)
    if words[0] in KINDS and (len(words) < 2 or words[1] not in [name for name, _, _ in KINDS[words[0]]]):
        asks_for_all = HELP_ALL in words and (len(words) < 2 or words[1].startswith("-"))
        return _kinds(words[0]) if asks_for_all or at == 1 else None
    if at is None:
        return None
    command = " ".join(words[:2]) if words[0] in KINDS else words[0]
    section = words[at + 1] if at + 1 < len(words) and not words[at + 1].startswith("-") else ""
    return section_page(command, section) if section else page(command)


def page(command: str) -> str:
    """What a command does, what it needs, its main settings, an example, and where the others are."""
    _, takes, does = row_of(command)
    about = PAGES[command]
    known = {setting.name: setting for setting in settings.read(about.settings)}
    known |= {setting.flag.removeprefix("--"): setting for setting in known.values()}
    lines = [f"rpt {command} {takes} [options]".replace("  ", " "), "", f"{does[0].upper()}{does[1:]}.", ""]
    from_first = takes.startswith("[")  # what comes first may be left out, and may name what is needed
    first = [(f"[{name}]" if from_first else name, what) for name, what in about.first]
    needs = [*first, *((_typed(known[name]), known[name].about) for name in about.needs)]
    often = [(_typed(known[name]), _about(known[name], BRIEF)) for name in about.often]
    width = max(len(typed) for typed, _ in (*needs, *often))
    if needs:
        lines += [f"needed, here or in {about.first[0][0]}" if from_first else "needed", *_columns(needs, width), ""]
    lines += ["often set [default]", *_columns(often, width), "", "example", f"  {about.example}", ""]
    return "\n".join([*lines, *_elsewhere(command, about)]) + "\n"


def section_page(command: str, section: str) -> str:
    """All settings of a section, or, by the name MAIN, those that are in none."""
    about = PAGES[command]
    every = settings.read(about.settings)
    own = "" if section == MAIN else section
    chosen = [setting for setting in every if setting.section == own]
    if not chosen:
        names = [MAIN, *settings.sections(about.settings)]
        raise NoSection(f"{command} has no settings called {section!r}: ask for one of {', '.join(names)}")
    says = settings.sections(about.settings).get(own, "") if own else settings.docstring(about.settings).split("\n")[0]
    rows = [(_typed(setting), _about(setting)) for setting in chosen]
    width = min(max(len(typed) for typed, _ in rows), 44)
    heading = textwrap.wrap(f"rpt {command}, {section}: {says}".rstrip(": "), WIDTH)
    return "\n".join([*heading, "", *_columns(rows, width)]) + "\n"


def _elsewhere(command: str, about: Page) -> list[str]:
    """Where the settings are that the page does not show."""
    names = list(settings.sections(about.settings))
    if not names:
        return ["--help-all: all settings"]
    text = f"rpt {command} --help SECTION lists a section of the settings: {', '.join([MAIN, *names])}."
    text += f" --help-all lists all{', with the values that hold behind ' + about.first[0][0] if about.first else ''}."
    return textwrap.wrap(text, WIDTH)


def _kinds(command: str) -> str:
    _, takes, _ = row_of(command)
    usage = f"usage: rpt {command} {takes} [options]; `rpt {command} {takes.split()[0]} --help` lists its settings.\n"
    return "\n".join([usage, *_rows(KINDS[command])]) + "\n"


def _rows(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    width = max(len(f"{name} {takes}") for name, takes, _ in rows)
    return [f"  {f'{name} {takes}':{width}}  {does}" for name, takes, does in rows]


def _typed(setting: Setting) -> str:
    return f"{setting.flag} {setting.takes}".rstrip() if len(setting.takes) < 30 else f"{setting.flag} ..."


def _about(setting: Setting, most: int = 10_000) -> str:
    """The comment, cut at `most` characters; choices that are too long to stand behind the flag; the default."""
    choices = f" (one of {', '.join(setting.choices)})" if len(setting.takes) >= 30 else ""
    default = f" [{setting.shown_default}]" if setting.shown_default else ""
    return f"{textwrap.shorten(setting.about, most, placeholder=' ...')}{choices}{default}".strip()


def _columns(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Rows of two columns, the second wrapped beside the first."""
    lines = []
    for typed, about in rows:
        wrapped = textwrap.wrap(about, WIDTH - width - 4, break_long_words=True) or [""]
        if len(typed) > width:
            lines.append(f"  {typed}")
            typed = ""
        left = [typed, *[""] * (len(wrapped) - 1)]
        lines += [f"  {a:{width}}  {b}".rstrip() for a, b in zip(left, wrapped, strict=True)]
    return lines
