"""Policies on disk: a folder with what sampling needs, in few files that travel well.

policy.json, params.npz, the tokenizer. In the folder of a large model params/ (Orbax) stands for params.npz, of which
every device reads its own part. A run folder can be read as a policy, too: its newest checkpoint is.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import uuid
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from rpt_jax.agreement import require_agreement
from rpt_jax.config import Config, ModelConfig
from rpt_jax.config_dict import from_dict, to_dict
from rpt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.json_file import read_object
from rpt_jax.learning import checkpoints
from rpt_jax.learning.array_file import read_arrays
from rpt_jax.learning.checkpoints import NOT_OF_THE_FILES, first_line
from rpt_jax.mesh import param_shardings, place
from rpt_jax.policy import decoder
from rpt_jax.ranges import require_in_range
from rpt_jax.records import InputError, Params

FORMAT = 1
STORED = ("float32", "bfloat16", "float16", "orbax")  # bfloat16: its bits as uint16, which numpy knows
BITS = {"bfloat16": "uint16"}


def save_policy(
    folder: Path,
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    provenance: dict,
    *,
    stored: str = "param_dtype",
) -> None:
    """Writes a policy folder, whole or not at all; replaces an older policy there, but no folder of another kind.

    provenance: anything JSON can hold about how it was made. stored: "param_dtype" keeps every bit, "float16" halves
    a float32 policy on disk (relative error up to 2^-11; raises InputError for values beyond its range), "orbax" keeps
    every bit without another copy in host memory.
    """
    folder = Path(folder)
    check_vocabulary(model, tokenizer, str(folder))
    require_policy_folder(folder)
    stored = model.param_dtype if stored == "param_dtype" else stored
    arrays = {}
    if stored != "orbax":
        arrays = {name: _to_disk(np.asarray(x), stored, name) for name, x in _named(params).items()}
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if stored == "orbax":
        with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
            checkpointer.save((part / "params").absolute(), params)
    else:
        np.savez_compressed(part / "params.npz", **arrays)
    tokenizer.save(part / "tokenizer")
    content = {
        "format": FORMAT,
        "model": to_dict(model),
        "stored": stored,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        "provenance": provenance,
    }
    (part / "policy.json").write_text(json.dumps(content, indent=2) + "\n")
    if not folder.exists():
        part.rename(folder)
        return
    older = folder.with_name(f".{uuid.uuid4().hex}.old")  # nobody else's name
    folder.rename(older)
    part.rename(folder)
    shutil.rmtree(older, ignore_errors=True)


def require_policy_folder(folder: Path) -> None:
    """Raises InputError where save_policy would write over something that is no policy."""
    folder = Path(folder)
    if folder.exists() and not ((folder / "policy.json").is_file() or (folder.is_dir() and not any(folder.iterdir()))):
        raise InputError(f"{folder} is no policy folder and not empty: choose another folder for the policy")


def load_policy(folder: Path, mesh: Mesh | None = None) -> tuple[ModelConfig, Params, Tokenizer]:
    """(model, params, tokenizer) of a policy folder, or of the newest checkpoint of a run folder.

    With a mesh the parameters lie on it by decoder.logical_axes, otherwise on the first device. Raises InputError
    naming what is missing, damaged, does not fit together, or differs between hosts. Of several processes all call.
    """
    folder = Path(folder)
    if (folder / "policy.json").is_file():
        load, description = _load_folder, folder / "policy.json"
    elif (folder / "config.json").is_file() and "config" in read_object(folder / "config.json"):
        load, description = _load_run, folder / "config.json"
    else:
        raise InputError(
            f"no policy in {str(folder)!r}: give a folder with policy.json (`rpt pretrain` makes one, and "
            "`rpt convert hf-to-orbax` of published weights) or the folder of a run that has saved a checkpoint"
        )
    model, tokenizer, params = load(folder, mesh)
    if jax.process_count() > 1:  # Orbax's parameters are read from one place, which all see
        arrays = folder / "params.npz"
        content = description.read_bytes() + (arrays.read_bytes() if arrays.is_file() else b"")
        require_agreement({"policy": hashlib.blake2b(content).hexdigest(), "tokenizer": tokenizer.fingerprint})
    return model, params(), tokenizer


def check_vocabulary(model: ModelConfig, tokenizer: Tokenizer, where: str) -> None:
    """Raises InputError for a tokenizer with more ids than the embedding has rows (fewer: a padded embedding)."""
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids and the model's vocabulary {model.vocab_size}: "
            "use the tokenizer that the model was made for"
        )


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, fingerprint: str, where: str) -> None:
    """Raises InputError, with both vocabulary sizes, for a tokenizer that is not the one a policy was made with."""
    if tokenizer.fingerprint != fingerprint:
        raise InputError(
            f"{where}: this tokenizer has {tokenizer.vocab_size} ids (fingerprint {tokenizer.fingerprint}), the policy "
            f"was made with one of {vocab_size} ids (fingerprint {fingerprint}): use that one"
        )


def _load_folder(folder, mesh):
    """(model, tokenizer, a function that reads the parameters)."""
    path = folder / "policy.json"
    content = read_object(path, "format", "model", "stored", "tokenizer")
    if content["format"] != FORMAT:
        raise InputError(f"{path} has format {content['format']!r}, this version reads {FORMAT}: make it again")
    model = from_dict(ModelConfig, content["model"], f"{path}: model")
    model.check()
    if content["stored"] not in STORED or not isinstance(content["tokenizer"], dict):
        raise InputError(
            f"{path}: stored={content['stored']!r}, or tokenizer, is not what this program writes: make it again"
        )
    tokenizer = load_tokenizer(folder / "tokenizer")
    made_with = [content["tokenizer"].get(name) for name in ("vocab_size", "fingerprint")]
    check_tokenizer(tokenizer, *made_with, where=str(folder / "tokenizer"))
    check_vocabulary(model, tokenizer, str(folder))

    def params() -> Params:
        if content["stored"] == "orbax":
            return _restore_params(folder / "params", _abstract_params(model, mesh))
        return _laid_out(_read_arrays(folder / "params.npz", model, content["stored"]), model, mesh)

    return model, tokenizer, params


def _load_run(folder, mesh):
    """As _load_folder, of a run."""
    content = read_object(folder / "config.json", "config")
    config = from_dict(Config, content["config"], f"{folder}/config.json: config")
    require_in_range(config, f"{folder}/config.json: config")
    config.model.check()
    tokenizer, identity = load_tokenizer(folder / "tokenizer"), content.get("identity")
    if isinstance(identity, dict) and "tokenizer" in identity:
        check_tokenizer(tokenizer, config.model.vocab_size, identity["tokenizer"], where=str(folder / "tokenizer"))
    check_vocabulary(config.model, tokenizer, str(folder))
    saved = checkpoints.folder_of(dataclasses.replace(config, run_folder=str(folder)))

    def params() -> Params:
        found = checkpoints.newest_params(saved, _abstract_params(config.model, mesh))
        if found is None:
            raise InputError(f"{folder} has saved no whole checkpoint yet: run it on, or use its starting policy")
        return found

    return config.model, tokenizer, params


def _restore_params(path, like):
    try:
        with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
            return checkpointer.restore(path.absolute(), like)
    except NOT_OF_THE_FILES:
        raise
    except Exception as error:  # Orbax raises this very class for a file that is cut short
        raise InputError(f"{path} cannot be read ({first_line(error)}): copy or make the policy again") from error


def _abstract_params(model, mesh):
    """Shapes with shardings: on the mesh by decoder.logical_axes, otherwise on the first device."""
    shapes = decoder.shapes(model)
    first = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), shapes)
    shardings = first if mesh is None else param_shardings(mesh, decoder.logical_axes(model), shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _read_arrays(path, model, stored):
    """Parameters as numpy arrays in the dtype of the model, checked against its shapes."""
    shapes = decoder.shapes(model)
    wanted = _named(shapes)
    arrays = read_arrays(path, {name: x.shape for name, x in wanted.items()}, np.dtype(BITS.get(stored, stored)))
    leaves = [_from_disk(arrays[name], stored).astype(x.dtype) for name, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _laid_out(params, model, mesh):
    if mesh is None:
        return jax.tree.map(jnp.asarray, params)
    return place(params, param_shardings(mesh, decoder.logical_axes(model), params))


def _named(params) -> dict:
    """{"layers/wq": leaf}, in the order of jax.tree.leaves."""
    paths, _ = jax.tree.flatten_with_path(params)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in paths}


def _to_disk(x, stored, name):
    """numpy has no bfloat16 of its own: its bits are kept as uint16."""
    if stored == "bfloat16":
        return x.astype(jnp.bfloat16).view(np.uint16)
    with np.errstate(over="ignore"):
        narrow = x.astype(stored)
    if not np.isfinite(narrow).all():
        raise InputError(f"parameter {name!r} has values that {stored} cannot hold: train on, or store another dtype")
    return narrow


def _from_disk(x, stored):
    return x.view(jnp.bfloat16) if stored == "bfloat16" else x
