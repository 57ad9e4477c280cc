"""`rpt plan`: compiled for slices that are not there, and what it says where an experiment does not fit."""

import dataclasses
import functools
import importlib.util
import json
import math

import jax
import pytest

from rpt_jax import cli
from rpt_jax.config import MeshConfig, ModelConfig, PromptConfig, RewardConfig, SampleConfig, UpdateConfig
from rpt_jax.planning import phases, plan, search
from rpt_jax.records import InputError

LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
SMALL = plan.PlanRun(
    topology="v5e:2x2",
    batch_size=4,
    steps=10,
    model=ModelConfig(
        vocab_size=1024, width=256, layers=2, heads=2, kv_heads=1, head_channels=128, hidden=512, dtype="bfloat16"
    ),
    mesh=MeshConfig(data=1, fsdp=2, tensor=2),
    prompt=PromptConfig(max_tokens=128),
    sample=SampleConfig(group_size=4, max_tokens=256, slots=8),
    update=UpdateConfig(microbatches=4, check_shared_prefix="never"),
)
QWEN = dataclasses.replace(  # 1.5B, a response limit of 4,096 tokens
    SMALL,
    topology="v5e:4x4",
    batch_size=64,
    model=ModelConfig(
        vocab_size=151936,
        width=1536,
        layers=28,
        heads=12,
        kv_heads=2,
        head_channels=128,
        hidden=8960,
        qkv_bias=True,
        tied_head=True,
        dtype="bfloat16",
        remat="layer",
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
    prompt=PromptConfig(max_tokens=512),
    sample=SampleConfig(group_size=8, max_tokens=4096),
)
QWEN_14B = dataclasses.replace(
    QWEN,
    batch_size=256,
    model=dataclasses.replace(
        QWEN.model, vocab_size=152064, width=5120, layers=48, heads=40, kv_heads=8, hidden=13824, tied_head=False
    ),
    sample=SampleConfig(group_size=8, max_tokens=8192),
)


@LIBTPU
def test_a_small_model_is_planned(tmp_path, capsys):
    """Every phase compiles, with more devices than kv heads; the parts of the memory add up."""
    experiment = tmp_path / "small.py"
    experiment.write_text(
        "from rpt_jax.config import *\nfrom rpt_jax.config_dict import from_dict\n\n\n"
        "def config():\n    return from_dict(Config, "
        + repr(
            {name: dataclasses.asdict(getattr(SMALL, name)) for name in ("model", "mesh", "prompt", "sample", "update")}
        )
        + " | {'batch_size': 4, 'steps': 10})\n"
    )
    assert cli.main(["plan", str(experiment), "--topology", "v5e:2x2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["fits"] and figures["hbm_gib"] == 16 and figures["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    phases = figures["phases"]
    assert list(phases) == ["prefill", "decode", "refill", "grow", "shrink", "update"]
    for row in phases.values():
        assert 0 < row["total_gib"] == pytest.approx(row["argument_gib"] + row["temp_gib"])
    a_token = 2 * 2 * 128 * 2  # bytes in layers * (key, value) * channels * bfloat16; each device has the one head
    cached = 4 * (256 + 128) * a_token + 4 * (256 + 128) * 4  # 4 slots of a unit, places beside them
    assert phases["decode"]["cache_gib"] * plan.GIB == cached


@LIBTPU
@pytest.mark.parametrize(
    ("config", "topology", "tensor", "slots"),
    [(QWEN, "v5e:4x4", 2, 128), (QWEN, "v5p:2x2x4", 1, 0), (QWEN_14B, "v5e:16x16", 8, 256)],
)
def test_decode_copies_neither_cache_nor_weights(config, topology, tensor, slots):
    """Temporaries are below a tenth of the cache; also with one kv head a chip, slots that were refilled, and a hidden
    width of a chip that does not fill its lanes (13,824 / 8)."""
    from rpt_jax.mesh import make_mesh

    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=tensor), plan._devices(topology))
    sample = dataclasses.replace(config.sample, slots=slots)
    job = phases.Job(config.model, config.batch_size, config.prompt, sample, config.update, mesh)
    memory = phases.phases(job)["decode"]()
    assert memory.cache > 800 << 20
    assert memory.temporaries + memory.outputs < 0.1 * memory.cache


@LIBTPU
def test_the_text_of_an_update_is_planned():
    """8 windows of 130 tokens on two chips: so many more bytes of arguments, in whole tiles; it compiles."""
    from rpt_jax.mesh import make_mesh

    mesh = make_mesh(SMALL.mesh, plan._devices(SMALL.topology))
    memory = {}
    for share in (0.0, 0.25):
        update = dataclasses.replace(
            SMALL.update, next_token_share=share, next_token_sequences=8, next_token_length=130
        )
        job = phases.Job(SMALL.model, SMALL.batch_size, SMALL.prompt, SMALL.sample, update, mesh)
        memory[share] = phases.phases(job)["update"]()
    assert 8 // 2 * 130 * 4 <= memory[0.25].arguments - memory[0.0].arguments <= 2 * 8 * 256 * 4
    assert memory[0.25].outputs >= memory[0.0].outputs


@LIBTPU
def test_an_average_of_policies_is_planned():
    """RLP's reward keeps one, in float32: four bytes a parameter, split as the parameters are, in every phase."""
    gain = dataclasses.replace(SMALL, reward=RewardConfig(kind="information_gain"))
    plain, averaged = (plan._job(config) for config in (SMALL, gain))
    split = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(phases.train_state(plain).params)]
    more = 4 * sum(map(math.prod, split))
    for phase in ("decode", "update"):
        memory = [phases.phases(job)[phase]() for job in (plain, averaged)]
        grown = [each.arguments + each.resident for each in memory]
        assert more <= grown[1] - grown[0] <= 1.1 * more  # whole tiles
    assert plan.least_gib(gain) > plan.least_gib(SMALL)


