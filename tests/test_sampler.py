"""Sampler: against the full forward pass and the scorer, the contract "Randomness", end tokens, and what is drawn."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rpt_jax import mesh as meshes
from rpt_jax.config import MeshConfig, ModelConfig, SampleConfig
from rpt_jax.policy import decoder, sampler, scorer
from rpt_jax.records import InputError, Prompts, Rollouts

MODEL = ModelConfig(vocab_size=12, width=16, layers=2, heads=2, kv_heads=1, head_channels=8, hidden=24)
SAMPLING = SampleConfig(group_size=3, temperature=0.8, max_tokens=12, tokens_per_call=5)
TOKENS_NT = np.array([[3, 1, 4, 1], [9, 0, 0, 0], [2, 6, 5, 0], [10, 3, 0, 0]], np.int32)
LENGTHS_N = np.array([4, 1, 3, 2], np.int32)
IDS_N2 = np.array([[0, 7], [2**32 - 1, 2**32 - 2], [5, 2**31], [7, 0]], np.uint32)
END_IDS = (5, 8)
KEY = 0  # whose rollouts are ragged, of which some do not end and some go on behind a 7


@functools.cache
def policy(model: ModelConfig = MODEL):
    """Parameters whose distributions are neither uniform nor certain."""
    rng = np.random.default_rng(0)
    shapes = decoder.shapes(model)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), shapes)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + ("scale" in str(path[-1])), params)


def prompts(tokens_NT=TOKENS_NT, lengths_N=LENGTHS_N, ids_N2=IDS_N2):
    return Prompts(tokens_NT, lengths_N, ids_N2, truth_NX=None, boundaries_NX=None, entropies_N=None)


def sample(asked=None, sampling=SAMPLING, end_ids=END_IDS, key=KEY, params=None) -> Rollouts:
    params, asked = params or policy(), asked or prompts()
    return sampler.sample(params, MODEL, sampling, asked, jax.random.key(key), end_ids)


@functools.cache
def rollouts() -> Rollouts:
    """The rollouts that most tests look at."""
    return sample()


def assert_same(got: Rollouts, expected: Rollouts):
    for name in ("tokens_NGR", "lengths_NG", "finished_NG"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(got.logprobs_NGR, expected.logprobs_NGR, atol=1e-5)


def part(rollouts: Rollouts, *index):
    """Some prompts, members and tokens of rollouts."""
    return Rollouts(
        rollouts.tokens_NGR[index],
        rollouts.lengths_NG[index[:2]],
        rollouts.logprobs_NGR[index],
        rollouts.finished_NG[index[:2]],
    )


@jax.jit
def full_logits(params, tokens_BT, lengths_B):
    positions_BT = decoder.positions_from_lengths(lengths_B, tokens_BT.shape[1])
    return decoder.logits(params, MODEL, decoder.forward(params, MODEL, tokens_BT, positions_BT)[0])


def test_greedy_is_the_arg_max_of_the_full_forward_pass():
    """For 80 tokens, so across a growth of the cache; at temperature 0 log-probs are those of temperature 1."""
    compiled = sampler.decode._cache_size()
    got = sample(sampling=replace(SAMPLING, group_size=1, temperature=0.0, max_tokens=80), end_ids=())
    assert sampler.decode._cache_size() - compiled == 2, "one compilation for each size of the cache"
    assert sampler.FIRST_CACHE < 80 and (got.lengths_NG == 80).all() and not got.finished_NG.any()
    rows_BT = np.zeros((4, 84), np.int32)
    for n, length in enumerate(LENGTHS_N):
        rows_BT[n, : length + 80] = [*TOKENS_NT[n, :length], *got.tokens_NGR[n, 0]]
    logits_BTV = np.asarray(full_logits(policy(), rows_BT, LENGTHS_N + 80))
    for n, length in enumerate(LENGTHS_N):
        predicting_RV = logits_BTV[n, length - 1 : length + 79]
        np.testing.assert_array_equal(got.tokens_NGR[n, 0], predicting_RV.argmax(axis=1))
        logprobs_R = predicting_RV.max(axis=1) - scipy.special.logsumexp(predicting_RV, axis=1)
        np.testing.assert_allclose(got.logprobs_NGR[n, 0], logprobs_R, atol=1e-4)
        assert len(set(got.tokens_NGR[n, 0])) > 2, "a constant row would show little"


def test_logprobs_are_the_scorer_s():
    """At temperature 0.8, ragged prompts and rollouts, within 1e-4; zero behind the end."""
    score = jax.jit(scorer.score, static_argnums=1)
    made = rollouts()
    scored_NGR, _ = score(policy(), MODEL, TOKENS_NT, LENGTHS_N, made.tokens_NGR, made.lengths_NG, 0.8)
    assert np.abs(scored_NGR - made.logprobs_NGR).max() < 1e-4
    live_NGR = np.arange(12) < made.lengths_NG[:, :, None]
    np.testing.assert_array_equal(made.logprobs_NGR < 0, live_NGR)
    assert len(np.unique(made.lengths_NG)) > 2, "lengths are not ragged"


def test_end_tokens_end_and_are_kept():
    """The same as sampling without end tokens and cutting behind the first one."""
    free, made = sample(end_ids=()), rollouts()
    assert (free.lengths_NG == 12).all() and not free.finished_NG.any()
    is_end_NGR = np.isin(free.tokens_NGR, END_IDS)
    first_NG = np.where(is_end_NGR.any(axis=2), is_end_NGR.argmax(axis=2), 11)
    live_NGR = np.arange(12) <= first_NG[:, :, None]
    expected = Rollouts(free.tokens_NGR * live_NGR, first_NG + 1, free.logprobs_NGR * live_NGR, is_end_NGR.any(axis=2))
    assert_same(made, expected)
    last_NG = np.take_along_axis(made.tokens_NGR, made.lengths_NG[:, :, None] - 1, axis=2)[:, :, 0]
    assert set(last_NG[made.finished_NG]) == set(END_IDS) and not made.finished_NG.all(), "too few cases"


def test_rollouts_do_not_depend_on_order_or_company():
    reverse = slice(None, None, -1)
    got = sample(prompts(TOKENS_NT[reverse], LENGTHS_N[reverse], IDS_N2[reverse]))
    assert_same(part(got, reverse), rollouts())
    others_NT = np.vstack([[[7, 7, 7, 7], [1, 1, 0, 0], [6, 0, 0, 0]], TOKENS_NT[1:2]])
    got = sample(prompts(others_NT, np.array([4, 2, 1, 1], np.int32), IDS_N2[[0, 2, 3, 1]]))
    assert_same(part(got, slice(3, 4)), part(rollouts(), slice(1, 2)))


def test_rollouts_do_not_depend_on_batch_size_padding_group_size_or_calls():
    """Alone, padding wider and filled, another member, fewer tokens a call, a lower limit: what is shared stays."""
    wider_NT = np.pad(TOKENS_NT[2:3], ((0, 0), (0, 3)))
    wider_NT[:, 3:] = 11
    sampling = replace(SAMPLING, group_size=4, tokens_per_call=2, max_tokens=9)
    got = sample(prompts(wider_NT, LENGTHS_N[2:3], IDS_N2[2:3]), sampling)
    made = part(rollouts(), slice(2, 3))
    live_NGR = np.arange(9) < made.lengths_NG[:, :, None]
    expected = Rollouts(
        made.tokens_NGR[:, :, :9],
        np.minimum(made.lengths_NG, 9),
        made.logprobs_NGR[:, :, :9] * live_NGR,
        made.finished_NG & (made.lengths_NG <= 9),
    )
    assert_same(part(got, slice(None), slice(3)), expected)


def test_a_mesh_of_8_devices_gives_the_rollouts_of_one():
    """Parameters split over fsdp and tensor, whose two devices each cache the one kv head; prompts over data, fsdp."""
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = meshes.param_shardings(mesh, decoder.logical_axes(MODEL), policy())
    spread = meshes.place(prompts(), meshes.batch_sharding(mesh))
    assert_same(sample(spread, params=meshes.place(policy(), shardings)), rollouts())


def test_members_positions_and_steps_differ():
    """The same prompt under four positions, three members each: twelve rollouts; another step key: twelve others."""
    same = prompts(np.repeat(TOKENS_NT[:1], 4, axis=0), np.full(4, 4, np.int32))
    rows = {tuple(row) for key in (0, 1) for row in sample(same, end_ids=(), key=key).tokens_NGR.reshape(12, 12)}
    assert len(rows) == 24


def test_keys_are_all_different():
    """For ids over the whole range of uint32, in both places, and every member; and none is the caller's."""
    ids = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    ids_N2 = np.array([(document, t) for document in ids for t in ids], np.uint32)
    keys = [jax.random.key_data(sampler.rollout_keys(jax.random.key(key), ids_N2[None], 3)[0]) for key in (0, 1)]
    rows = {tuple(row) for row in np.concatenate([*keys, [jax.random.key_data(jax.random.key(0))]])}
    assert len(rows) == 2 * len(ids_N2) * 3 + 1


