"""mesh.py: shapes and messages, where parameters lie, and that arrays come back whole, also from two processes."""

import os
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rpt_jax import mesh as meshes
from rpt_jax.config import MeshConfig
from rpt_jax.records import InputError, Rollouts


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=-1, tensor=4), (2, 1, 4)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=8, tensor=1), (1, 8, 1)),
    ],
)
def test_mesh_covers_all_devices(config, shape):
    mesh = meshes.make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3, tensor=2), "data=3 x fsdp=1 x tensor=2 = 6, but there are 8 devices.*product is 8"),
        (MeshConfig(data=16), "data=16 x fsdp=1 x tensor=1 = 16, but there are 8 devices"),
        (MeshConfig(tensor=3), "fsdp=1 x tensor=3 = 3 does not divide 8 devices"),
        (MeshConfig(fsdp=-1), "data=-1 x fsdp=-1 x tensor=1: .* at most one is -1"),
        (MeshConfig(tensor=0), "tensor=0: sizes are 1 or more"),
    ],
)
def test_impossible_mesh_names_both_numbers(config, message):
    with pytest.raises(InputError, match=message):
        meshes.make_mesh(config)


@dataclass(frozen=True)
class Chip:
    """As much of a jax device as the layout of a mesh looks at."""

    id: int
    slice_index: int
    platform: str = "fake"
    device_kind: str = "fake"


