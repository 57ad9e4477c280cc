"""What lm-evaluation-harness asks of a model, answered by a policy: log-probs of texts after texts, and generated text.

In: a policy, and requests as text. Out: plain figures and texts, in the order of the requests. Nothing here needs the
harness; harness_lm.py hands its requests over. Texts become tokens as they stand: no start token is put before one
unless `start` names it.
"""

import hashlib
import importlib.util
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rpt_jax import mesh as meshes
from rpt_jax.config import MeshConfig, ModelConfig, SampleConfig
from rpt_jax.corpus.prompts import THOUGHT_END
from rpt_jax.corpus.templates import CHATS
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.learning import identity, run_folder
from rpt_jax.learning.collect import end_ids
from rpt_jax.learning.policy_folder import load_policy
from rpt_jax.policy import decoder
from rpt_jax.policy.sampler import sample
from rpt_jax.records import InputError, Params, Prompts
from rpt_jax.study.continuations import Scored, cut_left, encode_pair, padded_rows, rows_of_batch, score_pairs
from rpt_jax.study.evaluate import KEY

log = logging.getLogger(__name__)

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting, by rank
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}  # settings that say nothing so


@dataclass(frozen=True)
class HarnessRun:
    """Tasks of lm-evaluation-harness on a policy (extra `harness`)."""

    policy: str = ""  # a policy folder, or a run folder: its newest checkpoint
    tasks: tuple[str, ...] = ()  # names of tasks, groups or tags
    include_path: str = ""  # folder with YAML files of more tasks, for example ones that read local files
    catalogue: bool = True  # the harness's own tasks can be named too; reading its thousands takes seconds
    limit: int = 0  # documents of each task; 0: all
    fewshot: int = -1  # examples before each question; -1: as the task says
    max_length: int = 4096  # tokens of context and answer; a longer context loses its left end and is counted
    max_gen_tokens: int = 256  # of an answer where the task names no limit, the harness's own default
    start: str = ""  # piece put before every text, for models that expect one, e.g. <|begin_of_text|>
    chat: Literal["none", "r1", "chatml"] = "none"  # generation: turn markers around the context
    think: bool = False  # generation: the prompt opens a thought, and what follows </think> is the answer
    thought: str = "<think>\n"  # text that opens it
    think_tokens: int = 2048  # of a thought, beyond the answer's limit
    end_tokens: tuple[str, ...] = ()  # pieces that end an answer; empty: the tokenizer's end-of-text token
    batch_size: int = 32  # contexts
    seed: int = 0  # of sampled answers, and of the harness's few-shot examples
    results: str = ""  # JSON file to write; empty: none
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def check(self) -> None:
        """Raises InputError for settings that clash."""
        if min(self.batch_size, self.max_length, self.max_gen_tokens, self.think_tokens) < 1 or self.limit < 0:
            raise InputError(
                f"batch_size={self.batch_size}, max_length={self.max_length}, max_gen_tokens={self.max_gen_tokens}, "
                f"think_tokens={self.think_tokens}, limit={self.limit}: use 1 or more of each, and 0 or more"
            )


@dataclass(frozen=True)
class Asked:
    """A policy with what asking it takes; `cut` counts contexts that were too long, by kind of request."""

    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    config: HarnessRun
    end_ids: tuple[int, ...]
    mesh: Mesh | None = None
    cut: Counter = field(default_factory=Counter)

    @property
    def start_ids(self) -> list[int]:
        return self.tokenizer.start_ids(self.config.start, "start")

    @property
    def nothing(self) -> list[int]:
        """What stands for an empty context: the start, or the end-of-text token (or what ends an answer)."""
        end = self.tokenizer.end_of_text
        return self.start_ids or [self.end_ids[0] if end is None else end]


class Wish(NamedTuple):
    """How an answer is generated."""

    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float


def settings_of(folder: str) -> HarnessRun:
    """For a run folder its chat markers, end tokens and mesh; for a policy folder the defaults."""
    if not (Path(folder) / "config.json").is_file():
        return HarnessRun(folder)
    config = run_folder.read_config(folder)
    return HarnessRun(folder, chat=config.prompt.chat, end_tokens=config.sample.end_tokens, mesh=config.mesh)


