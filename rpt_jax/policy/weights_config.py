"""config.json of Hugging Face checkpoints to ModelConfig, and back, for Llama, Qwen2/2.5 and Qwen3.

A setting that the decoder does not compute is an InputError, never passed over: sliding windows, other activations,
biases elsewhere, other kinds of RoPE scaling. Scalings are those of transformers' modeling_rope_utils.
"""

import functools
import math
from pathlib import Path

from rpt_jax.config import ModelConfig, RopeScaling
from rpt_jax.json_file import read_object
from rpt_jax.records import InputError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
FIXED = {  # settings of config.json that the decoder has in this form only
    "hidden_act": "silu",
    "attention_bias": False,  # would put one on o_proj too
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "truncate": True,
    "use_mrope": False,
    "dual_chunk_attention_config": None,
    "quantization_config": None,
}
ROPE = {  # fields of RopeScaling by kind, with their names in config.json
    "llama3": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of folder/config.json; dtypes and remat are left at their defaults, whatever the file holds.

    Raises InputError for another family and for settings that the decoder does not compute.
    """
    file = Path(folder) / "config.json"
    values = read_object(file, remedy="give a whole folder of config.json and .safetensors files")
    family = values.get("model_type")
    if family not in tuple(ARCHITECTURES):  # a tuple: the file may hold a list, which no dict can look up
        raise InputError(f"{file}: model_type={family!r}: choose a model of type {', '.join(ARCHITECTURES)}")
    _refuse_unknown(values, file)
    get = functools.partial(_get, values, file)
    heads, width = get("num_attention_heads", int), get("hidden_size", int)
    theta, scaling = _read_rope(values, file)
    model = ModelConfig(
        vocab_size=get("vocab_size", int),
        width=width,
        layers=get("num_hidden_layers", int),
        heads=heads,
        kv_heads=get("num_key_value_heads", int, heads if family == "llama" else None),
        head_channels=get("head_dim", int, None if family == "qwen3" else width // max(heads, 1)),
        hidden=get("intermediate_size", int),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=get("rms_norm_eps", float, 1e-6),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_head=get("tie_word_embeddings", bool, False),
        context=get("max_position_embeddings", int, 0),
    )
    try:
        model.check()
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return model


def _get(values: dict, file: Path, key: str, kind: type, default=None):
    """values[key] of the given type; absent or null is the default, or an error where there is none."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise InputError(f"{file}: no {key}: write it into the file, the weights' shapes alone do not tell it")
    value = float(value) if kind is float and type(value) is int and abs(value) < 2**63 else value
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise InputError(f"{file}: {key}={value!r}: expected {'finite ' if kind is float else ''}{kind.__name__}")
    return value


def _refuse_unknown(values: dict, file: Path) -> None:
    """Raises InputError for a setting that the decoder has in another form only."""
    for key, only in FIXED.items():
        if values.get(key) not in (None, only):
            has = "none" if only is None else f"{only!r} only"
            raise InputError(f"{file}: {key}={values[key]!r}, but the decoder has {has}: choose another model")
    windowed = sorted({str(kind) for kind in _get(values, file, "layer_types", list, [])} - {"full_attention"})
    if windowed:
        raise InputError(f"{file}: layer_types has {windowed[0]!r}, the decoder full attention only: choose another")


def _read_rope(values: dict, file: Path) -> tuple[float, RopeScaling]:
    """rope_theta and scaling from rope_scaling (transformers 4) or rope_parameters (5)."""
    rope = _get(values, file, "rope_scaling", dict, {}) or _get(values, file, "rope_parameters", dict, {})
    nested = sorted(key for key, value in rope.items() if isinstance(value, dict))
    if nested:
        raise InputError(f"{file}: rope of {nested[0]!r} alone, the decoder has one rope only: choose another model")
    rope = {key: value for key, value in rope.items() if value is not None}
    _refuse_unknown(rope, file)
    theta = _get({"rope_theta": values.get("rope_theta")} | rope, file, "rope_theta", float, 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind not in tuple(ROPE):
        raise InputError(
            f"{file}: rope type {kind!r}: the decoder has default, {', '.join(ROPE)}; choose another model"
        )
    context = values.get("max_position_embeddings")
    rope = {"original_max_position_embeddings": context} | rope
    scales = [_get(rope, file, key, float, 0.0) for key in ("mscale", "mscale_all_dim")]
    if all(scales):  # DeepSeek's way to give the factor on cos and sin
        factor = _get(rope, file, "factor", float)
        try:
            gains = [0.1 * scale * math.log(factor) + 1 for scale in scales]
            rope.setdefault("attention_factor", gains[0] / gains[1])
        except (ValueError, ZeroDivisionError) as error:
            raise InputError(f"{file}: rope factor={factor} and mscale={scales}: no such scaling ({error})") from error
    optional = {"beta_fast", "beta_slow", "attention_factor"}
    names = {ours: name for ours, name in ROPE[kind].items() if name in rope or name not in optional}
    types = {"original_context": int}
    return theta, RopeScaling(kind, **{ours: _get(rope, file, n, types.get(ours, float)) for ours, n in names.items()})


def config_json(model: ModelConfig, end_ids: int | list[int] | None) -> dict:
    """What config.json says of the model; raises InputError where no family has its combination of options.

    end_ids: the token, or tokens, that end a text.
    """
    if model.context < 1:
        raise InputError("model.context=0: config.json has to say for how many tokens the model was made: set it")
    if model.qkv_bias and model.qk_norm:
        raise InputError("model.qkv_bias and model.qk_norm together: neither Qwen2 nor Qwen3 has both, drop one")
    family = "qwen2" if model.qkv_bias else "qwen3" if model.qk_norm else "llama"
    values = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_channels,
        "hidden_act": FIXED["hidden_act"],
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": _rope_json(model.rope_scaling),
        "tie_word_embeddings": model.tied_head,
        "torch_dtype": model.param_dtype,
        "bos_token_id": None,
        "eos_token_id": end_ids,
    }
    return values if family == "qwen2" else values | {"attention_bias": False}


def _rope_json(scaling: RopeScaling) -> dict | None:
    if scaling.kind == "none":
        return None
    fields = {name: getattr(scaling, ours) for ours, name in ROPE[scaling.kind].items()}
    if not fields.get("attention_factor", 1.0):
        del fields["attention_factor"]  # theirs too is 0.1 ln(factor) + 1 when absent
    return {"rope_type": scaling.kind} | fields
