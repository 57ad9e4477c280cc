"""Side by side with transformers, where the extra parity is installed: what it computes, we compute, and it opens what
we write. The mark is `parity`; test_weights_golden.py holds a part of it without torch."""

import importlib.util
import json

import numpy as np
import pytest
import toy
from golden.make import TOKENS, expected, published
from test_tokenizer_files import byte_level_description, write
from test_weights_golden import our_greedy, our_logits, relative, tensors_of

from rpt_jax import cli
from rpt_jax.corpus.tokenizer import load_tokenizer
from rpt_jax.learning.policy_folder import load_policy, save_policy
from rpt_jax.policy import weights
from rpt_jax.policy.weights_config import read_config

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers: extra parity"),
    pytest.mark.filterwarnings("ignore"),  # what torch and transformers warn of is theirs
]

SCALED = ("none", "llama3", "yarn")
GRID = [
    (family, scaling, kv_heads, tied)
    for i, family in enumerate(("llama", "qwen2", "qwen3"))
    for j, scaling in enumerate(SCALED)
    for tied, kv_heads in ((False, (1, 2, 4)[(i + j) % 3]), (True, (2, 4, 1)[(i + j) % 3]))
]


def convert(capsys, *words):
    status = cli.main(["convert", *map(str, words), "--json"])
    output, message = capsys.readouterr()
    assert status == 0, message
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize(("family", "scaling", "kv_heads", "tied"), GRID)
def test_logits_and_greedy_tokens(family, scaling, kv_heads, tied, tmp_path):
    theirs = published(family, scaling, kv_heads, tied, "float32", seed=kv_heads)
    values = expected(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    model = read_config(tmp_path)
    params = weights.load_weights(tmp_path, model)
    assert relative(our_logits(model, params, values["tokens_T"]), values["logits_TV"]) < 1e-4
    ours_R = our_greedy(model, params, values["tokens_T"][: TOKENS // 2], len(values["greedy_R"]))
    np.testing.assert_array_equal(ours_R, values["greedy_R"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "scaling", "kv_heads", "tied"),
    [("llama", "llama3", 2, False), ("qwen2", "yarn", 1, True), ("qwen3", "yarn_gain", 4, False)],
)
def test_what_comes_back_is_the_same_model_to_transformers(family, scaling, kv_heads, tied, dtype, tmp_path, capsys):
    """Through a policy and back: tensors to the bit, and logits too, by its own code."""
    import torch
    import transformers

    theirs = published(family, scaling, kv_heads, tied, dtype)
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    toy.tokenizer().save(tmp_path / "theirs")
    convert(capsys, "hf-to-orbax", tmp_path / "theirs", tmp_path / "policy")
    convert(capsys, "orbax-to-hf", tmp_path / "policy", tmp_path / "ours")
    assert tensors_of(tmp_path / "ours") == tensors_of(tmp_path / "theirs")
    tokens_1T = torch.arange(40)[None]
    logits = []
    for folder in ("theirs", "ours"):
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert opened.dtype == getattr(torch, dtype)
        logits.append(opened(tokens_1T).logits.detach().float().numpy())
    np.testing.assert_array_equal(*logits)


def their_text(folder, text: str, added: int) -> str:
    """Greedy text by transformers alone, from nothing but a folder."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    whole = model.generate(**prompt, do_sample=False, max_new_tokens=added)
    return tokenizer.decode(whole[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def our_text(folder, text: str, added: int) -> str:
    model, params, tokenizer = load_policy(folder)
    tokens = our_greedy(model, params, tokenizer.encode(text), added, (tokenizer.end_of_text,))
    return tokenizer.bytes_of(tokens.tolist()).decode(errors="replace")


def test_greedy_text_of_an_exported_policy(tmp_path, capsys):
    """A policy with a SentencePiece vocabulary: it answers in pieces, with a space, and ends its text."""
    save_policy(tmp_path / "policy", toy.model(), toy.params(), toy.tokenizer(), {})
    convert(capsys, "orbax-to-hf", tmp_path / "policy", tmp_path / "out", "--context", 64)
    for text in ("a 3.<predict><think>", "h 0.b 4.<think>"):
        ours = our_text(tmp_path / "policy", text, 12)
        assert ours == their_text(tmp_path / "out", text, 12) and ours.startswith("</think>\\boxed{")
        assert len(ours) < 12 + len("</think>\\boxed{")  # it ended


@pytest.mark.parametrize("maker", ["Qwen2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
def test_greedy_text_with_a_byte_level_tokenizer(maker, tmp_path, capsys):
    """As Qwen2 and (with another maker's name) R1 distillations publish it, or without a tokenizer_config.json."""
    theirs = published("qwen2", "none", 2, False, "float32", vocab_size=260, eos_token_id=256)
    theirs.save_pretrained(tmp_path / "theirs")
    write(tmp_path / "theirs", "tokenizer.json", byte_level_description())
    if maker:
        config = {"tokenizer_class": maker, "eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
        write(tmp_path / "theirs", "tokenizer_config.json", config)
    convert(capsys, "hf-to-orbax", tmp_path / "theirs", tmp_path / "policy")
    convert(capsys, "orbax-to-hf", tmp_path / "policy", tmp_path / "ours")
    ours = our_text(tmp_path / "policy", "x + 1 =\n 2é", 24)
    assert ours == their_text(tmp_path / "ours", "x + 1 =\n 2é", 24) and len(ours) > 3


def test_vocab_and_merges_open_too(tmp_path, capsys):
    """Qwen2's older form."""
    import transformers

    description = byte_level_description()["model"]
    vocab = description["vocab"] | {"Ġa": 256, "in": 257, "<|endoftext|>": 258}
    published("qwen2", "none", 2, False, "float32", vocab_size=260).save_pretrained(tmp_path / "theirs")
    write(tmp_path / "theirs", "vocab.json", vocab)
    write(tmp_path / "theirs", "merges.txt", "#version: 0.2\nĠ a\ni n\n")
    convert(capsys, "hf-to-orbax", tmp_path / "theirs", tmp_path / "policy")
    convert(capsys, "orbax-to-hf", tmp_path / "policy", tmp_path / "ours")
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "in a rain\n a 12"
    assert opened(text, add_special_tokens=False)["input_ids"] == load_tokenizer(tmp_path / "ours").encode(text)
