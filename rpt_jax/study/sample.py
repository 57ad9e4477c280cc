"""A text -> what a policy thinks of how it goes on: a few thoughts with their predictions.

In: a policy or run folder, and a text from the command line, a pipe or the keyboard. The prompt is assembled as in
training, with the settings of the run; nothing is rewarded, since nobody says what really follows.
"""

import json
import logging
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from rpt_jax import mesh as meshes
from rpt_jax.config import Config, MeshConfig, ModelConfig, PromptConfig, SampleConfig
from rpt_jax.corpus.pieces import number_within, readable_pieces
from rpt_jax.corpus.positions import Position
from rpt_jax.corpus.prompts import THOUGHT_END, answer_start, assemble, parse_answers
from rpt_jax.corpus.templates import Template, load_template
from rpt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.learning import run_folder
from rpt_jax.learning.collect import end_ids
from rpt_jax.learning.policy_folder import load_policy
from rpt_jax.policy import decoder
from rpt_jax.policy.sampler import sample
from rpt_jax.records import InputError, Params, Prompts
from rpt_jax.study.evaluate import KEY

log = logging.getLogger(__name__)
ASK = "text> "


@dataclass(frozen=True)
class SampleRun:
    """Thoughts about a text, and the predictions they end in.

    The text comes from a pipe, which may hold many lines and loses a last line break, or from --text as it stands. At
    a terminal you type one line after another; Ctrl-D or Ctrl-C ends it.
    """

    policy: str = ""  # a policy folder, or a run folder: its newest checkpoint
    text: str = ""  # empty: from a pipe, or typed
    samples: int = 4  # thoughts for each text
    seed: int = 0  # the same text, seed and settings give the same thoughts
    prompt: PromptConfig = field(default_factory=PromptConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)  # the group size is `samples`
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class Thinker:
    """A policy with what asking it takes."""

    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    template: Template
    config: SampleRun
    mesh: Mesh
    end_ids: tuple[int, ...]


def settings_of(folder: str) -> SampleRun:
    """What a run was trained with; for a policy folder the defaults, with the bare template where its marks are."""
    if (Path(folder) / "config.json").is_file():
        config: Config = run_folder.read_config(folder)
        mesh = replace(config.mesh, coordinator="none", processes=0, process=-1)  # one process, whatever trained it
        return SampleRun(folder, prompt=config.prompt, sample=config.sample, mesh=mesh)
    tokenizer = Path(folder) / "tokenizer"
    if tokenizer.is_dir() and load_tokenizer(tokenizer).id_of(load_template("bare").head) is not None:
        return SampleRun(folder, prompt=PromptConfig(template="bare"), sample=SampleConfig(max_tokens=256))
    return SampleRun(folder)


def run(config: SampleRun, show: bool) -> dict:
    """Asks about one text, or about each line typed; prints the answers if `show`, returns the last one."""
    text = config.text or ("" if sys.stdin.isatty() else piped())
    if text or not sys.stdin.isatty():
        require_text(text)
        figures = think(open_policy(config), text)
        if show:
            print(shown(figures))
        return figures
    thinker, figures = open_policy(config), {}
    while (line := typed()) is not None:
        try:
            figures = think(thinker, line)
        except InputError as error:
            print(f"rpt: {error}", file=sys.stderr)
            continue
        if show:
            print(shown(figures), end="\n\n")
    return figures


def require_text(text: str) -> None:
    """Raises InputError where there is none."""
    if not text:
        raise InputError("no text to think about: type one, pipe one in, or give --text")


def open_policy(config: SampleRun) -> Thinker:
    """Loads and checks everything; raises InputError, before the policy is read where settings alone are wrong."""
    config.sample.check()
    if not config.policy:
        raise InputError("no policy named: give a policy folder or the folder of a run, `rpt sample FOLDER`")
    if config.samples < 1:
        raise InputError(f"samples={config.samples}: use 1 or more")
    if config.sample.temperature == 0 and config.samples > 1:
        raise InputError(f"sample.temperature=0 makes all {config.samples} samples equal: use --samples 1")
    template = load_template(config.prompt.template, config.prompt.chat)
    meshes.start_distributed(config.mesh)
    if jax.process_count() > 1:
        raise InputError(
            f"sample runs in one process, these are {jax.process_count()}: start it on one host with "
            "--mesh.coordinator none, or use `rpt evaluate`"
        )
    mesh = mesh_here(config)
    model, params, tokenizer = load_policy(config.policy, mesh)
    return Thinker(model, params, tokenizer, template, config, mesh, end_ids(tokenizer, config.sample.end_tokens))


def mesh_here(config: SampleRun) -> Mesh:
    """The mesh that is asked for; where it is that of the run, for another slice, one for the devices here."""
    try:
        return meshes.make_mesh(config.mesh)
    except InputError as error:
        if config.mesh != settings_of(config.policy).mesh:
            raise
        log.warning("%s was trained on another slice (%s): the policy lies whole on each device", config.policy, error)
        return meshes.make_mesh(MeshConfig())