def test_sequences_follow_the_policy():
    """Pairs of tokens of 6,000 members of one group, in three classes: noise shared by tokens would show."""
    sampling = replace(SAMPLING, group_size=6000, max_tokens=2)
    pairs_B2 = sample(prompts(TOKENS_NT[:1], LENGTHS_N[:1], IDS_N2[:1]), sampling, end_ids=()).tokens_NGR[0]
    rows_BT = np.zeros((12, 84), np.int32)
    rows_BT[:, :4], rows_BT[:, 4] = TOKENS_NT[0], np.arange(12)
    parts = [full_logits(policy(), rows_BT[b : b + 4], np.full(4, 5, np.int32)) for b in range(0, 12, 4)]
    p_BTV = scipy.special.softmax(np.concatenate(parts).astype(np.float64) / 0.8, axis=2)
    both_VV = p_BTV[0, 3][:, None] * p_BTV[:, 4]  # first token, second token
    classes_33 = both_VV.reshape(3, 4, 3, 4).sum(axis=(1, 3))
    counts = np.bincount(pairs_B2 // 4 @ [3, 1], minlength=9)
    assert scipy.stats.chisquare(counts, 6000 * classes_33.reshape(9), sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("slots", [3, 6, 8])
@pytest.mark.parametrize("cache", [64, 4])
def test_refilled_slots_give_the_rollouts_of_all_at_once(monkeypatch, slots, cache):
    """Fewer slots than rollouts, ragged lengths; and a cache that is packed and grown every few tokens."""
    monkeypatch.setattr(sampler, "FIRST_CACHE", cache)
    assert len(np.unique(rollouts().lengths_NG)) > 2
    assert_same(sample(sampling=replace(SAMPLING, slots=slots, tokens_per_call=2)), rollouts())


def test_fewer_slots_when_none_wait_give_the_same_rollouts():
    """One rollout of 12 goes on alone for long: from 12 slots down to 2."""
    limits_NG = np.where(np.arange(12).reshape(4, 3) == 7, 12, 3)
    sampling = replace(SAMPLING, tokens_per_call=3)
    made = sampler.sample(policy(), MODEL, sampling, prompts(), jax.random.key(KEY), (), limits_NG=limits_NG)
    np.testing.assert_array_equal(made.lengths_NG, limits_NG)
    free = sample(end_ids=())
    live_NGR = np.arange(12) < limits_NG[:, :, None]
    assert_same(made, Rollouts(free.tokens_NGR * live_NGR, limits_NG, free.logprobs_NGR * live_NGR, free.finished_NG))


def test_a_rollout_has_room_for_a_token():
    limits_NG = np.where(np.arange(12).reshape(4, 3) == 7, 0, 3)
    with pytest.raises(InputError, match="a rollout may have 0 tokens"):
        sampler.sample(policy(), MODEL, SAMPLING, prompts(), jax.random.key(KEY), (), limits_NG=limits_NG)


def test_a_policy_that_is_broken_gives_no_rollouts():
    """All comparisons with nan are false: the first token would be drawn each time, as if nothing were wrong."""
    broken = policy() | {"head": policy()["head"].at[0, 3].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match="log-probs of sampled tokens are not finite"):
        sample(params=broken)


def test_positions_of_one_document_give_the_rollouts_of_prompts_alone():
    """Four prompts with common beginnings, which are prefilled once, against one call for each; greedy too."""
    tokens_NT = np.array([[3, 1, 4, 1], [3, 1, 4, 2], [3, 1, 0, 0], [3, 0, 0, 0]], np.int32)
    lengths_N = np.array([4, 4, 2, 1], np.int32)
    for sampling in (SAMPLING, replace(SAMPLING, temperature=0.0, group_size=2)):
        together = sample(prompts(tokens_NT, lengths_N), sampling)
        for n in range(4):
            alone = sample(prompts(tokens_NT[n : n + 1], lengths_N[n : n + 1], IDS_N2[n : n + 1]), sampling)
            assert_same(part(together, slice(n, n + 1)), alone)


def test_refilled_slots_on_a_mesh_give_the_rollouts_of_one_device(monkeypatch):
    """Two units with slots for one of their two prompts; two devices each share a unit and cache its one kv head."""
    refills, refill = [], sampler.refill
    monkeypatch.setattr(sampler, "refill", lambda *arguments: refills.append(1) or refill(*arguments))
    mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    shardings = meshes.param_shardings(mesh, decoder.logical_axes(MODEL), policy())
    placed = meshes.place(policy(), shardings)
    assert_same(sample(sampling=replace(SAMPLING, slots=6, tokens_per_call=2), params=placed), rollouts())
    assert refills


def test_sampling_reads_a_copy_that_is_whole_over_fsdp():
    """In the computation's dtype, norm scales apart; one device's parameters, which are so, are not copied."""
    model = replace(MODEL, dtype="bfloat16")
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = meshes.place(policy(), meshes.param_shardings(mesh, decoder.logical_axes(model), policy()))
    copy = decoder.gathered(placed, model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(copy):
        assert leaf.dtype == ("float32" if path[-1].key == "scale" else "bfloat16")
        assert "fsdp" not in str(leaf.sharding.spec)
    assert copy["layers"]["wq"].sharding.spec[2] == "tensor"
    assert copy["layers"]["wq"].addressable_shards[0].data.size * 2 == placed["layers"]["wq"].size
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(policy()), jax.tree.leaves(decoder.gathered(policy(), MODEL)), strict=True)
    )
    assert all(
        a is b for a, b in zip(jax.tree.leaves(copy), jax.tree.leaves(decoder.gathered(copy, model)), strict=True)
    )


def test_a_layout_of_its_own_changes_no_rollout(monkeypatch):
    """The order of axes that TPUs sample with, on this platform; kept where it lies so already."""
    monkeypatch.setattr(decoder, "REORDERED", ("cpu",))
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = meshes.place(policy(), meshes.param_shardings(mesh, decoder.logical_axes(MODEL), policy()))
    for params in (policy(), placed):
        copy = decoder.gathered(params, MODEL)
        assert copy["layers"]["wq"].format.layout.major_to_minor == (0, 2, 3, 1)
        assert copy["layers"]["wo"].format.layout.major_to_minor == (0, 1, 2, 3)
        jax.tree.map(np.testing.assert_array_equal, copy, policy())
        again = decoder.gathered(copy, MODEL)
        assert all(a is b for a, b in zip(jax.tree.leaves(copy), jax.tree.leaves(again), strict=True))
    assert_same(sample(params=copy), rollouts())


@pytest.mark.parametrize("slots", [0, 4])
def test_a_stop_ends_a_rollout_and_changes_no_other(slots):
    """At the end of the call in which it came; what was drawn until then is what is drawn without it."""
    whole, token, ended = rollouts(), 7, 0
    sampling = replace(SAMPLING, slots=slots, tokens_per_call=3)
    made = sampler.sample(
        policy(), MODEL, sampling, prompts(), jax.random.key(KEY), END_IDS, stop=lambda tokens_R: token in tokens_R
    )
    for n, g in np.ndindex(*whole.lengths_NG.shape):
        tokens_R, length = whole.tokens_NGR[n, g, : whole.lengths_NG[n, g]], made.lengths_NG[n, g]
        found = np.flatnonzero(tokens_R == token)
        np.testing.assert_array_equal(made.tokens_NGR[n, g, :length], tokens_R[:length])
        assert not made.tokens_NGR[n, g, length:].any()
        if len(found):
            assert found[0] < length <= min(found[0] + 3, len(tokens_R)) and made.finished_NG[n, g]
            ended += length < len(tokens_R)
        else:
            assert length == len(tokens_R) and made.finished_NG[n, g] == whole.finished_NG[n, g]
    assert ended >= 2
