"""Within which bounds a number of the settings can mean anything at all; looked at wherever settings come in.

In: a config, from the command line, an experiment file or a run's config.json. Out: InputError that names the first
setting that is out of bounds. Bounds are wide: they keep out what could only crash, hang or fill the memory, nothing
that somebody may want to try. What settings mean together is for their `check` (config.py).
"""

import dataclasses
import math
import sys

from rpt_jax.records import InputError

ABOVE_0 = sys.float_info.min
MANY, COUNT = 2**31 - 1, 2**24  # of steps, tokens or documents in all; of what is in memory at one time
INTEGER = -(2**63), 2**63 - 1  # every whole number; a seed may be any
POSITIVE, RATE, SHARE, FACTOR = (1, COUNT), (0, 1e3), (0, 1), (ABOVE_0, 1e9)
BETA = 0, 1 - 1e-6  # with 1 a moment stays 0, and its bias correction, too
TRAINING = {
    "learning_rate": RATE,
    "warmup_steps": (0, MANY),
    "beta1": BETA,
    "beta2": BETA,
    "weight_decay": RATE,
    "max_gradient_norm": (0, 1e30),
    "token_chunk": (0, COUNT),
}
SIZES = dict.fromkeys(("vocab_size", "width", "head_channels", "hidden"), POSITIVE)
SIZES |= dict.fromkeys(("heads", "kv_heads"), (1, 2**16))
MEASURED = dict.fromkeys(("repeats", "devices", "microbatches"), POSITIVE)
MEASURED |= {"warmup": (0, COUNT), "seed": (0, INTEGER[1])}
BOUNDS = {  # by class and field, both ends included
    "RopeScaling": dict.fromkeys(
        ("factor", "low_frequency_factor", "high_frequency_factor", "beta_fast", "beta_slow"), FACTOR
    )
    | {"original_context": (1, MANY), "attention_factor": (0, 1e9)},
    "ModelConfig": SIZES
    | {"layers": (1, 2**14), "rope_theta": (2, 1e18), "norm_epsilon": (0, 1), "context": (0, MANY)},
    "MeshConfig": dict.fromkeys(("data", "fsdp", "tensor", "process"), (-1, COUNT)) | {"processes": (0, COUNT)},
    "CorpusConfig": {"minimum_tokens": (0, MANY), "holdout": (0, MANY)},
    "PositionConfig": dict.fromkeys(("shortest_target", "longest_target", "stages", "top_candidates"), POSITIVE)
    | {"share": SHARE, "minimum_context": (0, MANY), "window": (2, COUNT), "batch_tokens": POSITIVE},
    "QuestionConfig": {
        "train": (0, MANY),
        "holdout": (0, MANY),
        "workers": (1, 1024),
        "seconds": (ABOVE_0, 86400),
        "memory_mib": (256, COUNT),
    },
    "PromptConfig": {"max_tokens": POSITIVE, "truth_bytes": (1, 2**20)},
    "SampleConfig": {
        "group_size": (1, 2**16),
        "temperature": (0, 1e6),
        "top_k": (0, COUNT),
        "top_p": SHARE,
        "min_p": SHARE,
        "max_tokens": POSITIVE,
        "tokens_per_call": POSITIVE,
        "slots": (0, COUNT),
    },
    "RewardConfig": {"ema_decay": SHARE},
    "UpdateConfig": TRAINING
    | {
        "advantage_epsilon": RATE,
        "clip_low": (0, 1e9),
        "clip_high": (0, 1e9),
        "kl_coefficient": RATE,
        "next_token_share": SHARE,
        "next_token_sequences": (0, COUNT),
        "next_token_length": POSITIVE,
        "microbatches": POSITIVE,
    },
    "DynamicSamplingConfig": {"from_step": (-1, MANY), "max_rounds": (0, 2**16)},
    "PretrainConfig": TRAINING | {"batch_size": POSITIVE, "sequence_length": (2, COUNT), "steps": (1, MANY)},
    "CheckpointConfig": {"every": (1, MANY), "keep": (1, MANY)},
    "EvaluateConfig": {
        "every": (0, MANY),
        "positions": (0, MANY),
        "group_size": (1, 2**16),
        "pass_at": (0, 2**16),
        "temperature": (0, 1e6),
        "batch_size": POSITIVE,
    },
    "Config": {"steps": (1, MANY), "flops": (0, 1e40), "batch_size": POSITIVE, "rollouts_logged": (0, MANY)},
    "PretrainRun": {"vocab_size": POSITIVE},
    "SampleRun": {"samples": (1, 2**16)},
    "ChoicesRun": {"per_category": (0, MANY), "batch_size": POSITIVE},
    "HarnessRun": dict.fromkeys(("max_length", "max_gen_tokens", "think_tokens", "batch_size"), POSITIVE)
    | {"limit": (0, MANY), "fewshot": (-1, MANY), "seed": (0, 2**32 - 1)},
    "FitSettings": {"sets": (1, 10**6), "seed": (0, INTEGER[1])},
    "SweepSettings": {"workers": (1, 1024)},
    "ReportConfig": {"rollouts": (0, MANY)},
    "ToPublished": {"context": (0, MANY), "file_gib": (ABOVE_0, 1e6)},
    "BaseConfig": dict.fromkeys(("width", "layers", "heads"), (1, 2**14)) | {"examples": POSITIVE},
    "QuickstartConfig": dict.fromkeys(("documents", "evaluation_documents", "batch_size"), POSITIVE)
    | dict.fromkeys(("learning_rate", "next_token_learning_rate", "sft_learning_rate"), RATE)
    | {"seed": (0, 2**63 - 20_000), "steps": (1, MANY), "group_size": (2, 2**16), "temperature": (ABOVE_0, 1e6)},
    "PlanRun": {"response_tokens": (0, COUNT), "steps": (1, MANY), "batch_size": POSITIVE},
    "KernelBench": dict.fromkeys(("tokens", "width", "vocabulary", "chunk", "repeats"), POSITIVE)
    | {"seed": (0, INTEGER[1])},
    "StepBench": MEASURED | {"slots": (0, COUNT)},
    "CompareBench": MEASURED,
}


def require_in_range(config, where: str = "") -> None:
    """Raises InputError for a setting outside of BOUNDS, no number, or text that is no UTF-8 or has a zero byte.

    where: name of the setting that holds `config`; empty for the outermost.
    """
    bounds = BOUNDS.get(type(config).__name__, {})
    for field in dataclasses.fields(config):
        name, value = f"{where}.{field.name}" if where else field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            require_in_range(value, name)
        for each in value if isinstance(value, tuple) else (value,):
            _require(name, each, bounds.get(field.name))


def _require(name: str, value, bounds: tuple[float, float] | None) -> None:
    if isinstance(value, str) and ("\0" in value or not _is_utf8(value)):
        raise InputError(f"{name}={value!r}: use UTF-8 without zero bytes")
    if type(value) is float and not math.isfinite(value):
        raise InputError(f"{name}={value}: use a finite number")
    if type(value) not in (int, float):
        return
    low, high = bounds or (INTEGER if type(value) is int else (-math.inf, math.inf))
    if not low <= value <= high:
        least = "more than 0" if low == ABOVE_0 else f"{low} or more"
        raise InputError(f"{name}={value}: use {least}" + ("" if value < low else f", and at most {high}"))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
