"""Safetensors: layout by hand, meaning by a float64 model in their layout, round trips bitwise, shards, refusals."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rpt_jax import mesh as meshes
from rpt_jax.config import MeshConfig, ModelConfig
from rpt_jax.policy import decoder, weights
from rpt_jax.policy.weights_config import config_json, read_config
from rpt_jax.records import InputError

LLAMA = ModelConfig(
    vocab_size=12,
    width=8,
    layers=3,
    heads=4,
    kv_heads=2,
    head_channels=4,
    hidden=6,
    rope_theta=50.0,
    norm_epsilon=1e-3,
    context=64,
)
MODELS = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, tied_head=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_channels=6),
}


def published(model: ModelConfig, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random tensors under the names and in the shapes [out, in] in which the family publishes them."""
    rng = np.random.default_rng(0)
    D, F, V, C = model.width, model.hidden, model.vocab_size, model.head_channels
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not model.tied_head:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(model.layers):
        own = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        for name, heads in (("q", model.heads), ("k", model.kv_heads), ("v", model.kv_heads)):
            own[f"self_attn.{name}_proj.weight"] = (heads * C, D)
            if model.qkv_bias:
                own[f"self_attn.{name}_proj.bias"] = (heads * C,)
            if model.qk_norm and name != "v":
                own[f"self_attn.{name}_norm.weight"] = (C,)
        own |= {"self_attn.o_proj.weight": (D, model.heads * C), "mlp.down_proj.weight": (D, F)}
        own |= {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(folder, model, tensors):
    """A published checkpoint in one file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(model, None)))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def bits(array) -> bytes:
    return str(array.dtype).encode() + str(array.shape).encode() + np.asarray(array).tobytes()


def assert_same_bits(tree, expected):
    jax.tree.map(lambda a, b: np.testing.assert_equal(bits(a), bits(b)), tree, expected)


def their_logits(t, model: ModelConfig, tokens_T):
    """Logits [T, V] of one sequence as transformers computes them: x W^T, rotate_half, repeated kv heads; float64."""
    t = {name: tensor.astype(np.float64) for name, tensor in t.items()}
    T, C = len(tokens_T), model.head_channels
    angles_TC = np.arange(T)[:, None] / model.rope_theta ** (np.tile(np.arange(0, C, 2), 2) / C)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon) * scale

    def turn(x_THC):
        half = np.concatenate([-x_THC[..., C // 2 :], x_THC[..., : C // 2]], axis=-1)
        return x_THC * np.cos(angles_TC)[:, None] + half * np.sin(angles_TC)[:, None]

    x_TD = t["model.embed_tokens.weight"][tokens_T]
    for layer in range(model.layers):
        own = {name.split(".", 3)[3]: tensor for name, tensor in t.items() if f"layers.{layer}." in name}
        y_TD = norm(x_TD, own["input_layernorm.weight"])
        heads = {}
        for name in "qkv":
            z = y_TD @ own[f"self_attn.{name}_proj.weight"].T + own.get(f"self_attn.{name}_proj.bias", 0)
            z = z.reshape(T, -1, C)
            z = norm(z, own[f"self_attn.{name}_norm.weight"]) if f"self_attn.{name}_norm.weight" in own else z
            z = z if name == "v" else turn(z)
            heads[name] = np.repeat(z, model.heads // z.shape[1], axis=1)
        scores_HTS = np.einsum("thc,shc->hts", heads["q"], heads["k"]) / np.sqrt(C)
        scores_HTS = np.where(np.tril(np.ones((T, T), bool)), np.exp(scores_HTS), 0)
        weights_HTS = scores_HTS / scores_HTS.sum(-1, keepdims=True)
        out_TE = np.einsum("hts,shc->thc", weights_HTS, heads["v"]).reshape(T, -1)
        x_TD = x_TD + out_TE @ own["self_attn.o_proj.weight"].T
        y_TD = norm(x_TD, own["post_attention_layernorm.weight"])
        gate_TF = y_TD @ own["mlp.gate_proj.weight"].T
        up_TF = y_TD @ own["mlp.up_proj.weight"].T
        x_TD = x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * up_TF) @ own["mlp.down_proj.weight"].T
    head_VD = t["model.embed_tokens.weight" if model.tied_head else "lm_head.weight"]
    return norm(x_TD, t["model.norm.weight"]) @ head_VD.T


@pytest.mark.parametrize("family", MODELS)
def test_loaded_weights_compute_what_they_were_published_for(family, tmp_path):
    """config.json and tensors in, the logits of an independent model in their layout out."""
    tensors = published(MODELS[family])
    folder = write(tmp_path, MODELS[family], tensors)
    model = read_config(folder)
    params = weights.load_weights(folder, model)
    tokens_1T = np.array([[3, 1, 4, 1, 5, 9]])

    @jax.jit
    def logits(params):
        return decoder.logits(params, model, decoder.forward(params, model, tokens_1T, jnp.arange(6)[None])[0])

    expected_TV = their_logits(tensors, model, tokens_1T[0])
    np.testing.assert_allclose(logits(params)[0], expected_TV, rtol=1e-3, atol=1e-3)


def test_layout_by_hand(tmp_path):
    """Rows of theirs are outputs, of head h and channel c in row h C + c; ours have the inputs first."""
    model = MODELS["qwen2"]
    tensors = published(model)
    layers = weights.load_weights(write(tmp_path, model, tensors), model)["layers"]
    h, c, d, f = 2, 3, 5, 4
    assert layers["wq"][1, d, h, c] == tensors["model.layers.1.self_attn.q_proj.weight"][h * 4 + c, d]
    assert layers["wo"][1, h, c, d] == tensors["model.layers.1.self_attn.o_proj.weight"][d, h * 4 + c]
    assert layers["bk"][2, 1, c] == tensors["model.layers.2.self_attn.k_proj.bias"][4 + c]
    assert layers["w_gate"][1, d, f] == tensors["model.layers.1.mlp.gate_proj.weight"][f, d]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bitwise(family, dtype, tmp_path):
    """File to tree to file: the same tensors; tree to file to tree: the same leaves; trees are decoder.init's."""
    model = dataclasses.replace(MODELS[family], param_dtype=dtype)
    tensors = published(model, dtype)
    params = weights.load_weights(write(tmp_path / "a", model, tensors), model)
    shapes = decoder.shapes(model)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    weights.save_weights(tmp_path / "b", model, params)
    assert_same_bits(safetensors.numpy.load_file(tmp_path / "b" / "model.safetensors"), tensors)
    assert dataclasses.replace(read_config(tmp_path / "b"), param_dtype=dtype) == model
    host = jax.device_get(params)
    weights.save_weights(tmp_path / "c", model, host)
    assert_same_bits(weights.load_weights(tmp_path / "c", model), params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_files_are_exact_in_float32(dtype, tmp_path):
    tensors = published(LLAMA, dtype)
    params = weights.load_weights(write(tmp_path, LLAMA, tensors), LLAMA)
    assert params["head"].dtype == np.float32
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"].T.astype(np.float32))


def test_many_files_with_an_index(tmp_path):
    """Files keep to the limit, the index names the file of every tensor, and all together are the one file."""
    params = weights.load_weights(write(tmp_path / "one", LLAMA, published(LLAMA)), LLAMA)
    weights.save_weights(tmp_path / "many", LLAMA, params, file_bytes=2000)
    index = json.loads((tmp_path / "many" / weights.INDEX).read_text())
    files = sorted(tmp_path.glob("many/*.safetensors"))
    assert len(files) > 2 and files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    whole = {}
    for file in files:
        content = safetensors.numpy.load_file(file)
        assert sum(tensor.nbytes for tensor in content.values()) <= 2000
        assert all(index["weight_map"][name] == file.name for name in content)
        whole |= content
    assert_same_bits(whole, published(LLAMA))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert_same_bits(weights.load_weights(tmp_path / "many", LLAMA), params)


@pytest.mark.parametrize("family", MODELS)
def test_eight_devices_read_their_own_parts(family, tmp_path, monkeypatch):
    """Sharded leaves equal those of one device, every number is read once for all devices, and they save the same."""
    model = MODELS[family]
    folder = write(tmp_path / "a", model, published(model))
    whole = weights.load_weights(folder, model)
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = meshes.param_shardings(mesh, decoder.logical_axes(model), whole)
    elements, read = [], weights._Leaf.read
    monkeypatch.setattr(weights._Leaf, "read", lambda *args: elements.append(args[-1].size) or read(*args))
    params = weights.load_weights(folder, model, shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    assert_same_bits(params, whole)
    assert sum(elements) == sum(leaf.size for leaf in jax.tree.leaves(params))
    weights.save_weights(tmp_path / "b", model, params)
    assert_same_bits(safetensors.numpy.load_file(tmp_path / "b" / "model.safetensors"), published(model))


@pytest.mark.parametrize("sharded", [False, True])
def test_host_memory_holds_one_tensor_beside_the_parameters(sharded, tmp_path, monkeypatch):
    """The most that numpy and the files' reader hold at a time; XLA's own buffers are not counted here.

    An embedding that a CPU device takes without a copy is the parameters themselves, and stays. A whole leaf of ours
    would be six times the largest tensor, blocks of it are a twentieth each.
    """
    model = dataclasses.replace(LLAMA, width=512, layers=6, hidden=2048, vocab_size=512, tied_head=True)
    folder = write(tmp_path, model, published(model))
    shapes = decoder.shapes(model)
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = meshes.param_shardings(mesh, decoder.logical_axes(model), shapes) if sharded else None
    weights.load_weights(folder, model, shardings)  # compiles
    largest = 4 * model.width * model.hidden
    sizes, read = [], weights._Leaf.read
    monkeypatch.setattr(weights._Leaf, "read", lambda *args: sizes.append(args[-1].nbytes) or read(*args))
    monkeypatch.setattr(weights, "BLOCK_BYTES", largest // 20)
    tracemalloc.start()
    try:
        weights.load_weights(folder, model, shardings)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * model.width * model.vocab_size + 1.2 * largest
    assert sizes == sorted(sizes, reverse=True)  # so that XLA's buffers are few while much is staged


def test_any_sharding_will_do(tmp_path):
    """First axes split, so layers, which the project's own rules never split."""
    model = dataclasses.replace(LLAMA, layers=4)
    folder = write(tmp_path, model, published(model))
    whole = weights.load_weights(folder, model)
    halves = jax.sharding.NamedSharding(meshes.make_mesh(MeshConfig(data=2, tensor=4)), jax.P("data"))
    assert_same_bits(weights.load_weights(folder, model, jax.tree.map(lambda leaf: halves, whole)), whole)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {Q: None}, f"1 tensors .* missing, the first is {Q}: download all"),
        ("llama", {"lm_head.weight": None}, 'no lm_head.weight: .*"tie_word_embeddings": true'),
        (
            "llama",
            {"model.layers.0.self_attn.q_proj.bias": np.zeros(16)},
            "first is .*q_proj.bias: choose",
        ),
        ("llama", {"model.layers.3.mlp.up_proj.weight": np.zeros(1)}, "does not know, the first is model.layers.3"),
        ("llama", {Q: np.zeros((16, 9), np.float32)}, rf"{Q} is F32 \(16, 9\), .* \(16, 8\)"),
        ("llama", {Q: np.zeros((16, 8), np.int8)}, f"{Q} is I8 .* not quantised"),
        (
            "qwen2",
            {"lm_head.weight": np.ones((12, 8), np.float32)},
            'not the embedding: set "tie_word_embeddings": false',
        ),
    ],
)
def test_tensors_that_do_not_fit_the_model(family, change, message, tmp_path):
    tensors = {name: t for name, t in (published(MODELS[family]) | change).items() if t is not None}
    folder = write(tmp_path, MODELS[family], tensors)
    with pytest.raises(InputError, match=message):
        weights.load_weights(folder, MODELS[family])


def test_harmless_extras_are_passed_over(tmp_path):
    """A tied model that also holds its head, and the RoPE table of old Llama checkpoints."""
    model = MODELS["qwen2"]
    tensors = published(model)
    extras = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    extras |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    params = weights.load_weights(write(tmp_path / "a", model, tensors | extras), model)
    assert_same_bits(params, weights.load_weights(write(tmp_path / "b", model, tensors), model))


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(InputError, match="no .*model.safetensors: download"):
        weights.load_weights(tmp_path, LLAMA)
    file = write(tmp_path, LLAMA, published(LLAMA)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="model.safetensors: not a whole .safetensors file"):
        weights.load_weights(tmp_path, LLAMA)
    (tmp_path / weights.INDEX).write_text("{}")
    with pytest.raises(InputError, match="no weight_map"):
        weights.load_weights(tmp_path, LLAMA)
    (tmp_path / weights.INDEX).write_text('{"weight_map": {"lm_head.weight": "model-00002.safetensors"}}')
    with pytest.raises(InputError, match="no .*model-00002.safetensors"):
        weights.load_weights(tmp_path, LLAMA)


def test_nothing_is_overwritten(tmp_path):
    params = weights.load_weights(write(tmp_path, LLAMA, published(LLAMA)), LLAMA)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a checkpoint already"):
        weights.save_weights(tmp_path, LLAMA, params)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(InputError, match="neither"):
        weights.save_weights(tmp_path / "new", dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True), {})
    assert not (tmp_path / "new").exists()
