"""Targets: settings as JSON, as words of a command line and as experiment files."""

import contextlib
import io
import json
import os
import sys

import toy
from fuzz_mutate import damaged, rewritten, words_rewritten
from fuzz_targets import Target, file_of, scratch

from rpt_jax import cli, commands
from rpt_jax.config import Config, EvaluateConfig, MeshConfig, ModelConfig
from rpt_jax.config_dict import from_dict, to_dict
from rpt_jax.corpus.text_files import matching_files
from rpt_jax.experiment_file import load_experiment
from rpt_jax.learning import custom_judge
from rpt_jax.learning.judge import check_questions
from rpt_jax.mesh import distributed_settings, make_mesh
from rpt_jax.planning.estimate import PlanRun
from rpt_jax.ranges import require_in_range
from rpt_jax.study.evaluate import check_settings
from rpt_jax.study.multiple_choice import ChoicesRun

KINDS = (
    Config,
    commands.PretrainRun,
    commands.AnnotateRun,
    commands.EvaluateRun,
    ChoicesRun,
    PlanRun,
    ModelConfig,
    MeshConfig,
)
WORDS = (
    "train --policy x --steps 3 --update.learning-rate 1e-4 --sample.group-size 8 --wandb --corpus.files a b",
    "train --prompt.template bare --evaluate.annotated y --batch-size 16 --no-wandb --mesh.data 2 --reward.kind prefix",
    "pretrain --output o --vocab-size 300 --model.width 8 --pretrain.steps 3 --corpus.template {text}",
    "evaluate x --evaluate.positions 3 --evaluate.greedy --seed -1 --results r.json",
    "choices x --files a.jsonl --format mmlu --mode both --per-category 2",
    "sample x --text hello --samples 2 --sample.temperature 0.5",
    "plan --topology v5e:4x4 --mesh auto --model.layers 3",
    "fit t.csv --sets 100 --splits hard easy --plot none",
    "bench kernel --tokens 8 --seed 3",
    "quickstart --seed 3 --steps 2",
)
COMMANDS = (  # run to their end: they need no policy, or find none
    "report a b --output o.html --rollouts 3",
    "patterns p --against q --from-step 1",
    "fit t.csv --sets 100",
    "convert orbax-to-hf a b --context 3",
    "convert hf-to-orbax a b --dtype float32",
    "sweep e.py --workers 1 --only a",
    "evaluate x --json",
    "sample x --text a",
    "choices x --files c.jsonl --format mmlu",
    "train e.py --policy x",
    "bench what",
    "nothing --help",
    "--version",
)
EXPERIMENTS = (
    '{"steps": 7, "update": {"learning_rate": 1.0}, "corpus": {"files": ["a"]}}',
    '{"model": {"heads": 2, "kv_heads": 1}, "sample": {"group_size": 2}, "name": "x"}',
)


def targets() -> tuple[Target, ...]:
    values = tuple(json.dumps(to_dict(kind())).encode() for kind in KINDS)
    changed = json.dumps(to_dict(toy.config(scratch() / "x"))).encode()
    words, all_of_it = (tuple(b"\n".join(line.encode().split()) for line in lines) for lines in (WORDS, COMMANDS))
    experiment, judge = file_of("e.py"), file_of("j.py")
    return (
        Target("config", (*values, changed), settings, rewritten, 6),
        Target("mesh", (b'{"data": 2, "fsdp": -1, "tensor": 4}',), mesh, rewritten, 2),
        Target("words", words, parses, words_rewritten, 0.01),
        Target("commands", all_of_it, commands_end, words_rewritten, 0.01),
        Target("experiment", tuple(map(str.encode, EXPERIMENTS)), lambda c: experiments(experiment, c), rewritten, 1),
        Target("source", (SOURCE.encode(),), lambda c: sources(experiment, c), _expression, 1),
        Target("judge", (b"[0.5, 1.0]", b"[]"), lambda c: judges(judge, c), rewritten, 1),
        Target("patterns-of-files", (b"*.jsonl", b"a/**/[b-c]?.txt", b"~nobody/x"), files, damaged, 1),
    )


def settings(content: bytes) -> None:
    """What passes its checks comes back from JSON as it was."""
    values = json.loads(content) if _is_json(content) else None
    kind = max(KINDS, key=lambda kind: len(set(values) & set(to_dict(kind()))) if isinstance(values, dict) else 0)
    made = from_dict(kind, values)
    require_in_range(made)
    assert from_dict(kind, json.loads(json.dumps(to_dict(made)))) == made
    for each in (made, *vars(made).values()):
        if isinstance(each, EvaluateConfig):
            check_settings(each)
        elif hasattr(each, "check") and not hasattr(each, "kind"):
            each.check()
    if kind is Config:
        check_questions(made, bool(made.questions.files))


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def mesh(content: bytes) -> None:
    made = from_dict(MeshConfig, json.loads(content) if _is_json(content) else None)
    require_in_range(made, "mesh")
    distributed_settings(made, {}, "cpu")
    make_mesh(made)


