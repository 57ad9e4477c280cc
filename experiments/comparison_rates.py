"""Learning rates of the methods that are new in comparison.py.

    .venv/bin/python experiments/comparison_rates.py
    .venv/bin/python experiments/comparison_rates.py --methods expert_iteration --rates 1e-3

Starts from base-0 and the budget of prefix-0 in runs/comparison, which comparison.py makes. Rollouts have a seed of
their own, and judged it is on texts of the training side that nothing has learnt from (quickstart_controls.py), never
on held-out ones. Hardware: one CPU core. Time: about 3 minutes a row. Rows of results/comparison_rates.csv that exist
are skipped.

Measured result, hard positions right of 245, thoughts sampled at 0.8: expert iteration 82.9 % at 1e-4, 83.7 at 3e-4,
65.7 at 1e-3 (standard errors 2.4, 2.4, 3.0), so 3e-4; information gain 93.1 (1.6) at 1e-4, which is RPT's rate, and
3e-4 was not tried. The other rewards have RPT's rate, untried.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import comparison
import tyro
from comparison import Method
from quickstart_controls import tuning_texts
from rows import append_row, read_rows

from rpt_jax import compilation
from rpt_jax.study import controls, quickstart
from rpt_jax.study.quickstart import QuickstartConfig

RESULTS = Path(__file__).parent / "results" / "comparison_rates.csv"
SEED = 7  # of rollouts and batches


@dataclass(frozen=True)
class Settings:
    """Which methods at which rates."""

    methods: tuple[Method, ...] = ("information_gain", "expert_iteration")
    rates: tuple[float, ...] = (1e-4, 3e-4)
    runs: Path = Path("runs/comparison")


def main(settings: Settings) -> None:
    """A row for each method and rate."""
    compilation.keep_on_disk()
    shared = comparison.open_shared(QuickstartConfig(from_scratch=True), settings.runs / "base-0")
    budget, tokenizer = comparison.spent(settings.runs / "prefix-0"), shared.policy[2]
    exam = tuning_texts(shared.annotated, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        texts = quickstart.annotate_texts(shared.policy, exam, Path(folder) / "texts")
        splits = quickstart.evaluation_splits(texts, exam, tokenizer, shared.config.base)
        config = dataclasses.replace(shared.config, seed=SEED)
        shared = dataclasses.replace(shared, config=config, held_out=texts, splits={"hard": splits["hard"]})
        for method in settings.methods:
            for rate in settings.rates:
                name = {"method": method, "rate": f"{rate:g}"}
                if any(name.items() <= row.items() for row in read_rows(RESULTS)):
                    print(f"{name}: has a row already")
                    continue
                run = Path(folder) / f"{method}-{rate:g}"
                trained = comparison.train_method(method, shared, controls.ExpertConfig(), rate, budget, run)
                row = name | {"updates": trained.updates, "flops": f"{trained.flops:.6g}"}
                append_row(RESULTS, row | comparison.figures(trained.policy, shared))


if __name__ == "__main__":
    main(tyro.cli(Settings))
