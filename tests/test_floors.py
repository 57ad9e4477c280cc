"""The floors of the house: who may import whom, how long a file may be, and what gets installed.

Imports are read from the syntax tree, so lazy and relative ones count too. A new file goes into ORDER, below
everything it imports.
"""

import ast
import configparser
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Data flows down this list: a module imports only from modules above it.
ORDER = [
    "rpt_jax.kernels.grouped_logprob_blocks",
    "rpt_jax.kernels.grouped_logprob_tpu",
    "rpt_jax.kernels.grouped_logprob_xla",
    "rpt_jax.kernels.grouped_logprob",
    "rpt_jax.settings",
    "rpt_jax.help",
    "rpt_jax.completion",
    "rpt_jax.records",
    "rpt_jax.parts",
    "rpt_jax.json_file",
    "rpt_jax.ranges",
    "rpt_jax.config",
    "rpt_jax.config_dict",
    "rpt_jax.experiment_file",
    "rpt_jax.mesh",
    "rpt_jax.ending",
    "rpt_jax.agreement",
    "rpt_jax.disk",
    "rpt_jax.host_memory",
    "rpt_jax.preemption",
    "rpt_jax.compilation",
    "rpt_jax.corpus.tokenizer_files",
    "rpt_jax.corpus.tokenizer",
    "rpt_jax.corpus.tokenizer_export",
    "rpt_jax.corpus.text_files",
    "rpt_jax.corpus.choices",
    "rpt_jax.corpus.documents",
    "rpt_jax.corpus.segments",
    "rpt_jax.corpus.annotated_record",
    "rpt_jax.corpus.positions",
    "rpt_jax.corpus.curriculum",
    "rpt_jax.corpus.surroundings",
    "rpt_jax.corpus.templates",
    "rpt_jax.corpus.prompts",
    "rpt_jax.corpus.questions",
    "rpt_jax.corpus.pieces",
    "rpt_jax.corpus.arithmetic",
    "rpt_jax.policy.fingerprint",
    "rpt_jax.policy.stream",
    "rpt_jax.policy.splash",
    "rpt_jax.policy.attention",
    "rpt_jax.policy.decoder",
    "rpt_jax.policy.flops",
    "rpt_jax.policy.weights_config",
    "rpt_jax.policy.weights",
    "rpt_jax.policy.slots",
    "rpt_jax.policy.draw",
    "rpt_jax.policy.caches",
    "rpt_jax.policy.sampler",
    "rpt_jax.policy.scorer",
    "rpt_jax.policy.proxy",
    "rpt_jax.learning.judge_worker",
    "rpt_jax.learning.judge",
    "rpt_jax.learning.custom_judge",
    "rpt_jax.learning.rewards",
    "rpt_jax.learning.next_token",
    "rpt_jax.learning.advantages",
    "rpt_jax.learning.text_loss",
    "rpt_jax.learning.update",
    "rpt_jax.learning.batch",
    "rpt_jax.learning.checkpoints",
    "rpt_jax.learning.array_file",
    "rpt_jax.learning.policy_folder",
    "rpt_jax.learning.tensorboard",
    "rpt_jax.learning.run_rows",
    "rpt_jax.learning.run_folder",
    "rpt_jax.learning.pretrain",
    "rpt_jax.learning.collect",
    "rpt_jax.learning.shown",
    "rpt_jax.learning.targets",
    "rpt_jax.learning.identity",
    "rpt_jax.learning.progress",
    "rpt_jax.learning.inputs",
    "rpt_jax.learning.train",
    "rpt_jax.study.held_out",
    "rpt_jax.study.continuations",
    "rpt_jax.study.evaluate",
    "rpt_jax.study.multiple_choice",
    "rpt_jax.study.harness",
    "rpt_jax.study.harness_lm",
    "rpt_jax.study.question_evaluation",
    "rpt_jax.study.sample",
    "rpt_jax.study.plots",
    "rpt_jax.study.report",
    "rpt_jax.study.patterns",
    "rpt_jax.study.base",
    "rpt_jax.study.controls",
    "rpt_jax.study.quickstart_results",
    "rpt_jax.study.quickstart",
    "rpt_jax.planning.phases",
    "rpt_jax.planning.estimate",
    "rpt_jax.planning.search",
    "rpt_jax.planning.plan",
    "rpt_jax.bench.simulate",
    "rpt_jax.bench.stopwatch",
    "rpt_jax.bench.workload",
    "rpt_jax.bench.step",
    "rpt_jax.bench.kernel",
    "rpt_jax.bench.compare",
    "rpt_jax.convert",
    "rpt_jax.commands",
    "rpt_jax.scaling.power_law",
    "rpt_jax.scaling.bootstrap",
    "rpt_jax.scaling.table",
    "rpt_jax.scaling.fit",
    "rpt_jax.scaling.fit_plot",
    "rpt_jax.scaling.claims",
    "rpt_jax.scaling.sweep_cell",
    "rpt_jax.scaling.sweep_xpk",
    "rpt_jax.scaling.sweep",
    "rpt_jax.cli",
]
ROOMS = {name.rpartition(".")[0] for name in ORDER}
LONGEST = 350  # lines
REASON = "Longer than 350 lines because"  # in the docstring of a file that has to be


