"""Claims: figures are what counting by hand gives; each position is evaluated once whatever the splits; the arg-max is
the proxy's, the rollouts are the sampler's and depend on seed and position only; a prefill is part of the response."""

import dataclasses
import functools
import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rpt_jax.config import EvaluateConfig, MeshConfig, ModelConfig, PositionConfig, PromptConfig, SampleConfig
from rpt_jax.corpus.positions import Position, Positions, open_annotated
from rpt_jax.corpus.prompts import parse_answer
from rpt_jax.corpus.templates import Template
from rpt_jax.mesh import make_mesh, place, replicated
from rpt_jax.policy import decoder, proxy, sampler
from rpt_jax.records import InputError, Rollouts
from rpt_jax.study import evaluate as study

PIECES = (b"a", b"b", b"ab", b"}", b"</think>\\boxed{", b"<think>", b"}")  # the last one ends a response
CLOSE, THINK, END = 4, 5, 6
TOKENIZER = SimpleNamespace(
    token_bytes=PIECES,
    vocab_size=len(PIECES),
    fingerprint="seven",
    end_of_text=END,
    start_ids=lambda piece, setting: {"": [], "<think>": [THINK]}[piece],
    encode_markup=lambda text: {"": [], "<think>": [THINK]}[text],
    bytes_of=lambda ids: b"".join(PIECES[i] for i in ids),
    id_of=lambda piece: None,
)
MODEL = ModelConfig(vocab_size=7, width=16, layers=1, heads=2, kv_heads=1, head_channels=8, hidden=24)
RANDOM = np.random.default_rng(0)
DOCUMENTS = [RANDOM.integers(0, 3, n).astype(np.int32) for n in (12, 5, 40)]
HARD = [Position(0, 3, 2.0), Position(2, 30, 1.75)]
EASY = [Position(2, 30, 1.75), Position(1, 4, 0.75), Position(0, 3, 2.0), Position(2, 1, 0.5), Position(0, 11, 0.625)]
SPLITS = {"easy": EASY, "hard": HARD, "none": []}
MANY = [*EASY, *(Position(2, t, 0.5) for t in range(11, 39) if t != 30)]
CONFIG = EvaluateConfig(positions=0, group_size=3, pass_at=2, temperature=1.0, batch_size=len(MANY))
SAMPLE = SampleConfig(max_tokens=6, tokens_per_call=8)
TEMPLATE = Template("thought alone", thought="<think>")
PROMPT = PromptConfig(max_tokens=64, truth_bytes=8)


@functools.cache
def policy():
    """Random parameters; drawn by numpy, as compiling decoder.init would take longer than most tests here."""
    shapes = decoder.shapes(MODEL)
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)


def evaluate(splits, params=None, prompt=PROMPT, config=CONFIG, seed=7, **options):
    sample = options.pop("sample", SAMPLE)
    options |= {"prompt": prompt, "sample": sample, "config": config, "seed": seed, "end_ids": (END,)}
    return study.evaluate(params or policy(), MODEL, TOKENIZER, TEMPLATE, DOCUMENTS, splits, **options)


def by_place(evaluation):
    """{(document, index): everything about it}."""
    sampled = evaluation.sampled
    return {
        (position.document, position.index): (
            position.entropy,
            evaluation.argmax_tokens_N[n],
            sampled.rewards_NG[n].tolist(),
            sampled.answers[n],
            [tokens_R.tolist() for tokens_R in sampled.responses[n]],
        )
        for n, position in enumerate(evaluation.positions[i] for i in range(len(evaluation.positions)))
    }


# What a scripted policy says at each place: two responses, ended or not.
SCRIPT = {
    (0, 3): ([CLOSE, "truth", 3, END], [CLOSE, END]),  # right, empty box
    (2, 30): ([CLOSE, "truth", 3, END], [CLOSE, "truth", 3, END]),  # right twice
    (1, 4): ([0, 1, 0, 1, 0, 1], [CLOSE, "truth", 3, 0, 0, 0]),  # no answer; one that never ends
    (2, 1): ([CLOSE, "wrong", 3, END], [CLOSE, "wrong", 3, END]),
    (0, 11): ([CLOSE, "wrong", 3, END], [CLOSE, "truth", 3, END]),
}


