"""Claims: a fingerprint depends on every bit and its place, and not on how arrays lie on devices."""

import jax.numpy as jnp
import numpy as np

from rpt_jax.config import MeshConfig
from rpt_jax.mesh import batch_sharding, make_mesh, place
from rpt_jax.policy.fingerprint import fingerprint


def test_fingerprint_sees_every_bit_and_place():
    leaves = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)}
    others = [
        leaves | {"a": leaves["a"].at[1, 2].add(1e-6)},
        leaves | {"a": leaves["a"].reshape(2, 3)[::-1]},
        leaves | {"a": leaves["a"][:, ::-1]},
        leaves | {"b": -leaves["b"]},
        {"a": leaves["a"]},
    ]
    assert len({fingerprint(tree) for tree in [leaves, *others]}) == 6
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
    split = place(jnp.arange(24.0).reshape(8, 3), batch_sharding(mesh))
    assert fingerprint(split) == fingerprint(np.arange(24, dtype=np.float32).reshape(8, 3))
