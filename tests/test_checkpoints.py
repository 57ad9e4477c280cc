"""Claims: what is saved comes back to the bit, on any mesh; only the newest stay; the state may be donated at once; a
damaged, missing or foreign checkpoint is named with the remedy."""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from rpt_jax.agreement import HostTrouble
from rpt_jax.config import CheckpointConfig, MeshConfig, UpdateConfig
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


def test_reading_warns_of_nothing(tmp_path, caplog):
    """Orbax does, of each thing that a manager cannot do that only reads."""
    with contextlib.closing(checkpoints.open_checkpoints(tmp_path, 2, read_only=True)):
        assert not caplog.records


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
    elif how == "digit":  # still JSON
        text = (folder / "host" / "metadata").read_text()
        (folder / "host" / "metadata").write_text(text.replace('"step": 4', '"step": 5'))
    elif how == "item":
        shutil.rmtree(folder / "rest")
    elif how == "list":
        (folder / "host" / "metadata").write_text('["stream"]')
    else:
        (folder / "host" / "metadata").write_text('{"stream": ')


DAMAGES = ["cut", "gone", "item", "json", "list", "digit", "other"]


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


def test_a_checkpoint_that_another_host_could_not_open_stays(tmp_path, monkeypatch):
    """What that host raised says nothing of the files."""
    saved(tmp_path, steps=(2, 4))

    @contextlib.contextmanager
    def elsewhere():
        yield
        raise HostTrouble("process 1: Permission denied")

    previous = CheckpointConfig(on_damaged="previous")
    monkeypatch.setattr(checkpoints, "newest_step", lambda folder: 4)
    monkeypatch.setattr(checkpoints, "together", elsewhere)
    with pytest.raises(HostTrouble):
        checkpoints.restore_newest(tmp_path, state_on(None), previous)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    saved(tmp_path)
    wide = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], x.shape[-1] + 1)) if x.ndim else x, state_on(None))
    with pytest.raises(InputError, match=rf"{tmp_path}/2 cannot be read: .*shape.*start the run anew"):
        restored(tmp_path, wide, 2)
