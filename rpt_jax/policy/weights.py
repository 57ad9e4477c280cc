"""Hugging Face safetensors to our parameter tree, and back.

In: a folder in which Llama, Qwen2/2.5 or Qwen3 is published, one file or many with an index, and its ModelConfig (from
weights_config.py). Out: parameters laid out as decoder.init makes them, each device reading its own part only. Tensors
that the model lacks or does not know are an InputError: a model that is nearly right trains without a word.
"""

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from rpt_jax import mesh
from rpt_jax.config import ModelConfig
from rpt_jax.policy import decoder
from rpt_jax.policy.weights_config import config_json, read_json
from rpt_jax.records import Array, InputError, Params

# Of each leaf of ours: the name of theirs, and for each axis of theirs, which axes of ours (L left out) it merges.
TENSORS = {
    "embedding": ("model.embed_tokens.weight", ((0,), (1,))),
    "final_norm.scale": ("model.norm.weight", ((0,),)),
    "head": ("lm_head.weight", ((1,), (0,))),
    "layers.attention_norm.scale": ("model.layers.{}.input_layernorm.weight", ((0,),)),
    "layers.wq": ("model.layers.{}.self_attn.q_proj.weight", ((1, 2), (0,))),
    "layers.wk": ("model.layers.{}.self_attn.k_proj.weight", ((1, 2), (0,))),
    "layers.wv": ("model.layers.{}.self_attn.v_proj.weight", ((1, 2), (0,))),
    "layers.wo": ("model.layers.{}.self_attn.o_proj.weight", ((2,), (0, 1))),
    "layers.bq": ("model.layers.{}.self_attn.q_proj.bias", ((0, 1),)),
    "layers.bk": ("model.layers.{}.self_attn.k_proj.bias", ((0, 1),)),
    "layers.bv": ("model.layers.{}.self_attn.v_proj.bias", ((0, 1),)),
    "layers.q_norm.scale": ("model.layers.{}.self_attn.q_norm.weight", ((0,),)),
    "layers.k_norm.scale": ("model.layers.{}.self_attn.k_norm.weight", ((0,),)),
    "layers.mlp_norm.scale": ("model.layers.{}.post_attention_layernorm.weight", ((0,),)),
    "layers.w_gate": ("model.layers.{}.mlp.gate_proj.weight", ((1,), (0,))),
    "layers.w_up": ("model.layers.{}.mlp.up_proj.weight", ((1,), (0,))),
    "layers.w_down": ("model.layers.{}.mlp.down_proj.weight", ((1,), (0,))),
}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Leaf:
    """A leaf of our tree and the tensors of theirs, one per layer or a single one, that hold it."""

    path: tuple
    shape: tuple[int, ...]  # L left out
    names: tuple[str, ...]
    merged: tuple[tuple[int, ...], ...]
    stacked: bool  # has L in front

    @property
    def their_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[axis] for axis in axes) for axes in self.merged)

    @property
    def their_order(self) -> list[int]:
        return [axis for axes in self.merged for axis in axes]

    def to_theirs(self, own: Array) -> np.ndarray:
        """One tensor in their layout."""
        return np.ascontiguousarray(own.transpose(self.their_order).reshape(self.their_shape))

    def read(self, tensor, part: tuple[slice, ...]) -> np.ndarray:
        """A part (slices of our axes) of one tensor, read from the file without the rest and brought to our layout."""
        cuts, sizes = [], []
        for first, *rest in self.merged:
            inner = [self.shape[axis] for axis in rest]
            start, stop, _ = part[first].indices(self.shape[first])
            cuts.append(slice(start * math.prod(inner), stop * math.prod(inner)))
            sizes += [stop - start, *inner]
        own = tensor[tuple(cuts)].reshape(sizes).transpose(np.argsort(self.their_order))
        leading = {axes[0] for axes in self.merged}
        return own[tuple(slice(None) if axis in leading else cut for axis, cut in enumerate(part))]


@functools.cache  # tracing takes half a second
def _shapes(model: ModelConfig) -> Params:
    return jax.eval_shape(functools.partial(decoder.init, model), jax.random.key(0))


def _leaves(model: ModelConfig) -> list[_Leaf]:
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(_shapes(model)):
        key = jax.tree_util.keystr(path, simple=True, separator=".")
        name, merged = TENSORS[key]
        stacked = key.startswith("layers.")
        names = tuple(name.format(layer) for layer in range(model.layers)) if stacked else (name,)
        leaves.append(_Leaf(path, leaf.shape[1:] if stacked else leaf.shape, names, merged, stacked))
    return leaves


