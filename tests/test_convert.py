"""Claims: dtypes are as asked, a repository's id is looked up with its revision, and what cannot be used ends with a
remedy and status 2, before anything is written. Bits and meaning: test_weights_golden.py."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import toy
from huggingface_hub import constants, file_download
from test_weights_golden import GOLDEN, tensors_of

from rpt_jax import cli
from rpt_jax.learning import train
from rpt_jax.learning.policy_folder import load_policy, save_policy
from rpt_jax.policy import decoder

CONFIG = json.loads((GOLDEN / "qwen2_tied" / "config.json").read_text())


@pytest.fixture
def published(tmp_path):
    """A published folder with a tokenizer."""
    shutil.copytree(GOLDEN / "qwen2_tied", tmp_path / "published")
    toy.tokenizer().save(tmp_path / "published")
    return tmp_path / "published"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The hub's client with an empty cache and no network; gives the cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(capsys):
    def run(*words):
        status = cli.main(["convert", *map(str, words), "--json"])
        output, message = capsys.readouterr()
        return status, json.loads(output.splitlines()[-1]) if output else None, message

    return run


def test_dtypes_as_asked(published, tmp_path, run):
    """bfloat16 -> float32 -> bfloat16 loses nothing; what is computed with follows what is stored."""
    status, made, _ = run("hf-to-orbax", published, tmp_path / "policy", "--dtype", "float32")
    assert status == 0 and made.pop("seconds") > 0
    shape = {"parameters": 5168, "dtype": "float32", "vocab_size": 40, "context": 64}
    assert made == {"policy": str(tmp_path / "policy")} | shape
    model, params, _ = load_policy(tmp_path / "policy")
    assert (model.dtype, model.param_dtype, params["embedding"].dtype) == ("float32", "float32", jnp.float32)
    status, made, _ = run("orbax-to-hf", tmp_path / "policy", tmp_path / "out", "--dtype", "bfloat16")
    assert status == 0 and made["dtype"] == "bfloat16"
    assert tensors_of(tmp_path / "out") == tensors_of(published)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_files_are_as_large_as_asked_and_the_context_too(published, tmp_path, run):
    run("hf-to-orbax", published, tmp_path / "policy")
    options = ["--context", "77", "--file-gib", 4000 / 2**30]
    assert run("orbax-to-hf", tmp_path / "policy", tmp_path / "out", *options)[0] == 0
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and all(sum(x.nbytes for x in safetensors.numpy.load_file(f).values()) <= 4000 for f in files)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 77


@pytest.mark.parametrize("made_for", [8, 4096])
def test_a_run_says_by_itself_how_long_its_texts_are(tmp_path, run, made_for):
    """What its policy was made for, or prompt and response together where they are longer."""
    policy = toy.model(context=made_for), toy.params(), toy.tokenizer()
    train.train(toy.config(tmp_path / "run", steps=1), **toy.arguments(policy=policy))
    assert run("orbax-to-hf", tmp_path / "run", tmp_path / "out")[0] == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"]
    assert written == max(made_for, 32 + 8)  # toy.config's


def test_a_repository_comes_from_the_hub(published, tmp_path, run, offline):
    """Laid where the hub's client keeps what it has downloaded, under a revision that is asked for."""
    folder = offline / file_download.repo_folder_name(repo_id="someone/tiny", repo_type="model")
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "v2").write_text("0123abc")
    shutil.copytree(published, folder / "snapshots" / "0123abc")
    status, made, _ = run("hf-to-orbax", "someone/tiny", tmp_path / "policy", "--revision", "v2")
    assert status == 0 and made["dtype"] == "bfloat16"
    embedding = safetensors.numpy.load_file(published / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(load_policy(tmp_path / "policy")[1]["embedding"], embedding)
    provenance = json.loads((tmp_path / "policy" / "policy.json").read_text())["provenance"]
    assert (provenance["source"], provenance["revision"]) == ("someone/tiny", "v2")
    status, made, message = run("hf-to-orbax", "someone/tiny", tmp_path / "other")
    assert status == 2 and made is None and "cannot be reached" in message


def test_without_network_or_client(tmp_path, run, offline, monkeypatch):
    status, _, message = run("hf-to-orbax", "someone/tiny", tmp_path / "policy")
    assert status == 2 and message.splitlines()[-1].startswith("rpt: no folder someone/tiny, and the hub cannot be")
    assert message.endswith("download the repository where there is a network, and give its folder\n")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    status, _, message = run("hf-to-orbax", "someone/tiny", tmp_path / "policy")
    assert status == 2 and message.endswith("pip install 'rpt_jax[hub]'\n")
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "convert: nothing is no conversion: use `rpt convert hf-to-orbax"),
        ("hf-to-jax a b", "convert: hf-to-jax is no conversion"),
        ("hf-to-orbax", "is missing: use `rpt convert hf-to-orbax MODEL OUTPUT`"),
        ("orbax-to-hf {policy} --context 64", "is missing: use `rpt convert orbax-to-hf POLICY OUTPUT`"),
        ("hf-to-orbax {tmp}/none {tmp}/out", "no folder {tmp}/none: give a folder with config.json, or the id"),
        ("hf-to-orbax {policy} {tmp}/out", "{policy}/model.safetensors: download all .safetensors"),
        ("hf-to-orbax {published} {published}", "{published} is no policy folder and not empty: choose another"),
        ("orbax-to-hf {published} {tmp}/out", "no policy in '{published}'"),
        ("orbax-to-hf {policy} {tmp}/out", "does not say for how many tokens it was made.*--context TOKENS"),
        ("orbax-to-hf {policy} {published}", "{published} holds a checkpoint already"),
        ("orbax-to-hf {policy} {tmp}/out --context 9 --file-gib 0", "file_gib=0.0: use more than 0"),
        ("orbax-to-hf {policy} {tmp}/out --context 9 --file-gib nan", "file_gib=nan: use a finite number"),
        ("orbax-to-hf {policy} {tmp}/out --context 9 --file-gib inf", "file_gib=inf: use a finite number"),
        (
            "orbax-to-hf {policy} {tmp}/out --context 9 --file-gib 1e300",
            "file_gib=1e+300: use more than 0, and at most",
        ),
    ],
)
def test_what_cannot_be_used_is_named_with_a_remedy(words, message, published, tmp_path, run):
    save_policy(tmp_path / "policy", toy.model(), toy.params(), toy.tokenizer(), {})
    before = sorted(tmp_path.rglob("*"))
    places = {"policy": tmp_path / "policy", "published": published, "tmp": tmp_path}
    status, figures, said = run(*words.format(**places).split())
    assert status == 2 and figures is None
    assert len(said.splitlines()) == 1 and said.startswith("rpt: ")
    parts = message.format(**places).split(".*")
    assert all(part in said for part in parts), said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_policy_of_no_family_leaves_nothing_behind(tmp_path, run):
    model = toy.model(qkv_bias=True, qk_norm=True)
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), decoder.shapes(model))
    save_policy(tmp_path / "policy", model, params, toy.tokenizer(), {})
    status, _, said = run("orbax-to-hf", tmp_path / "policy", tmp_path / "out", "--context", 64)
    assert status == 2 and "neither Qwen2 nor Qwen3 has both" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral': choose a model of type llama, qwen2, qwen3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"vocab_size": 20}, "asks for a floating-point (20, 16)"),
    ],
)
def test_models_that_the_decoder_lacks_leave_nothing_behind(change, message, published, tmp_path, run):
    (published / "config.json").write_text(json.dumps(CONFIG | change))
    status, _, said = run("hf-to-orbax", published, tmp_path / "policy")
    assert status == 2 and message in said
    assert not (tmp_path / "policy").exists()
