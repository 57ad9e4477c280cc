"""Claims: every token but the first of a document is learnt from once; what an update reads depends on seed and step
alone; the gradient is the weighted sum of both, on one device and on several; without a share nothing changes."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mesh_law as law
import toy
from hypothesis import given
from hypothesis import strategies as st
from toy import rows_of

from rpt_jax.config import MeshConfig
from rpt_jax.learning import batch, text_loss, train, update
from rpt_jax.mesh import make_mesh, param_shardings, place
from rpt_jax.policy import decoder, flops
from rpt_jax.policy.decoder import forward, output_head
from rpt_jax.records import InputError

STEPS, SHARE = 6, 0.25


class Artefact(list):
    """Documents as an opened artefact has them, by number and in stored order."""

    documents = property(lambda self: {each.document: each.tokens_T for each in self})


def artefact(*lengths):
    return Artefact(SimpleNamespace(document=7 * i, tokens_T=100 * i + np.arange(n)) for i, n in enumerate(lengths))


def test_windows_by_hand():
    """Documents of 5, 2, 1 and 6 tokens in windows of 3; each but the first of a document begins with one more."""
    windows = text_loss.cut(artefact(5, 2, 1, 6), 3)
    assert windows.numbers.tolist() == [0, 0, 7, 21, 21, 21] and windows.starts.tolist() == [0, 2, 0, 0, 2, 4]
    text = text_loss.drawn(windows, seed=0, step=0, rows=6)
    rows = sorted(row[:n].tolist() for row, n in zip(text.tokens_BT, text.lengths_B, strict=True))
    assert rows == [[0, 1, 2], [2, 3, 4], [100, 101], [300, 301, 302], [302, 303, 304], [304, 305]]
    assert text.tokens_BT.dtype == text.lengths_B.dtype == np.int32 and text.tokens_BT.shape == (6, 3)
    assert not text.tokens_BT[text.lengths_B == 2, 2].any()
    with pytest.raises(InputError, match="no document has 2 tokens"):
        text_loss.cut(artefact(1, 0), 3)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(2, 5), st.integers(0, 2**70))
def test_every_token_but_the_first_is_predicted_once(lengths, length, seed):
    documents = artefact(2, *lengths)
    windows = text_loss.cut(documents, length)
    text = text_loss.drawn(windows, seed, 3, len(windows.numbers))
    predicted = [t for row, n in zip(text.tokens_BT.tolist(), text.lengths_B, strict=True) for t in row[1:n]]
    assert sorted(predicted) == [t for each in documents for t in each.tokens_T[1:].tolist()]


def test_what_is_drawn_depends_on_seed_and_step_alone():
    windows = text_loss.cut(artefact(*[9] * 40), 5)

    def rows(seed, step, count=16):
        return text_loss.drawn(windows, seed, step, count).tokens_BT[:, 0].tolist()

    assert rows(1, 2) == rows(1, 2) and len(set(rows(1, 2))) == 16
    assert len({tuple(sorted(rows(seed, step))) for seed in range(3) for step in range(3)}) == 9
    assert len(rows(0, 0, 99)) == 99  # more than there are


def plain_loss(params, model, text):
    """Mean cross entropy by all logits, written out."""
    B, T = text.tokens_BT.shape
    places_BT = np.where(np.arange(T) < text.lengths_B[:, None], np.arange(T), -1)
    hidden_BTD, _ = forward(params, model, text.tokens_BT, places_BT)
    logits_BTV = jnp.einsum("btd,dv->btv", hidden_BTD, output_head(params, model))
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    losses = [-logp_BTV[b, t - 1, text.tokens_BT[b, t]] for b in range(B) for t in range(1, int(text.lengths_B[b]))]
    return jnp.stack(losses).mean()


CONFIG = dataclasses.replace(law.UPDATE, next_token_share=SHARE)


def text_data(rows=8, T=6):
    random = np.random.default_rng(3)
    lengths_B = random.integers(2, T + 1, rows).astype(np.int32)
    tokens_BT = random.integers(0, law.MODEL.vocab_size, (rows, T)) * (np.arange(T) < lengths_B[:, None])
    return text_loss.Text(tokens_BT.astype(np.int32), lengths_B)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_gradient_of_the_mix_is_the_weighted_sum(microbatches):
    model, text, config = law.MODEL, text_data(), dataclasses.replace(CONFIG, microbatches=microbatches)
    params = law.policy(model)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        packed = batch.pack(*law.step_data(), config, mesh)
        options = {"model": model, "config": config}
        loss, gradients, _ = update.loss_and_gradients(params, packed, 0.8, None, packed.logprobs_NGR, **options)
        of_text, text_gradients = jax.value_and_grad(plain_loss)(params, model, text)
        both, mixed_gradients, metrics = text_loss.mixed(params, loss, gradients, text, **options)
        none = dataclasses.replace(config, next_token_share=0.0)
        same, unmixed, _ = text_loss.mixed(params, loss, gradients, text, model=model, config=none)
    assert float(metrics["next_token_loss"]) == pytest.approx(float(of_text), rel=1e-5)
    assert float(both) == pytest.approx(0.75 * float(loss) + 0.25 * float(of_text), rel=1e-5)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, gradients, text_gradients)
    assert not law.far(gradients=(mixed_gradients, expected))
    assert law.far(gradients=(gradients, expected)) and law.far(gradients=(text_gradients, expected))
    assert int(metrics["next_token_tokens"]) == text.lengths_B.sum() and int(metrics["next_token_rows"]) == 8
    jax.tree.map(np.testing.assert_array_equal, unmixed, gradients)  # to the bit
    assert same == loss


def step_on(shape):
    """(parameters, gradients, metrics) of a step of the mix, as rpt train makes it; as in test_mesh_law."""
    mesh, model = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)]), law.MODEL
    with jax.set_mesh(mesh):
        params = place(law.policy(model), param_shardings(mesh, decoder.logical_axes(model), law.policy(model)))
        state = update.init_state(params, update.make_optimizer(CONFIG, 10))
        packed = batch.pack(*law.step_data(), CONFIG, mesh)
        text = place(text_data(), text_loss.batch_sharding(mesh))
        options = {"model": model, "config": CONFIG, "steps": 10}
        state, metrics = update.train_step(state, packed, 0.8, None, packed.logprobs_NGR, text, **options)
    moments = next(part.mu for part in state.optimizer_state if hasattr(part, "mu"))
    metrics = {name: x for name, x in metrics.items() if name not in law.BY_UNIT}
    return jax.device_get((state.params, moments, metrics))


def test_several_devices_give_what_one_gives():
    """In two microbatches."""
    alone, several = step_on((1, 1, 1)), step_on((2, 1, 2))
    names = ("params", "gradients", "metrics")
    assert not law.far(**{name: (a, b) for name, a, b in zip(names, several, alone, strict=True)})
    assert "next_token_loss" in alone[2]


def settings(folder, **options):
    config = toy.config(folder, seed=4, steps=STEPS)
    changes = {"next_token_share": SHARE, "next_token_length": 3, "next_token_sequences": 12} | options
    return dataclasses.replace(config, update=dataclasses.replace(config.update, **changes))


def run(config, **options):
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return train.train(config, **toy.arguments(mesh=mesh, **options))


@functools.cache
def finished():
    folder = Path(tempfile.mkdtemp()) / "run"
    return folder, run(settings(folder))


def test_a_continued_run_is_the_run_that_was_not_broken_off(tmp_path):
    toy.assert_continues(run, settings, finished(), tmp_path, stopped=4, saved=2)


def test_a_run_reports_and_counts_its_text():
    """Documents of four tokens in windows of three: three tokens, then two."""
    rows = rows_of(finished()[0])
    assert rows[-1]["next_token_loss"] < rows[0]["next_token_loss"]
    assert len({row["next_token_loss"] for row in rows}) == STEPS
    for row in rows:
        assert row["next_token_rows"] == 12 and 24 <= row["next_token_tokens"] <= 36
        of_text = flops.pretraining(toy.model(), 12, row["next_token_tokens"])
        of_policy = flops.update(toy.model(), 8, row["prompt_tokens"], 32, row["response_tokens"])
        assert of_text > 0 and row["flops_update"] == of_policy + of_text


def test_without_a_share_nothing_changes(tmp_path):
    """To the bit, whatever else is set."""
    off = {"next_token_share": 0.0, "next_token_sequences": 0}
    state = run(settings(tmp_path / "a", **off, next_token_length=512))
    other = run(settings(tmp_path / "b", **off))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(other))
    assert not any("next_token" in name for name in rows_of(tmp_path / "a")[0])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *jax.device_get((state.params, finished()[1].params)))
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"next_token_share": 1.0}, "next_token_share=1.0: use 0 .off. to below 1"),
        ({"next_token_share": -0.1}, "next_token_share=-0.1"),
        ({"next_token_length": 1}, "next_token_length=1: use 2 or more"),
        ({"microbatches": 8}, "12 sequences .* update.microbatches=8: use --update.next-token-sequences 16"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(settings(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
