r"""RPT on real text that a laptop can hold: Omni-MATH and GSM8K, a decoder of 1.2 million parameters, two controls.

    python experiments/omnimath_small.py --data DATA

DATA holds omni-math/omni_math_rule.jsonl (KbsdJames/omni-math-rule) and gsm8k/train.jsonl (openai/grade-school-math).
A stage that has left its folder behind in --folder is not run again; delete the folder to run it anew.
omnimath_examples.py makes what the start and the controls learn from.

base      SentencePiece and a decoder from scratch on plain text, no problem of the tuning or held-out parts among it.
annotate  entropy of positions under the base: the filter and the easy/medium/hard splits.
start     the cold start. Its thoughts are made from the text itself: the last two tokens of the context again and a
          draw of the base for what comes next, one to three times, then a choice. Half of the traces choose the truth
          if it is among the draws; the rest, and those without it, choose blindly: the start learns to list
          candidates and not to weigh them well. Behind `.. equal to $ x` it may go
              $ x^<or>$ x+</think>\boxed{+}
rpt       reinforcement pre-training of the start on filtered positions.
controls  the start with the same FLOPs spent otherwise: supervised training on boxed answers at the very positions RPT
          has used, and next-token training with the traces kept in (learning rate chosen on the tuning part).
evaluate  all of them at the same positions of 200 held-out problems, in both modes.

Measured (seed 0; one core of an AMD EPYC shared with other work; the training stages took 18 minutes of its time and
51 of the clock, annotation and evaluation some ten more):

                          arg-max               reasoning, T 0.8      greedy                format
                          easy  medium hard     easy  medium hard     easy  medium hard     easy
    base                  28.9  26.3   23.1      0.0   0.0    0.0      0.0   0.0    0.0      0.0
    start                 27.1  24.8   21.7      8.8   8.2    7.0     17.2  16.1   13.8     97.0
    RPT                   25.8  23.5   20.2     11.5  10.9    9.3     15.7  14.7   12.5     99.5
    next token, 1e-3      29.6  27.1   23.9      9.1   8.3    7.2     18.1  16.6   13.9     96.1
    boxed answers, 3e-4   25.2  23.0   20.0      5.7   5.7    5.4      9.8   9.7    8.6    100.0

RPT over the start, sampled: +2.7 / +2.7 / +2.3 points, standard error 0.5, and no control does that. It is sharpening:
greedy reasoning and arg-max fall a little, and next-token training is best at both (experiments/LOG.md).
"""

import dataclasses
import json
import os
import re
import time
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path

import jax
import numpy as np
import tyro
from omnimath_examples import MARKS, Policy, boxed_examples, make_traces, marks, next_token_examples
from rows import replace_rows

from rpt_jax.config import (
    Config,
    CorpusConfig,
    EvaluateConfig,
    ModelConfig,
    PositionConfig,
    PretrainConfig,
    PromptConfig,
    SampleConfig,
    UpdateConfig,
)
from rpt_jax.corpus.documents import Documents, read_documents
from rpt_jax.corpus.positions import difficulty_splits, open_annotated, select_positions
from rpt_jax.corpus.templates import load_template
from rpt_jax.corpus.tokenizer import train_sentencepiece
from rpt_jax.learning.policy_folder import load_policy, save_policy
from rpt_jax.learning.pretrain import Example, plain, pretrain, row_batches, running_batches
from rpt_jax.learning.run_rows import read_rows
from rpt_jax.learning.train import train
from rpt_jax.policy import decoder, flops
from rpt_jax.policy.proxy import TokenSource, annotate
from rpt_jax.study import quickstart
from rpt_jax.study.evaluate import Evaluation, evaluate

FOLDER = "runs/omnimath_small"
OUTCOMES = ("argmax", "reasoning", "greedy")


def config() -> Config:
    """The RPT stage; `rpt train experiments/omnimath_small.py` repeats it once the stages before it are there."""
    return Config(
        name="omnimath_small",
        steps=100,
        batch_size=16,
        policy=f"{FOLDER}/start",
        run_folder=f"{FOLDER}/rpt",
        model=ModelConfig(width=128, layers=4, heads=4, kv_heads=4, head_channels=32, tied_head=True, remat="dots"),
        positions=PositionConfig(
            annotated=f"{FOLDER}/annotated/train", threshold=1.0, minimum_context=32, window=128, batch_tokens=4096
        ),
        prompt=PromptConfig(template="bare", max_tokens=96, truth_bytes=64),
        sample=SampleConfig(group_size=8, temperature=0.8, max_tokens=20, tokens_per_call=20),
        update=UpdateConfig(learning_rate=3e-4, warmup_steps=10),
        evaluate=EvaluateConfig(every=0, positions=2048, group_size=2, greedy=True, batch_size=128),
    )