@pytest.fixture
def scripted(monkeypatch):
    """Puts the script in the place of sampler and arg-max; gives the places of all batches."""
    asked = []

    def sample(params, model, sampling, prompts, key, end_ids):
        assert (sampling.group_size, sampling.temperature) in ((2, 0.8), (1, 0.0)) and end_ids == (END,)
        N, G = len(prompts.ids_N2), sampling.group_size
        tokens_NGR, lengths_NG = np.zeros((N, G, 6), np.int32), np.zeros((N, G), np.int32)
        for n, (document, index) in enumerate(prompts.ids_N2.tolist()):
            asked.append((G, document, index))
            truth = int(DOCUMENTS[document][index])
            words = {"truth": truth, "wrong": (truth + 1) % 2 if truth < 2 else 1}
            for g, response in enumerate(SCRIPT[document, index][:G]):
                lengths_NG[n, g] = len(response)
                tokens_NGR[n, g, : len(response)] = [words.get(token, token) for token in response]
        return Rollouts(tokens_NGR, lengths_NG, np.zeros((N, G, 6), np.float32), (tokens_NGR == END).any(axis=2))

    monkeypatch.setattr(study, "sample_rollouts", sample)
    # The true token after 3 and 1 tokens, a token that is none after 4, 11 and 30.
    after = {3: DOCUMENTS[0][3], 1: DOCUMENTS[2][1], 4: END, 11: END, 30: END}
    monkeypatch.setattr(
        study, "most_probable", lambda *arguments: np.array([after[length] for length in arguments[-1].tolist()])
    )
    return asked


def test_figures_by_hand(scripted):
    config = EvaluateConfig(positions=0, group_size=2, temperature=0.8, batch_size=2)
    ticks = []
    evaluation = evaluate(SPLITS, config=config, progress=lambda *count: ticks.append(count))
    summary = evaluation.summary()
    assert json.loads(json.dumps(summary)) == summary
    easy, hard, none = summary["easy"], summary["hard"], summary["none"]
    assert (easy["positions"], hard["positions"], none["positions"]) == (5, 2, 0)
    for name, of_easy, of_hard in (
        ("argmax", 2 / 5, 1 / 2),
        ("reasoning", (1 / 2 + 1 + 0 + 0 + 1 / 2) / 5, 3 / 4),
        ("pass_at_k", 3 / 5, 1.0),
        ("format_rate", (1 + 1 + 0 + 1 + 1) / 5, 1.0),  # the box that is empty counts, the one that never ends not
        ("response_length", (3 + 4 + 6 + 4 + 4) / 5, 3.5),
    ):
        assert easy[name] == pytest.approx(of_easy) and hard[name] == pytest.approx(of_hard)
        assert none[name] is None and none["standard_errors"][name] is None
    assert easy["standard_errors"]["argmax"] == pytest.approx((0.4 * 0.6 / 5) ** 0.5)  # binomial
    of_positions = np.array([0.5, 1, 0, 0, 0.5])
    assert easy["standard_error"] == easy["standard_errors"]["reasoning"]
    assert easy["standard_error"] == pytest.approx(of_positions.std() / 5**0.5)
    assert "greedy" not in easy
    assert set(scripted) == {(2, *place) for place in SCRIPT}
    assert len(scripted) == 6  # five and one repeat, for batches of two
    assert ticks == [(i, 6) for i in range(1, 7)]
    of_document_0 = evaluation.figures(evaluation.positions.documents == 0)
    assert of_document_0["positions"] == 2 and of_document_0["reasoning"] == 0.5


def test_greedy_stands_beside_the_sampled(scripted):
    """Greedy gets the first response of the script."""
    config = EvaluateConfig(positions=0, group_size=2, temperature=0.8, batch_size=5, greedy=True)
    ticks = []
    figures = evaluate(SPLITS, config=config, progress=lambda *count: ticks.append(count)).summary()["easy"]
    assert figures["greedy"] == pytest.approx(2 / 5) and figures["reasoning"] == pytest.approx(2 / 5)
    assert figures["greedy_format_rate"] == pytest.approx(4 / 5)
    assert figures["standard_errors"]["greedy"] == pytest.approx((0.4 * 0.6 / 5) ** 0.5)
    assert sorted(scripted) == sorted((G, *place) for place in SCRIPT for G in (1, 2)) and ticks[-1] == (3, 3)


def test_pass_at_k_counts_all_draws():
    for G, k in ((1, 1), (4, 1), (4, 2), (5, 3), (4, 4)):
        rewards_NG = np.array(list(itertools.product([0, 1], repeat=G)), np.float32)
        by_counting = [np.mean([max(drawn) for drawn in itertools.combinations(row, k)]) for row in rewards_NG]
        np.testing.assert_allclose(study.pass_at_k(rewards_NG, k), by_counting, atol=1e-12)


@functools.cache
def reference():
    """With the box opened by a prefill, so that a random policy is right now and then."""
    return evaluate({"many": MANY}, prefill=(CLOSE,))


