"""config.json: as published models have it, both ways, and what is refused."""

import dataclasses
import json

import pytest

from rpt_jax.config import ModelConfig, RopeScaling
from rpt_jax.policy.weights_config import config_json, read_config
from rpt_jax.records import InputError

LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN25_HALF_B = {
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_8B_YARN = {  # as the model card says to set it, in the words of transformers 5
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000000,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
TINY = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}


def written(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return read_config(folder)


def test_llama_31(tmp_path):
    scaling = RopeScaling("llama3", 8.0, 8192, low_frequency_factor=1.0, high_frequency_factor=4.0)
    assert written(tmp_path, LLAMA_31_8B) == ModelConfig(
        128256,
        4096,
        32,
        32,
        8,
        128,
        14336,
        rope_theta=500000.0,
        rope_scaling=scaling,
        norm_epsilon=1e-5,
        context=131072,
    )


def test_qwen25(tmp_path):
    assert written(tmp_path, QWEN25_HALF_B) == ModelConfig(
        151936,
        896,
        24,
        14,
        2,
        64,
        4864,
        rope_theta=1e6,
        norm_epsilon=1e-6,
        qkv_bias=True,
        tied_head=True,
        context=32768,
    )


def test_qwen3_with_yarn(tmp_path):
    scaling = RopeScaling("yarn", 4.0, 32768, beta_fast=32.0, beta_slow=1.0, attention_factor=0.0)
    assert written(tmp_path, QWEN3_8B_YARN) == ModelConfig(
        151936,
        4096,
        36,
        32,
        8,
        128,
        12288,
        rope_theta=1e6,
        rope_scaling=scaling,
        norm_epsilon=1e-6,
        qk_norm=True,
        context=40960,
    )


def test_what_may_be_absent_or_null(tmp_path):
    """Llama without key/value heads has as many as heads; head_dim is hidden_size / heads; theta 10,000."""
    expected = ModelConfig(11, 12, 2, 3, 3, 4, 20, rope_theta=10000.0, norm_epsilon=1e-6, context=64)
    assert written(tmp_path, TINY) == expected
    assert written(tmp_path, TINY | {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None}) == expected


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"type": "yarn", "factor": 2}, RopeScaling("yarn", 2.0, 64)),  # the context it has is the original one
        ({"type": "yarn", "factor": 2.0, "beta_fast": 16, "attention_factor": 1.5}, ("yarn", 2.0, 64, 16.0, 1.5)),
        ({"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}, ("yarn", 40.0, 64, 32.0, 1.0)),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0}, ("yarn", 4.0, 64, 32.0, 1.12175)),
        ({"rope_type": "default"}, RopeScaling()),
    ],
)
def test_ways_to_write_rope_scaling(tmp_path, rope, scaling):
    """mscale 2 over 1 at factor 4: (0.2 ln 4 + 1) / (0.1 ln 4 + 1) = 1.277259 / 1.138629."""
    if isinstance(scaling, tuple):
        kind, factor, context, fast, gain = scaling
        scaling = RopeScaling(kind, factor, context, beta_fast=fast, attention_factor=pytest.approx(gain, rel=1e-5))
    assert written(tmp_path, TINY | {"rope_scaling": rope}).rope_scaling == scaling


LLAMA = ModelConfig(11, 12, 2, 3, 1, 8, 20, rope_theta=123.0, norm_epsilon=1e-4, context=4096)


