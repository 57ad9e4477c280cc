"""Parameters, or any tree of arrays -> a few digits that tell whether every bit is as it was."""

import jax
import jax.numpy as jnp

from rpt_jax.records import Array, Params


def fingerprint(tree: Params) -> str:
    """Eight hex digits from every bit of the arrays, the same however they lie on devices (integer sums).

    With several processes all call it: the sums run over all devices.
    """
    return f"{int(_bit_sum(tree)):08x}"


@jax.jit
def _bit_sum(tree: Params) -> Array:
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        width = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
        weights = jnp.ones(leaf.shape, jnp.uint32)  # odd, and another one for nearly every entry
        for axis in range(leaf.ndim):
            step = jnp.uint32((2654435761 * (2 * axis + 1) * 2) % 2**32)
            weights += step * jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        total = total * jnp.uint32(16777619) + jnp.sum(bits * weights, dtype=jnp.uint32)
    return total
