"""Claims: what is saved comes back to the bit, on any mesh; only the newest stay; the state may be donated at once; a
damaged, missing or foreign checkpoint or policy is named with the remedy; policies travel in either precision."""

import contextlib
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from rpt_jax.config import CheckpointConfig, MeshConfig, UpdateConfig
from rpt_jax.corpus.tokenizer import train_sentencepiece
from rpt_jax.learning import checkpoints
from rpt_jax.learning.update import TrainState, init_state, make_optimizer
from rpt_jax.mesh import make_mesh, param_shardings, place
from rpt_jax.policy import decoder
from rpt_jax.records import InputError

HOST = {"stream": {"next_index": 7}, "queue": [[1, 2, 1.6094379425048828]]}
OPTIMIZER = make_optimizer(UpdateConfig(), 10)


def state_on(shape, scale=1.0):
    """A state whose arrays all differ, on a mesh of that shape; None: on one device without a mesh."""
    params = jax.tree.map(lambda x: jnp.asarray(scale * x), toy.params())
    if shape is not None:
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
        params = place(params, param_shardings(mesh, decoder.logical_axes(toy.model()), params))
    state = init_state(params, OPTIMIZER)
    moments = jax.tree.map(lambda x: x + jnp.full((1,) * x.ndim, 3, x.dtype), state.optimizer_state)
    return TrainState(state.params, moments, state.step + 5)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def saved(folder, steps=(2,), keep=2):
    with contextlib.closing(checkpoints.open_checkpoints(folder, keep)) as manager:
        for step in steps:
            checkpoints.save(manager, step, state_on(None, scale=step), HOST | {"step": step})
    return folder


def restored(folder, like, step):
    with contextlib.closing(checkpoints.open_checkpoints(folder, 2)) as manager:
        return checkpoints.restore(manager, like, step)


def test_state_and_host_come_back_to_the_bit_and_the_newest_stay(tmp_path):
    saved(tmp_path, steps=(2, 4, 6))
    assert checkpoints.newest_step(tmp_path) == 6
    for step in (4, 6):
        state, host = restored(tmp_path, state_on(None), step)
        assert_same(state, state_on(None, scale=step))
        assert host == HOST | {"step": step}
    with pytest.raises(InputError, match=rf"no checkpoint {tmp_path}/2; whole ones in {tmp_path}: 4, 6"):
        restored(tmp_path, state_on(None), 2)


def test_an_average_comes_back_too_and_is_guarded(tmp_path):
    state = state_on(None)
    state = state.replace(average=jax.tree.map(lambda x: x / 3, state.params))
    with contextlib.closing(checkpoints.open_checkpoints(tmp_path, 2)) as manager:
        checkpoints.save(manager, 1, state, HOST)
    found, _ = restored(tmp_path, state, 1)
    assert_same(found, state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    with pytest.raises(InputError, match="cannot be read"):
        restored(tmp_path, state_on(None), 1)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 1)])
def test_another_mesh_reads_it(tmp_path, shape):
    """Saved from (8, 1, 1); the copies lie as they do on the mesh that asks."""
    with contextlib.closing(checkpoints.open_checkpoints(tmp_path, 2)) as manager:
        checkpoints.save(manager, 1, state_on((8, 1, 1)), HOST)
    like = state_on(shape, scale=2.0)
    state, _ = restored(tmp_path, checkpoints.abstract_state(like), 1)
    assert_same(state, state_on(None))
    jax.tree.map(lambda x, y: None if x.sharding == y.sharding else pytest.fail(f"{x.sharding}"), state, like)


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    state, double = state_on(None), jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
    with contextlib.closing(checkpoints.open_checkpoints(tmp_path, 2)) as manager:
        checkpoints.save(manager, 1, state, HOST)
        for _ in range(3):
            state = double(state)
        jax.block_until_ready(state)
    assert_same(restored(tmp_path, state_on(None), 1)[0], state_on(None))


def test_saving_a_step_again_changes_nothing(tmp_path):
    saved(tmp_path, steps=(2,))
    with contextlib.closing(checkpoints.open_checkpoints(tmp_path, 2)) as manager:
        checkpoints.save(manager, 2, state_on(None, scale=9.0), {})
    assert restored(tmp_path, state_on(None), 2)[1]["step"] == 2


def test_no_checkpoint_is_no_step(tmp_path):
    assert checkpoints.newest_step(tmp_path / "absent") is None
    assert checkpoints.newest_step(tmp_path) is None
    assert not (tmp_path / "absent").exists()


def damage(folder, how):
    data = max((folder / "params").rglob("*"), key=lambda path: path.stat().st_size)
    if how == "other":  # reads well, and is not what was saved
        shutil.rmtree(folder / "params")
        shutil.copytree(folder.with_name("2") / "params", folder / "params")
        return
    if how == "cut":
        data.write_bytes(data.read_bytes()[:40])
    elif how == "gone":
        data.unlink()
    elif how == "item":
        shutil.rmtree(folder / "rest")
    else:
        (folder / "host" / "metadata").write_text('{"stream": ')


