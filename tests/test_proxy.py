"""Claims: entropies and arg-maxes are those of a full softmax over the same context; batching, padding, chunks, parts,
interruptions and devices change none; long documents keep half a window of context; what does not fit is refused."""

import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import CorpusConfig, MeshConfig, ModelConfig, PositionConfig
from rpt_jax.corpus.documents import open_corpus
from rpt_jax.corpus.positions import open_annotated, written_parts
from rpt_jax.mesh import make_mesh, param_shardings, place, replicated
from rpt_jax.policy import decoder, proxy
from rpt_jax.records import InputError

MODEL = ModelConfig(vocab_size=40, width=16, layers=1, heads=2, kv_heads=1, head_channels=8, hidden=24)
START = 39
TOKENIZER = SimpleNamespace(
    fingerprint="aa11",
    vocab_size=40,
    token_bytes=tuple(bytes([i]) for i in range(40)),
    start_ids=lambda piece, setting: {"": [], "<s>": [START]}[piece],
)
LENGTHS = (30, 1, 5, 17, 2, 30, 70, 16)  # tokens; one of a single token, four beyond a window of 14
RANDOM = np.random.default_rng(0)
DOCUMENTS = [(7 * i, f"a:{i}", RANDOM.integers(0, 40, n).astype(np.int32)) for i, n in enumerate(LENGTHS)]
CONFIG = PositionConfig(top_candidates=4, window=14, batch_tokens=64)  # one shape, 4 x 16 tokens
BANNED = (3, 11)


@functools.cache
def policy():
    """Random parameters; drawn by numpy, as compiling decoder.init would take longer than most tests here."""
    shapes = decoder.shapes(MODEL)
    random = np.random.default_rng(5)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.5, leaf.shape), leaf.dtype), shapes)


def annotate(folder, config=CONFIG, documents=DOCUMENTS, model=MODEL, params=None, tokenizer=TOKENIZER, **options):
    options = {"proxy": "base", "part_documents": 3, "token_chunk": 16} | options
    proxy.annotate(params or policy(), model, tokenizer, documents, folder, config, **options)
    return {annotated.document: annotated for annotated in open_annotated(folder)}


@jax.jit
def logits_after(params, tokens_BT, lengths_B):
    positions_BT = decoder.positions_from_lengths(lengths_B, tokens_BT.shape[1])
    hidden_BTD, _ = decoder.forward(params, MODEL, tokens_BT, positions_BT)
    return decoder.logits(params, MODEL, hidden_BTD)


