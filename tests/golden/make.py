"""Makes the checkpoints beside it, and what `transformers` computes from them; needs the extra parity.

    python tests/golden/make.py

Each folder is a tiny random model as `save_pretrained` writes it, with expected.npz: tokens, their logits in float32 by
the library's own code, and the tokens that greedy decoding adds. Weights are drawn large enough that every bias, norm
and frequency moves the logits; all folders but one keep them in bfloat16. The scalings stretch a context of 16 tokens,
and the texts have 48. Made with torch 2.13.0 and transformers 5.23.0; other versions may round
the logits otherwise in the last digits. tests/test_weights_golden.py reads them without torch.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TOKENS, ADDED = 48, 24
SCALINGS = {
    "none": {"rope_type": "default"},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0},
    "yarn_gain": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3},
}
CASES = {  # family, scaling, key/value heads, tied head, dtype on disk, bytes of a file
    "llama": ("llama", "llama3", 2, False, "float32", "1GB"),
    "llama_tied": ("llama", "none", 1, True, "bfloat16", "1GB"),
    "qwen2": ("qwen2", "yarn", 2, False, "bfloat16", "4KB"),
    "qwen2_tied": ("qwen2", "none", 4, True, "bfloat16", "1GB"),
    "qwen3": ("qwen3", "yarn_gain", 2, False, "bfloat16", "1GB"),
    "qwen3_tied": ("qwen3", "none", 1, True, "bfloat16", "4KB"),
}


def published(family: str, scaling: str, kv_heads: int, tied: bool, dtype: str, seed: int = 0, **options):
    """A random model of a family, an object of `transformers` in float32 whose values `dtype` can hold."""
    import torch
    import transformers

    dtype = getattr(torch, dtype)
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    rope = SCALINGS[scaling] | {"rope_theta": 500.0}
    if scaling != "none":
        rope["original_max_position_embeddings"] = 16
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "qwen3":
        shape["head_dim"] = 8  # more than the width / heads
    config = getattr(transformers, f"{name}Config")(
        **shape | {"rope_parameters": rope, "tie_word_embeddings": tied, "attn_implementation": "eager"} | options
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.float32).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            scale = 0.2 if tied and "embed" in key else 0.5
            drawn = 1 + 0.3 * noise if "norm" in key else scale * noise
            parameter.copy_(drawn.to(dtype).to(torch.float32))
    return model


def expected(model, seed: int = 0) -> dict[str, np.ndarray]:
    """Tokens, their logits and what greedy decoding adds to the first half of them."""
    import torch

    tokens_1T = torch.tensor(np.random.RandomState(seed).randint(0, model.config.vocab_size, (1, TOKENS)))
    with torch.no_grad():
        logits_TV = model(tokens_1T).logits[0].numpy()
    start = tokens_1T[:, : TOKENS // 2]
    whole = model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=ADDED)
    tokens_T, greedy_R = tokens_1T[0].numpy().astype(np.int32), whole[0, TOKENS // 2 :].numpy().astype(np.int32)
    return {"tokens_T": tokens_T, "logits_TV": logits_TV, "greedy_R": greedy_R}


def main() -> None:
    import torch
    import transformers

    for name, (family, scaling, kv_heads, tied, dtype, file_size) in CASES.items():
        model = published(family, scaling, kv_heads, tied, dtype, seed=len(name))
        values = expected(model)
        shutil.rmtree(HERE / name, ignore_errors=True)
        model.to(getattr(torch, dtype)).save_pretrained(HERE / name, max_shard_size=file_size)
        np.savez_compressed(HERE / name / "expected.npz", **values)
        print(name, len(set(values["greedy_R"].tolist())), "different tokens", float(abs(values["logits_TV"]).max()))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
