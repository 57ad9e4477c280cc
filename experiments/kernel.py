"""The grouped log-prob kernel measured: `rpt bench kernel` for each setting, one row in results/kernel.csv.

    python experiments/kernel.py cpu            two sizes on this machine, about a minute
    python experiments/kernel.py v5e v5p v6e    simulated TPUs; needs the extra tpu, about 10 minutes a chip on one core
                                                and, with plain JAX beside it (v5e only), 16 GiB and 20 minutes more

Settings that are in the table already are skipped. What came out is in LOG.md.
"""

import sys
from pathlib import Path

import jax
from rows import append_row, read_rows

from rpt_jax.bench.kernel import KernelBench, bench_kernel
from rpt_jax.learning.run_rows import flat

RESULTS = Path(__file__).parent / "results" / "kernel.csv"
HEAD = {"tokens": 4096, "width": 5120, "vocabulary": 152064}  # of DeepSeek-R1-Distill-Qwen-14B
SETTINGS = {
    "cpu": (
        KernelBench(tokens=512, width=512, vocabulary=16384),
        KernelBench(tokens=2048, width=256, vocabulary=32768),
    ),
    "v5e": (KernelBench(target="v5e", **HEAD),),
    "v5p": (KernelBench(target="v5p", baselines=False, **HEAD),),
    "v6e": (KernelBench(target="v6e", baselines=False, **HEAD),),
}


def columns_of(figures: dict) -> dict:
    """Nested figures as columns, names joined by points, six digits."""
    row = flat(figures, joint=".")
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def main(names: list[str]) -> None:
    if wrong := [name for name in names if name not in SETTINGS]:
        raise SystemExit(f"no settings for {', '.join(wrong)}: use {', '.join(SETTINGS)}")
    for name in names:
        for setting in SETTINGS[name]:
            sizes = (name, *(str(size) for size in (setting.tokens, setting.width, setting.vocabulary)))
            columns = ("target", "shape.tokens", "shape.width", "shape.vocabulary")
            if sizes in [tuple(row[column] for column in columns) for row in read_rows(RESULTS)]:
                continue
            append_row(RESULTS, columns_of(bench_kernel(setting)) | {"jax": jax.__version__})


if __name__ == "__main__":
    main(sys.argv[1:] or ["cpu"])