def test_only_data_spans_slices():
    """Two slices of four chips: neighbours along fsdp and tensor always share a slice."""
    devices = [Chip(id=i, slice_index=i // 4) for i in range(8)]
    mesh = meshes.make_mesh(MeshConfig(fsdp=2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert mesh.devices.shape == (4, 2, 1)
    assert slices[:, 0, 0].tolist() == [0, 0, 1, 1] and (slices == slices[:, :1]).all()
    with pytest.raises(InputError, match="data=1 does not divide over 2 TPU slices.*multiple of 2"):
        meshes.make_mesh(MeshConfig(fsdp=8), devices)


def test_parameters_are_split_by_their_logical_axes():
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes = {
        "embedding": ("vocab", "embed"),
        "layers": {"wk": ("layers", "embed", "kv_heads", "channels"), "scale": ("layers", "norm"), "free": (None,)},
    }
    params = {
        "embedding": jnp.arange(48.0).reshape(12, 4),
        "layers": {"wk": jnp.zeros((3, 4, 2, 5)), "scale": jnp.zeros((3, 4)), "free": jnp.zeros(7)},
    }
    shardings = meshes.param_shardings(mesh, axes, jax.eval_shape(lambda: params))
    placed = meshes.place(params, shardings)
    local = jax.tree.map(lambda x: x.addressable_data(0).shape, placed)
    assert local == {"embedding": (6, 2), "layers": {"wk": (3, 2, 1, 5), "scale": (3, 4), "free": (7,)}}
    jax.tree.map(np.testing.assert_array_equal, meshes.to_host(placed), params)


def test_kv_heads_are_replicated_where_tensor_does_not_divide_them():
    mesh = meshes.make_mesh(MeshConfig(tensor=4))
    assert meshes.partition_spec(("embed", "kv_heads"), (8, 2), mesh) == PartitionSpec("fsdp", None)
    assert meshes.partition_spec(("embed", "kv_heads"), (8, 4), mesh) == PartitionSpec("fsdp", "tensor")


def test_other_axes_that_do_not_divide_are_refused():
    mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    with pytest.raises(InputError, match=r"\['wq'\]: heads=6 does not divide over tensor=4 devices.*divides 6"):
        meshes.param_shardings(mesh, {"wq": ("embed", "heads")}, {"wq": jnp.zeros((8, 6))})
    with pytest.raises(InputError, match="embed=9 does not divide over fsdp=2"):
        meshes.partition_spec(("embed",), (9,), mesh)


def test_batch_goes_out_by_rows_and_comes_back():
    """Each of the four data x fsdp groups holds two of eight prompts, whatever the rank of the array."""
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rollouts = Rollouts(
        tokens_NGR=np.arange(8 * 3 * 5, dtype=np.int32).reshape(8, 3, 5),
        lengths_NG=np.arange(24, dtype=np.int32).reshape(8, 3),
        logprobs_NGR=np.linspace(0, 1, 120, dtype=np.float32).reshape(8, 3, 5),
        finished_NG=np.arange(24).reshape(8, 3) % 2 == 0,
    )
    sent = meshes.place(rollouts, meshes.batch_sharding(mesh))
    assert [x.addressable_data(0).shape[0] for x in jax.tree.leaves(sent)] == [2, 2, 2, 2]
    jax.tree.map(np.testing.assert_array_equal, meshes.to_host(sent), rollouts)
    assert meshes.batch_rows(8, mesh).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("batch", "config", "message"),
    [
        (30, MeshConfig(), "batch of 30 prompts does not divide over data=8 devices: use 24 or 32"),
        (3, MeshConfig(), "batch of 3 prompts does not divide over data=8 devices: use 8"),
        (0, MeshConfig(), "batch of 0 prompts does not divide over data=8 devices: use 8"),
        (6, MeshConfig(fsdp=2, tensor=2), "batch of 6 prompts .* data=2 x fsdp=2 = 4 devices: use 4 or 8"),
        (6, MeshConfig(data=1, fsdp=4, tensor=2), "batch of 6 prompts does not divide over fsdp=4 devices: use 4 or 8"),
    ],
)
def test_batch_that_does_not_divide(batch, config, message):
    with pytest.raises(InputError, match=message):
        meshes.check_batch_divides(batch, meshes.make_mesh(config))


def test_batch_that_divides_passes():
    meshes.check_batch_divides(32, meshes.make_mesh(MeshConfig()))
    meshes.check_batch_divides(3, meshes.make_mesh(MeshConfig(data=1, tensor=8)))


def test_donating_a_placed_tree_keeps_the_original():
    original = {"w": jnp.arange(4.0)}
    placed = meshes.place(original, meshes.replicated(meshes.make_mesh(MeshConfig(), jax.devices()[:1])))
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(placed)
    assert placed["w"].is_deleted()
    np.testing.assert_array_equal(original["w"], np.arange(4.0))


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("config", "environ", "platforms", "expected"),
    [
        (MeshConfig(), {}, "", None),
        (MeshConfig(), {}, "cpu", None),
        (MeshConfig(), {**SLURM, "SLURM_NTASKS": "2"}, "cpu", {}),
        (MeshConfig(), {**SLURM, "SLURM_NTASKS": "1"}, "cpu", None),
        (MeshConfig(), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, "cpu", None),  # in the batch script, before srun
        (MeshConfig(coordinator="none"), {**SLURM, "SLURM_NTASKS": "2", **JAX}, "cpu", None),
        (MeshConfig(), {}, "tpu,cpu", {}),
        (MeshConfig(), {"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", None),
        (MeshConfig(), {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", {}),
        (MeshConfig(), {"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu,cpu", None),
        (MeshConfig(), {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "tpu,cpu", {}),
        (MeshConfig(), JAX, "", {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3}),
        (
            MeshConfig(coordinator="b:2", processes=2, process=0),
            {**JAX, **SLURM, "SLURM_NTASKS": "9"},
            "",
            {"coordinator_address": "b:2", "num_processes": 2, "process_id": 0},
        ),
    ],
)
def test_where_the_processes_are_found(config, environ, platforms, expected):
    assert meshes.distributed_settings(config, environ, platforms) == expected


@pytest.mark.parametrize(
    ("config", "environ", "message"),
    [
        (MeshConfig(coordinator="b:2", processes=2, process=2), {}, "processes=2 and process=2: give host:port"),
        (MeshConfig(coordinator="b", processes=2, process=0), {}, "coordinator='b' .* give host:port"),
        (MeshConfig(), {"JAX_COORDINATOR_ADDRESS": "a:1"}, "processes=0 and process=-1: give"),
        (MeshConfig(), JAX | {"JAX_PROCESS_ID": "n3"}, "JAX_PROCESS_ID='n3': set it to a whole number"),
        (MeshConfig(processes=2, process=0), {}, "without a coordinator: add --mesh.coordinator"),
    ],
)
def test_half_given_processes_are_refused(config, environ, message):
    with pytest.raises(InputError, match=message):
        meshes.distributed_settings(config, environ, "")


PROCESS = textwrap.dedent(
    """
    import sys
    import jax, numpy as np
    from rpt_jax import mesh as meshes
    from rpt_jax.config import MeshConfig

    meshes.start_distributed(MeshConfig(coordinator=sys.argv[1], processes=2, process=int(sys.argv[2])))
    meshes.start_distributed(MeshConfig(coordinator=sys.argv[1], processes=2, process=int(sys.argv[2])))  # does nothing
    assert jax.process_count() == 2 and jax.device_count() == 4
    whole = np.arange(24, dtype=np.float32).reshape(8, 3)
    devices = [jax.devices()[i] for i in (0, 2, 1, 3)]
    # hosts in order, hosts interleaved, and processes that share rows because tensor spans both
    for config, order, rows in [
        (MeshConfig(), jax.devices(), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (MeshConfig(), devices, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (MeshConfig(tensor=2), devices, [[0, 1, 2, 3, 4, 5, 6, 7]] * 2),
    ]:
        mesh = meshes.make_mesh(config, order)
        mine = meshes.batch_rows(8, mesh)
        assert mine.tolist() == rows[jax.process_index()], (mine, rows)
        sent = meshes.place({"x": whole}, meshes.batch_sharding(mesh))
        held = {row for shard in sent["x"].addressable_shards for row in range(8)[shard.index[0]]}
        assert held == set(rows[jax.process_index()]), (held, rows)
        assert sent["x"].shape == (8, 3) and not sent["x"].is_fully_addressable
        np.testing.assert_array_equal(meshes.to_host(jax.jit(lambda x: x["x"] * 2)(sent)), whole * 2)
        split = meshes.place({"w": whole.T}, meshes.param_shardings(mesh, {"w": ("embed", "mlp")}, {"w": whole.T}))
        np.testing.assert_array_equal(meshes.to_host(split)["w"], whole.T)
        assert float(meshes.to_host(jax.jit(lambda x: x.sum())(sent["x"]))) == whole.sum()
    print("process", jax.process_index(), "done")
    """
)


def test_two_processes_exchange_whole_arrays():
    """Real processes with gloo collectives: rows go where the mesh says, and every process reads the whole back."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    assert all(f"process {i} done" in output for i, output in enumerate(outputs)), outputs


ALONE = textwrap.dedent(
    """
    import sys
    from rpt_jax import cli, mesh as meshes
    from rpt_jax.config import MeshConfig

    cli._log_to_stderr()
    meshes.JOIN_NOTED = 0.2
    meshes.start_distributed(MeshConfig(coordinator=sys.argv[1], processes=3, process=int(sys.argv[2])))
    """
)


@pytest.mark.parametrize("process", [0, 2])
def test_a_process_that_is_alone_says_what_it_waits_for(process):
    """Long before XLA gives up, whether the coordinator or another process is the one that came."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ALONE, address, str(process)]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as running:
        try:
            said = next((line for line in running.stderr if "waiting" in line or "Terminating" in line), "nothing")
        finally:
            running.kill()
    assert said == (
        f"still waiting for the others of 3, at {address}, as process {process}: each has to be started, with the "
        "same address, and reach process 0 there; without them this process ends after 300 s\n"
    )


def test_sizes_whose_product_no_int64_holds():
    with pytest.raises(InputError, match=r"data=4611686018427387904 x fsdp=4 .*, but there are 8 devices"):
        meshes.make_mesh(MeshConfig(data=2**62, fsdp=4))
    with pytest.raises(InputError, match="does not divide 8 devices"):
        meshes.make_mesh(MeshConfig(fsdp=2**62, tensor=4))
