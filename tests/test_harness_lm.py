"""Claims: lm-evaluation-harness runs its own tasks, from its own YAML files, on a policy: only where the data come from
is changed, to a local file. What it reports is what can be counted by hand; a task that there is not is said. Skipped
without the extra harness."""

import functools
import importlib.util
import json
import math
import os
import string
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from test_tokenizer_files import byte_level_description, write

from rpt_jax import cli
from rpt_jax.corpus.tokenizer import load_tokenizer, train_sentencepiece
from rpt_jax.learning.policy_folder import save_policy
from rpt_jax.policy import decoder
from rpt_jax.study import harness

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="no lm_eval: extra harness"),
    pytest.mark.filterwarnings("ignore"),  # what the harness and its packages warn of is theirs
]
WORDS = ["--no-catalogue", "--batch-size", "8", "--max-length", "512"]
CHARACTERS = string.ascii_letters + string.digits + "\n .,:?#<>=+*/"
ARC = [
    {
        "question": f"What is {i}?",
        "choices": {"text": ["one", "two", "three"], "label": ["A", "B", "C"]},
        "answerKey": k,
    }
    for i, k in enumerate("ABCAB")
]
SUMS = [{"question": f"{i} + {j} = ?", "answer": f"Add.\n#### {i + j}"} for i, j in ((3, 4), (1, 1), (2, 5), (4, 4))]
PAGES = [{"page": "One page. "}, {"page": "Another, and a longer one: " * 30}]


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Nothing is asked of any server, and what `datasets` keeps has a folder of its own; both are read at import."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("HF_HOME", tempfile.mkdtemp())


@functools.cache
def tokenizer():
    """A token a character, but for the harness's stop string of gsm8k."""
    symbols = ("Question:",)
    size = len(CHARACTERS) + len(symbols) + 3
    return train_sentencepiece(
        [CHARACTERS] * 9, size, tempfile.mkdtemp(), symbols, model_type="char", byte_fallback=False
    )


def model():
    return replace(toy.model(width=96, head_channels=16), vocab_size=96)


@functools.cache
def params():
    """Random, but for what follows a colon: 7, and then a new question."""
    rng, id_of = np.random.default_rng(0), tokenizer().id_of
    tree = toy.noise(model(), 0.04, rng)
    follows_VV = 0.1 * rng.standard_normal((96, 96)).astype(np.float32)
    follows_VV[id_of(":"), id_of("7")] = follows_VV[id_of("7"), id_of("Question:")] = 3
    return tree | {"embedding": np.eye(96, dtype=np.float32), "head": follows_VV}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder, model(), params(), tokenizer(), {})
    return folder


def task(folder: Path, name: str, source: str, rows: list[dict], splits: tuple[str, ...]) -> str:
    """A task that includes the harness's YAML file `source` and reads `rows` (JSON is YAML); its name."""
    origin = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / source
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {split: str(data) for split in splits}}
    content = {"include": str(origin), "task": name, "dataset_path": "json", "dataset_name": None}
    (folder / f"{name}.yaml").write_text(json.dumps(content | {"dataset_kwargs": files}))
    return name


def run(capsys, policy, folder, *words):
    given = [policy, "--include-path", folder, *WORDS, *words, "--json"]
    status = cli.main(["harness", *map(str, given)])
    output, message = capsys.readouterr()
    return (status, json.loads(output.splitlines()[-1])) if status == 0 else (status, message)