@dataclass(frozen=True)
class Settings:
    """The whole experiment."""

    data: str = os.environ.get("RPT_DATA", "../shared/data")  # folder that holds omni-math/ and gsm8k/
    folder: str = FOLDER  # where the stages leave what they make
    results: str = "experiments/results/omnimath_small.csv"  # one row for each policy and split
    seed: int = 0
    pieces: int = 3072  # of SentencePiece
    holdout: int = 200  # problems for the figures, nothing is chosen on them
    tuning: int = 100  # problems for choosing learning rates
    annotated: int = 300  # training documents whose positions are annotated
    base: PretrainConfig = PretrainConfig(warmup_steps=50, beta2=0.98, batch_size=16, steps=1100)
    traces: int = 8000  # thoughts of the cold start
    careful: float = 0.5  # share of them whose choice is the truth where it is listed
    start: PretrainConfig = PretrainConfig(
        learning_rate=2e-3, warmup_steps=20, beta2=0.98, batch_size=16, sequence_length=116, steps=500
    )
    next_token_rates: tuple[float, ...] = (3e-4, 1e-3)
    sft_rates: tuple[float, ...] = (3e-4,)
    rpt: Config = field(default_factory=config)


@dataclass(frozen=True)
class Corpus:
    """Omni-MATH in parts that share no problem, and GSM8K to learn from."""

    settings: Settings

    def read(self, file: str, template: str) -> Documents:
        return read_documents(CorpusConfig(files=(f"{self.settings.data}/{file}",), template=template))

    @cached_property
    def documents(self) -> Documents:
        return self.read("omni-math/omni_math_rule.jsonl", "{problem}\n\n{solution}")

    @cached_property
    def parts(self) -> dict[str, np.ndarray]:
        """Document numbers; a problem that occurs twice is in one part only, spelling aside."""
        problems = self.read("omni-math/omni_math_rule.jsonl", "{problem}")
        names = np.array([re.sub(r"\W", "", problems[i].text.lower()) for i in range(len(problems))])
        distinct, first = np.unique(names, return_index=True)
        order = list(range(len(distinct)))
        np.random.default_rng(self.settings.seed).shuffle(order)
        holdout, tuning = np.split(order[: self.settings.holdout + self.settings.tuning], [self.settings.holdout])
        kept_out = np.isin(names, distinct[np.concatenate([holdout, tuning])])
        return {
            "train": np.flatnonzero(~kept_out),
            "tuning": np.sort(first[tuning]),
            "holdout": np.sort(first[holdout]),
        }

    @cached_property
    def training_texts(self) -> list[str]:
        return [self.documents[i].text for i in self.parts["train"]]


def train_base(settings: Settings, corpus: Corpus, report) -> Policy:
    """Two rounds of Omni-MATH to one of GSM8K, one document behind the other."""
    school = corpus.read("gsm8k/train.jsonl", "{question}\n\n{answer}")
    school_texts = [school[i].text for i in range(len(school))]
    texts = corpus.training_texts
    folder = Path(settings.folder) / "tokenizer"
    tokenizer = train_sentencepiece(texts + school_texts[::4], settings.pieces, folder, MARKS, split_digits=True)
    examples = [plain([*tokenizer.encode(text), tokenizer.end_of_text]) for text in 2 * texts + school_texts]
    model = dataclasses.replace(settings.rpt.model, vocab_size=tokenizer.vocab_size)
    batches = running_batches(examples, settings.base.batch_size, settings.base.sequence_length, settings.seed)
    params = decoder.init(model, jax.random.key(settings.seed))
    return model, pretrain(params, model, settings.base, batches, report), tokenizer


def annotate_parts(settings: Settings, corpus: Corpus, base: Policy) -> dict:
    """{part: annotated documents} under the base; goes on where an earlier call stopped."""
    model, params, tokenizer = base
    few = np.random.default_rng(settings.seed).permutation(corpus.parts["train"])[: settings.annotated]
    opened = {}
    for part, indexes in (corpus.parts | {"train": np.sort(few)}).items():
        folder = Path(settings.folder) / "annotated" / part
        source = TokenSource(corpus.documents, indexes, tokenizer)
        annotate(
            params, model, tokenizer, source, folder, settings.rpt.positions, proxy="base", banned_ids=marks(tokenizer)
        )
        opened[part] = open_annotated(folder, tokenizer)
    return opened