@pytest.mark.parametrize(
    "model",
    [
        LLAMA,
        dataclasses.replace(LLAMA, rope_scaling=RopeScaling("llama3", 8.0, 1024, 2.0, 5.0)),
        dataclasses.replace(LLAMA, qkv_bias=True, tied_head=True, rope_scaling=RopeScaling("yarn", 4.0, 1024)),
        dataclasses.replace(LLAMA, qk_norm=True, rope_scaling=RopeScaling("yarn", 4.0, 1024, 1.0, 4.0, 16.0, 2.0, 1.5)),
    ],
)
def test_what_is_written_reads_back(tmp_path, model):
    values = config_json(model, end_ids=[7, 9])
    assert written(tmp_path, values) == model
    assert values["max_position_embeddings"] == 4096 and values["eos_token_id"] == [7, 9]
    assert values["architectures"] == [
        {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[values["model_type"]] + "ForCausalLM"
    ]


def test_rope_for_each_kind_of_layer_is_refused(tmp_path):
    """Read as if it were one for all, it would have no type, and be the plain one."""
    nested = {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}
    with pytest.raises(InputError, match="rope of 'full_attention' alone"):
        written(tmp_path, TINY | {"rope_parameters": nested})


def test_a_rope_theta_of_null_leaves_the_one_beside_it(tmp_path):
    assert written(tmp_path, TINY | {"rope_theta": 1e6, "rope_parameters": {"rope_theta": None}}).rope_theta == 1e6


def test_yarn_factor_on_cos_and_sin_is_written_only_when_given():
    """transformers takes an attention_factor of 0 at its word, and computes 0.1 ln(factor) + 1 where there is none."""
    for given, expected in [(0.0, {}), (1.5, {"attention_factor": 1.5})]:
        scaling = RopeScaling("yarn", 4.0, 1024, attention_factor=given)
        written_rope = config_json(dataclasses.replace(LLAMA, rope_scaling=scaling), None)["rope_scaling"]
        assert {key: value for key, value in written_rope.items() if key == "attention_factor"} == expected


def test_a_model_without_a_context_cannot_be_written():
    with pytest.raises(InputError, match="model.context=0: .* how many tokens"):
        config_json(dataclasses.replace(LLAMA, context=0), None)


def test_a_model_of_no_family_cannot_be_written():
    with pytest.raises(InputError, match="qkv_bias and model.qk_norm"):
        config_json(dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral': choose"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"use_mrope": True}, "use_mrope=True, but the decoder has False only"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config=.*the decoder has none"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*fp8.*choose another model"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=False"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0}}, "no low_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "no factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn': expected dict"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"vocab_size": "11"}, "vocab_size='11': expected int"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: expected bool"),
        ({"model_type": "qwen2"}, "no num_key_value_heads"),
        ({"model_type": "qwen3", "num_key_value_heads": 1}, "no head_dim"),
        ({"num_key_value_heads": 2}, "kv_heads from 1, 3"),
        ({"num_attention_heads": 0}, "heads=0"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]: choose"),
        ({"layer_types": 5}, "layer_types=5: expected list"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope type \['yarn'\]"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: expected finite float"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=1.*: expected finite float"),
        ({"rope_theta": 0.0}, "config.json: model.rope_theta=0.0: use 2"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.0}}, "model.rope_scaling.factor=0.0: use more than 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1.0}}, "beta_fast=-1.0: use more than 0"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": -1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
            "rope factor=-1.0 and mscale=.*: no such scaling",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1e999}},
            "mscale_all_dim=inf: expected finite float",
        ),
        ({"num_hidden_layers": 10**9}, "model.layers=1000000000: use 1 or more, and at most 16384"),
        ({"num_attention_heads": 10**12, "num_key_value_heads": 7}, "model.heads=1000000000000: .* at most"),
        ({"hidden_size": -8}, "model.width=-8: use 1 or more"),
    ],
)
def test_settings_that_the_decoder_lacks_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        written(tmp_path, TINY | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", " is no JSON"),
        ("[" * 99_999, " is no JSON .brackets nest deeper"),
        (b'"\\ud83d"', " is no JSON"),
        ("[]", ": expected a JSON object"),
        (b"\xff", " is no JSON"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    with pytest.raises(InputError, match="no .*config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"config.json{message}"):
        read_config(tmp_path)


def test_code_that_a_config_names_is_not_run(tmp_path):
    """auto_map and the like are for loaders that trust what they download."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    named = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil--x.Model"}, "trust_remote_code": True}
    assert written(tmp_path, TINY | named) == written(tmp_path, TINY)
    assert not (tmp_path / "ran").exists()