def module_name(path: Path) -> str:
    """The importable name of a file, kernels/ standing for rpt_jax/kernels/."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("rpt_jax", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_files() -> dict[str, Path]:
    """Every file that is installed, by importable name; rpt_jax/docs is read by Sphinx alone."""
    paths = sorted([*(ROOT / "rpt_jax").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
    return {module_name(path): path for path in paths if ROOT / "rpt_jax" / "docs" not in path.parents}


def imports(source: str, module: str) -> set[str]:
    """Absolute dotted names that a module's source imports, wherever in the file; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(source: str, module: str) -> list[str]:
    """What a module imports from this project that does not stand above it in ORDER."""
    above = ORDER[: ORDER.index(module)]
    ours = {name for name in imports(source, module) if name.startswith("rpt_jax.")}  # `import rpt_jax` is the version
    return sorted(name for name in ours if not any(is_within(name, upper) for upper in above))


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("rpt_jax.policy.sampler", "from rpt_jax.policy.decoder import forward\nfrom rpt_jax import mesh", []),
        ("rpt_jax.policy.sampler", "from . import decoder\nfrom ..records import Prompts", []),
        ("rpt_jax.policy.sampler", "from . import scorer", ["rpt_jax.policy.scorer"]),
        ("rpt_jax.policy.sampler", "from ..learning import train", ["rpt_jax.learning.train"]),
        ("rpt_jax.policy.sampler", "def f():\n    import rpt_jax.cli", ["rpt_jax.cli"]),
        ("rpt_jax.corpus.prompts", "from rpt_jax.policy.decoder import forward", ["rpt_jax.policy.decoder.forward"]),
        ("rpt_jax.records", "from rpt_jax.config import Config", ["rpt_jax.config.Config"]),
    ],
)
def test_checker_sees_what_is_wrong(module, source, wrong):
    """The checks below stand on this reading of imports."""
    assert violations(source, module) == wrong


def test_every_module_has_its_place():
    unlisted = set(package_files()) - set(ORDER) - ROOMS
    assert not unlisted, f"put {sorted(unlisted)} into ORDER of {Path(__file__).name}, below what they import"


def test_modules_import_only_from_above():
    files = package_files()
    wrong = {name: violations(files[name].read_text(), name) for name in ORDER if name in files}
    assert not {name: found for name, found in wrong.items() if found}


def test_rooms_import_nothing():
    """An import in an __init__.py would pull one module in by way of another and hide it from the order."""
    files = package_files()
    assert not {room: found for room in ROOMS if (found := imports(files[room].read_text(), room))}


def test_kernels_stand_alone():
    """Kernels build on jax, numpy and one another, never on the rest of the project."""
    allowed = sys.stdlib_module_names | {"jax", "numpy"}
    for name, path in package_files().items():
        if is_within(name, "rpt_jax.kernels"):
            found = {each for each in imports(path.read_text(), name) if not is_within(each, "rpt_jax.kernels")}
            foreign = {each for each in found if each.split(".")[0] not in allowed}
            assert not foreign, f"{path}: {foreign}"


def test_corpus_knows_no_model():
    for name, path in package_files().items():
        if is_within(name, "rpt_jax.corpus"):
            found = imports(path.read_text(), name)
            assert not [each for each in found if each.split(".")[0] == "flax" or each.endswith(".ModelConfig")], name


def test_nobody_imports_a_top_level_kernels():
    """Hugging Face has a package of that name; ours is rpt_jax.kernels."""
    paths = [
        path for folder in ("rpt_jax", "kernels", "tests", "experiments") for path in (ROOT / folder).rglob("*.py")
    ]
    wrong = [path for path in paths if any(is_within(name, "kernels") for name in imports(path.read_text(), "x.y"))]
    assert len(paths) > 5 and not wrong


def test_files_are_short_or_say_why():
    for folder in ("rpt_jax", "kernels", "experiments", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text()
            lines = source.count("\n")
            assert lines <= LONGEST or REASON in (ast.get_docstring(ast.parse(source)) or ""), (
                f"{path} has {lines} lines: split it, or let its docstring say '{REASON} ...'"
            )


def test_all_packages_are_installed_and_kernels_only_inside():
    """setup.cfg lists every room, maps kernels/ to rpt_jax.kernels, and installs one top-level name."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(setup["options"]["packages"].split()) == ROOMS
    assert setup["options"]["package_dir"].split("\n")[1:] == ["rpt_jax.kernels = kernels"]
    assert importlib.metadata.distribution("rpt_jax").read_text("top_level.txt").split() == ["rpt_jax"]
    assert importlib.import_module("rpt_jax.kernels").__path__ == [str(ROOT / "kernels")]