@contextlib.contextmanager
def quiet():
    """Nothing on the terminal, nothing of this folder, and nothing to be asked."""
    before, streams = os.getcwd(), (sys.stdin, sys.stdout, sys.stderr)
    folder = scratch() / "here"
    folder.mkdir(exist_ok=True)
    (folder / "x.jsonl").touch()
    os.chdir(folder)
    sys.stdin = io.TextIOWrapper(io.BytesIO(b""))
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        yield sys.stderr
    finally:
        os.chdir(before)
        sys.stdin, sys.stdout, sys.stderr = streams


def parses(content: bytes) -> None:
    """Words become settings in range, or the flags' own complaint ends them with status 2."""
    words = [word.decode("utf-8", "surrogateescape").replace("\0", "") for word in content.split(b"\n")]
    defaults = {"train": Config(), "pretrain": commands.PretrainRun(), "evaluate": commands.EvaluateRun()}
    with quiet():
        try:
            made = cli.parse(words[0] if words[0] in defaults else "train", defaults.get(words[0], Config()), words[1:])
        except SystemExit as ended:
            assert ended.code in (0, 2)
            return
    require_in_range(made)


def commands_end(content: bytes) -> None:
    """A command ends with status 0, 1 or 2, and what it says for 2 is a line, or the flags' own complaint."""
    words = [word.decode("utf-8", "surrogateescape").replace("\0", "") for word in content.split(b"\n")]
    if {"hf-to-orbax", "quickstart", "kernel", "step", "compare"} & set(words) and "a" not in words:
        return  # these would begin to work
    if any("coordinator" in word or "process" in word for word in words):
        return  # and wait for other machines
    with quiet() as said:
        try:
            status = cli.main(words)
        except SystemExit as ended:
            status = ended.code
            said = None
    assert status in (0, 1, 2)
    if status == 2 and said is not None:
        text = said.getvalue()
        assert text.startswith("rpt: ") and (len(text.splitlines()) == 1 or "no command" in text), text


SOURCE = (
    "from rpt_jax.config import *\ndef config():\n    return Config(steps=7, update=UpdateConfig(learning_rate=1e-3))\n"
)


def experiments(write, content: bytes) -> None:
    """An experiment file whose settings are whatever JSON holds: config() fails with a line, or gives settings."""
    values = json.loads(content) if _is_json(content) else {}
    values = values if isinstance(values, dict) else {"steps": values}
    rooms = "\n".join(
        f"    values[{name!r}] = type(getattr(Config(), {name!r}))(**values[{name!r}])"
        for name in ("update", "model", "sample")
        if isinstance(values.get(name), dict)
    )
    head = "from rpt_jax.config import *\nnan = inf = 1e999\ndef config():\n"
    source = f"{head}    values = {values!r}\n{rooms}\n    return Config(**values)\n"
    made = load_experiment(str(write(source.encode("utf-8", "backslashreplace"))))
    require_in_range(made)


def _expression(chance, content: bytes, others) -> bytes:
    """A number, a name or a mark of the source changed; no new calls, so that nothing else is run."""
    text, marks = (
        content.decode(),
        ("7", "1e-3", "steps", "update", "UpdateConfig", "config", "return", ":", "(", ")", "=", "\n", "    "),
    )
    for _ in range(1 + chance.randrange(3)):
        mark = chance.choice([each for each in marks if each in text] or [""])
        new = chance.choice((*marks, "", "None", "-1", "'x'", "[]", "nan", "0/0", "...", "\t", "é", "raise"))
        text = text.replace(mark, new, 1) if mark else text
    return text.encode()


def sources(write, content: bytes) -> None:
    require_in_range(load_experiment(str(write(content))))


def judges(write, content: bytes) -> None:
    """A judge's scores are from 0 to 1, one for each prediction, or it is named."""
    values = json.loads(content) if _is_json(content) else None
    path = write(f"nan = inf = 1e999\ndef judge(*asked):\n    return {values!r}\n".encode("utf-8", "backslashreplace"))
    custom_judge.load_judge.cache_clear()
    found = custom_judge.judged(f"{path}:judge", [b"c", b"d"], [[b"x"], [b"y"]], [b"t", b"u"])
    assert found.shape == (2, 1) and ((found >= 0) & (found <= 1)).all()


def files(content: bytes) -> None:
    text = content.decode("utf-8", "surrogateescape").lstrip("/")  # not through the whole disk
    with quiet():
        assert matching_files((text,))
