"""Batches of an update: rows and stream belong together, loads are even, and a wrong shared prefix is noticed."""

import functools

import jax
import numpy as np
import pytest

from rpt_jax import mesh as meshes
from rpt_jax.config import MeshConfig, ModelConfig, UpdateConfig
from rpt_jax.learning import batch, update
from rpt_jax.policy import decoder
from rpt_jax.records import Prompts, Rollouts

MODEL = ModelConfig(vocab_size=12, width=16, layers=2, heads=2, kv_heads=2, head_channels=8, hidden=24)
N, G, T, R = 16, 2, 5, 4


@functools.cache
def policy():
    return jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))


def records():
    """Documents of up to three positions that share their beginning, ragged everywhere."""
    random = np.random.default_rng(0)
    documents_N = np.sort(random.integers(0, 9, N))
    texts = random.integers(0, 11, (9, T))
    lengths_N = random.integers(1, T + 1, N).astype(np.int32)
    lengths_NG = random.integers(0, R + 1, (N, G)).astype(np.int32)
    live_NGR = np.arange(R) < lengths_NG[:, :, None]
    prompts = Prompts(
        tokens_NT=(texts[documents_N] * (np.arange(T) < lengths_N[:, None])).astype(np.int32),
        lengths_N=lengths_N,
        ids_N2=np.stack([documents_N, lengths_N], axis=1).astype(np.uint32),
        truth_NX=None,
        boundaries_NX=None,
        entropies_N=None,
    )
    rollouts = Rollouts(
        tokens_NGR=(random.integers(0, 11, (N, G, R)) * live_NGR).astype(np.int32),
        lengths_NG=lengths_NG,
        logprobs_NGR=(-2.4 * live_NGR).astype(np.float32),
        finished_NG=np.ones((N, G), bool),
    )
    return prompts, rollouts, random.normal(size=(N, G)).astype(np.float32)


def one_device():
    return meshes.make_mesh(MeshConfig(), jax.devices()[:1])


def loss_and_gradients(made, config, mesh):
    params = meshes.place(policy(), meshes.replicated(mesh))
    run = jax.jit(functools.partial(update.loss_and_gradients, model=MODEL, config=config))
    with jax.set_mesh(mesh):
        return jax.device_get(run(params, made, 0.8))


@pytest.mark.parametrize(("microbatches", "devices"), [(1, 1), (4, 1), (2, 4), (4, 8)])
def test_packed_batches_have_the_loss_and_gradients_of_padded_ones(microbatches, devices):
    """Whatever the microbatches and devices, groups split over 32 of them, too; loss, metrics and gradients to 1e-5."""
    plain = batch.pack(*records(), UpdateConfig(), one_device())
    expected = loss_and_gradients(plain.replace(stream=None), UpdateConfig(), one_device())
    config = UpdateConfig(microbatches=microbatches)
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:devices])
    got = loss_and_gradients(batch.pack(*records(), config, mesh), config, mesh)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    for a, b, atol in zip(got, expected, (0, 1e-5 * scale, 0), strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=atol), a, b)


def test_rows_are_those_of_the_stream():
    """Every part and device has in its stream the tokens of the rows that _split gives it."""
    config, mesh = UpdateConfig(microbatches=2), meshes.make_mesh(MeshConfig(), jax.devices()[:4])
    made = jax.device_get(batch.pack(*records(), config, mesh))
    parts = jax.device_get(update._split(made, 2))
    targets_XU = parts.stream.targets_UX.reshape(8, -1)
    tokens = parts.tokens_NGR.reshape(8, N // 8 * G, R)
    lengths = parts.lengths_NG.reshape(8, N // 8 * G)
    for unit in range(8):
        expected = [token for row, length in zip(tokens[unit], lengths[unit], strict=True) for token in row[:length]]
        np.testing.assert_array_equal(targets_XU[unit][targets_XU[unit] >= 0], expected)


def test_the_check_passes_and_notices_a_wrong_mask():
    """One key of one block swapped for another of the stream: well above rounding."""
    config, mesh = UpdateConfig(), one_device()
    made = batch.pack(*records(), config, mesh)
    options = {"model": MODEL, "config": config, "mesh": mesh}
    assert 0 <= batch.check_shared_prefix(policy(), made, 0.8, **options) < 1e-5
    block = made.stream.blocks[1]
    shifted = block.replace(keys_UBS=jax.numpy.roll(block.keys_UBS, 1, axis=2))
    broken = made.replace(stream=made.stream.replace(blocks=(made.stream.blocks[0], shifted)))
    with pytest.raises(FloatingPointError, match="nats a token off those of whole sequences"):
        batch.check_shared_prefix(policy(), broken, 0.8, **options)


def test_shortened_responses_are_padding_behind_their_ends():
    """The stream of a batch of them holds no token from there on; as long as they were, they stay as they are."""
    prompts, rollouts, advantages_NG = records()
    lengths_NG = rollouts.lengths_NG // 2
    shorter = batch.shortened(rollouts, lengths_NG)
    for n, g in np.ndindex(N, G):
        length = lengths_NG[n, g]
        for name in ("tokens_NGR", "logprobs_NGR"):
            before, after = getattr(rollouts, name)[n, g], getattr(shorter, name)[n, g]
            np.testing.assert_array_equal(after, np.where(np.arange(R) < length, before, 0))
    made = batch.pack(
        prompts, shorter, advantages_NG, UpdateConfig(), meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    )
    assert (np.asarray(made.stream.targets_UX) >= 0).sum() == lengths_NG.sum() < rollouts.lengths_NG.sum()
    jax.tree.map(np.testing.assert_array_equal, batch.shortened(rollouts, rollouts.lengths_NG), rollouts)
