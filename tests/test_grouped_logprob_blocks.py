"""Block sizes: the trade between matmuls and memory, for the chips that exist."""

import pytest
from jax.experimental.pallas import tpu as pltpu
from rpt_jax.kernels.grouped_logprob_blocks import choose_blocks

CHIPS = {"v4": ("TPU_V4", 2), "v5e": ("TPU_V5E", 1), "v5p": ("TPU_V5P", 2), "v6e": ("TPU_V6E", 1)}


def chip(name):
    version, cores = CHIPS[name]
    return pltpu.get_tpu_info_for_chip(getattr(pltpu.ChipVersion, version), cores)


@pytest.mark.parametrize("name", CHIPS)
def test_a_14b_head_waits_for_memory_as_little_as_vmem_allows(name):
    """Flops a byte of each pass against what the chip needs; v4's VMEM is too small for one backward pass."""
    info, D, V = chip(name), 5120, 152064
    blocks = choose_blocks(info, D, 65536, 2)
    needed = info.bf16_ops_per_second / info.mem_bw_bytes_per_second
    assert 2 * D * blocks.forward[0] * V / (2 * D * V) > needed
    assert blocks.one_pass == (name != "v4")
    t, v = blocks.backward
    if blocks.one_pass:
        held = D * v * (2 * 2 + 2 * 2 + 4) + 2 * t * D * (2 + 4)  # head and dW twice, its sum; h and dh twice
        assert 6 * v / (2 + 4 + 4) > needed
    else:
        held = D * (2 * 2 * (t + v) + max(t, v) * (2 * 2 + 4))
        assert min(4 * t / 2, 4 * v / 2) > needed
    assert held < info.vmem_capacity_bytes >= blocks.vmem_bytes
    assert blocks.cores == info.num_cores


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e"])
def test_float32_gets_the_smaller_tiles_that_six_matmuls_in_bfloat16_allow(name):
    """Still no waiting for memory; libtpu spills four times h in float32 tiles of 512 tokens and more (v5p, v5e)."""
    info, D = chip(name), 5120
    blocks, half = (choose_blocks(info, D, 65536, itemsize) for itemsize in (4, 2))
    needed = info.bf16_ops_per_second / 6 / info.mem_bw_bytes_per_second
    assert 2 * blocks.forward[0] / 4 > needed and 6 * blocks.backward[1] / (4 + 4 + 4) > needed
    assert blocks.one_pass and blocks.forward[0] < half.forward[0]
    (t, v), vmem = blocks.forward, info.vmem_capacity_bytes
    assert 2 * (t + v) * D * 4 + 4 * (t * D * 4) < vmem


def test_few_tokens_get_small_blocks():
    blocks = choose_blocks(chip("v6e"), 5120, 20, 2)
    assert blocks.forward[0] == blocks.backward[0] == 32


def test_a_pass_can_be_asked_for():
    assert not choose_blocks(chip("v5p"), 5120, 4096, 2, one_pass=False).one_pass
    assert choose_blocks(chip("v4"), 5120, 4096, 2, one_pass=True).one_pass


def test_what_does_not_fit_says_so():
    with pytest.raises(ValueError, match="D=200000 at 4 bytes does not fit into the 16 MiB of VMEM"):
        choose_blocks(chip("v4"), 200_000, 4096, 4)
