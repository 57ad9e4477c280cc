"""Targets: published weights and configs, policies, and what runs and checkpoints say of themselves."""

import dataclasses
import json
import math
import random
import struct
from collections.abc import Sequence

import jax
import numpy as np
import toy
from fuzz_mutate import damaged, rewritten
from fuzz_targets import Target, file_in, scratch
from test_weights import MODELS, published, write
from test_weights_config import LLAMA_31_8B, QWEN3_8B_YARN, QWEN25_HALF_B

from rpt_jax import commands
from rpt_jax.config_dict import to_dict
from rpt_jax.learning import array_file, policy_folder, run_folder, train
from rpt_jax.policy import decoder, weights
from rpt_jax.policy.weights_config import config_json, read_config
from rpt_jax.study import harness, multiple_choice, sample

MODEL = dataclasses.replace(
    MODELS["qwen2"], layers=1, width=2, heads=1, kv_heads=1, head_channels=2, hidden=1, vocab_size=3
)
ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b/c": np.ones(2, np.float32)}
HOST = {"stream": {"next_index": 3}, "queue": [[0, 2, 1.5, 0], [1, 2, 1.25, 0]], "flops": 1e9}


def targets() -> tuple[Target, ...]:
    """A table, a reader a line or two behind the files that they read, and so longer than 40 lines."""
    one = write(scratch() / "published", MODEL, published(MODEL))
    tensors = published(MODEL)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    tied = write(scratch() / "tied", MODEL, tensors | head)
    params = weights.load_weights(one, MODEL)
    weights.save_weights(scratch() / "many", MODEL, params, file_bytes=60)
    policy_folder.save_policy(scratch() / "policy", toy.model(), toy.params(), toy.tokenizer(), {})
    orbax = scratch() / "orbax"
    policy_folder.save_policy(orbax, toy.model(layers=1), _one_layer(), toy.tokenizer(), {}, stored="orbax")
    run = _run(scratch() / "run-of-models")
    np.savez(scratch() / "stored.npz", **ARRAYS)
    np.savez_compressed(scratch() / "packed.npz", **ARRAYS)
    arrays = tuple((scratch() / name).read_bytes() for name in ("stored.npz", "packed.npz"))
    places = {
        "safetensors": file_in(one, "model.safetensors"),
        "config": file_in(one, "config.json"),
        "index": file_in(scratch() / "many", weights.INDEX),
        "policy": file_in(scratch() / "policy", "policy.json"),
        "params": file_in(scratch() / "policy", "params.npz"),
        "run": file_in(run, "config.json"),
    }
    seeds = tuple((folder / "model.safetensors").read_bytes() for folder in (one, tied))
    configs = tuple(
        json.dumps(each).encode() for each in (LLAMA_31_8B, QWEN25_HALF_B, QWEN3_8B_YARN, config_json(MODEL, [1, 2]))
    )
    parts = sorted(path.relative_to(orbax).as_posix() for path in (orbax / "params").rglob("*") if path.is_file())
    damaged_parts = [file_in(orbax, name) for name in parts]
    contents = tuple(bytes([i]) + (orbax / name).read_bytes() for i, name in enumerate(parts))

    def restores(content: bytes) -> None:
        policy_folder.load_policy(damaged_parts[content[0] % len(parts) if content else 0](content[1:]))

    return (
        Target("safetensors", seeds, lambda content: loads(places["safetensors"](content)), safetensors, 5),
        Target("published-config", configs, lambda content: config(places["config"](content)), rewritten, 5),
        Target(
            "index",
            ((scratch() / "many" / weights.INDEX).read_bytes(),),
            lambda c: loads(places["index"](c)),
            rewritten,
            0.6,
        ),
        Target(
            "policy",
            ((scratch() / "policy" / "policy.json").read_bytes(),),
            lambda c: policy(places["policy"](c)),
            rewritten,
            0.6,
        ),
        Target("arrays", arrays, arrays_of, damaged, 5),
        Target(
            "params",
            ((scratch() / "policy" / "params.npz").read_bytes(),),
            lambda c: policy(places["params"](c)),
            damaged,
            0.2,
        ),
        Target(
            "run-config", ((run / "config.json").read_bytes(),), lambda c: run_config(places["run"](c)), rewritten, 2
        ),
        Target("host", (json.dumps(HOST).encode(),), host, rewritten, 3),
        Target("orbax", contents, restores, damaged, 0.004),
    )


def _one_layer():
    return toy.params() | {"layers": jax.tree.map(lambda x: x[:1], toy.params()["layers"])}


def _run(folder):
    folder.mkdir()
    toy.tokenizer().save(folder / "tokenizer")
    identity = {"starting_policy": "00", "template": ["<predict>"]}
    content = {"config": to_dict(dataclasses.replace(toy.config(folder), model=toy.model())), "identity": identity}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def safetensors(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """The header rewritten as JSON, with its length or without; bytes at random one time in three."""
    length = int.from_bytes(content[:8], "little")
    if chance.random() < 0.33 or len(content) < 8 or length > len(content):
        return damaged(chance, content, others)
    header = rewritten(chance, content[8 : 8 + length], [content])
    said = len(header) if chance.random() < 0.9 else chance.choice((0, 1, length, 2**31, 2**62, 2**64 - 1))
    return struct.pack("<Q", said) + header + content[8 + length :]


def loads(folder) -> None:
    """What loads has the shapes of the model, and no more bytes than the files."""
    weights.stored_dtype(folder)
    params = weights.load_weights(folder, MODEL)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert sum(leaf.size * 2 for leaf in jax.tree.leaves(params)) <= size


def config(folder) -> None:
    model = read_config(folder)
    model.check()
    if math.prod((model.width, model.vocab_size)) < 2**20:
        decoder.rope_frequencies(min(model.head_channels, 1024), model.rope_theta, model.rope_scaling)
        decoder._rope_gain(model.rope_scaling)
    if model.context:
        (scratch() / "again").mkdir(exist_ok=True)
        (scratch() / "again" / "config.json").write_text(json.dumps(config_json(model, None)))
        assert read_config(scratch() / "again") == model


def policy(folder) -> None:
    model, params, tokenizer = policy_folder.load_policy(folder)
    assert params["embedding"].shape == (model.vocab_size, model.width) and tokenizer.vocab_size <= model.vocab_size


def arrays_of(content: bytes) -> None:
    path = scratch() / "arrays.npz"
    path.write_bytes(content)
    read = array_file.read_arrays(path, {name: array.shape for name, array in ARRAYS.items()}, np.dtype("float32"))
    assert all(read[name].shape == array.shape and read[name].dtype == array.dtype for name, array in ARRAYS.items())


def run_config(folder) -> None:
    """Settings of a run, as every command takes them that names its folder; and whether it is the same run."""
    made = run_folder.read_config(folder)
    made.check()
    for settings_of in (commands.settings_of, sample.settings_of, multiple_choice.settings_of, harness.settings_of):
        settings_of(str(folder))
    run_folder.require_same_run(made, {"starting_policy": "00"}, 0, folder)


class Stream:
    """The state that a stream of positions takes back, without one."""

    def set_state(self, state) -> None:
        if state["next_index"] != int(state["next_index"]):
            raise ValueError("no index")


def host(content: bytes) -> None:
    """What stands beside the arrays of a checkpoint."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return  # Orbax reads the JSON, and what it raises is caught where it is called
    if isinstance(values, dict):
        queue, spent = train._continued(Stream(), values, toy.config(scratch() / "none"), 3)
        assert all(isinstance(each, train.Position) for each in queue) and isinstance(spent, float)