def piped() -> str:
    """What standard input holds, without a last line break, which `echo` adds."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the text is not UTF-8 (byte {error.start + 1}): give UTF-8") from error


def typed() -> str | None:
    """A line from the keyboard, None at the end."""
    try:
        return input(ASK)
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def think(thinker: Thinker, text: str) -> dict:
    """{"text", "samples": [...], "predictions": {prediction: how often}}, fit for JSON.

    A sample has thought, prediction (None: no answer), logprob (of all its tokens, nats at the sampling temperature),
    prediction_logprob (of the tokens that have a byte of the prediction, given all before them), tokens, finished, and
    pieces [[text, log-prob], ...]. Raises InputError for a text that is empty or that the tokenizer cannot represent.
    """
    require_text(text)
    config, tokenizer = thinker.config, thinker.tokenizer
    prompts = prompt_of(thinker, text)
    sampling = replace(config.sample, group_size=config.samples)
    key = jax.random.fold_in(jax.random.key(config.seed), KEY)
    params = decoder.gathered(thinker.params, thinker.model)
    rollouts = sample(params, thinker.model, sampling, prompts, key, thinker.end_ids)
    answers = parse_answers(tokenizer, rollouts.tokens_NGR, rollouts.lengths_NG, rollouts.finished_NG)[0]
    samples = []
    for g, answer in enumerate(answers):
        length = int(rollouts.lengths_NG[0, g])
        tokens, logprobs = rollouts.tokens_NGR[0, g, :length].tolist(), rollouts.logprobs_NGR[0, g, :length].tolist()
        described = describe([tokenizer.bytes_of([token]) for token in tokens], logprobs, answer)
        samples.append(described | {"tokens": length, "finished": bool(rollouts.finished_NG[0, g])})
    given = Counter(each["prediction"] for each in samples if each["prediction"] is not None)
    return {"text": text, "samples": samples, "predictions": dict(given.most_common())}


def prompt_of(thinker: Thinker, text: str) -> Prompts:
    """The prompt as training would assemble it for a document that begins with the text, in a row for every device."""
    config, tokenizer, template = thinker.config.prompt, thinker.tokenizer, thinker.template
    tokens_T = np.array(tokenizer.encode(text), np.int32)
    # The position is the end of the text: some token has to stand there, and is never read.
    documents, position = [np.append(tokens_T, tokens_T[-1])], Position(0, len(tokens_T), float("nan"))
    prompts = assemble(tokenizer, template, config, documents, [position])
    frame = sum(len(tokenizer.encode_markup(part)) for part in (template.before, template.after))
    cut = len(tokens_T) + frame - int(prompts.lengths_N[0])
    if cut > 0:
        message = "the first %d of %d tokens of the text are left out: prompt.max_tokens=%d"
        log.warning(message, cut, len(tokens_T), config.max_tokens)
    parts = meshes.batch_parts(thinker.mesh)
    return jax.tree.map(lambda leaf: np.repeat(leaf, parts, axis=0), prompts)


def describe(contents: list[bytes], logprobs: list[float], answer: bytes | None) -> dict:
    """Texts and log-probs of a response, given the bytes of each token; see think."""
    response = b"".join(contents)
    before, mark, _ = response.rpartition(THOUGHT_END)
    within = None
    if answer is not None:
        start = answer_start(response)
        within = number_within(contents, logprobs, start, start + len(answer))
    return {
        "thought": _text(before if mark else response),
        "prediction": None if answer is None else _text(answer),
        "logprob": sum(logprobs),
        "prediction_logprob": within,
        "pieces": readable_pieces(contents, logprobs),
    }


def shown(figures: dict) -> str:
    """The samples for a terminal: control characters, which could rule it, are spelled out."""
    lines = []
    for number, each in enumerate(figures["samples"], 1):
        if each["prediction"] is None:
            verdict = "no answer" if each["finished"] else "no answer within sample.max_tokens"
        else:
            logprob = each["prediction_logprob"] + 0.0  # turns -0.0 into 0.0
            verdict = f"{_quoted(each['prediction'])}   log-prob {logprob:.3f}"
        lines += [
            f"[{number}] {verdict}",
            *(f"    {line}" for line in harmless(each["thought"]).strip().splitlines()),
            "",
        ]
    counts = ", ".join(f"{_quoted(text)} {count}" for text, count in figures["predictions"].items())
    return "\n".join([*lines, f"predictions: {counts or 'none'} (of {len(figures['samples'])})"])


def harmless(text: str) -> str:
    """The text with control characters other than tab and line break as \\x1b and the like.

    Among them those that turn the direction of what follows: a prediction could look like another.
    """
    ruling = r"[^\t\n\x20-\x7e\xa0-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]"
    return re.sub(
        ruling, lambda found: f"\\x{ord(found[0]):02x}" if found[0] < "\xa0" else f"\\u{ord(found[0]):04x}", text
    )


def _quoted(text: str) -> str:
    return harmless(json.dumps(text, ensure_ascii=False))


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="replace")
