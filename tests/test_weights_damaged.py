"""Claims: a header, a tied head, an index or a config that does not fit the files is named, whatever it says."""

import dataclasses
import json

import numpy as np
import pytest
from test_weights import LLAMA, MODELS, published, write

from rpt_jax.policy import weights
from rpt_jax.records import InputError


def header_of(tensors: dict, more: bytes = b"") -> bytes:
    """A .safetensors file of a header that says whatever it likes, and some bytes."""
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header + more


ONCE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
LYING = {
    "longer than the file": (2**62).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "no UTF-8": (2).to_bytes(8, "little") + b"\xff\xff",
    "list": (2).to_bytes(8, "little") + b"[]",
    "offsets behind the end": header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4)),
    "offsets backwards": header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
    "negative": header_of({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
    "huge shape": header_of({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]}}, bytes(4)),
    "unknown dtype": header_of({"a": {"dtype": "F77", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "overlap": header_of({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, bytes(4)),
    "twice": (2 * len(ONCE) + 1).to_bytes(8, "little") + ONCE[:-1] + b"," + ONCE[1:] + b" " * 2 + bytes(4),
    "empty": b"",
}


@pytest.mark.parametrize("name", LYING)
def test_headers_that_lie(name, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(LYING[name])
    with pytest.raises(InputError, match="not a whole .safetensors file|tensors of the model are missing|asks for"):
        weights.load_weights(tmp_path, LLAMA)


@pytest.mark.parametrize(
    ("embedding", "head"),
    [((12,), (12, 8)), ((12, 8, 1), (12, 8)), ((12, 0), (12, 8)), ((12, 8), ()), ((12, 8), (12, 8, 8))],
)
def test_tied_heads_of_other_shapes(embedding, head, tmp_path):
    tensors = published(MODELS["qwen2"]) | {"model.embed_tokens.weight": np.zeros(embedding, np.float32)}
    folder = write(tmp_path, MODELS["qwen2"], tensors | {"lm_head.weight": np.zeros(head, np.float32)})
    with pytest.raises(InputError, match="model.embed_tokens.weight is F32|lm_head.weight is not the embedding"):
        weights.load_weights(folder, MODELS["qwen2"])


@pytest.mark.parametrize("change", [{"layers": 2**14}, {"hidden": 2**24}, {"vocab_size": 2**24}])
def test_a_config_that_asks_for_more_than_there_is(change, tmp_path):
    """Before shapes and names of such a model are made, which alone would take gigabytes."""
    folder = write(tmp_path, LLAMA, published(LLAMA))
    with pytest.raises(InputError, match=r"config.json asks for \d+ layers and a matrix of \d+ numbers, but there are"):
        weights.load_weights(folder, dataclasses.replace(LLAMA, **change))


@pytest.mark.parametrize(
    "places",
    [[], 7, {"a": 7}, {"a": ["b"]}, {"a": "../b.safetensors"}, {"a": "/etc/passwd"}, {"a": ""}, {"a": "x" * 5000}],
)
def test_indexes_name_files_beside_them(places, tmp_path):
    write(tmp_path, LLAMA, published(LLAMA))
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match="no weight_map of tensors to files beside it"):
        weights.load_weights(tmp_path, LLAMA)
