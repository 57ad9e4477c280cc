"""What `rpt convert` does: a published model becomes a policy, a policy or run becomes a model that others open.

In: a folder in Hugging Face's layout or the id of a repository of theirs; a policy or run folder. Out: a policy folder
for `rpt train --policy`; a folder that `transformers`, and what builds on it, opens. Float32 and bfloat16 keep their
bits unless another dtype is asked for. Works on the CPU, with one copy of the parameters in host memory.
"""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax

from rpt_jax.config import ModelConfig
from rpt_jax.corpus.tokenizer import load_tokenizer
from rpt_jax.corpus.tokenizer_export import end_ids, export_tokenizer
from rpt_jax.learning import run_folder
from rpt_jax.learning.policy_folder import load_policy, require_policy_folder, save_policy
from rpt_jax.policy.weights import load_weights, require_new_folder, save_weights, stored_dtype
from rpt_jax.policy.weights_config import config_json, read_config
from rpt_jax.ranges import require_in_range
from rpt_jax.records import InputError, Params

log = logging.getLogger(__name__)

# Of a repository's files: not those in subfolders, where the same weights often lie a second time.
WANTED, UNWANTED = ["*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt"], ["*/*"]


@dataclass(frozen=True)
class FromPublished:
    """Llama, Qwen2/2.5 or Qwen3 as published, with its tokenizer, as a policy folder."""

    dtype: Literal["stored", "float32", "bfloat16"] = "stored"  # of the policy; stored: bfloat16 if all tensors are
    revision: str = ""  # branch, tag or commit of a repository; empty: its main one


@dataclass(frozen=True)
class ToPublished:
    """A policy, or the newest checkpoint of a run, as config.json, safetensors and tokenizer files."""

    dtype: Literal["stored", "float32", "bfloat16"] = "stored"  # of the written tensors; stored: as in the policy
    context: int = 0  # max_position_embeddings, tokens; 0: what the model was made for, and trained on by the run
    file_gib: float = 4.5  # the most that one file holds, and host memory beside the parameters


def from_published(source: str, output: str, config: FromPublished) -> dict:
    """Writes the policy folder and returns its figures; source: a folder, or owner/name of a repository."""
    _require_names(source, output, "hf-to-orbax MODEL OUTPUT")
    require_policy_folder(Path(output))
    began = time.perf_counter()
    folder = _find(source, config.revision)
    dtype = stored_dtype(folder) if config.dtype == "stored" else config.dtype
    model = replace(read_config(folder), dtype=dtype, param_dtype=dtype)
    tokenizer = load_tokenizer(folder)
    params = load_weights(folder, model)
    made_by = {"made_by": "rpt convert", "source": source, "revision": config.revision} | run_folder.provenance()
    save_policy(Path(output), model, params, tokenizer, made_by, stored="orbax")
    return {"policy": output} | _figures(model, params) | {"seconds": time.perf_counter() - began}


def to_published(source: str, output: str, config: ToPublished) -> dict:
    """Writes the folder and returns its figures; source: a policy or run folder."""
    _require_names(source, output, "orbax-to-hf POLICY OUTPUT")
    require_in_range(config)
    require_new_folder(Path(output))
    began = time.perf_counter()
    model, params, tokenizer = load_policy(Path(source))
    context = config.context or max(model.context, _longest_rollout(source))
    if context < 1:
        raise InputError(
            f"{source} does not say for how many tokens it was made, which config.json has to: --context TOKENS, for "
            "example those of prompt and response together"
        )
    dtype = model.param_dtype if config.dtype == "stored" else config.dtype
    model, ends = replace(model, context=context, param_dtype=dtype), end_ids(tokenizer)
    config_json(model, ends)  # raises for a model of no family before anything is written
    export_tokenizer(tokenizer, Path(output))
    save_weights(output, model, params, end_ids=ends, file_bytes=int(config.file_gib * 2**30))
    return {"model": output} | _figures(model, params) | {"seconds": time.perf_counter() - began}


def _longest_rollout(source: str) -> int:
    """Tokens of prompt and response together in a run; 0 for a policy folder."""
    if (Path(source) / "policy.json").is_file():
        return 0
    config = run_folder.read_config(Path(source))
    return config.prompt.max_tokens + config.sample.max_tokens


def _require_names(source: str, output: str, usage: str) -> None:
    if not source or not output:
        raise InputError(f"convert: what to read or where to write it is missing: use `rpt convert {usage}`")


def _figures(model: ModelConfig, params: Params) -> dict:
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "dtype": model.param_dtype,
        "vocab_size": model.vocab_size,
        "context": model.context,
    }


def _find(source: str, revision: str) -> Path:
    """The folder itself, or that of a repository's files after a download."""
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise InputError(f"no folder {source}: give a folder with config.json, or the id of a repository, owner/name")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise InputError(
            f"no folder {source}; to download a repository of that name: pip install 'rpt_jax[hub]'"
        ) from error
    log.info("reading %s from the hub", source)
    try:
        options = {"allow_patterns": WANTED, "ignore_patterns": UNWANTED, "revision": revision or None}
        return Path(huggingface_hub.snapshot_download(source, **options))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise InputError(
            f"no folder {source}, and the hub knows no such repository or revision, or not for you: check the id, "
            "or for a gated model accept its licence and set HF_TOKEN"
        ) from error
    except (OSError, ValueError) as error:  # what its HTTP errors and those of a missing cache are
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"no folder {source}, and the hub cannot be reached ({first}): download the repository where there is a "
            "network, and give its folder"
        ) from error