def require_installed() -> None:
    """Raises InputError where lm-evaluation-harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm-evaluation-harness is not installed: pip install -e .[harness], or pip install lm-eval")


def open_policy(config: HarnessRun) -> Asked:
    """Loads and checks everything; raises InputError."""
    config.check()
    if not config.policy:
        raise InputError("no policy named: give a policy folder or the folder of a run, `rpt harness FOLDER`")
    if not config.tasks:
        raise InputError("tasks is empty: name one or more, for example --tasks gsm8k")
    identity.start_together(config)
    mesh = meshes.make_mesh(config.mesh)
    meshes.check_batch_divides(config.batch_size, mesh, "contexts (batch_size)")
    model, params, tokenizer = load_policy(config.policy, mesh)
    tokenizer.warn_without_start(config.start + CHATS[config.chat].opening, "start")
    return Asked(model, params, tokenizer, config, end_ids(tokenizer, config.end_tokens), mesh)


def loglikelihoods(asked: Asked, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
    """log p(continuation | context), nats, and whether greedy decoding gives it, of each (context, continuation).

    Split into tokens as encode_pair does; an empty context is the start or end-of-text token.
    """
    encoded = []
    for context, continuation in pairs:
        before, after = encode_pair(asked.tokenizer, context, continuation)
        whole = [*asked.start_ids, *before] or asked.nothing
        kept = cut_left(whole, len(after), asked.config.max_length, "max_length")
        asked.cut["loglikelihood"] += len(kept) < len(whole)
        encoded.append((kept, after))
    return _score(asked, encoded, "log-probs")


def rolling_loglikelihoods(asked: Asked, texts: Sequence[str]) -> list[float]:
    """log p(text), nats, of each whole text: in windows, each token predicted once."""
    encoded = [windows(asked.tokenizer.encode(text), asked.nothing, asked.config.max_length) for text in texts]
    scored = iter(_score(asked, [pair for pairs in encoded for pair in pairs], "windows"))
    return [sum(next(scored).logprob for _ in pairs) for pairs in encoded]


def windows(tokens: Sequence[int], before: Sequence[int], length: int) -> list[tuple[list[int], list[int]]]:
    """(context, the tokens predicted after it) of a text's windows; a model reads `length` tokens at the most.

    As lm-evaluation-harness has them: windows follow one another without overlap but for one token, and the last, which
    predicts what is left, reaches back to be as long as the others. For tokens 0..9 after `before` = [b] and length 4:
    b | 0 1 2 3, 3 | 4 5 6 7, 5 6 7 | 8 9.
    """
    pairs = []
    for begin in range(0, len(tokens), length):
        predicted = list(tokens[begin : begin + length])
        seen = [*before[-1:], *tokens[:begin]] if begin else list(before[-(length + 1 - len(predicted)) :])
        pairs.append((seen[-(length + 1 - len(predicted)) :], predicted))
    return pairs


def wish_of(settings: dict, config: HarnessRun) -> Wish:
    """The generation settings of a request; raises InputError for one that is not known or of a wrong kind.

    Greedy unless a temperature above 0 is given and do_sample is not false; do_sample alone samples at 1.
    """
    given = {name: value for name, value in settings.items() if value is not None and NEUTRAL.get(name) != value}
    known = {"until", "do_sample", "temperature", "top_k", "top_p", "min_p", *LENGTHS}
    unknown = sorted(set(given) - known)
    if unknown:
        raise InputError(
            f"generation setting {unknown[0]}={given[unknown[0]]!r} is not known: a task may set "
            f"{', '.join(sorted(known))}; leave it out in a YAML of your own (--include-path)"
        )
    until = given.get("until", ())
    try:
        temperature = float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
        return Wish(
            until=tuple(each for each in ([until] if isinstance(until, str) else until) if each),
            max_tokens=int(next((given[name] for name in LENGTHS if name in given), config.max_gen_tokens)),
            temperature=temperature if given.get("do_sample", True) else 0.0,
            top_k=int(given.get("top_k", 0)),
            top_p=float(given.get("top_p", 1.0)),
            min_p=float(given.get("min_p", 0.0)),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"generation settings {given} of a wrong kind ({error}): mend the task's YAML") from error


def generate(asked: Asked, requests: Sequence[tuple[str, dict]]) -> list[str]:
    """The text after each (context, generation settings), up to the first of its stop strings, which is left out.

    The random keys of an answer are folded from seed, context and how often that context came before, so that neither
    order nor batch changes it. With config.think the answer begins behind the first `</think>`; without one it is
    empty. Raises InputError for settings that are not known and answers too long for config.max_length.
    """
    wishes = [wish_of(settings, asked.config) for _, settings in requests]
    identities, seen = [], Counter()
    for context, _ in requests:
        identities.append(_identity(context, seen[context]))
        seen[context] += 1
    contexts = [_prompt(asked, context, wish) for (context, _), wish in zip(requests, wishes, strict=True)]
    answers = [""] * len(requests)
    for wish in dict.fromkeys(wishes):
        rows = [n for n in range(len(requests)) if wishes[n] == wish]
        for row, text in zip(rows, _generate(asked, wish, rows, contexts, identities), strict=True):
            answers[row] = text
    return answers


def answer_of(response: bytes, until: Sequence[str], think: bool) -> tuple[str, bool]:
    """(the text before the first stop string, whether there was one); with think, of what follows `</think>`."""
    if think:
        response = response.partition(THOUGHT_END)[2]
    ends = [place for place in (response.find(each.encode()) for each in until) if place >= 0]
    return response[: min(ends, default=len(response))].decode("utf-8", errors="replace"), bool(ends)


def _score(asked: Asked, pairs, what: str) -> list[Scored]:
    def progress(done: int, total: int) -> None:
        log.info("%d of %d batches of %s", done, total, what)

    size = asked.config.batch_size
    return score_pairs(asked.params, asked.model, pairs, batch_size=size, mesh=asked.mesh, progress=progress)


def _prompt(asked: Asked, context: str, wish: Wish) -> list[int]:
    """Token ids: start, chat opening, the context's last tokens, chat closing, thought opening."""
    config, chat, tokenizer = asked.config, CHATS[asked.config.chat], asked.tokenizer
    opening = tokenizer.encode_markup(chat.opening)
    if opening[:1] != asked.start_ids:  # that of r1 has one of its own
        opening = [*asked.start_ids, *opening]
    closing = tokenizer.encode_markup(chat.closing + (config.thought if config.think else ""))
    made = wish.max_tokens + (config.think_tokens if config.think else 0)
    room = config.max_length - made - len(opening) - len(closing)
    if room < 1:
        raise InputError(
            f"answers of up to {made} tokens and {len(opening) + len(closing)} of markers leave no room for a context "
            f"within max_length={config.max_length}: raise it"
        )
    ids = tokenizer.encode(context)
    asked.cut["generate_until"] += len(ids) > room
    return [*opening, *ids[-room:], *closing] or asked.nothing


