"""estimate.py: FLOPs, bytes and seconds of a step against numbers by hand."""

import collections
import dataclasses
import importlib.util
import math
import re

import pytest

from rpt_jax.config import MeshConfig, ModelConfig, PromptConfig, SampleConfig, UpdateConfig
from rpt_jax.planning import estimate

LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
SIZES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def test_flops_and_seconds_by_hand():
    """4 prompts of 2 tokens, 2 responses of 4 tokens each, 1 layer of 8 * 2 * (4 + 2) + 3 * 8 * 16 = 480 weights."""
    model = ModelConfig(vocab_size=10, width=8, layers=1, heads=2, kv_heads=1, head_channels=2, hidden=16)
    config = estimate.PlanRun(
        topology="v5e:2x2",
        batch_size=4,
        model=model,
        mesh=MeshConfig(data=1, fsdp=2, tensor=2),
        prompt=PromptConfig(max_tokens=2),
        sample=SampleConfig(group_size=2, max_tokens=4),
    )
    prefill = 4 * 2 * (2 * (480 + 8 * 1) + 8 * 10)  # two tokens that see one key on average, one of them predicts
    decode = 4 * 2 * (8 * (480 + 8 * (2 + 2)) + 8 * 8 * 10)
    assert estimate.model_flops(config, "prefill") == prefill
    assert estimate.model_flops(config, "decode") == decode
    assert estimate.model_flops(config, "update") == 3 * (prefill + decode)
    mixed = dataclasses.replace(config, update=UpdateConfig(next_token_share=0.1, next_token_length=6))
    text = 4 * 2 * (6 * (480 + 8 * 3) + 6 * 8 * 10)  # as many windows as prompts, each token sees three keys
    assert estimate.model_flops(mixed, "update") == 3 * (prefill + decode + text)
    gathered = (480 + 2 * 80) * 4 / 2 / 2  # layers, head and embedding
    assert estimate.collective_bytes(config, "prefill") == gathered + 4 * 2 * (3 * 8 * 4 * 2 / 2 / 2)
    weights = 480 + 80  # of the embedding a few rows
    # Four calls read all weights of a device; each token sees 2 / 2 + 2 cached places, 2 * 1 * 2 numbers each, twice.
    read = 4 * weights * 4 / 2 + 32 * 3 * 16 * 2 / 4
    assert estimate.seconds(config, "decode") == pytest.approx(max(read / 819e9, decode / 4 / 197e12, 32 * 48 / 200e9))
    halves = dataclasses.replace(config, sample=dataclasses.replace(config.sample, slots=4))
    read = 8 * weights * 4 / 2 + 32 * 4 * 16 * 2 / 4  # half the rollouts at one time, each with a prompt of its own
    assert estimate.seconds(halves, "decode") == pytest.approx(max(read / 819e9, decode / 4 / 197e12, 32 * 48 / 200e9))
    model = dataclasses.replace(model, heads=12, kv_heads=6)
    mesh = MeshConfig(data=1, fsdp=1, tensor=4)
    shared = dataclasses.replace(config, model=model, mesh=mesh, prompt=PromptConfig(max_tokens=200))
    weights = 8 * 2 * (2 * 12 + 2 * 6) + 3 * 8 * 16 + 80
    read = 4 * weights * 4 / 4 + 32 * (200 / 2 + 2) * (2 * 6 * 2 * 4) * 2 / 4  # six heads, over four devices twice
    assert estimate.seconds(shared, "decode") == pytest.approx(read / 819e9)


def sent(text: str, trips: dict[str, int]) -> float:
    """Bytes that one chip sends in a compiled program, every group of chips being a pair.

    Of a pair each sends half of a gathered result, and as much as the array of what is summed up; half of that where
    the sum is only one half of a scatter. trips: by the name of a loop as it stands in the names of its operations,
    how often it runs. A gather that is spread over several fusions (one chain) counts once.
    """
    callers, found, computation = {}, {}, ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line):
            computation = header[1]
        name = re.search(r'op_name="([^"]*)"', line)
        callers |= dict.fromkeys(re.findall(r"calls=%([\w.\-]+)", line), (computation, name and name[1]))
        if match := COLLECTIVE.search(line):
            chain = re.search(r'chain_id="\d+"', line)
            found[chain[0] if chain else line] = (*match.groups(), computation, name and name[1])
    total = 0
    for shape, kind, computation, name in found.values():
        half = kind == "all-gather" or "all-reduce-scatter" in computation
        while name is None and computation in callers:
            computation, name = callers[computation]
        parts = [SIZES[dtype] * math.prod(map(int, filter(None, sizes.split(",")))) for dtype, sizes in _arrays(shape)]
        bytes_sent = parts[0] if kind == "collective-permute" else sum(parts) * (0.5 if half else 1)
        total += bytes_sent * math.prod(times for loop, times in trips.items() if loop in (name or ""))
    return total


def _arrays(shape: str) -> list[tuple[str, str]]:
    return re.findall(rf"({'|'.join(SIZES)})\[([\d,]*)\]", shape)


@LIBTPU
def test_collective_bytes_are_those_of_compiled_programs(monkeypatch):
    """Of four layers in four microbatches on v5e:2x2, counted in libtpu's programs: within 10 %."""
    import jax

    from rpt_jax.planning import phases, plan

    shape = {"vocab_size": 1024, "width": 512, "layers": 4, "heads": 2, "kv_heads": 2, "head_channels": 128}
    config = estimate.PlanRun(
        topology="v5e:2x2",
        batch_size=4,
        model=ModelConfig(**shape, hidden=1024, dtype="bfloat16", remat="layer"),
        mesh=MeshConfig(data=1, fsdp=2, tensor=2),
        prompt=PromptConfig(max_tokens=128),
        sample=SampleConfig(group_size=4, max_tokens=256),
        update=UpdateConfig(microbatches=4, check_shared_prefix="never"),
    )
    texts = collections.deque()

    def compiled(job, lower, arguments, *_):
        with jax.set_mesh(job.mesh):
            texts.append(lower(*arguments).compile().as_text())

    monkeypatch.setattr(phases, "_compiled", compiled)
    with plan._without_cache():
        for phase in ("prefill", "decode", "update"):
            phases.phases(plan._job(config))[phase]()
    layers = {"Decoder/while/body": 4}
    gathered = estimate.collective_bytes(config, "prefill") - sent(texts.popleft(), layers)
    weights = 4 * (512 * 128 * 8 + 3 * 512 * 1024) + 2 * 1024 * 512  # gathered before prefill, by a program of its own
    assert gathered == pytest.approx(weights * 2 / 2 / 2, rel=0.01)
    a_step = estimate.collective_bytes(config, "decode") / 256  # tokens
    assert sent(texts.popleft(), layers) == pytest.approx(a_step, rel=0.1)
    microbatches = {"jit(train_step)/while/body": 4}
    measured = sent(texts.popleft(), layers | microbatches)
    assert measured == pytest.approx(estimate.collective_bytes(config, "update"), rel=0.1)
