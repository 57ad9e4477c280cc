"""Hugging Face safetensors to our parameter tree, and back.

In: a folder in which Llama, Qwen2/2.5 or Qwen3 is published, one file or many with an index, and its ModelConfig (from
weights_config.py). Out: parameters laid out as decoder.init makes them, each device reading its own part only. Host
memory holds a tensor at a time, never a second copy of the model. Tensors that the model lacks or does not know are an
InputError: a model that is nearly right trains without a word.
"""

import contextlib
import functools
import gc
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from rpt_jax import mesh
from rpt_jax.config import ModelConfig
from rpt_jax.json_file import read_object
from rpt_jax.policy import decoder
from rpt_jax.policy.weights_config import config_json
from rpt_jax.records import Array, InputError, Params, words_of

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
FLOATS = ("F32", "F16", "BF16")  # of the tensors that are read
INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 1 << 22  # of a tensor are read at once, on the way to their place in our layout
ALIGNMENT = 64  # bytes: a numpy array that begins at a multiple becomes an array on a CPU device without a copy


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

    def read(self, tensor, part: tuple[slice, ...], own: np.ndarray) -> None:
        """Fills `own` with a part (slices of our axes) of one tensor, read from the file without the rest."""
        axis = self.merged[0][0]
        start, stop, _ = part[axis].indices(self.shape[axis])
        step = max(1, BLOCK_BYTES * (stop - start) // max(own.nbytes, 1))
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            place = (slice(None),) * axis + (slice(begin - start, end - start),)
            own[place] = self._read_block(tensor, (*part[:axis], slice(begin, end), *part[axis + 1 :]))

    def _read_block(self, tensor, part: tuple[slice, ...]) -> np.ndarray:
        cuts, sizes = [], []
        for first, *rest in self.merged:
            inner = [self.shape[axis] for axis in rest]
            start, stop, _ = part[first].indices(self.shape[first])
            cuts.append(slice(start * math.prod(inner), stop * math.prod(inner)))
            sizes += [stop - start, *inner]
        own = tensor[tuple(cuts)].reshape(sizes).transpose(np.argsort(self.their_order))
        leading = {axes[0] for axes in self.merged}
        return own[tuple(slice(None) if axis in leading else cut for axis, cut in enumerate(part))]


def _aligned_empty(count: int) -> np.ndarray:
    """So many bytes, at an address from which a CPU device takes them as they are, without a copy."""
    raw = np.empty(count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count]


def _leaves(model: ModelConfig) -> list[_Leaf]:
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(decoder.shapes(model)):
        key = jax.tree_util.keystr(path, simple=True, separator=".")
        name, merged = TENSORS[key]
        stacked = key.startswith("layers.")
        names = tuple(name.format(layer) for layer in range(model.layers)) if stacked else (name,)
        leaves.append(_Leaf(path, leaf.shape[1:] if stacked else leaf.shape, names, merged, stacked))
    return leaves


def load_weights(folder: str | Path, model: ModelConfig, shardings: Params | None = None) -> Params:
    """The checkpoint's parameters in model.param_dtype, on one device or laid out by a tree of (named) shardings.

    A device reads its own part of each tensor, one tensor after the other, and a tensor lies in its place before the
    next is read: beside the parameters themselves host memory holds the parts of one tensor and BLOCK_BYTES.
    Raises InputError, before a parameter is made, when the tensors are not exactly those that the model needs.
    """
    arrays, staging = {}, _aligned_empty(0)
    with contextlib.ExitStack() as stack:
        tensors = _open(Path(folder), stack)
        _require_plausible(Path(folder), model, tensors)
        leaves, one = _leaves(model), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = [one] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
        places = [_Place(*pair, np.dtype(model.param_dtype)) for pair in zip(leaves, placed, strict=True)]
        _check(Path(folder), model, leaves, tensors)
        # The largest first: when nearly all parameters are there, what is staged is small.
        for place in sorted(places, key=lambda place: -place.staged_bytes):
            if not place.leaf.stacked:  # its own, which a CPU device keeps
                arrays[place.leaf.path] = place.load(tensors, _aligned_empty(place.staged_bytes))
                continue
            if not place.staged_bytes <= staging.nbytes < 2 * place.staged_bytes:
                staging = _aligned_empty(0)
                gc.collect(0)  # jax lets go of host arrays when Python collects
                staging = _aligned_empty(place.staged_bytes)
            arrays[place.leaf.path] = place.load(tensors, staging)
    return jax.tree.unflatten(jax.tree.structure(decoder.shapes(model)), [arrays[leaf.path] for leaf in leaves])


@dataclass(frozen=True)
class _Place:
    """Where a leaf goes."""

    leaf: _Leaf
    sharding: jax.sharding.Sharding
    dtype: np.dtype

    @functools.cached_property
    def within(self) -> jax.sharding.Sharding:
        """The sharding of one tensor."""
        if self.leaf.stacked and isinstance(self.sharding, jax.sharding.NamedSharding):
            return jax.NamedSharding(self.sharding.mesh, jax.P(*self.sharding.spec[1:]))
        return self.sharding

    @functools.cached_property
    def parts(self) -> dict[tuple, tuple[slice, ...]]:
        """The parts of a tensor that devices of this process hold, those that several hold once, by their bounds."""
        parts = self.within.addressable_devices_indices_map(self.leaf.shape).values()
        return {self.bounds(part): part for part in parts}

    def bounds(self, part: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        return tuple(cut.indices(size)[:2] for cut, size in zip(part, self.leaf.shape, strict=True))

    def bytes_of(self, bounds: tuple[tuple[int, int], ...]) -> int:
        size = math.prod(stop - start for start, stop in bounds) * self.dtype.itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT

    @property
    def staged_bytes(self) -> int:
        return sum(map(self.bytes_of, self.parts))

    def load(self, tensors: dict, staging: np.ndarray) -> Array:
        """The whole leaf; its tensors come through `staging` one by one."""
        if not self.leaf.stacked:
            return self._load_tensor(tensors, self.leaf.names[0], staging).block_until_ready()
        array = jnp.zeros((len(self.leaf.names), *self.leaf.shape), self.dtype, device=self.sharding)
        for layer, name in enumerate(self.leaf.names):
            array = _layer_setter(self.sharding)(array, self._load_tensor(tensors, name, staging), layer)
            array.block_until_ready()  # what is staged has arrived, and the next layer may take its place
        return array

    def _load_tensor(self, tensors: dict, name: str, staging: np.ndarray) -> Array:
        staged, begin = {}, 0
        for bounds, part in self.parts.items():
            shape = [stop - start for start, stop in bounds]
            end = begin + math.prod(shape) * self.dtype.itemsize
            staged[bounds] = staging[begin:end].view(self.dtype).reshape(shape)
            self.leaf.read(tensors[name].get_slice(name), part, staged[bounds])
            begin += self.bytes_of(bounds)
        return jax.make_array_from_callback(self.leaf.shape, self.within, lambda part: staged[self.bounds(part)])


@functools.cache
def _layer_setter(sharding):
    """(array with L in front, one layer, its number) -> the array, which is written to where it lies."""
    update = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


def stored_dtype(folder: str | Path) -> str:
    """The param_dtype that keeps the tensors of a checkpoint as they are: "bfloat16" where all are, else "float32"."""
    with contextlib.ExitStack() as stack:
        tensors = _open(Path(folder), stack)
        return "bfloat16" if {file.get_slice(n).get_dtype() for n, file in tensors.items()} == {"BF16"} else "float32"


def _open(folder: Path, stack: contextlib.ExitStack) -> dict:
    """The open file of each tensor by the tensor's name."""
    if (folder / INDEX).is_file():
        places = read_object(folder / INDEX, remedy="download it again").get("weight_map")
        named = places.values() if isinstance(places, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name == name and 0 < len(name) < 200 for name in named):
            raise InputError(f"{folder / INDEX}: no weight_map of tensors to files beside it: download it again")
        files = [folder / name for name in sorted(set(named))]
    else:
        files = [folder / "model.safetensors"]
    tensors = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"no {words_of(file)}: download all .safetensors files, and {INDEX} if there are many")
        try:
            opened = stack.enter_context(safetensors.safe_open(file, framework="np"))
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            raise InputError(f"{file}: not a whole .safetensors file ({words_of(error)}): download again") from error
        tensors |= dict.fromkeys(opened.keys(), opened)
    return tensors


def _require_plausible(folder: Path, model: ModelConfig, tensors: dict) -> None:
    """Raises InputError where config.json asks for more than the files can hold, before the model's shapes are made."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    largest = max(model.vocab_size, model.hidden, model.heads * model.head_channels) * model.width
    if model.layers > len(tensors) or 2 * largest > size:
        raise InputError(
            f"{folder}: config.json asks for {model.layers} layers and a matrix of {largest} numbers, but there are "
            f"{len(tensors)} tensors and {size} bytes: use the config.json that belongs to these weights"
        )


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
    for name, shape in shapes.items():
        tensor = tensors[name].get_slice(name)
        if tuple(tensor.get_shape()) != shape or tensor.get_dtype() not in FLOATS:
            raise InputError(
                f"{folder}: {name} is {tensor.get_dtype()} {tuple(tensor.get_shape())}, but config.json asks for a "
                f"floating-point {shape}: use the config.json that belongs to these weights, not quantised"
            )
    unknown = [name for name in tensors if name not in shapes and not name.endswith("rotary_emb.inv_freq")]
    if model.tied_head and "lm_head.weight" in unknown:
        head, embedding = (tensors[n].get_slice(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        (rows, width), known = embedding.get_shape(), head.get_dtype() in FLOATS
        step = max(1, BLOCK_BYTES // (8 * width))
        cuts = [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
        alike = known and head.get_shape() == [rows, width]
        if not alike or not all(np.array_equal(head[cut], embedding[cut]) for cut in cuts):
            raise InputError(f'{folder}: lm_head.weight is not the embedding: set "tie_word_embeddings": false')
        unknown.remove("lm_head.weight")
    if unknown:
        raise InputError(
            f"{folder}: {len(unknown)} tensors that the decoder does not know, the first is {min(unknown)}: choose a "
            "plain checkpoint of Llama, Qwen2 or Qwen3, not quantised and without adapters"
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
    leaves, itemsize = _leaves(model), np.dtype(model.param_dtype).itemsize
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


def require_new_folder(folder: Path) -> None:
    """Raises InputError where save_weights would write over a checkpoint."""
    if any(folder.glob("*.safetensors")) or (folder / INDEX).exists():
        raise InputError(f"{folder} holds a checkpoint already: give a new folder")


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