DAMAGES = ["cut", "gone", "item", "json", "other"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_one_before_it(tmp_path, how):
    saved(tmp_path, steps=(2, 4))
    damage(tmp_path / "4", how)
    with pytest.raises(
        InputError, match=rf"checkpoint {tmp_path}/4 cannot be read.*on-damaged previous continues from step 2"
    ):
        restored(tmp_path, state_on(None), 4)
    assert_same(restored(tmp_path, state_on(None), 2)[0], state_on(None, scale=2))


@pytest.mark.parametrize("how", DAMAGES)
def test_on_request_a_damaged_checkpoint_is_set_aside(tmp_path, how, caplog):
    saved(tmp_path, steps=(2, 4))
    damage(tmp_path / "4", how)
    previous = CheckpointConfig(on_damaged="previous")
    state, host, step = checkpoints.restore_newest(tmp_path, state_on(None), previous)
    assert step == host["step"] == 2 and checkpoints.newest_step(tmp_path) == 2
    assert_same(state, state_on(None, scale=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4.damaged"]
    assert f"checkpoint {tmp_path}/4 cannot be read" in caplog.text
    damage(tmp_path / "2", "gone")
    with pytest.raises(InputError, match=f"{tmp_path}/2 cannot be read.*start the run anew"):
        checkpoints.restore_newest(tmp_path, state_on(None), previous)
    saved(tmp_path, steps=(4,))  # the run goes on, and gets there again
    assert checkpoints.newest_step(tmp_path) == 4


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    saved(tmp_path)
    wide = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], x.shape[-1] + 1)) if x.ndim else x, state_on(None))
    with pytest.raises(InputError, match=rf"{tmp_path}/2 cannot be read: .*shape.*start the run anew"):
        restored(tmp_path, wide, 2)


def policy(dtype):
    model = toy.model(param_dtype=dtype)
    return model, jax.tree.map(lambda x: jnp.asarray(x / 3, dtype), toy.params()), toy.tokenizer()


@pytest.mark.parametrize("stored", ["param_dtype", "orbax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_comes_back_to_the_bit(tmp_path, dtype, stored):
    model, params, tokenizer = policy(dtype)
    checkpoints.save_policy(tmp_path / "policy", model, params, tokenizer, {"made by": "test"}, stored=stored)
    there, read, read_tokenizer = checkpoints.load_policy(tmp_path / "policy")
    assert there == model and read_tokenizer.fingerprint == tokenizer.fingerprint
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y) or (x.dtype == y.dtype or pytest.fail()), read, params
    )
    assert json.loads((tmp_path / "policy" / "policy.json").read_text())["provenance"] == {"made by": "test"}
    mesh = make_mesh(MeshConfig(2, 2, 2))
    on_mesh = checkpoints.load_policy(tmp_path / "policy", mesh)[1]
    assert_same(on_mesh, params)
    assert on_mesh["head"].sharding == param_shardings(mesh, decoder.logical_axes(model), params)["head"]


def test_half_precision_on_disk(tmp_path):
    model, params, tokenizer = policy("float32")
    for stored in ("param_dtype", "float16"):
        checkpoints.save_policy(tmp_path / stored, model, params, tokenizer, {}, stored=stored)
    sizes = [(tmp_path / stored / "params.npz").stat().st_size for stored in ("param_dtype", "float16")]
    assert sizes[1] < 0.65 * sizes[0]
    read = checkpoints.load_policy(tmp_path / "float16")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype("float32")}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-11, atol=2**-25), read, params)
    broken = params | {"head": params["head"].at[0, 0].set(1e5)}
    with pytest.raises(InputError, match="'head' has values that float16 cannot hold"):
        checkpoints.save_policy(tmp_path / "new", model, broken, tokenizer, {}, stored="float16")
    assert not (tmp_path / "new").exists()


def test_a_policy_replaces_a_policy_and_nothing_else(tmp_path):
    model, params, tokenizer = policy("float32")
    for scale in (1, 2):
        scaled = jax.tree.map(lambda x, scale=scale: scale * x, params)
        checkpoints.save_policy(tmp_path / "policy", model, scaled, tokenizer, {})
    np.testing.assert_array_equal(checkpoints.load_policy(tmp_path / "policy")[1]["head"], 2 * params["head"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match="mine is no policy folder and not empty"):
        checkpoints.save_policy(tmp_path / "mine", model, params, tokenizer, {})
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.fixture
def folder(tmp_path):
    checkpoints.save_policy(tmp_path / "policy", *policy("float32"), {})
    return tmp_path / "policy"


def other_tokenizer(folder, vocab_size=17):
    return train_sentencepiece(["abcdefgh 01234"] * 3, vocab_size, folder, model_type="char", byte_fallback=False)


def test_a_tokenizer_of_another_vocabulary_is_named_with_both_numbers(folder, tmp_path):
    size = other_tokenizer(folder / "tokenizer").vocab_size
    assert size != toy.tokenizer().vocab_size
    with pytest.raises(
        InputError, match=rf"this tokenizer has {size} ids .* made with one of {toy.tokenizer().vocab_size}"
    ):
        checkpoints.load_policy(folder)
    small = toy.model(width=8)
    small = dataclasses.replace(small, vocab_size=20)
    with pytest.raises(InputError, match="the tokenizer has 24 ids and the model's vocabulary 20"):
        checkpoints.save_policy(tmp_path / "new", small, {}, toy.tokenizer(), {})


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
        checkpoints.load_policy(folder)


@pytest.mark.parametrize("how", ["cut", "gone", "shape"])
def test_a_damaged_policy_of_orbax_is_named(tmp_path, how):
    folder = tmp_path / "policy"
    checkpoints.save_policy(folder, *policy("float32"), {}, stored="orbax")
    if how == "shape":
        content = json.loads((folder / "policy.json").read_text())
        content["model"]["hidden"] = 48
        (folder / "policy.json").write_text(json.dumps(content))
    else:
        damage(folder, how)
    with pytest.raises(InputError, match="policy/params cannot be read .*: copy or make the policy again"):
        checkpoints.load_policy(folder)


def test_a_policy_with_another_shape_than_it_says_is_named(folder):
    content = json.loads((folder / "policy.json").read_text())
    content["model"]["hidden"] = 48
    (folder / "policy.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"'layers/w_down' has shape \(2, 32, 32\), policy.json says \(2, 48, 32\)"):
        checkpoints.load_policy(folder)
