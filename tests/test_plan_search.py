"""search.py: which settings are tried, in which order, and what is said to get there."""

import dataclasses

import pytest

from rpt_jax.config import MeshConfig, ModelConfig, PromptConfig, SampleConfig, UpdateConfig
from rpt_jax.planning import search
from rpt_jax.planning.estimate import PlanRun
from rpt_jax.records import InputError

START = PlanRun(
    topology="v5e:2x2",
    batch_size=8,
    model=ModelConfig(vocab_size=1024, width=256, heads=2, kv_heads=1, head_channels=128, hidden=512),
    mesh=MeshConfig(data=1, fsdp=2, tensor=2),
    prompt=PromptConfig(max_tokens=128),
    sample=SampleConfig(group_size=4, max_tokens=256, slots=32),
    update=UpdateConfig(microbatches=2),
)
PHASES = [phase for phases in search.GROUPS for phase in phases]


def found(failed, fits, may_fit=lambda config: True):
    """(what has to be said for the settings that were found, what was asked)"""
    asked = []

    def watched(config, phase):
        asked.append((" ".join(search.overrides(START, config)), phase))
        return fits(config, phase)

    nearest = search.nearest(START, failed, watched, may_fit)
    return nearest and " ".join(search.overrides(START, nearest)), asked


def test_slots_are_halved_until_all_of_sampling_fits():
    """The update fits and is left alone; the phase that is largest is asked first."""
    words, asked = found(["shrink"], lambda config, phase: phase != "shrink" or config.sample.slots <= 8)
    assert words == "--sample.slots 8"
    assert [trial for trial, phase in asked if phase == "shrink"] == ["", "--sample.slots 16", "--sample.slots 8"]
    assert {phase for _, phase in asked} == {"grow", "shrink", "refill", "decode"} and asked[0][1] == "grow"


def test_update_and_sampling_are_searched_apart_and_said_together():
    """Recomputed layers come before microbatches."""

    def fits(config, phase):
        if phase in ("update", "score"):
            return config.model.remat == "layer" and config.update.microbatches >= 8
        return phase == "prefill" or config.sample.slots <= 16

    words, asked = found(["grow", "update"], fits)
    assert words == "--model.remat layer --sample.slots 16 --update.microbatches 8"
    updates = [trial.replace("--sample.slots 16", "").split() for trial, phase in asked if phase == "update"]
    assert updates[1] == ["--model.remat", "layer"] and len(updates) == 4
    assert not any(phase == "prefill" for _, phase in asked)


def test_no_more_parts_than_responses_and_no_fewer_slots_than_a_group_a_unit():
    microbatches = [trial.update.microbatches for trial in search.smaller_updates(START)]
    assert microbatches == [2, 2, 4, 8, 16]  # 8 prompts * 4 responses on 2 units
    assert [trial.sample.slots for trial in search.fewer_slots(START)] == [32, 16, 8]
    everything = dataclasses.replace(START, sample=dataclasses.replace(START.sample, slots=0))
    assert [trial.sample.slots for trial in search.fewer_slots(everything)] == [0, 16, 8]


def test_then_other_meshes_then_larger_slices():
    """Prefill depends on nothing else; on a mesh that shapes rule out nothing is asked."""
    words, asked = found(["prefill"], lambda config, phase: config.mesh.tensor == 1)
    assert words == "--mesh.fsdp 4 --mesh.tensor 1" and {phase for _, phase in asked} == set(PHASES)
    words, asked = found(
        ["prefill"], lambda config, phase: config.topology != "v5e:2x2", lambda config: config.mesh.tensor == 2
    )
    assert words == "--topology v5e:2x4 --mesh.fsdp 4" and {trial for trial, _ in asked} == {"", words}
    assert found([], lambda config, phase: True, lambda config: config.topology == "v5e:4x4")[0].startswith(
        "--topology v5e:4x4"
    )


def test_none_is_said_where_nothing_fits():
    words, asked = found(PHASES, lambda config, phase: False)
    slices = {trial.split()[1] for trial, _ in asked if "--topology" in trial}
    assert words is None and slices == {"v5e:2x4", "v5e:4x4", "v5e:4x8"} - _too_many_chips()


def _too_many_chips() -> set[str]:
    """Slices over which the 8 prompts and 2 heads do not divide."""
    return {f"v5e:{size}" for size in search.FLAT if search.chips_of(f"v5e:{size}") > 8 * 2}


def test_candidates_divide_and_come_from_the_fastest():
    """Of 4 chips heads allow tensor 1 and 2."""
    assert sorted(mesh.tensor for mesh in search.candidates(START, 4)) == [1, 2]
    shared = dataclasses.replace(START, model=dataclasses.replace(START.model, heads=12, kv_heads=6))
    assert 4 in [mesh.tensor for mesh in search.candidates(shared, 4)]
    odd = dataclasses.replace(START, batch_size=3, model=dataclasses.replace(START.model, heads=3))
    with pytest.raises(InputError, match="no split of 4 chips divides batch_size=3"):
        search.candidates(odd, 4)
