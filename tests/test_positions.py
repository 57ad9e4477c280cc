"""Claims: the artefact comes back as written and only whole; selections are what their names say and nest; the
stream is reshuffled and resumes exactly."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpt_jax.config import PositionConfig
from rpt_jax.corpus import positions
from rpt_jax.corpus.positions import Annotated, Position, Positions
from rpt_jax.records import InputError

TOKENIZER = SimpleNamespace(fingerprint="aa11", vocab_size=4, token_bytes=(b"a", b"b", b" ", b""))
OTHER = SimpleNamespace(fingerprint="bb22", vocab_size=7, token_bytes=(b"x",) * 7)
# Document 5 stands before document 2: record order is not document order.
DOCUMENTS = (
    Annotated(
        5,
        "a.jsonl:6",
        np.array([0, 1, 2, 3, 1], np.int32),
        np.array([np.nan, 0.4, 1.2, 2.0, 1.6], np.float32),
        np.array([-1, 1, 2, 0, 0], np.int32),
    ),
    Annotated(
        2,
        "ä.jsonl:3",
        np.array([1, 1, 0], np.int32),
        np.array([np.nan, 0.7, 1.5], np.float32),
        np.array([-1, 0, 0], np.int32),
    ),
)


@pytest.fixture
def folder(tmp_path):
    positions.write_header(tmp_path, positions.make_header(TOKENIZER, PositionConfig(), "base"))
    positions.write_annotated(tmp_path, 0, DOCUMENTS[:1])
    positions.write_annotated(tmp_path, 1, DOCUMENTS[1:])
    return tmp_path


def pairs(selection):
    return list(zip(selection.documents.tolist(), selection.indices.tolist(), strict=True))


def test_artefact_comes_back_as_written(folder):
    annotated = positions.open_annotated(folder, TOKENIZER)
    assert annotated.header["tokenizer"] == "aa11" and annotated.header["proxy"] == "base"
    assert annotated.header["log_base"] == "nats" and annotated.header["vocab_size"] == 4
    assert len(annotated) == 2
    for documents in ([annotated[0], annotated[1]], list(annotated)):
        for read, written in zip(documents, DOCUMENTS, strict=True):
            assert (read.document, read.name) == (written.document, written.name)
            for field in ("tokens_T", "entropies_T", "argmaxes_T"):
                assert getattr(read, field).dtype == getattr(written, field).dtype
                np.testing.assert_array_equal(getattr(read, field), getattr(written, field))
    assert annotated.documents[2].tolist() == [1, 1, 0] and annotated.documents[5].tolist() == [0, 1, 2, 3, 1]
    with pytest.raises(InputError, match="no document 3"):
        annotated.documents[3]


def test_an_interrupted_part_is_not_there(folder, monkeypatch):
    def broken(document):
        if document.document == 2:
            raise KeyboardInterrupt
        return positions_pack(document)

    positions_pack = positions.pack
    monkeypatch.setattr(positions, "pack", broken)
    with pytest.raises(KeyboardInterrupt):
        positions.write_annotated(folder, 2, DOCUMENTS)
    assert positions.written_parts(folder) == [0, 1]
    assert len(positions.open_annotated(folder)) == 2


def test_an_annotation_that_was_broken_off_is_not_learnt_from(folder):
    """Its header says how many documents there are to be."""

    def knows_of(wanted):
        return dataclasses.replace(annotated, header=annotated.header | {"documents": wanted})

    annotated = positions.open_annotated(folder)
    assert len(positions.select_positions(knows_of(2), PositionConfig(threshold=0.0), 0)) == 6
    assert len(positions.difficulty_splits(knows_of(2))["easy"])
    with pytest.raises(InputError, match="has 2 of 3 documents: run the same `rpt annotate` again"):
        positions.select_positions(knows_of(3), PositionConfig(threshold=0.0), 0)
    with pytest.raises(InputError, match="has 2 of 3 documents"):
        positions.difficulty_splits(knows_of(3))


@pytest.mark.parametrize(
    "config, expected",
    [
        # 1.5 is not above 1.5; the position of token 3, which has no bytes, could never be answered
        (PositionConfig(threshold=1.5), [(5, 4)]),
        (PositionConfig(threshold=0.0), [(5, 1), (5, 2), (5, 4), (2, 1), (2, 2)]),
        (PositionConfig(threshold=0.0, minimum_context=2), [(5, 2), (5, 4), (2, 2)]),
        (PositionConfig(select="top_share", share=0.4), [(5, 4), (2, 2)]),
        (PositionConfig(select="top_share", share=0.01), [(5, 4)]),
        (PositionConfig(select="random", share=1.0), [(5, 1), (5, 2), (5, 4), (2, 1), (2, 2)]),
    ],
)
def test_selections_by_hand(folder, config, expected):
    selection = positions.select_positions(positions.open_annotated(folder, TOKENIZER), config, seed=0)
    assert pairs(selection) == expected
    assert selection[0] == Position(*expected[0], pytest.approx(selection.entropies[0]))
    assert selection.indices.dtype == selection.documents.dtype == np.int32


def test_without_a_tokenizer_every_target_counts(folder):
    selection = positions.select_positions(positions.open_annotated(folder), PositionConfig(), seed=0)
    assert pairs(selection) == [(5, 3), (5, 4)]


def test_random_selection_depends_on_the_seed_only(tmp_path):
    write_long(tmp_path, tokens=400)
    annotated = positions.open_annotated(tmp_path)
    config = PositionConfig(select="random", share=0.25)
    drawn = [pairs(positions.select_positions(annotated, config, seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == len(set(drawn[0])) == 100  # of 399 positions


def test_splits_nest(tmp_path):
    write_long(tmp_path, tokens=400)
    splits = positions.difficulty_splits(positions.open_annotated(tmp_path))
    easy, medium, hard = (set(pairs(splits[name])) for name in ("easy", "medium", "hard"))
    assert hard < medium < easy
    for name, entropy in {"easy": 0.5, "medium": 1.0, "hard": 1.5}.items():
        assert splits[name].entropies.min() > entropy
    everything = positions.all_positions(positions.open_annotated(tmp_path), 1)
    assert len(hard) == int((everything.entropies > 1.5).sum())


def write_long(folder, tokens):
    entropies_T = np.random.default_rng(0).uniform(0, 2.3, tokens).astype(np.float32)
    entropies_T[0] = np.nan
    ids_T = np.zeros(tokens, np.int32)
    positions.write_header(folder, positions.make_header(TOKENIZER, PositionConfig(), "base"))
    positions.write_annotated(folder, 0, [Annotated(0, "long", ids_T, entropies_T, ids_T)])


def test_no_position_left_says_the_largest_entropy(folder):
    annotated = positions.open_annotated(folder, TOKENIZER)
    with pytest.raises(InputError, match=r"threshold=3.0 nats; the largest of 5 is 1.6.*top_share"):
        positions.select_positions(annotated, PositionConfig(threshold=3.0), seed=0)
    with pytest.raises(InputError, match="minimum_context=9"):
        positions.select_positions(annotated, PositionConfig(select="random", minimum_context=9), seed=0)


@pytest.mark.parametrize("share", [0.0, 1.5, -0.1])
def test_a_share_is_a_share(folder, share):
    with pytest.raises(InputError, match=f"positions.share={share}"):
        positions.select_positions(positions.open_annotated(folder), PositionConfig(select="random", share=share), 0)


def test_artefacts_that_do_not_fit(folder, tmp_path_factory):
    with pytest.raises(InputError, match="aa11 .*bb22"):
        positions.open_annotated(folder, OTHER)
    with pytest.raises(InputError, match="renormalise=True.*positions.renormalise=False"):
        positions.select_positions(positions.open_annotated(folder), PositionConfig(renormalise=False), seed=0)
    with pytest.raises(InputError, match="begun with proxy='base'.*'other'"):
        positions.write_header(folder, positions.make_header(TOKENIZER, PositionConfig(), "other"))
    positions.write_header(folder, positions.make_header(TOKENIZER, PositionConfig(), "base"))  # continues
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match="rpt annotate"):
        positions.open_annotated(empty)
    positions.write_header(empty, positions.make_header(TOKENIZER, PositionConfig(), "base"))
    with pytest.raises(InputError, match="no finished part"):
        positions.open_annotated(empty)


def test_broken_artefacts(folder):
    positions.write_annotated(folder, 2, DOCUMENTS[:1])
    with pytest.raises(InputError, match="records 0 and 2 both annotate document 5"):
        _ = positions.open_annotated(folder).documents[5]
    (folder / "part-00002.arrayrecord").write_bytes(b"no record " * 10000)
    with pytest.raises(InputError, match="part-00002.arrayrecord"):
        positions.open_annotated(folder)
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps(header | {"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        positions.open_annotated(folder)
    (folder / "header.json").write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        positions.open_annotated(folder)


def many(count):
    indices = np.arange(count, dtype=np.int32)
    return Positions(np.zeros(count, np.int32), indices, np.ones(count, np.float32))


def take(iterator, count):
    return [position.index for position in itertools.islice(iterator, count)]


def test_every_epoch_has_every_position_in_its_own_order():
    drawn = take(iter(positions.position_stream(many(11), seed=4)), 33)
    epochs = [drawn[:11], drawn[11:22], drawn[22:]]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert drawn == take(iter(positions.position_stream(many(11), seed=4)), 33)
    assert drawn != take(iter(positions.position_stream(many(11), seed=5)), 33)


def test_neighbouring_seeds_share_no_epoch():
    epochs = [tuple(take(iter(positions.position_stream(many(20), seed=seed)), 40)[20:]) for seed in range(8)]
    firsts = [tuple(take(iter(positions.position_stream(many(20), seed=seed)), 20)) for seed in range(8)]
    assert len(set(epochs) | set(firsts)) == 16


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 60), st.integers(0, 40), st.integers(0, 2**40))
def test_resumed_equals_uninterrupted(count, stop, seed):
    stream = positions.position_stream(many(count), seed=seed)
    whole = take(iter(stream), stop + 15)
    first = iter(stream)
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))  # a checkpoint keeps it as JSON
    second = iter(stream)
    take(second, 3)
    second.set_state(state)
    assert take(second, 15) == whole[stop:]


def test_a_stream_needs_positions():
    with pytest.raises(InputError, match="no positions"):
        positions.position_stream(many(0), seed=0)


@pytest.mark.parametrize(
    "header", ["[]", "{}", '{"format": 1}', '{"tokenizer": "aa11", "vocab_size": "4"}', "[" * 9999]
)
def test_headers_that_say_too_little(folder, header):
    (folder / "header.json").write_text(header)
    with pytest.raises(
        InputError, match=r"header\.json(: expected a JSON object| does not name the tokenizer| is no JSON)"
    ):
        positions.open_annotated(folder, TOKENIZER)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"tokens_T": [0, 1, 4, 3, 1]}, "has tokens from 0 to 4 in a vocabulary of 4"),
        ({"tokens_T": [0, -1, 2, 3, 1]}, "has tokens from -1 to 3 in a vocabulary of 4"),
        ({"document": 2**31}, "is of document 2147483648, numbers end below 2147483648"),
    ],
)
def test_records_with_what_cannot_be(folder, change, found):
    """Tokens that the tokenizer lacks, and a number of a document that an int32 does not hold."""
    positions.write_annotated(folder, 1, [dataclasses.replace(DOCUMENTS[0], **change)])
    annotated = positions.open_annotated(folder, TOKENIZER)
    with pytest.raises(InputError, match=f"record 1 {found}: annotate again"):
        positions.all_positions(annotated, 1)


def test_a_random_selection_takes_any_seed(folder):
    annotated, config = positions.open_annotated(folder), PositionConfig(select="random", share=0.5)
    assert pairs(positions.select_positions(annotated, config, -1)) == pairs(
        positions.select_positions(annotated, config, 2**64 - 1)
    )