def reinforce(settings: Settings, start: Policy, annotated) -> Policy:
    """RPT; goes on from its newest checkpoint."""
    run, (model, _, tokenizer) = rpt_config(settings), start
    positions = select_positions(annotated, run.positions, run.seed)
    template = load_template(run.prompt.template)
    state = train(run, start, annotated=annotated, positions=positions, template=template, report=print_row)
    return model, state.params, tokenizer


def rpt_config(settings: Settings) -> Config:
    return dataclasses.replace(settings.rpt, seed=settings.seed, run_folder=f"{settings.folder}/rpt")


def rpt_flops(settings: Settings) -> float:
    """Of sampling and of updates."""
    return quickstart.rpt_flops(read_rows(Path(settings.folder) / "rpt" / "metrics.jsonl"))


def control_config(settings: Settings, model: ModelConfig, examples: list[Example], rate: float) -> PretrainConfig:
    """As many steps as RPT's FLOPs pay for; padding is not charged, and the head by the weights of the tokens."""
    size, longest = settings.start.batch_size, settings.start.sequence_length
    pieces = [-(-len(tokens_T) // longest) for tokens_T, _ in examples]
    tokens = sum(len(tokens_T) for tokens_T, _ in examples) / sum(pieces)  # of a row
    predicted = sum(weights_T.sum() for _, weights_T in examples) / sum(pieces)
    step = 3 * size * flops.forward(model, tokens, tokens / 2, predicted)
    steps = round(rpt_flops(settings) / step)
    return dataclasses.replace(settings.start, learning_rate=rate, warmup_steps=10, steps=steps)


def best_control(settings: Settings, kind: str, rates, make_examples, start: Policy, tuning) -> tuple[str, Policy]:
    """(name, policy) of the learning rate whose better mode is best on the medium positions of the tuning part."""
    model, params, tokenizer = start
    made, scores = {}, {}

    def make(rate, report):
        examples = make_examples()
        chosen = control_config(settings, model, examples, rate)
        print(f"{kind} at {rate:g}: {chosen.steps} steps for {rpt_flops(settings):.4g} FLOPs", flush=True)
        batches = row_batches(examples, chosen.batch_size, chosen.sequence_length, settings.seed)
        return model, pretrain(params, model, chosen, batches, report), tokenizer

    for rate in rates:
        name = f"{kind}_{rate:g}"
        made[name] = policy_stage(settings, name, partial(make, rate))
        medium = measure(settings, made[name], tuning, 256, False).summary()["medium"]
        scores[name] = max(medium["argmax"], medium["reasoning"])
        print(f"{name}: tuning argmax {medium['argmax']:.4f} reasoning {medium['reasoning']:.4f}", flush=True)
    best = max(scores, key=scores.get)
    return best, made[best]


def measure(settings: Settings, policy: Policy, annotated, count: int, greedy: bool = True) -> Evaluation:
    """Both modes at `count` positions of each split; the same positions and the same noise for every policy."""
    model, params, tokenizer = policy
    run = settings.rpt
    return evaluate(
        params,
        model,
        tokenizer,
        load_template(run.prompt.template),
        {document.document: document.tokens_T for document in annotated},
        difficulty_splits(annotated, run.positions),
        prompt=run.prompt,
        sample=run.sample,
        config=dataclasses.replace(run.evaluate, positions=count, greedy=greedy),
        seed=settings.seed,
        end_ids=(tokenizer.end_of_text,),
        banned_ids=marks(tokenizer),
    )


def clustered(values_N: np.ndarray, documents_N: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, positions of one document taken together."""
    mean = float(values_N.mean())
    sums = np.bincount(documents_N, weights=values_N - mean)
    return mean, float(np.sqrt(np.sum(sums**2)) / len(values_N))


def add_rows(settings: Settings, policy: str, evaluation: Evaluation, before: Evaluation) -> None:
    """Prints and writes a row for each split; gains are paired with the outcomes `before` at the same positions."""
    after_N, before_N = outcomes(evaluation), outcomes(before)
    rows = []
    for split, chosen in evaluation.splits.items():
        documents_N = evaluation.positions.documents[chosen]
        row = {"seed": settings.seed, "policy": policy, "split": split, "positions": len(chosen)}
        for name in OUTCOMES:
            row[name], row[f"{name}_error"] = clustered(after_N[name][chosen], documents_N)
            gain_N = after_N[name][chosen] - before_N[name][chosen]
            row[f"{name}_gain"], row[f"{name}_gain_error"] = clustered(gain_N, documents_N)
        figures = evaluation.figures(chosen)
        row |= {name: figures[name] for name in ("format_rate", "greedy_format_rate", "pass_at_k", "response_length")}
        row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
        rows.append(row | cost(settings, policy))
    for row in rows:
        shown = "  ".join(
            f"{name} {row[name]:.3f} ({row[name + '_gain']:+.3f}±{row[name + '_gain_error']:.3f})" for name in OUTCOMES
        )
        print(f"{policy:>16} {row['split']:>6}  {shown}  format {row['format_rate']:.3f}", flush=True)
    replace_rows(Path(settings.results), rows, keys=("seed", "policy"))


def outcomes(evaluation: Evaluation) -> dict[str, np.ndarray]:
    sampled_N, greedy_N = evaluation.sampled.rewards_NG.mean(axis=1), evaluation.greedy.rewards_NG[:, 0]
    return dict(zip(OUTCOMES, (evaluation.argmax_right_N.astype(float), sampled_N, greedy_N), strict=True))


def policy_stage(settings: Settings, name: str, make) -> Policy:
    """What `make(report)` gives, kept in a policy folder with the seconds it took."""
    folder = Path(settings.folder) / name
    if not (folder / "policy.json").is_file():
        start, cpu = time.perf_counter(), time.process_time()
        policy = make(lambda step, row: print(f"{name} step {step}  loss {row['loss']:.4f}", flush=True))
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        save_policy(folder, *policy, {"experiment": "omnimath_small", "stage": name} | seconds)
    return load_policy(folder)


def cost(settings: Settings, name: str) -> dict:
    provenance = json.loads((Path(settings.folder) / name / "policy.json").read_text())["provenance"]
    return {key: round(provenance[key], 1) for key in ("seconds", "cpu_seconds")}


def print_row(row: dict) -> None:
    if row["step"] % 10 == 0:
        names = ("reward", "format_rate", "length", "entropy", "zero_variance_share", "mismatch_max", "seconds")
        print(f"rpt step {row['step']}  " + "  ".join(f"{name} {row[name]:.4g}" for name in names), flush=True)


def main(settings: Settings) -> None:
    """Every stage that is not there yet, then the figures; a policy's rows are written as soon as it is evaluated."""
    corpus = Corpus(settings)
    base = policy_stage(settings, "base", partial(train_base, settings, corpus))
    annotated = annotate_parts(settings, corpus, base)
    tokenizer, training = base[2], annotated["train"]
    run, length = rpt_config(settings), settings.start.sequence_length
    traces = cache(lambda: make_traces(run, base, training, settings.traces, settings.careful))
    start = policy_stage(settings, "start", lambda report: train_start(settings, base, traces(), report))
    held_out = partial(measure, settings, annotated=annotated["holdout"], count=settings.rpt.evaluate.positions)
    before = held_out(start)
    add_rows(settings, "start", before, before)
    after = policy_stage(settings, "after_rpt", lambda report: reinforce(settings, start, training))
    add_rows(settings, "after_rpt", held_out(after), before)
    controls = (
        ("sft", settings.sft_rates, lambda: boxed_examples(run, tokenizer, training)),
        (
            "next_token",
            settings.next_token_rates,
            lambda: next_token_examples(corpus.training_texts, tokenizer, traces(), length, settings.seed),
        ),
    )
    for kind, rates, make_examples in controls:
        name, policy = best_control(settings, kind, rates, make_examples, start, annotated["tuning"])
        add_rows(settings, name, held_out(policy), before)
    add_rows(settings, "base", held_out(base), before)
    for row in read_rows(Path(settings.folder) / "rpt" / "rollouts.jsonl")[-3:]:
        print(json.dumps(row, indent=1, ensure_ascii=False))


def train_start(settings: Settings, base: Policy, traces: list[Example], report) -> Policy:
    """The base goes on with the traces, the text before their positions included."""
    model, params, tokenizer = base
    batches = row_batches(traces, settings.start.batch_size, settings.start.sequence_length, settings.seed)
    return model, pretrain(params, model, settings.start, batches, report), tokenizer


if __name__ == "__main__":
    main(tyro.cli(Settings))
