"""RPT with DeepSeek-R1-Distill-Qwen-1.5B on a v5e:4x4: the paper's method at a size that 16 small chips hold.

    rpt convert hf-to-orbax deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B policies/r1_1_5b
    rpt annotate experiments/qwen_1_5b_v5e.py --policy policies/r1_1_5b
    rpt plan experiments/qwen_1_5b_v5e.py --topology v5e:4x4
    rpt train experiments/qwen_1_5b_v5e.py

Hardware: one v5e:4x4, 16 chips on four hosts. Not run yet. Thoughts are shorter than the paper's, everything that is
not named here is as in omnimath_14b.py.
"""

from dataclasses import replace

from omnimath_14b import config as paper

from rpt_jax.config import Config, MeshConfig


def config() -> Config:
    base = paper()
    return replace(
        base,
        name="qwen_1_5b_v5e",
        batch_size=128,
        policy="policies/r1_1_5b",
        run_folder="runs/qwen_1_5b_v5e",
        model=replace(
            base.model,
            vocab_size=151936,
            width=1536,
            layers=28,
            heads=12,
            kv_heads=2,
            hidden=8960,
            rope_theta=1e4,
            norm_epsilon=1e-6,
        ),
        mesh=MeshConfig(data=1, fsdp=16, tensor=1),
        prompt=replace(base.prompt, max_tokens=1024),
        sample=replace(base.sample, max_tokens=2048, slots=512),
        update=replace(base.update, microbatches=16),
    )