def load_weights(folder: str | Path, model: ModelConfig, shardings: Params | None = None) -> Params:
    """The checkpoint's parameters in model.param_dtype, on one device or laid out by a tree of shardings.

    A device reads its own part of each tensor, one leaf after the other: host memory holds the parts of one leaf.
    Raises InputError, before anything is read, when the tensors are not exactly those that the model needs.
    """
    leaves = _leaves(model)
    with contextlib.ExitStack() as stack:
        tensors = _open(Path(folder), stack)
        _check(Path(folder), model, leaves, tensors)

        def make(leaf: _Leaf, sharding) -> Array:
            def read(part: tuple[slice, ...]) -> np.ndarray:
                names, within = (leaf.names[part[0]], part[1:]) if leaf.stacked else (leaf.names, part)
                shape = [len(range(*cut.indices(size))) for cut, size in zip(within, leaf.shape, strict=True)]
                own = np.empty((len(names), *shape), model.param_dtype)
                for layer, name in enumerate(names):
                    own[layer] = leaf.read(tensors[name].get_slice(name), within)
                return own if leaf.stacked else own[0]

            shape = (len(leaf.names), *leaf.shape) if leaf.stacked else leaf.shape
            return jax.make_array_from_callback(shape, sharding, read)

        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = [one] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
        arrays = [make(leaf, sharding) for leaf, sharding in zip(leaves, placed, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(_shapes(model)), arrays)


def _open(folder: Path, stack: contextlib.ExitStack) -> dict:
    """The open file of each tensor by the tensor's name."""
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise InputError(f"{folder / INDEX}: no weight_map of tensors to files: download it again")
        files = [folder / str(name) for name in sorted(set(places.values()), key=str)]
    else:
        files = [folder / "model.safetensors"]
    tensors = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"no {file}: download all .safetensors files of the model, and {INDEX} if there are many")
        try:
            opened = stack.enter_context(safetensors.safe_open(file, framework="np"))
        except safetensors.SafetensorError as error:
            raise InputError(f"{file}: not a whole .safetensors file ({error}): download it again") from error
        tensors |= dict.fromkeys(opened.keys(), opened)
    return tensors


def _check(folder: Path, model: ModelConfig, leaves: list[_Leaf], tensors: dict) -> None:
    """Raises InputError unless the tensors are those of the model, in number, shape and kind."""
    shapes = {name: leaf.their_shape for leaf in leaves for name in leaf.names}
    missing = [name for name in shapes if name not in tensors]
    if missing == ["lm_head.weight"]:
        raise InputError(
            f'{folder}: no lm_head.weight: if the head is the embedding, set "tie_word_embeddings": true in config.json'
        )
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} tensors of the model are missing, the first is {missing[0]}: download all "
            "files of the checkpoint, with the config.json that belongs to it"
        )
    unknown = [name for name in tensors if name not in shapes and not name.endswith("rotary_emb.inv_freq")]
    if model.tied_head and "lm_head.weight" in unknown:
        head, embedding = (tensors[n].get_tensor(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        if not np.array_equal(head, embedding):
            raise InputError(f'{folder}: lm_head.weight is not the embedding: set "tie_word_embeddings": false')
        unknown.remove("lm_head.weight")
    if unknown:
        raise InputError(
            f"{folder}: {len(unknown)} tensors that the decoder does not know, the first is {min(unknown)}: choose a "
            "plain checkpoint of Llama, Qwen2 or Qwen3, not quantised and without adapters"
        )
    for name, shape in shapes.items():
        tensor = tensors[name].get_slice(name)
        if tuple(tensor.get_shape()) != shape or tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise InputError(
                f"{folder}: {name} is {tensor.get_dtype()} {tuple(tensor.get_shape())}, but config.json asks for a "
                f"floating-point {shape}: use the config.json that belongs to these weights, not quantised"
            )


def save_weights(
    folder: str | Path,
    model: ModelConfig,
    params: Params,
    *,
    end_ids: int | list[int] | None = None,
    file_bytes: int = 5 * 10**9,
) -> None:
    """Writes config.json and, in model.param_dtype, safetensors files that transformers reads.

    end_ids: what ends a text. file_bytes: the most a file has, unless it is a single tensor; host memory holds one
    file. With several processes all call it and the first writes.
    Raises InputError for a model of no family and for a folder in use.
    """
    folder = Path(folder)
    config = json.dumps(config_json(model, end_ids), indent=2)
    require_new_folder(folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_weights")  # nobody writes before all have looked
    leaves = _leaves(model)
    itemsize = np.dtype(model.param_dtype).itemsize
    sizes = {name: math.prod(leaf.shape) * itemsize for leaf in leaves for name in leaf.names}
    files = _split(sizes, file_bytes)
    mine = jax.process_index() == 0
    tensors = _theirs(model, leaves, params)
    if mine:
        folder.mkdir(parents=True, exist_ok=True)
    for file, names in files.items():
        content = {name: next(tensors) for name in names}
        if mine:
            safetensors.numpy.save_file(content, folder / f"{file}.part", metadata={"format": "pt"})
            (folder / f"{file}.part").replace(folder / file)
    if not mine:
        return
    if len(files) > 1:
        places = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(config + "\n")  # last: a folder without it is not whole


def _split(sizes: dict[str, int], file_bytes: int) -> dict[str, list[str]]:
    """Names of the tensors in each file, in order; a file is full before a tensor that would not fit."""
    parts, used = [[]], 0
    for name, size in sizes.items():
        if parts[-1] and used + size > file_bytes:
            parts, used = [*parts, []], 0
        parts[-1].append(name)
        used += size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": names for i, names in enumerate(parts, 1)}


def _theirs(model: ModelConfig, leaves: list[_Leaf], params: Params) -> Iterator[np.ndarray]:
    """Every tensor in their layout on the host, one at a time, in the order of the leaves."""
    for leaf in leaves:
        ours = functools.reduce(lambda tree, entry: tree[entry.key], leaf.path, params)
        for layer in range(len(leaf.names)):
            own = mesh.to_host(ours[layer] if leaf.stacked else ours)
            yield leaf.to_theirs(own.astype(model.param_dtype, copy=False))
