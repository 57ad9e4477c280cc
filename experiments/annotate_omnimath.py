"""Annotates the whole of Omni-MATH in the vocabulary of Qwen2: does the position filter hold at 151,643 pieces?

    python experiments/annotate_omnimath.py --data DATA

DATA holds omni-math/omni_math_rule.jsonl (KbsdJames/omni-math-rule) and Qwen2's vocab.json and merges.txt in
tokenizers/qwen2/. What is tried is the machine and not the filter: the proxy is a decoder of one layer and width 32
after 40 steps on the same documents, so its entropies are those of a model that knows little more than how frequent
tokens are. The bytes of every document are compared with what its annotated tokens spell. Goes on, part by part,
where an earlier call stopped. Hardware: one CPU core. Time: 13 minutes. Writes the row of its seed to
results/annotate_omnimath.csv (its seconds are those of the last call). Measured result: 2,821 documents, every byte
the same; see LOG.md.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from rows import replace_rows

from rpt_jax.config import CorpusConfig, ModelConfig, PositionConfig, PretrainConfig
from rpt_jax.corpus.documents import read_documents
from rpt_jax.corpus.positions import difficulty_splits, open_annotated
from rpt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.learning.policy_folder import load_policy, save_policy
from rpt_jax.learning.pretrain import plain, pretrain, running_batches
from rpt_jax.policy import decoder
from rpt_jax.policy.proxy import TokenSource, annotate
from rpt_jax.records import Params


@dataclass(frozen=True)
class Settings:
    data: str = os.environ.get("RPT_DATA", "../shared/data")  # folder that holds omni-math/ and tokenizers/qwen2/
    folder: str = "runs/annotate_omnimath"
    results: str = "experiments/results/annotate_omnimath.csv"
    seed: int = 0
    documents: int = 0  # the first so many; 0: all
    model: ModelConfig = ModelConfig(
        width=32, layers=1, heads=2, kv_heads=2, head_channels=16, hidden=64, tied_head=True
    )
    proxy: PretrainConfig = PretrainConfig(
        learning_rate=1e-2, warmup_steps=10, batch_size=4, sequence_length=256, steps=40, token_chunk=64
    )
    positions: PositionConfig = PositionConfig(window=4096, batch_tokens=8192)


def train_proxy(settings: Settings, tokenizer: Tokenizer, documents) -> tuple[ModelConfig, Params]:
    """Next-token training on documents drawn at random."""
    model = ModelConfig(**(vars(settings.model) | {"vocab_size": tokenizer.vocab_size}))
    few = np.random.default_rng(settings.seed).permutation(len(documents))[:400]
    examples = [plain(tokenizer.encode(documents[i].text)) for i in few]
    batches = running_batches(examples, settings.proxy.batch_size, settings.proxy.sequence_length, settings.seed)
    params = decoder.init(model, jax.random.key(settings.seed))
    return model, pretrain(params, model, settings.proxy, batches, lambda step, row: print(step, row["loss"]))


def count_bytes(annotated, documents, tokenizer: Tokenizer) -> int:
    """Bytes of all documents; raises ValueError for one that its annotated tokens do not spell."""
    total = 0
    for record in annotated:
        text = documents[record.document].text.encode()
        if tokenizer.bytes_of(record.tokens_T.tolist()) != text:
            raise ValueError(f"{record.name}: the tokens of the artefact do not spell the document")
        total += len(text)
    return total


def main(settings: Settings) -> None:
    files = CorpusConfig(files=(f"{settings.data}/omni-math/omni_math_rule.jsonl",), template="{problem}\n\n{solution}")
    documents = read_documents(files)
    tokenizer = load_tokenizer(f"{settings.data}/tokenizers/qwen2")
    folder, row = Path(settings.folder), {"seed": settings.seed, "device": jax.devices()[0].platform}
    start, cpu = time.perf_counter(), time.process_time()
    if not (folder / "proxy" / "policy.json").is_file():
        model, params = train_proxy(settings, tokenizer, documents)
        save_policy(folder / "proxy", model, params, tokenizer, {"experiment": "annotate_omnimath"})
    model, params, _ = load_policy(folder / "proxy")
    row["proxy_seconds"] = round(time.perf_counter() - start, 1)
    row["proxy_cpu_seconds"] = round(time.process_time() - cpu, 1)
    source = TokenSource(documents, np.arange(settings.documents or len(documents)), tokenizer)
    start, cpu = time.perf_counter(), time.process_time()

    def progress(done, total):
        print(f"{done} of {total} documents, {time.perf_counter() - start:.0f} s", flush=True)

    annotate(
        params,
        model,
        tokenizer,
        source,
        folder / "annotated",
        settings.positions,
        proxy=f"{settings.proxy.steps} steps of a width-{model.width} decoder",
        part_documents=1024,
        token_chunk=32,
        progress=progress,
    )
    row["seconds"], row["cpu_seconds"] = round(time.perf_counter() - start, 1), round(time.process_time() - cpu, 1)
    annotated = open_annotated(folder / "annotated", tokenizer)
    row |= figures(annotated, documents, tokenizer)
    print(json.dumps(row))
    replace_rows(Path(settings.results), [row], keys=("seed",))


def figures(annotated, documents, tokenizer: Tokenizer) -> dict:
    """Sizes, arg-max accuracy and positions of the splits; raises ValueError where bytes differ, as count_bytes."""
    found = {"documents": len(annotated), "bytes": count_bytes(annotated, documents, tokenizer)}
    tokens = [(record.tokens_T, record.argmaxes_T) for record in annotated]
    found["tokens"] = sum(len(tokens_T) for tokens_T, _ in tokens)
    right = sum(int(np.sum(tokens_T[1:] == argmaxes_T[1:])) for tokens_T, argmaxes_T in tokens)
    found["argmax_right"] = round(right / (found["tokens"] - len(annotated)), 4)
    found |= {f"positions_{name}": len(split) for name, split in difficulty_splits(annotated).items()}
    return found | {"exact_bytes": True}  # count_bytes would have raised


if __name__ == "__main__":
    main(tyro.cli(Settings))
