"""Attention of a stream's blocks on TPUs, by JAX's splash attention: scores and softmax never leave the chip's VMEM.

In: queries and keys of blocks, both at the right end of their rows (stream.packed), so that one causal mask fits all
blocks and empty places are masked as another segment. Out: what each query has gathered.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AxisType, PartitionSpec

from rpt_jax.mesh import BATCH, copies_of_heads
from rpt_jax.policy.stream import LANES, Block
from rpt_jax.records import Array

AT_ONCE = 1 << 27  # bytes of keys and values that are gathered for some blocks at a time
TILE = 512  # queries and keys of a step of the kernels, at most


def takes(block: Block, channels: int) -> bool:
    """Whether the kernels can: rows of whole lanes, aligned on the right."""
    sizes = block.queries_UBQ.shape[2], block.keys_UBS.shape[2], channels
    return block.aligned and not any(size % LANES for size in sizes)


def attend(
    q_UBQHC: Array, k_UBSKC: Array, v_UBSKC: Array, queries_UBQ: Array, keys_UBS: Array, *, interpret: bool = False
) -> Array:
    """Exact softmax attention of query r of a block to its keys up to S - Q + r; [U, B, Q, H, C].

    The last two say the places of tokens in their sequences, -1: nothing there; the queries' follow from their row.
    Split by jax.set_mesh's mesh, U over data and fsdp and heads over tensor; key/value heads are repeated where that
    does not divide them.
    """
    del queries_UBQ
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return _on_one_device(q_UBQHC, k_UBSKC, v_UBSKC, keys_UBS, interpret)
    copies = copies_of_heads(k_UBSKC.shape[3])
    k_UBSKC, v_UBSKC = (jnp.repeat(a, copies, axis=3) for a in (k_UBSKC, v_UBSKC))
    heads = PartitionSpec(BATCH, None, None, "tensor", None)
    run = jax.shard_map(
        partial(_on_one_device, interpret=interpret),
        mesh=mesh,
        in_specs=(heads, heads, heads, PartitionSpec(BATCH, None, None)),
        out_specs=heads,
        check_vma=False,
    )
    return run(q_UBQHC, k_UBSKC, v_UBSKC, keys_UBS)


def _on_one_device(q_UBQHC, k_UBSKC, v_UBSKC, keys_UBS, interpret):
    (Q, H, C), S = q_UBQHC.shape[2:], keys_UBS.shape[2]
    q_tile, k_tile = _tile(Q), _tile(S)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((Q, S), offset=S - Q)] * H),
        block_sizes=splash.BlockSizes(
            block_q=q_tile,
            block_kv=k_tile,
            block_kv_compute=k_tile,
            block_q_dkv=q_tile,
            block_kv_dkv=k_tile,
            block_kv_dkv_compute=k_tile,
            block_q_dq=q_tile,
            block_kv_dq=k_tile,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def of_block(q_QHC, k_SKC, v_SKC, keys_S):
        # An empty query may see no key: masked scores are finite in the kernel, so it gathers a mean that nobody reads.
        segments = splash.SegmentIds(q=jnp.ones(Q, jnp.int32), kv=(keys_S >= 0).astype(jnp.int32))
        scaled_QHC = (q_QHC.astype(jnp.float32) * C**-0.5).astype(q_QHC.dtype)
        q_HQC, k_KSC, v_KSC = (a.swapaxes(0, 1) for a in (scaled_QHC, k_SKC, v_SKC))
        return kernel(q_HQC, k_KSC, v_KSC, segment_ids=segments).swapaxes(0, 1)

    return jax.vmap(jax.vmap(of_block))(q_UBQHC, k_UBSKC, v_UBSKC, keys_UBS).astype(q_UBQHC.dtype)


def _tile(size: int) -> int:
    """The largest whole part of size up to TILE that is a multiple of the lanes."""
    return next(tile for tile in range(TILE, 0, -LANES) if size % tile == 0)
