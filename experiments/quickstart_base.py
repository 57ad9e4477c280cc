"""Makes the base policy that ships with the package (rpt_jax/study/base_policy/) from nothing but a seed.

    .venv/bin/python experiments/quickstart_base.py

Hardware: two CPU cores. Time: about 3 minutes. The shipped file is the base of seed 0 of quickstart_seeds.py, made on
one core and rounded to float16: 0.88 million parameters, 1.6 MB with tokenizer and provenance. The number of cores
changes the order of sums, so a base made anew differs to rounding, and after 600 updates in its figures (see LOG.md).
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import tyro

import rpt_jax
from rpt_jax.config_dict import to_dict
from rpt_jax.learning.policy_folder import save_policy
from rpt_jax.study.base import BaseConfig, train_base
from rpt_jax.study.quickstart import SHIPPED


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where the base goes and how it is made."""

    seed: int = 0
    output: Path = SHIPPED
    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)


def main(settings: Settings) -> None:
    """Trains and saves; prints the loss on the way."""

    def report(step, metrics):
        print(f"step {step}/{settings.base.pretrain.steps}  loss {metrics['loss']:.3f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model, params, tokenizer = train_base(settings.base, settings.seed, Path(folder), report)
    provenance = {
        "made_by": "experiments/quickstart_base.py",
        "seed": settings.seed,
        "base": to_dict(settings.base),
        "versions": {"rpt_jax": rpt_jax.__version__, "jax": jax.__version__},
    }
    save_policy(settings.output, model, params, tokenizer, provenance, stored="float16")


if __name__ == "__main__":
    main(tyro.cli(Settings))
