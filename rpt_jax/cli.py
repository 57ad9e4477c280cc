"""The command line: `rpt COMMAND`. Settings come from the dataclasses, so no flag is written by hand.

What a command needs is imported when it runs, so that help comes at once. Exit status: 0 done, 1 a loss or gradient
that is not finite, a plan that does not fit or a cell of a sweep that failed, 2 input that cannot be used or a full
disk, 128 + signal when told to stop (a run has saved), 3 where another host of the run is gone, 141 where nobody reads
stdout any more.
"""

import json
import logging
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import rpt_jax
from rpt_jax import disk, ending, help, host_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    Raises SystemExit with it where tyro has answered, or a run was told to stop.
    """
    if argv is None:  # this process is ours, and has no threads yet
        host_memory.share_arenas()
    argv, status = list(sys.argv[1:] if argv is None else argv), None
    try:
        status = _answer(argv)
        if status is None:
            status = _execute(argv)
        print(end="", flush=True)  # here, where a failure is caught, rather than when Python ends
    except OSError as error:
        disk.end_if_full(error)
        if not ending.nobody_reads(error):
            raise
        ending.drop_output()
        return status or ending.UNREAD
    return status


def _answer(argv: list[str]) -> int | None:
    """Answers words that ask for help, and those that are no command; None for a command that is to run."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help.overview())
        return 0 if argv else 2
    if argv[0] in ("--version", "-V"):
        print(f"rpt_jax {rpt_jax.__version__}")
        return 0
    if argv[0] == "completion":
        return _complete(argv[1:])
    if argv[0] not in [name for name, _, _ in help.COMMANDS]:
        print(f"rpt: no command {argv[0]!r}\n\n{help.overview()}", file=sys.stderr)
        return 2
    try:
        page = help.wanted(argv)
    except help.NoSection as error:
        print(f"rpt: {error}", file=sys.stderr)
        return 2
    if page is None:
        return None
    print(page, end="")
    return 0


def _execute(argv: list[str]) -> int:
    """Runs a command and shows its figures, or says why it could not; returns the exit status."""
    _log_to_stderr()
    as_json = "--json" in argv
    words = ["--help" if word == help.HELP_ALL else word for word in argv[1:] if word != "--json"]
    try:
        figures = run(argv[0], words, as_json)
    except SystemExit:
        print(end="", flush=True)  # what tyro has printed, before Python ends
        raise
    except KeyboardInterrupt:
        _broken_off()
    except Exception as error:
        return failed(error)
    status = _finish(argv[0], figures, as_json)
    if agreement := sys.modules.get("rpt_jax.agreement"):
        agreement.all_end(agreement.LAST_SECONDS)
    return status


def failed(error: Exception) -> int:
    """Says what a command failed with, and returns the exit status; in a single process raises what has no words.

    Where other processes go on, and so wait for this one, it ends here.
    """
    import jax

    from rpt_jax import agreement
    from rpt_jax.records import InputError

    disk.end_if_full(error)
    agreement.end_if_host_lost(error)
    status = 2
    if isinstance(error, InputError):
        said = str(error)
    elif isinstance(error, OSError):  # a name too long, a folder where a file is expected, no permission
        if ending.nobody_reads(error):
            raise error
        said = f"{error}: check the name, what is there, and who may read and write it"
    elif isinstance(error, MemoryError):
        said = f"not enough memory ({error}): lower the sizes that were asked for"
    elif isinstance(error, FloatingPointError):
        said, status = str(error), 1
    elif jax.distributed.is_initialized():
        said, status = "".join(traceback.format_exception(error)), 1
    else:
        raise error
    print(f"rpt: {said}", file=sys.stderr, flush=True)
    agreement.end_if_alone(status)
    return status


def _broken_off() -> NoReturn:
    """The end of a command by Ctrl-C, also of one that was still loading."""
    if agreement := sys.modules.get("rpt_jax.agreement"):
        agreement.end_if_alone(128 + signal.SIGINT)
    ending.by_interrupt("rpt: broken off")