def _generate(asked: Asked, wish: Wish, rows: Sequence[int], contexts, identities) -> list[str]:
    """Answers to the requests `rows`, which all have this wish."""
    config, tokenizer = asked.config, asked.tokenizer
    sampling = SampleConfig(
        group_size=1,
        temperature=wish.temperature,
        top_k=wish.top_k,
        top_p=wish.top_p,
        min_p=wish.min_p,
        max_tokens=wish.max_tokens + (config.think_tokens if config.think else 0),
    )
    sampling.check()

    def response(tokens_R: np.ndarray) -> bytes:
        ends = np.isin(tokens_R[-1:], asked.end_ids).sum()  # one whose bytes are text is no part of the answer either
        return tokenizer.bytes_of(tokens_R[: len(tokens_R) - ends].tolist())

    def stop(tokens_R: np.ndarray) -> bool:
        return answer_of(response(tokens_R), wish.until, config.think)[1]

    params = decoder.gathered(asked.params, asked.model)
    key = jax.random.fold_in(jax.random.key(config.seed), KEY)
    size = rows_of_batch(len(rows), config.batch_size, asked.mesh)
    texts, order = {}, sorted(rows, key=lambda n: (len(contexts[n]), contexts[n]))
    for begin in range(0, len(order), size):
        batch = order[begin : begin + size]
        prompts = _prompts(
            [contexts[n] for n in np.resize(batch, size)], [identities[n] for n in np.resize(batch, size)]
        )
        rollouts = sample(params, asked.model, sampling, prompts, key, asked.end_ids, stop=stop if wish.until else None)
        for place, row in enumerate(batch):
            tokens_R = rollouts.tokens_NGR[place, 0, : rollouts.lengths_NG[place, 0]]
            texts[row] = answer_of(response(tokens_R), wish.until, config.think)[0]
        log.info("%d of %d batches of answers", begin // size + 1, -(-len(order) // size))
    return [texts[row] for row in rows]


def _prompts(contexts: Sequence[Sequence[int]], identities: Sequence[tuple[int, int]]) -> Prompts:
    """What the sampler reads; there is no truth."""
    tokens_NT, lengths_N = padded_rows(contexts)
    nothing_N0 = np.zeros((len(contexts), 0))
    return Prompts(
        tokens_NT=tokens_NT,
        lengths_N=lengths_N,
        ids_N2=np.array(identities, np.uint32),
        truth_NX=nothing_N0.astype(np.uint8),
        boundaries_NX=nothing_N0.astype(bool),
        entropies_N=np.full(len(contexts), np.nan, np.float32),
    )


def _identity(context: str, repeat: int) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{repeat}\0{context}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