def context_starts(tokens, window):
    """First token of what is seen at each t >= 1 by the documented rule: the first of the windows that start every
    half window whose end reaches t."""
    return [next(s for s in range(0, tokens, window // 2) if s + window >= t) for t in range(1, tokens)]


def by_hand(config=CONFIG, banned=()):
    """Every prediction from its own context alone, a row each, by a softmax over the whole vocabulary in float64."""
    ahead = [START] if config.start else []
    contexts = [
        [*ahead, *tokens_T[start:t]]
        for _, _, tokens_T in DOCUMENTS
        for t, start in enumerate(context_starts(len(tokens_T), config.window - len(ahead)), start=1)
    ]
    lengths_B = np.array([len(context) for context in contexts])
    tokens_BT = np.zeros((len(contexts), 80), np.int32)
    for tokens_T, context in zip(tokens_BT, contexts, strict=True):
        tokens_T[: len(context)] = context
    z_BV = np.asarray(logits_after(policy(), tokens_BT, lengths_B), np.float64)[np.arange(len(contexts)), lengths_B - 1]
    z_BV[:, list(banned)] = -np.inf
    p_BV = np.exp(z_BV) / np.exp(z_BV).sum(1, keepdims=True)
    p_BZ = -np.sort(-p_BV, axis=1)[:, : config.top_candidates]
    p_BZ = p_BZ / p_BZ.sum(1, keepdims=True) if config.renormalise else p_BZ
    entropies_B = -(p_BZ * np.log(np.where(p_BZ > 0, p_BZ, 1))).sum(1)
    splits = np.cumsum([len(tokens_T) - 1 for _, _, tokens_T in DOCUMENTS])[:-1]
    return np.split(entropies_B, splits), np.split(z_BV.argmax(1), splits)


def assert_same(some, others, **tolerance):
    assert some.keys() == others.keys()
    for document, annotated in some.items():
        other = others[document]
        np.testing.assert_allclose(annotated.entropies_T, other.entropies_T, **tolerance)
        np.testing.assert_array_equal(annotated.argmaxes_T, other.argmaxes_T)
        np.testing.assert_array_equal(annotated.tokens_T, other.tokens_T)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return annotate(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "config, banned",
    [
        (CONFIG, ()),
        (dataclasses.replace(CONFIG, renormalise=False, window=7), BANNED),
        (dataclasses.replace(CONFIG, top_candidates=400, window=40), BANNED),  # more than there are; three shapes
        (dataclasses.replace(CONFIG, start="<s>"), ()),
    ],
)
def test_equals_full_softmax_over_the_same_context(tmp_path, config, banned):
    got = annotate(tmp_path, config, banned_ids=banned)
    for (number, name, tokens_T), entropies_T, argmaxes_T in zip(DOCUMENTS, *by_hand(config, banned), strict=True):
        annotated = got[number]
        assert annotated.name == name
        np.testing.assert_array_equal(annotated.tokens_T, tokens_T)
        assert np.isnan(annotated.entropies_T[0]) and annotated.argmaxes_T[0] == -1
        np.testing.assert_allclose(annotated.entropies_T[1:], entropies_T, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(annotated.argmaxes_T[1:], argmaxes_T)
        assert not np.isin(annotated.argmaxes_T, banned).any()


@pytest.mark.parametrize(
    "top, renormalise, banned, entropy_in_bits",
    [
        (4, True, (), 1.75),
        (2, False, (), 1.0),  # 1/2 * 1 + 1/4 * 2
        (2, True, (), np.log2(3) - 2 / 3),  # 2/3 and 1/3
        (1, True, (), 0.0),
        (1, False, (), 0.5),
        (4, True, (1,), 1.5),  # without the first: 1/2, 1/4, 1/4
        (2, False, (1,), 1.0),
    ],
)
def test_entropies_by_hand(top, renormalise, banned, entropy_in_bits):
    """p = 1/8, 1/2, 1/8, 1/4."""
    logits_BTV = jnp.tile(jnp.log(jnp.array([1 / 8, 1 / 2, 1 / 8, 1 / 4])), (1, 1, 1))
    logits_BTV = logits_BTV.at[..., jnp.array(banned, int)].set(-jnp.inf)
    entropies, argmaxes = proxy.candidates(logits_BTV, top, renormalise)
    np.testing.assert_allclose(entropies, entropy_in_bits * np.log(2), rtol=1e-5, atol=1e-6)
    assert argmaxes == (3 if banned else 1)


@pytest.mark.parametrize("window", [2, 3, 7, 20, 64])
def test_windows_predict_every_token_once_from_half_a_window_or_all(window):
    for tokens in range(1, 90):
        kept = []
        for start, stop, first in proxy.windows(tokens, window):
            assert stop - start <= window and stop < tokens
            for target in range(first, stop + 1):
                assert start == 0 or target - start > window / 2
                kept.append(target)
        assert kept == list(range(1, tokens))


@pytest.mark.parametrize(
    "options",
    [
        {"part_documents": 100},
        {"token_chunk": 1},
        {"config": dataclasses.replace(CONFIG, batch_tokens=1)},
        {"config": dataclasses.replace(CONFIG, batch_tokens=1000), "token_chunk": 1000},
        {"documents": DOCUMENTS[::-1]},
    ],
    ids=["parts", "chunk", "one-row-each", "one-batch", "order"],
)
def test_batches_change_nothing(tmp_path, reference, options):
    assert_same(annotate(tmp_path, **options), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 2, 1), (1, 2, 1), (2, 2, 2)])
@pytest.mark.parametrize("spread", [False, True])
def test_a_mesh_changes_nothing(tmp_path, reference, shape, spread):
    """Rows over data and fsdp, parameters whole or spread as those of a policy that is read, against one device."""
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
    shardings = param_shardings(mesh, decoder.logical_axes(MODEL), policy()) if spread else replicated(mesh)
    got = annotate(tmp_path, params=place(policy(), shardings), mesh=mesh)
    assert_same(got, reference, rtol=1e-4, atol=1e-5)


def test_continues_where_it_was_interrupted(tmp_path, reference):
    """Stopped in the second part: the first is whole and stays, the second is made anew, all bits are the same."""
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        annotate(tmp_path, progress=stop)
    assert written_parts(tmp_path) == [0]
    before = (tmp_path / "part-00000.arrayrecord").stat().st_mtime_ns
    read = []

    class Watched(list):
        def __getitem__(self, place):
            read.append(place)
            return super().__getitem__(place)

    done = []
    again = annotate(tmp_path, documents=Watched(DOCUMENTS), progress=lambda *d: done.append(d))
    assert (tmp_path / "part-00000.arrayrecord").stat().st_mtime_ns == before
    assert read == [0, 1, 2, 3, 4, 5, 6, 7]  # the first three: compared with what is there
    assert_same(again, reference, rtol=0, atol=0)
    assert done == sorted(done) and done[0] == (3, 8) and done[-1] == (8, 8)
    assert written_parts(tmp_path) == [0, 1, 2]


def test_other_proxies_settings_and_documents_do_not_mix(tmp_path):
    annotate(tmp_path)
    other = policy() | {"head": policy()["head"].at[0, 0].add(1e-6)}
    number, name, tokens_T = DOCUMENTS[0]
    edited = [(number, name, np.roll(tokens_T, 1)), *DOCUMENTS[1:]]
    assert not np.array_equal(tokens_T, np.roll(tokens_T, 1))
    shorter = [DOCUMENTS[0], DOCUMENTS[1], (14, "a:2", DOCUMENTS[2][2][:-1]), *DOCUMENTS[3:]]
    for options, message in (
        ({"params": other}, "begun with parameters="),
        ({"model": dataclasses.replace(MODEL, rope_theta=9999.0)}, "begun with model="),
        ({"proxy": "late"}, "begun with proxy='base'"),
        ({"banned_ids": (3,)}, "begun with banned_ids="),
        ({"config": dataclasses.replace(CONFIG, window=30)}, "begun with window=14"),
        ({"config": dataclasses.replace(CONFIG, start="<s>")}, "begun with start=None, this annotation has '<s>'"),
        ({"documents": DOCUMENTS[:-1]}, "begun with documents=8"),
        ({"documents": edited}, "part 0 was made from other documents"),
        ({"documents": shorter}, "part 0 was made from other documents"),
    ):
        with pytest.raises(InputError, match=message):
            annotate(tmp_path, **options)
    assert json.loads((tmp_path / "header.json").read_text())["window"] == 14


def test_bad_input_is_refused(tmp_path):
    larger = SimpleNamespace(**vars(TOKENIZER) | {"vocab_size": 41})
    for options, message in (
        ({"tokenizer": larger}, "41 ids and the proxy model.vocab_size=40"),
        ({"documents": [(0, "b:9", np.array([1, 40]))]}, "b:9: token ids from 1 to 40"),
        ({"banned_ids": (40,)}, "banned token 40"),
        ({"config": dataclasses.replace(CONFIG, top_candidates=0)}, "positions.top_candidates=0"),
        ({"config": dataclasses.replace(CONFIG, window=1)}, "positions.window=1"),
        ({"config": dataclasses.replace(CONFIG, window=2, start="<s>")}, "positions.window=2: use 3 or more"),
    ):
        with pytest.raises(InputError, match=message):
            annotate(tmp_path / message[:9], **options)
    with pytest.raises(FloatingPointError, match="a:0"):
        annotate(tmp_path / "nan", params=policy() | {"head": policy()["head"].at[0, 0].set(jnp.nan)})


def test_token_source_reads_the_corpus(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n\n{"text": "cde"}\n{"text": "ff"}\n')
    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()), longest_token=1, represents_all=True)
    corpus = open_corpus(CorpusConfig(files=(str(tmp_path / "a.jsonl"),)), tokenizer, seed=0)
    source = proxy.TokenSource(corpus.documents, np.array([0, 2]), tokenizer)
    assert len(source) == 2
    number, name, tokens_T = source[1]
    assert (number, name.rpartition("/")[2], tokens_T.tolist()) == (2, "a.jsonl:4", [102, 102])