def _finish(command: str, figures: dict, as_json: bool) -> int:
    """Shows the figures that a command has not shown itself; returns the exit status that they mean."""
    if "commands" in figures and not as_json:  # for a shell: nothing else on stdout
        print("\n".join(figures["commands"]))
    elif as_json or command not in ("quickstart", "sample", "plan", "fit"):  # which show their own
        show(figures, as_json)
    if figures.get("signal"):
        return 128 + figures["signal"]
    return 0 if figures.get("fits", True) and not figures.get("failed") else 1


def run(command: str, words: list[str], as_json: bool = False) -> dict:
    """Reads the settings of a command and runs it; returns its figures.

    Longer than 40 lines because all commands stand in one place, each with what it alone imports.
    """
    from rpt_jax import commands, compilation, config
    from rpt_jax.experiment_file import load_experiment

    compilation.keep_on_disk()

    takes = next(takes for name, takes, _ in help.COMMANDS if name == command)
    given = words.pop(0) if takes and words and not words[0].startswith("-") else ""
    if command == "quickstart":
        from rpt_jax.study import quickstart

        return quickstart.main(parse(command, quickstart.QuickstartConfig(), words))
    if command == "pretrain":
        return commands.run_pretrain(parse(command, commands.PretrainRun(), words))
    if command == "annotate":
        start = commands.part_of(commands.AnnotateRun, load_experiment(given)) if given else None
        return commands.run_annotate(parse(command, start or commands.AnnotateRun(), words))
    if command == "bench":
        return run_bench(given, words)
    if command == "plan":
        from rpt_jax.planning import plan

        pairs = [words[i : i + 2] for i in range(len(words))]
        if ["--mesh", "auto"] in pairs:
            at = pairs.index(["--mesh", "auto"])
            words[at : at + 2] = ["--choose-mesh"]
        start = commands.part_of(plan.PlanRun, load_experiment(given)) if given else plan.PlanRun()
        figures = plan.plan(parse(command, start, words))
        print(plan.shown(figures))
        return figures
    if command == "choices":
        from rpt_jax.study import multiple_choice

        return multiple_choice.run(parse(command, multiple_choice.settings_of(given), words))
    if command == "harness":
        from rpt_jax.study import harness

        settings = parse(command, harness.settings_of(given), words)
        harness.require_installed()
        from rpt_jax.study import harness_lm  # imports the extra

        return harness_lm.run(settings)
    if command == "sample":
        from rpt_jax.study import sample

        return sample.run(parse(command, sample.settings_of(given), words), show=not as_json)
    if command in ("report", "patterns"):
        import jax

        jax.config.update("jax_platforms", "cpu")  # leaves accelerators to the run that may be going on
    if command == "report":
        from rpt_jax.study import report

        runs = [*filter(None, [given]), *places(words)]
        return report.write_report(runs, parse(command, report.ReportConfig(), words))
    if command == "patterns":
        from rpt_jax.study import patterns

        figures = patterns.run(given, parse(command, patterns.PatternsRun(), words))
        return figures if as_json else patterns.shown(figures)
    if command == "convert":
        return run_convert(given, words)
    if command == "fit":
        from rpt_jax.scaling import fit, fit_plot

        figures = fit.fit(given, parse(command, fit.FitSettings(), words), fit_plot.draw)
        show(fit_plot.table(figures), as_json=False)
        return figures
    if command == "sweep":
        from rpt_jax.scaling import sweep

        return sweep.sweep(given, parse(command, sweep.SweepSettings(), words))
    if command == "train":
        return commands.run_train(parse(command, load_experiment(given) if given else config.Config(), words))
    start = commands.settings_of(given) if given else commands.EvaluateRun()
    return commands.run_evaluate(parse(command, start, words))


def places(words: list[str]) -> list[str]:
    """Takes the words that are neither flags nor the value of one out of `words`; every flag has a value."""
    taken, left, queue = [], [], iter(words)
    for word in queue:
        if not word.startswith("-"):
            taken.append(word)
            continue
        left.append(word)
        if "=" not in word and word not in ("-h", "--help"):
            left += [value for value in [next(queue, None)] if value is not None]
    words[:] = left
    return taken


