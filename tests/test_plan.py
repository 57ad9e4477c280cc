"""`rpt plan`: compiled for slices that are not there; FLOPs, bytes and seconds against numbers by hand."""

import dataclasses
import importlib.util
import json

import pytest

from rpt_jax import cli
from rpt_jax.config import MeshConfig, ModelConfig, PromptConfig, SampleConfig, UpdateConfig
from rpt_jax.records import InputError
from rpt_jax.study import plan

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
        "from rpt_jax.config import *\n\n\ndef config():\n    return from_dict(Config, "
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
    from rpt_jax.study import plan_phases

    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=tensor), plan._devices(topology))
    sample = dataclasses.replace(config.sample, slots=slots)
    job = plan_phases.Job(config.model, config.batch_size, config.prompt, sample, config.update, mesh)
    memory = plan_phases.phases(job)["decode"]()
    assert memory.cache > 800 << 20
    assert memory.temporaries + memory.outputs < 0.1 * memory.cache


def test_flops_and_seconds_by_hand():
    """4 prompts of 2 tokens, 2 responses of 4 tokens each, 1 layer of 8 * 2 * (4 + 2) + 3 * 8 * 16 = 480 weights."""
    model = ModelConfig(vocab_size=10, width=8, layers=1, heads=2, kv_heads=1, head_channels=2, hidden=16)
    config = plan.PlanRun(
        topology="v5e:2x2",
        batch_size=4,
        model=model,
        mesh=MeshConfig(data=1, fsdp=2, tensor=2),
        prompt=PromptConfig(max_tokens=2),
        sample=SampleConfig(group_size=2, max_tokens=4),
    )
    prefill = 4 * 2 * (2 * (480 + 8 * 1) + 8 * 10)  # two tokens that see one key on average, one of them predicts
    decode = 4 * 2 * (8 * (480 + 8 * (2 + 2)) + 8 * 8 * 10)
    assert plan.model_flops(config, "prefill") == prefill
    assert plan.model_flops(config, "decode") == decode
    assert plan.model_flops(config, "update") == 3 * (prefill + decode)
    weights = 480 + 80  # layers and head; of the embedding a few rows
    assert plan.collective_bytes(config, "prefill") == weights * 4 / 2 / 2 + 4 * 2 * (2 * 8 * 4 * 2 / 2 / 2)
    # Four calls read all weights of a device; each token sees 2 / 2 + 2 cached places, 2 * 1 * 2 numbers each, twice.
    read = 4 * weights * 4 / 2 + 32 * 3 * 16 * 2 / 4
    assert plan.seconds(config, "decode") == pytest.approx(max(read / 819e9, decode / 4 / 197e12, 32 * 32 / 200e9))
    halves = dataclasses.replace(config, sample=dataclasses.replace(config.sample, slots=4))
    read = 8 * weights * 4 / 2 + 32 * 4 * 16 * 2 / 4  # half the rollouts at one time, each with a prompt of its own
    assert plan.seconds(halves, "decode") == pytest.approx(max(read / 819e9, decode / 4 / 197e12, 32 * 32 / 200e9))


def test_meshes_are_tried_from_the_fastest_until_one_fits(monkeypatch, capsys):
    """Of 4 chips: heads allow tensor 1 and 2. What does not divide is left out."""
    found = plan.candidates(SMALL, 4)
    assert sorted(mesh.tensor for mesh in found) == [1, 2]
    tried, rows = [], {"total_gib": 1.0, "argument_gib": 1.0, "temp_gib": 0.0, "cache_gib": 0.0}

    def planned(config, chip, devices, whole):
        tried.append((config.mesh, whole))
        shared = {"topology": config.topology, "mesh": {}, "hbm_gib": 16, "phases": {"decode": rows}}
        return shared | {"fits": config.mesh == found[1], "step_s_estimate": 1.0, "chip_hours_estimate": 1.0}

    monkeypatch.setattr(plan, "_planned", planned)
    monkeypatch.setattr(plan, "_devices", lambda topology: [None] * 4)
    monkeypatch.setattr(plan, "candidates", lambda config, chips: found)
    assert plan.plan(dataclasses.replace(SMALL, choose_mesh=True))["fits"]
    assert tried == [(found[0], False), (found[1], True)]
    tried.clear()
    assert cli.main(["plan", "--topology", "v5e:2x2", "--mesh", "auto", "--json"]) == 0
    assert [mesh for mesh, _ in tried] == found and json.loads(capsys.readouterr().out.splitlines()[-1])["fits"]
    monkeypatch.undo()
    with pytest.raises(InputError, match="no split of 4 chips divides batch_size=3"):
        plan.candidates(dataclasses.replace(SMALL, batch_size=3, model=dataclasses.replace(SMALL.model, heads=3)), 4)


def test_what_does_not_fit_is_named_with_a_remedy():
    totals = {"prefill": 3.0, "decode": 20.0, "refill": 21.0, "grow": 9.0, "update": 17.0}
    said = plan.remedy(SMALL, totals, 15.2)
    assert "sample.slots" not in said and "more chips for `tensor`" in said  # each unit has one group already
    assert "update.microbatches=8" in said and "model.remat=layer" in said
    assert "batch_size" not in said
    finest = dataclasses.replace(SMALL, update=UpdateConfig(microbatches=8))  # on 2 units: each bin has one response
    assert "microbatches" not in plan.remedy(finest, totals, 15.2)
    roomy = dataclasses.replace(SMALL, batch_size=8)
    assert plan.remedy(roomy, {"decode": 9.0, "shrink": 16.0}, 15.2).startswith("try more chips for `tensor`")
    assert "sample.slots=16" in plan.remedy(
        dataclasses.replace(roomy, sample=SampleConfig(group_size=4, slots=0)), {"decode": 9.0, "shrink": 16.0}, 15.2
    )


@LIBTPU
@pytest.mark.parametrize("topology", ["v9:2x2", "v5e:3x1", "v5e"])
def test_unknown_slices_are_named(topology, capsys):
    assert cli.main(["plan", "--topology", topology]) == 2
    assert "topology=" in capsys.readouterr().err