def test_the_random_policy_shows_every_outcome():
    """The tests below would show little if all answers were missing or all wrong."""
    sampled = reference().sampled
    assert 0 < sampled.rewards_NG.mean() < sampled.formatted_NG.mean() < 1
    assert len(np.unique(sampled.lengths_NG)) > 2
    figures = reference().summary()["many"]
    assert figures["reasoning"] < figures["pass_at_k"]


def test_rollouts_are_the_samplers():
    """The prompts written out by hand and sampled from give the same tokens, answers and rewards."""
    sampled, positions = reference().sampled, reference().positions
    places = list(zip(positions.documents, positions.indices, strict=True))
    rows = [[*DOCUMENTS[d][:t], THINK, CLOSE] for d, t in places]
    tokens_NT = np.zeros((32, 48), np.int32)
    for tokens_T, row in zip(tokens_NT, rows, strict=True):
        tokens_T[: len(row)] = row
    lengths_N, ids_N2 = np.array([len(row) for row in rows], np.int32), np.array(places, np.uint32)
    prompts = SimpleNamespace(tokens_NT=tokens_NT, lengths_N=lengths_N, ids_N2=ids_N2)
    sampling = dataclasses.replace(SAMPLE, group_size=3, temperature=1.0)
    key = jax.random.fold_in(jax.random.key(7), study.KEY)
    rollouts = sampler.sample(policy(), MODEL, sampling, prompts, key, (END,))
    np.testing.assert_array_equal(sampled.lengths_NG, rollouts.lengths_NG)
    for n, g in np.ndindex(32, 3):
        response = [CLOSE, *rollouts.tokens_NGR[n, g, : rollouts.lengths_NG[n, g]]]
        assert sampled.responses[n][g].tolist() == response
        answer = parse_answer(TOKENIZER.bytes_of(response)) if rollouts.finished_NG[n, g] else None
        assert sampled.answers[n][g] == answer
        after = DOCUMENTS[places[n][0]][places[n][1] :]
        truths = [TOKENIZER.bytes_of(after[:m]) for m in range(1, len(after) + 1)]
        assert sampled.rewards_NG[n, g] == (answer in truths)


@pytest.mark.parametrize(
    "options",
    [
        {"config": dataclasses.replace(CONFIG, batch_size=8)},
        {"splits": {"easy": MANY[::-1], "one": MANY[:1]}},
        {"splits": {"easy": Positions(*(np.array(c) for c in zip(*map(dataclasses.astuple, MANY), strict=True)))}},
    ],
    ids=["batch", "splits", "table"],
)
def test_batches_and_splits_change_nothing(options):
    options = {"splits": {"many": MANY}} | options
    assert by_place(evaluate(prefill=(CLOSE,), **options)) == by_place(reference())


def test_a_mesh_changes_nothing():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    params = place(policy(), replicated(mesh))
    assert by_place(evaluate({"many": MANY}, prefill=(CLOSE,), params=params, mesh=mesh)) == by_place(reference())


def test_the_seed_counts():
    other = evaluate({"many": MANY}, prefill=(CLOSE,), seed=8)
    assert other.argmax_tokens_N.tolist() == reference().argmax_tokens_N.tolist()
    assert by_place(other) != by_place(reference())


def test_argmax_is_the_proxys(tmp_path):
    """Every position of all documents, by one row a position here and one row a document there."""
    banned = (THINK, 2)
    source = [(d, f"a:{d}", tokens_T) for d, tokens_T in enumerate(DOCUMENTS)]
    places = np.array([(d, t) for d in range(3) for t in range(1, len(DOCUMENTS[d]))], np.int32)
    positions = Positions(places[:, 0], places[:, 1], np.zeros(len(places), np.float32))
    find = functools.partial(study.argmax_tokens, policy(), MODEL, DOCUMENTS, positions, batch_size=64)

    def of_proxy(folder, start):
        config = PositionConfig(start=start)
        proxy.annotate(policy(), MODEL, TOKENIZER, source, folder, config, proxy="self", banned_ids=banned)
        artefact = open_annotated(folder)
        argmaxes = {document.document: document.argmaxes_T for document in artefact}
        return [argmaxes[d][t] for d, t in places], artefact.start

    expected, nothing = of_proxy(tmp_path / "plain", "")
    started, start = of_proxy(tmp_path / "started", "<think>")
    got = find(limit=40, banned_ids=banned)
    assert got.tolist() == expected != started and (nothing, start) == ("", "<think>")
    assert find(limit=41, banned_ids=banned, start_ids=(THINK,)).tolist() == started
    assert not np.isin(got, banned).any() and np.isin(find(limit=40), banned).any()
    # With a limit of 8 tokens, what a document of those 8 alone gives.
    short = [DOCUMENTS[2][t - 8 : t + 1] for t in range(8, 40)]
    alone = Positions(np.arange(32), np.full(32, 8), np.zeros(32, np.float32))
    cut = study.argmax_tokens(policy(), MODEL, short, alone, batch_size=64, limit=40)
    assert cut.tolist() == find(limit=8)[-32:].tolist() != find(limit=40)[-32:].tolist()
    led = [np.insert(text, 0, THINK) for text in short]
    alone = Positions(alone.documents, alone.indices + 1, alone.entropies)
    cut = study.argmax_tokens(policy(), MODEL, led, alone, batch_size=64, limit=40)
    assert cut.tolist() == find(limit=9, start_ids=(THINK,))[-32:].tolist()