def run_bench(what: str, words: list[str]) -> dict:
    """Reads the settings of a benchmark and runs it; returns its figures."""
    if what == "kernel":
        from rpt_jax.bench import kernel

        return kernel.bench_kernel(parse("bench kernel", kernel.KernelBench(), words))
    if what == "step":
        from rpt_jax.bench import step

        return step.bench_step(parse("bench step", step.StepBench(), words))
    if what == "compare":
        from rpt_jax.bench import compare

        peer = words.pop(0) if words and not words[0].startswith("-") else ""
        return compare.compare(peer, parse("bench compare", compare.CompareBench(), words))
    from rpt_jax.records import InputError

    raise InputError(
        f"bench: {what or 'nothing'} cannot be measured: "
        "use `rpt bench kernel`, `rpt bench step` or `rpt bench compare PEER.py`"
    )


def run_convert(how: str, words: list[str]) -> dict:
    """Reads the settings of a conversion and runs it; returns its figures."""
    from rpt_jax.records import InputError

    if how not in [name for name, _, _ in help.CONVERSIONS]:
        raise InputError(
            f"convert: {how or 'nothing'} is no conversion: use `rpt convert hf-to-orbax MODEL OUTPUT` or "
            "`rpt convert orbax-to-hf POLICY OUTPUT`"
        )
    import jax

    jax.config.update("jax_platforms", "cpu")  # needs no accelerator, nor the other hosts of one
    from rpt_jax import convert

    given = [words.pop(0) for _ in range(2) if words and not words[0].startswith("-")]
    source, output = [*given, "", ""][:2]
    if how == "hf-to-orbax":
        return convert.from_published(source, output, parse("convert hf-to-orbax", convert.FromPublished(), words))
    return convert.to_published(source, output, parse("convert orbax-to-hf", convert.ToPublished(), words))


def parse(command: str, default, words: list[str]):
    """The dataclass of `default` with what the flags change; --help-all (here --help) lists all of them.

    Raises InputError for a number out of range, and SystemExit, as tyro does, for --help and for what is no flag.
    """
    import tyro

    from rpt_jax.ranges import require_in_range

    _, takes, does = help.row_of(command)
    text = f"{does[0].upper()}{does[1:]}.\n\n{type(default).__doc__}"
    if takes:
        text += f"\n\nUsage: rpt {command} {takes} [options]."
    if takes.startswith("["):
        text += " What comes first sets the defaults that are shown here."
    kind = type(default)
    settings = tyro.cli(kind, prog=f"rpt {command}", description=text, default=default, args=words, add_help=True)
    require_in_range(settings)
    return settings


def _complete(words: list[str]) -> int:
    from rpt_jax import completion

    if len(words) == 1 and words[0] in completion.SHELLS:
        print(completion.script(words[0]), end="")
        return 0
    asked = bool({*words} & {*help.HELP})
    print(completion.USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def show(figures: dict, as_json: bool) -> None:
    """Figures on stdout, in process 0: JSON on one line, or for people, as a table where they are one."""
    import jax

    if jax.process_index() != 0:
        return
    if as_json:
        print(json.dumps(figures))
        return
    columns = {name: None for row in figures.values() if isinstance(row, dict) for name in row}
    if not figures or not all(isinstance(row, dict) for row in figures.values()):
        print(json.dumps(figures, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = [name for name in columns if not any(isinstance(row.get(name), dict) for row in figures.values())]
    table = Table("", *(escape(name.replace("_", " ")) for name in shown), box=None)
    for split, row in figures.items():
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in map(row.get, shown))
        table.add_row(escape(split), *map(escape, cells))
    console = Console(width=None if sys.stdout.isatty() else 200)
    with console.capture() as made:  # for print: rich itself ends a process, with status 1, where nobody reads
        console.print(table)
    print(made.get(), end="")


def _log_to_stderr() -> None:
    logger = logging.getLogger("rpt_jax")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


if __name__ == "__main__":
    sys.exit(main())
