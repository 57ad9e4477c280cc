"""Against transformers without it: checkpoints, logits and greedy tokens in golden/, made by golden/make.py."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import toy
from golden.make import CASES, TOKENS

from rpt_jax import cli
from rpt_jax.config import SampleConfig
from rpt_jax.learning.policy_folder import load_policy
from rpt_jax.policy import decoder, weights
from rpt_jax.policy.sampler import sample
from rpt_jax.policy.weights_config import read_config
from rpt_jax.records import Prompts

GOLDEN = Path(__file__).parent / "golden"


def our_logits(model, params, tokens_T):
    """All logits [T, V] in float32."""

    @jax.jit
    def logits(params):
        tokens_1T, positions_1T = jnp.asarray(tokens_T)[None], jnp.arange(len(tokens_T))[None]
        return decoder.logits(params, model, decoder.forward(params, model, tokens_1T, positions_1T)[0])[0]

    return np.asarray(logits(params))


def our_greedy(model, params, tokens_T, added: int, end_ids=()):
    """What the sampler adds at temperature 0."""
    settings = SampleConfig(group_size=1, temperature=0, max_tokens=added, tokens_per_call=added)
    nothing = {name: np.zeros((1, 1)) for name in ("ids_N2", "truth_NX", "boundaries_NX", "entropies_N")}
    lengths_N = np.array([len(tokens_T)], np.int32)
    prompts = Prompts(**nothing | {"tokens_NT": np.asarray(tokens_T, np.int32)[None], "lengths_N": lengths_N})
    prompts = prompts.replace(ids_N2=np.zeros((1, 2), np.uint32))
    rollouts = sample(params, model, settings, prompts, jax.random.key(0), tuple(end_ids))
    return rollouts.tokens_NGR[0, 0, : rollouts.lengths_NG[0, 0]]


def relative(ours, theirs) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def tensors_of(folder) -> dict[str, tuple]:
    """(dtype, bytes) of each tensor."""
    files = [safetensors.numpy.load_file(file) for file in folder.glob("*.safetensors")]
    return {name: (tensor.dtype, tensor.tobytes()) for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
    model = read_config(GOLDEN / name)
    params = weights.load_weights(GOLDEN / name, model)
    expected = np.load(GOLDEN / name / "expected.npz")
    assert relative(our_logits(model, params, expected["tokens_T"]), expected["logits_TV"]) < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(name):
    model = read_config(GOLDEN / name)
    params = weights.load_weights(GOLDEN / name, model)
    expected = np.load(GOLDEN / name / "expected.npz")
    greedy_R = our_greedy(model, params, expected["tokens_T"][: TOKENS // 2], len(expected["greedy_R"]))
    np.testing.assert_array_equal(greedy_R, expected["greedy_R"])


@pytest.mark.parametrize("name", CASES)
def test_through_a_policy_and_back_to_the_bit(name, tmp_path, capsys):
    """Published -> policy -> published by commands: the same tensors in the same dtype, and the same model."""
    shutil.copytree(GOLDEN / name, tmp_path / "theirs")
    toy.tokenizer().save(tmp_path / "theirs")

    def convert(*words):
        status = cli.main(["convert", *map(str, words), "--json"])
        output, message = capsys.readouterr()
        assert status == 0, message
        return json.loads(output.splitlines()[-1])

    made = convert("hf-to-orbax", tmp_path / "theirs", tmp_path / "policy")
    config = json.loads((GOLDEN / name / "config.json").read_text())
    assert made["dtype"] == config["dtype"] and made["context"] == config["max_position_embeddings"]
    convert("orbax-to-hf", tmp_path / "policy", tmp_path / "ours")
    assert tensors_of(tmp_path / "ours") == tensors_of(tmp_path / "theirs") != {}
    assert read_config(tmp_path / "ours") == read_config(tmp_path / "theirs")
    assert load_policy(tmp_path / "policy")[2].fingerprint == toy.tokenizer().fingerprint
