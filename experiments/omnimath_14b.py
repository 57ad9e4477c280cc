"""The run of the paper: DeepSeek-R1-Distill-Qwen-14B on Omni-MATH [arXiv 2506.08007, section 3.3].

    rpt convert hf-to-orbax deepseek-ai/DeepSeek-R1-Distill-Qwen-14B policies/r1_14b       the starting policy
    rpt convert hf-to-orbax deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B policies/r1_1_5b     the proxy, same tokenizer
    rpt annotate experiments/omnimath_14b.py --policy policies/r1_1_5b
    rpt plan experiments/omnimath_14b.py --topology v5p:4x4x4        or v5e:16x16 --mesh.fsdp 32 --mesh.tensor 8
    rpt train experiments/omnimath_14b.py

Hardware: one TPU slice, v5p:4x4x4 with the mesh below; rpt annotate has that mesh, too, unless --mesh.data,
--mesh.fsdp and --mesh.tensor say otherwise. data/omni_math.jsonl is the data set KbsdJames/Omni-MATH, a record a
line. Not run yet: nothing here is a result. What the paper leaves open is chosen below, each with its reason.
"""

from rpt_jax.config import (
    CheckpointConfig,
    Config,
    CorpusConfig,
    DynamicSamplingConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    PositionConfig,
    PromptConfig,
    SampleConfig,
    UpdateConfig,
)


def config() -> Config:
    """A table, a value a line with its reason, and so longer than 40 lines."""
    return Config(
        name="omnimath_14b",
        steps=1000,
        batch_size=256,
        policy="policies/r1_14b",
        run_folder="runs/omnimath_14b",
        model=ModelConfig(  # of config.json; `rpt plan` needs it without the weights
            vocab_size=152064,
            width=5120,
            layers=48,
            heads=40,
            kv_heads=8,
            head_channels=128,
            hidden=13824,
            rope_theta=1e6,
            norm_epsilon=1e-5,
            qkv_bias=True,
            dtype="bfloat16",  # [open] float32 parameters and moments, bfloat16 arithmetic: steps of 1e-6 need the bits
            remat="layer",
        ),
        mesh=MeshConfig(data=1, fsdp=16, tensor=4),
        corpus=CorpusConfig(
            files=("data/omni_math.jsonl",),
            template="{problem}\n\n{solution}",  # [open] how problem and solution are joined
            holdout=200,
        ),
        positions=PositionConfig(
            annotated="data/omnimath_train",
            threshold=1.5,  # [open] nats; the paper's evaluation calls this hard
            top_candidates=16,
            renormalise=True,  # [open] whether the 16 probabilities sum to 1
            start="<｜begin▁of▁sentence｜>",  # [open] what the proxy's tokenizer puts before every text
        ),
        prompt=PromptConfig(template="v0", chat="r1", max_tokens=4096),
        sample=SampleConfig(
            group_size=8,
            temperature=0.8,
            top_p=1.0,  # [open]
            max_tokens=8192,
            slots=384,  # of 2048 rollouts: what fits beside the weights; those that end make room for the others
            tokens_per_call=128,
        ),
        update=UpdateConfig(
            learning_rate=1e-6,
            schedule="constant",  # [open]
            weight_decay=0.01,
            max_gradient_norm=1.0,  # [open] "actor gradient clip 0.2" may mean the norm or the ratio
            advantage="std",  # [open] as in GRPO
            aggregate="token_mean",  # [open] as in verl, which the paper uses
            microbatches=64,  # 16 prompts a unit in quarters of their groups
        ),
        dynamic_sampling=DynamicSamplingConfig(from_step=500),
        checkpoint=CheckpointConfig(every=50, keep=2),
        evaluate=EvaluateConfig(annotated="data/omnimath_held_out", every=100),
    )