def test_its_own_tasks(tmp_path, capsys, policy):
    """arc_easy by log-prob, gsm8k with its example questions by generation, wikitext by windows, in one run."""
    names = [
        task(tmp_path, "local_arc", "arc/arc_easy.yaml", ARC, ("train", "validation", "test")),
        task(tmp_path, "local_gsm8k", "gsm8k/gsm8k.yaml", SUMS * 2, ("train", "test")),
        task(tmp_path, "local_wikitext", "wikitext/wikitext.yaml", PAGES, ("train", "validation", "test")),
    ]
    results = tmp_path / "results.json"
    status, figures = run(capsys, policy, tmp_path, "--tasks", *names, "--results", results)
    assert status == 0, figures
    assert figures == json.loads(results.read_text())
    found, config = figures["results"], harness.HarnessRun(max_length=512, batch_size=8)
    asked = harness.Asked(model(), params(), tokenizer(), config, (tokenizer().end_of_text,))

    options = ARC[0]["choices"]["text"]
    pairs = [(f"Question: {row['question']}\nAnswer:", f" {option}") for row in ARC for option in options]
    sums_53 = np.array([each.logprob for each in harness.loglikelihoods(asked, pairs)]).reshape(5, 3)
    truth_5 = np.array(["ABC".index(row["answerKey"]) for row in ARC])
    assert found["local_arc"]["acc,none"] == pytest.approx((sums_53.argmax(axis=1) == truth_5).mean())
    by_length_53 = sums_53 / np.array([len(option) for option in options])[None]
    assert found["local_arc"]["acc_norm,none"] == pytest.approx((by_length_53.argmax(axis=1) == truth_5).mean())

    assert harness.generate(asked, [("Question: x\nAnswer:", {"until": ["Question:"]})]) == ["7"]
    assert found["local_gsm8k"]["exact_match,flexible-extract"] == 0.5  # two of four sums are 7
    assert found["local_gsm8k"]["exact_match,strict-match"] == 0  # no ####

    logprobs = harness.rolling_loglikelihoods(asked, [row["page"] for row in PAGES])
    size = sum(len(row["page"]) for row in PAGES)
    bits = -sum(logprobs) / size / math.log(2)
    assert found["local_wikitext"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert figures["n-samples"]["local_arc"] == {"original": 5, "effective": 5}
    assert figures["n-shot"]["local_gsm8k"] == 5
    assert figures["cut_contexts"] == {"loglikelihood": 0, "generate_until": 0}


def test_limit_and_long_contexts(tmp_path, capsys, policy):
    """So many questions, no examples; what max_length cuts is counted."""
    name = task(tmp_path, "short_arc", "arc/arc_easy.yaml", ARC, ("train", "validation", "test"))
    words = ["--tasks", name, "--limit", "2", "--fewshot", "1", "--max-length", "24"]
    status, figures = run(capsys, policy, tmp_path, *words)
    assert status == 0, figures
    assert figures["n-samples"][name]["effective"] == 2 and figures["n-shot"][name] == 1
    assert figures["cut_contexts"] == {"loglikelihood": 6}


THEIRS = ("torch", "transformers", "accelerate", "peft")


@pytest.mark.parity
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, THEIRS)), reason=f"no {', '.join(THEIRS)}: extra parity, and lm-eval[hf]"
)
def test_side_by_side_with_the_harnesses_own_model(tmp_path):
    """Its model for transformers, on the same weights: log-probs, greedy flags, windows, answers and cut contexts.

    But where a token reaches over the boundary it scores what comes behind as many tokens as the context has alone.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    added = {"<|endoftext|>": 256, "Ġa": 257, "in": 258, "Ġ3": 259}
    write(tmp_path / "tokenizer", "vocab.json", byte_level_description()["model"]["vocab"] | added)
    write(tmp_path / "tokenizer", "merges.txt", "#version: 0.2\nĠ a\ni n\nĠ 3\n")
    described = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    write(tmp_path / "tokenizer", "tokenizer_config.json", described)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    shape = replace(toy.model(), vocab_size=264, context=64, qkv_bias=True)
    random = jax.jit(decoder.init, static_argnums=0)(shape, jax.random.key(0))
    random |= {"head": 6 * random["head"]}
    save_policy(tmp_path / "policy", shape, random, tokenizer, {})
    assert cli.main(["convert", "orbax-to-hf", str(tmp_path / "policy"), str(tmp_path / "theirs")]) == 0
    theirs = HFLM(pretrained=str(tmp_path / "theirs"), device="cpu", batch_size=2, max_length=24, dtype="float32")
    config = harness.HarnessRun(max_length=24, batch_size=4)
    ours = harness.Asked(shape, random, tokenizer, config, (tokenizer.end_of_text,))

    def requests(kind, arguments):
        return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]

    pairs = [("Rain", " a day"), ("Rain ", "a day"), ("", "in"), ("x" * 40, " 3 in"), ("é", "ü")]
    greedy = harness.generate(ours, [("Rain", {"max_gen_toks": 2})])[0]
    pairs.append(("Rain", greedy))
    expected = theirs.loglikelihood(requests("loglikelihood", pairs))
    for each, (logprob, is_greedy) in zip(harness.loglikelihoods(ours, pairs), expected, strict=True):
        assert each.logprob == pytest.approx(logprob, abs=1e-3) and each.greedy == is_greedy
    texts = ["Rain in a day: 3" * 5, "a"]
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    assert harness.rolling_loglikelihoods(ours, texts) == pytest.approx(expected, abs=1e-2)
    asked = [(context, {"until": [greedy[-1]], "max_gen_toks": 6}) for context in ("Rain", "in a day " * 5, "3")]
    assert harness.generate(ours, asked) == theirs.generate_until(requests("generate_until", asked))
    assert dict(ours.cut) == {"loglikelihood": 1, "generate_until": 1}

    pair = ("Ri", "n a")
    [whole], [(less, _)] = harness.loglikelihoods(ours, [pair]), theirs.loglikelihood(requests("loglikelihood", [pair]))
    assert whole.logprob < less - 1  # "in" and " a" against " a" alone


def test_what_cannot_be_run_is_said(tmp_path, capsys, policy):
    status, message = run(capsys, policy, tmp_path, "--tasks", "none")
    assert status == 2 and "tasks: no task, group or tag 'none'" in message
    status, message = run(capsys, policy, tmp_path / "nowhere", "--tasks", "none")
    assert status == 2 and "is no folder" in message