def test_prefill_stands_behind_the_prompt_within_the_limit():
    positions = Positions(np.array([2, 1]), np.array([30, 2]), np.zeros(2, np.float32))
    prompt = dataclasses.replace(PROMPT, max_tokens=10)
    prefill_R = np.array([0, CLOSE], np.int32)
    prompts = study._prompts(TOKENIZER, TEMPLATE, prompt, DOCUMENTS, positions, prefill_R)
    assert prompts.lengths_N.tolist() == [10, 5]
    assert prompts.tokens_NT[0, :10].tolist() == [*DOCUMENTS[2][23:30], THINK, 0, CLOSE]
    assert prompts.tokens_NT[1, :5].tolist() == [*DOCUMENTS[1][:2], THINK, 0, CLOSE]
    assert not prompts.tokens_NT[1, 5:].any()


def test_batches_hold_every_row_in_few_shapes():
    lengths_N = np.random.default_rng(1).integers(1, 90, 50)
    rows, shapes = [], set()
    for real, filled, T in study._batches(lengths_N, 8):
        assert len(filled) == 8 and filled[: len(real)].tolist() == real.tolist()
        assert lengths_N[filled].max() <= T
        rows += real.tolist()
        shapes.add(T)
    assert sorted(rows) == list(range(50)) and shapes == {24, 48, 96}


def test_chosen_positions_nest_and_do_not_depend_on_other_splits():
    every = [Position(d, t, float(d + t) / 64) for d in range(20) for t in range(1, 40)]
    splits = {"easy": every, "hard": [p for p in every if p.entropy > 0.5]}

    def chosen(splits, count, seed=3):
        positions, rows = study.choose_positions(splits, count, seed)
        for n in range(len(positions)):
            assert positions[n].entropy == (positions[n].document + positions[n].index) / 64
        return len(positions), {
            name: {(positions[n].document, positions[n].index) for n in of_split} for name, of_split in rows.items()
        }

    distinct, sets = chosen(splits, 100)
    assert len(sets["easy"]) == len(sets["hard"]) == 100
    hard_ones = {(p.document, p.index) for p in splits["hard"]}
    assert sets["hard"] <= hard_ones and sets["easy"] & hard_ones <= sets["hard"]
    assert distinct == len(sets["easy"] | sets["hard"]) < 200
    assert chosen({"hard": splits["hard"][::-1]}, 100)[1]["hard"] == sets["hard"]
    assert chosen(splits, 100, seed=4)[1]["hard"] != sets["hard"]
    assert chosen(splits, 30)[1]["hard"] < sets["hard"]
    assert len({d for d, _ in sets["easy"]} | {100 + t for _, t in sets["easy"]}) > 20  # spread over documents, places
    for count in (0, 10**6):
        assert chosen(splits, count)[0] == len(every)


def test_settings_that_clash_are_refused():
    for options, message in (
        ({"config": dataclasses.replace(CONFIG, pass_at=4)}, "evaluate.pass_at=4 with evaluate.group_size=3"),
        ({"config": dataclasses.replace(CONFIG, temperature=0.0)}, "temperature=0 makes all"),
        ({"config": dataclasses.replace(CONFIG, batch_size=0)}, "evaluate.batch_size=0"),
        ({"splits": {"hard": []}}, "no position to evaluate in hard"),
        ({"splits": {"hard": [Position(1, 0, 2.0)]}}, "position 0 of document 1"),
        ({"splits": {"hard": [Position(1, 0, 2.0)]}, "start_ids": (THINK,)}, "position 0 of document 1"),
        ({"sample": dataclasses.replace(SAMPLE, top_p=0.0)}, "top_p=0"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(**{"splits": SPLITS} | options)