@LIBTPU
def test_a_batch_that_does_not_divide_is_named():
    """As `rpt train` does, and not with figures of a smaller one."""
    for batch_size in (1, 5):
        with pytest.raises(InputError, match=f"batch of {batch_size} prompts does not divide over"):
            plan.plan(dataclasses.replace(SMALL, batch_size=batch_size))


def test_meshes_are_tried_from_the_fastest_until_one_fits(monkeypatch, capsys):
    """Of 4 chips: heads allow tensor 1 and 2."""
    found = search.candidates(SMALL, 4)
    tried, rows = [], {"total_gib": 1.0, "argument_gib": 1.0, "temp_gib": 0.0, "cache_gib": 0.0}

    def planned(config, measure, whole):
        tried.append((config.mesh, whole))
        shared = {"topology": config.topology, "mesh": {}, "hbm_gib": 16, "phases": {"decode": rows}}
        return shared | {"fits": config.mesh == found[1], "step_s_estimate": 1.0, "chip_hours_estimate": 1.0}

    monkeypatch.setattr(plan, "_planned", planned)
    monkeypatch.setattr(plan, "may_fit", lambda config: True)
    monkeypatch.setattr(plan, "_devices", lambda topology: [None] * 4)
    assert plan.plan(dataclasses.replace(SMALL, choose_mesh=True))["fits"]
    assert tried == [(found[0], False), (found[1], True)]
    tried.clear()
    found = search.candidates(plan.PlanRun(topology="v5e:2x2"), 4)
    assert cli.main(["plan", "--topology", "v5e:2x2", "--mesh", "auto", "--json"]) == 0
    assert [mesh for mesh, _ in tried] == found[:2] and json.loads(capsys.readouterr().out.splitlines()[-1])["fits"]


@LIBTPU
def test_what_does_not_fit_comes_with_flags_that_do(monkeypatch):
    """Sampling that takes 1 GiB a slot of a unit, 15.2 GiB to be had: the flags, given to the command, make it fit."""

    compiled = []

    def grown(job):
        def of(name, gib):
            compiled.append(name)
            return phases.Memory(gib << 30, 0, 0, 0)

        slots = phases.seats(job)[0]
        sizes = {"prefill": 3, "decode": slots // 2, "refill": slots // 2, "grow": slots, "shrink": slots, "update": 9}
        return {name: functools.partial(of, name, size) for name, size in sizes.items()}

    monkeypatch.setattr(phases, "phases", grown)
    asked = dataclasses.replace(SMALL, batch_size=16, sample=dataclasses.replace(SMALL.sample, slots=64))
    figures = plan.plan(asked)
    assert not figures["fits"] and figures["phases"]["grow"]["total_gib"] == 32
    assert figures["nearest"] == {"overrides": ["--sample.slots", "16"], "largest_gib": 9}
    assert figures["tried"] == ["--sample.slots 32", "--sample.slots 16"]
    assert "with: --sample.slots 16" in plan.shown(figures)
    assert len(compiled) == 6 + 1 + 4  # all at first; then the largest phase, then those of sampling
    assert plan.plan(dataclasses.replace(asked, sample=dataclasses.replace(asked.sample, slots=16)))["fits"]


@LIBTPU
def test_what_shapes_rule_out_is_not_compiled(monkeypatch):
    """14.8 billion parameters with two float32 moments: 41 GiB on each of four chips."""

    compiled, huge = [], phases.Memory(1 << 50, 0, 0, 0)
    monkeypatch.setattr(
        phases, "phases", lambda job: {"prefill": lambda: compiled.append(dict(job.mesh.shape)) or huge}
    )
    monkeypatch.setattr(plan, "MOST", 1)
    figures = plan.plan(dataclasses.replace(QWEN_14B, topology="v5e:2x2"))
    assert len(compiled) == 1 and len(figures["tried"]) == 1  # what was not compiled is not called tried
    assert not figures["fits"] and figures["phases"] == {} and figures["nearest"] is None
    assert figures["largest_gib"] == {
        "parameters and optimizer state": pytest.approx(14.77e9 * 12 / 4 / 2**30, rel=0.01)
    }
    assert figures["tried"][0].startswith("--topology v5e:4x8") and "none of the" in plan.shown(figures)
    given = dataclasses.replace(QWEN_14B, topology="v5e:4x8", mesh=MeshConfig(data=32))  # each chip holds it all
    figures = plan.plan(given)
    assert not figures["fits"] and figures["phases"] == {} and figures["largest_gib"]["optimizer state"] > 100


@LIBTPU
@pytest.mark.parametrize("topology", ["v9:2x2", "v5e:3x1", "v5e"])
def test_unknown_slices_are_named(topology, capsys):
    assert cli.main(["plan", "--topology", topology]) == 2
    assert "topology=" in capsys.readouterr().err
