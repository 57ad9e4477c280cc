"""Block sizes of the Pallas kernels of grouped_logprob, from the chip's VMEM, memory bandwidth and matmul rate.

In: the chip (jax's own table of TPU generations), D, tokens, bytes of an element. Out: Blocks. A rule instead of a
table, so that a new generation or another D needs no new numbers; what it gives was compiled and simulated for the
chips of the table in the README (`rpt bench kernel`).
"""

from typing import NamedTuple

LANES = 128
FILLED = 0.9  # of VMEM by what is counted here; the rest is for the compiler's own temporaries
TOKENS = (2048, 1024, 512, 256, 128, 64, 32, 16)
COLUMNS = (1024, 768, 512, 384, 256, 128)


class Blocks(NamedTuple):
    """Tokens and vocabulary columns of one grid step."""

    forward: tuple[int, int]
    backward: tuple[int, int]  # of the one-pass kernel, or of both two-pass kernels
    one_pass: bool  # backward: one recomputation of the logits feeds dh and dW (three matmuls) | one for each (four)
    cores: int  # TensorCores that share a device's HBM (megacore): the backward's vocabulary is split over them
    vmem_bytes: int  # limit given to the compiler, a core


def choose_blocks(chip, D: int, T: int, itemsize: int, one_pass: bool | None = None) -> Blocks:
    """The blocks that keep the matrix units busy rather than the memory, as far as they fit.

    Forward: a tile of t tokens stays while the head streams past, 2 t D flops for each D x itemsize bytes, so t has
    to exceed the chip's flops per byte. Backward in one pass: v columns of head and dW stay while hidden states and
    f32 dh pass in and out, 6 v D flops for D (itemsize + 8) bytes. Where VMEM holds too few columns for that (v4's
    16 MiB), two passes with four matmuls are faster than three that wait for memory.

    A float32 matmul in full is six of bfloat16, so memory has six times as long and smaller tiles are enough. They have
    to be: of 1024 x 5120 hidden states in float32 libtpu spills 84 MB, four times as much, on v5e and v5p. Simulated on
    v5e, tiles of 128 tokens reach .88 of a sixth of the peak and 256 .89 (512 tokens, V 1024, start-up included).

    Args:
        chip: pltpu.TpuInfo, or anything with its vmem_capacity_bytes, mem_bw_bytes_per_second, bf16_ops_per_second
            and num_cores.
        T: tokens of a device; itemsize: bytes of an element of hidden states and head.
        one_pass: the backward pass that is wanted, if it fits; None takes the faster one.

    Raises ValueError for a D whose smallest blocks do not fit.
    """
    # Over 40 lines for the reasons and arguments above; the rule itself is read from top to bottom.
    vmem = int(chip.vmem_capacity_bytes * FILLED)
    passes = 6 if itemsize == 4 else 1
    intensity = chip.bf16_ops_per_second / passes / chip.mem_bw_bytes_per_second  # flops a byte: both take as long
    most = next((t for t in reversed(TOKENS) if t >= T), TOKENS[0])

    def fits(need, tokens, columns):
        return [(t, v) for t in tokens if t <= most for v in columns if need(t, v, D, itemsize) <= vmem]

    forward = fits(_forward_bytes, TOKENS, (512, 256, 128))
    # A matmul over 128 tokens fills half of v6e's 256 x 256 units.
    one = fits(_one_pass_bytes, (256,), COLUMNS) or fits(_one_pass_bytes, (128, 64, 32, 16), COLUMNS)
    two = fits(_two_pass_bytes, (512, 256, 128, 64, 32, 16), (512, 256, 128))
    if not forward or not (one or two):
        raise ValueError(
            f"D={D} at {itemsize} bytes does not fit into the {chip.vmem_capacity_bytes >> 20} MiB of VMEM of this "
            "TPU: use implementation='xla', or bfloat16"
        )

    def waiting(flops_per_byte):
        """How many times longer memory takes than the matmuls, at least 1."""
        return max(1.0, intensity / flops_per_byte)

    # Enough of what counts, with a margin for uneven transfers; then the squarest of those.
    best_forward = min(forward, key=lambda b: (waiting(2 * b[0] / itemsize / 1.5), -b[1], b[0]))
    best_one = min(one, key=lambda b: (waiting(6 * b[1] / (itemsize + 8) / 1.2), -b[0], b[1]), default=None)
    best_two = min(two, key=lambda b: (waiting(4 * min(b) / itemsize), -b[0], -b[1]), default=None)
    cost_one = 3 * waiting(6 * best_one[1] / (itemsize + 8)) if best_one else float("inf")
    cost_two = 4 * waiting(4 * min(best_two) / itemsize) if best_two else float("inf")
    if one_pass is None or not (one and two):
        one_pass = cost_one <= cost_two
    return Blocks(
        best_forward, best_one if one_pass else best_two, one_pass, chip.num_cores, chip.vmem_capacity_bytes * 63 // 64
    )


def _forward_bytes(t, v, D, itemsize):
    """Hidden states and head twice (one in use, one on its way), logits, row statistics."""
    return 2 * (t + v) * D * itemsize + 4 * t * v + 4 * t * LANES * (4 + 2 * 2)


def _one_pass_bytes(t, v, D, itemsize):
    """Head, dW and its f32 sum; hidden states; f32 dh, one tile in use and one on its way; logits and d logits."""
    return D * v * (2 * itemsize + 2 * itemsize + 4) + 2 * t * D * (itemsize + 4) + 12 * t * v + 8 * t * LANES


def _two_pass_bytes(t, v, D, itemsize):
    """The larger of the two: inputs twice, the gradient twice and its f32 sum."""
    return D * (2 * (t + v) * itemsize + max(t, v) * (2 * itemsize + 4)) + 12 * t * v + 8 * t * LANES
