"""Claims: a policy comes back to the bit, on any mesh, in either precision; a damaged one is named with the remedy, and
nothing but a policy is written over."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_checkpoints import assert_same, damage

from rpt_jax.config import MeshConfig
from rpt_jax.corpus.tokenizer import train_sentencepiece
from rpt_jax.learning import policy_folder, run_folder
from rpt_jax.mesh import make_mesh, param_shardings
from rpt_jax.policy import decoder
from rpt_jax.records import InputError


def policy(dtype):
    model = toy.model(param_dtype=dtype)
    return model, jax.tree.map(lambda x: jnp.asarray(x / 3, dtype), toy.params()), toy.tokenizer()


@pytest.mark.parametrize("stored", ["param_dtype", "orbax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_comes_back_to_the_bit(tmp_path, dtype, stored):
    model, params, tokenizer = policy(dtype)
    policy_folder.save_policy(tmp_path / "policy", model, params, tokenizer, {"made by": "test"}, stored=stored)
    there, read, read_tokenizer = policy_folder.load_policy(tmp_path / "policy")
    assert there == model and read_tokenizer.fingerprint == tokenizer.fingerprint
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y) or (x.dtype == y.dtype or pytest.fail()), read, params
    )
    assert json.loads((tmp_path / "policy" / "policy.json").read_text())["provenance"] == {"made by": "test"}
    mesh = make_mesh(MeshConfig(2, 2, 2))
    on_mesh = policy_folder.load_policy(tmp_path / "policy", mesh)[1]
    assert_same(on_mesh, params)
    assert on_mesh["head"].sharding == param_shardings(mesh, decoder.logical_axes(model), params)["head"]


def test_half_precision_on_disk(tmp_path):
    model, params, tokenizer = policy("float32")
    for stored in ("param_dtype", "float16"):
        policy_folder.save_policy(tmp_path / stored, model, params, tokenizer, {}, stored=stored)
    sizes = [(tmp_path / stored / "params.npz").stat().st_size for stored in ("param_dtype", "float16")]
    assert sizes[1] < 0.65 * sizes[0]
    read = policy_folder.load_policy(tmp_path / "float16")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype("float32")}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-11, atol=2**-25), read, params)
    broken = params | {"head": params["head"].at[0, 0].set(1e5)}
    with pytest.raises(InputError, match="'head' has values that float16 cannot hold"):
        policy_folder.save_policy(tmp_path / "new", model, broken, tokenizer, {}, stored="float16")
    assert not (tmp_path / "new").exists()


def test_a_policy_replaces_a_policy_and_nothing_else(tmp_path):
    model, params, tokenizer = policy("float32")
    for scale in (1, 2):
        scaled = jax.tree.map(lambda x, scale=scale: scale * x, params)
        policy_folder.save_policy(tmp_path / "policy", model, scaled, tokenizer, {})
    np.testing.assert_array_equal(policy_folder.load_policy(tmp_path / "policy")[1]["head"], 2 * params["head"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match="mine is no policy folder and not empty"):
        policy_folder.save_policy(tmp_path / "mine", model, params, tokenizer, {})
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.fixture
def folder(tmp_path):
    policy_folder.save_policy(tmp_path / "policy", *policy("float32"), {})
    return tmp_path / "policy"


def other_tokenizer(folder, vocab_size=17):
    return train_sentencepiece(["abcdefgh 01234"] * 3, vocab_size, folder, model_type="char", byte_fallback=False)


def test_a_tokenizer_of_another_vocabulary_is_named_with_both_numbers(folder, tmp_path):
    size = other_tokenizer(folder / "tokenizer").vocab_size
    assert size != toy.tokenizer().vocab_size
    with pytest.raises(
        InputError, match=rf"this tokenizer has {size} ids .* made with one of {toy.tokenizer().vocab_size}"
    ):
        policy_folder.load_policy(folder)
    small = toy.model(width=8)
    small = dataclasses.replace(small, vocab_size=20)
    with pytest.raises(InputError, match="the tokenizer has 24 ids and the model's vocabulary 20"):
        policy_folder.save_policy(tmp_path / "new", small, {}, toy.tokenizer(), {})


def test_a_run_says_which_tokenizer_it_has(tmp_path):
    config = toy.config(tmp_path / "run", model=toy.model())
    with run_folder.open_run(config, toy.tokenizer(), None, {"tokenizer": "of another"}):
        pass
    with pytest.raises(InputError, match="this tokenizer has 24 ids .* .fingerprint of another.: use that one"):
        policy_folder.load_policy(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "policy.json").unlink(), "no policy in .*policy.json"),
        (
            lambda folder: (folder / "policy.json").rename(folder / "config.json"),
            "no policy in .*rpt convert hf-to-orbax",
        ),
        (lambda folder: (folder / "policy.json").write_text("{"), "policy.json is no JSON"),
        (lambda folder: (folder / "policy.json").write_text('{"format": 1}'), "policy.json has no 'model'"),
        (lambda folder: (folder / "params.npz").unlink(), "params.npz cannot be read"),
        (lambda folder: (folder / "params.npz").write_bytes(b"PK\3\4 no zip"), "params.npz cannot be read"),
        (lambda folder: np.savez(folder / "params.npz", head=np.zeros(3)), "'embedding' is in the model only"),
        (lambda folder: (folder / "tokenizer" / "tokenizer.model").unlink(), "tokenizer: no tokenizer"),
    ],
)
def test_a_damaged_policy_is_named(folder, change, message):
    change(folder)
    with pytest.raises(InputError, match=message):
        policy_folder.load_policy(folder)


@pytest.mark.parametrize("how", ["cut", "gone", "shape"])
def test_a_damaged_policy_of_orbax_is_named(tmp_path, how):
    folder = tmp_path / "policy"
    policy_folder.save_policy(folder, *policy("float32"), {}, stored="orbax")
    if how == "shape":
        content = json.loads((folder / "policy.json").read_text())
        content["model"]["hidden"] = 48
        (folder / "policy.json").write_text(json.dumps(content))
    else:
        damage(folder, how)
    with pytest.raises(InputError, match="policy/params cannot be read .*: copy or make the policy again"):
        policy_folder.load_policy(folder)


def test_a_policy_with_another_shape_than_it_says_is_named(folder):
    content = json.loads((folder / "policy.json").read_text())
    content["model"]["hidden"] = 48
    (folder / "policy.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"'layers/w_down' has shape \(2, 32, 32\), policy.json says \(2, 48, 32\)"):
        policy_folder.load_policy(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": None}, "or tokenizer, is not what this program writes"),
        ({"tokenizer": {}}, "the policy was made with one of None ids"),
        ({"tokenizer": {"vocab_size": 24, "fingerprint": "x", "where": 1}}, "this tokenizer has 24 ids"),
        ({"stored": "float128"}, "stored='float128', or tokenizer, is not"),
        ({"stored": ["orbax"]}, r"stored=\['orbax'\], or tokenizer, is not"),
        ({"model": {"heads": 0}}, "model.heads=0: use 1 or more"),
        ({"model": {"vocab_size": 10**30}}, "model.vocab_size=1.*: use 1 or more, and at most"),
        ({"model": {"layers": -1}}, "model.layers=-1: use 1 or more"),
        ({"model": {"rope_theta": float("nan")}}, "model.rope_theta=nan: use a finite number"),
        ({"model": [1]}, r"model=\[1\]: expected the settings of ModelConfig"),
        ({"format": [1]}, r"has format \[1\], this version reads 1"),
    ],
)
def test_a_policy_json_that_lies_is_named(folder, change, message):
    content = json.loads((folder / "policy.json").read_text())
    change = {
        key: content[key] | value if key == "model" and isinstance(value, dict) else value
        for key, value in change.items()
    }
    (folder / "policy.json").write_text(json.dumps(content | change))
    with pytest.raises(InputError, match=message):
        policy_folder.load_policy(folder)


def test_a_policy_of_more_than_its_file_can_hold_is_named(folder):
    """policy.json asks for terabytes: the shapes alone say that the file is another one."""
    content = json.loads((folder / "policy.json").read_text())
    content["model"] |= {"hidden": 2**24, "width": 2**20}
    (folder / "policy.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"policy.json says \(1048576,|policy.json says \(32, 1048576\)"):
        policy_folder.load_policy(folder)
