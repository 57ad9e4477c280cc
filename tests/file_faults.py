"""Damages what a run of the toy has on disk or in memory, continues it, and compares it with one left alone.

    python tests/file_faults.py --results experiments/results/faults.csv

A row a fault, in the table of fault_campaign.py: each file of the newest checkpoint cut at every tenth of its bytes,
with single bytes turned, and removed; config.json likewise; the annotated texts, before a run and under it; a NaN in
what one device holds.
Each fault must be named, with a remedy, or do no harm; the remedy must lead to the end of the run left alone, to the
bit; what was whole must stay so. With --disks, instead, disks that are full at so many KiB (file systems in memory, so
as root only).
"""

import argparse
import contextlib
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fault_campaign
import jax
import numpy as np
import toy
import toy_run

from rpt_jax.config import CheckpointConfig
from rpt_jax.corpus.positions import open_annotated
from rpt_jax.learning import checkpoints, run_rows, train
from rpt_jax.mesh import make_mesh
from rpt_jax.records import InputError

STEPS, HALF = 10, 8  # checkpoints at 3, 6 and the end; the first half of a struck run ends within step 8
SAVED = (3, 6)
TENTHS = range(0, 100, 10)
TURNS = 3  # bytes of a file, one after the other
NAMED = (InputError, FloatingPointError)


def settings(folder: Path, mesh=(1, 1, 1), on_damaged="stop"):
    return toy_run.settings(folder, STEPS, mesh, checkpoint=CheckpointConfig(every=3, keep=2, on_damaged=on_damaged))


def run(folder: Path, mesh=(1, 1, 1), on_damaged="stop", **options) -> None:
    """To its end; state.npz then holds parameters and optimizer state, as toy_run leaves them."""
    config = settings(folder, mesh, on_damaged)
    state = toy_run.run(config, mesh=make_mesh(config.mesh, jax.devices()[: int(np.prod(mesh))]), **options)
    np.savez(folder / "state.npz", **toy_run.flat(state))


def half(folder: Path, mesh=(1, 1, 1)) -> None:
    """As a crash leaves it."""
    with contextlib.suppress(toy.Stop):
        run(folder, mesh, report=toy.stop_at(HALF))


def cut(path: Path, percent: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * percent // 100])


def turn(path: Path, randomly: random.Random) -> None:
    """One byte that is not zero, as padding is, becomes another."""
    content = bytearray(path.read_bytes())
    places = [i for i, byte in enumerate(content) if byte]
    if places:
        content[randomly.choice(places)] ^= randomly.randrange(1, 256)
    path.write_bytes(content)


def changes(files: list[Path], randomly: random.Random, tenths=TENTHS) -> Iterator[tuple[str, Path, Callable]]:
    """(what, file, what does it) for each file and kind of damage."""
    for path in files:
        for percent in tenths:
            yield f"cut to {percent} %", path, lambda path, percent=percent: cut(path, percent)
        for _ in range(TURNS):
            yield "byte turned", path, lambda path: turn(path, randomly)
        yield "removed", path, lambda path: path.unlink()


def files_of(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: (folder / path).read_bytes() for path in files_of(folder)}


def continued(folder: Path, **options) -> str:
    """What the run says when it cannot go on; "" where it ends."""
    try:
        run(folder, **options)
    except NAMED as error:
        return str(error)
    return ""


def strike_checkpoint(template: Path, struck: Path, alone: Path, file: Path, damage: Callable) -> dict:
    """Damage in the newest checkpoint: named, and nothing touched; on request set aside, and the run ends as alone."""
    shutil.copytree(template, struck)
    damage(struck / file)
    before = contents(struck / "checkpoints")
    said = continued(struck)
    if said:
        assert str(struck / "checkpoints" / str(SAVED[-1])) in said and "on-damaged previous" in said, said
        assert contents(struck / "checkpoints") == before
        assert not continued(struck, on_damaged="previous")
        assert (struck / "checkpoints" / f"{SAVED[-1]}.damaged").is_dir()
    return ended(struck, alone, said, SAVED[0] if said else SAVED[-1])


def strike_settings(template: Path, struck: Path, alone: Path, file: Path, damage: Callable) -> dict:
    """Damage in what says which run this is: named, or the same; with the file put back the run ends as alone."""
    shutil.copytree(template, struck)
    damage(struck / file)
    said = continued(struck)
    if said:
        assert str(struck) in said, said
        shutil.copy(template / file, struck / file)
        assert not continued(struck)
    return ended(struck, alone, said, SAVED[-1])


def strike_texts(template: Path, struck: Path, alone: Path, file: Path, damage: Callable, under_the_run: bool) -> dict:
    """Damage in the annotated texts, a copy of them: named, where it is met; with the file put back the run goes on.

    under_the_run: after the first step that the run makes on them; what is open or in memory may then hide it.
    """
    shutil.copytree(template, struck)
    texts = struck.with_name(struck.name + "_texts")
    toy.annotate(texts)
    whole = (texts / file).read_bytes()

    def report(row):
        if under_the_run and row["step"] == SAVED[-1] + 1:
            damage(texts / file)

    if not under_the_run:
        damage(texts / file)
    said = ""
    try:
        run(struck, annotated=open_annotated(texts, toy.tokenizer()), report=report)
    except NAMED as error:
        said = str(error)
        assert str(texts) in said, said
        (texts / file).write_bytes(whole)
        run(struck, annotated=open_annotated(texts, toy.tokenizer()))
    shutil.rmtree(texts)
    return ended(struck, alone, said, SAVED[-1])


def strike_memory(template: Path, struck: Path, alone: Path, step: int, device: int, mesh) -> dict:
    """A NaN in what one device holds before an update: the run ends there and says so, and what is saved is good."""
    shutil.copytree(template, struck)
    update = train.train_step

    def poisoned(state, *arguments, **options):
        if int(state.step) == step:
            state = state.replace(params=with_nan(state.params, device))
        return update(state, *arguments, **options)

    train.train_step = poisoned
    try:
        said = continued(struck, mesh=mesh)
    finally:
        train.train_step = update
    assert f"update {step + 1}" in said or f"step {step + 1}" in said, said
    saved = checkpoints.newest_step(struck / "checkpoints")
    assert saved <= step and not continued(struck, mesh=mesh)
    return ended(struck, alone, said, saved)


def with_nan(params, device: int):
    """The head, with a NaN in the part that a device holds."""
    head = params["head"]
    shards = [np.array(shard.data) for shard in head.addressable_shards]
    shards[device].flat[0] = np.nan
    arrays = [jax.device_put(x, shard.device) for x, shard in zip(shards, head.addressable_shards, strict=True)]
    return params | {"head": jax.make_array_from_single_device_arrays(head.shape, head.sharding, arrays)}


def strike_disk(disk: Path, alone: Path, kib: int) -> dict:
    """A disk with room for so many KiB: the run ends and says so; with more room the same command goes on."""
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", disk], check=True)
    try:
        running = toy_run.start(disk / "run", 1, 1, (1, 1, 1), steps=STEPS)
        (said,), status = toy_run.finish(running), running[0].returncode
        saved = checkpoints.newest_step(disk / "run" / "checkpoints")
        if status:
            assert status == 2 and "no space left" in said and "same command" in said, (status, said[-3000:])
            subprocess.run(["mount", "-o", f"remount,size={1 << 16}k", disk], check=True)
            running = toy_run.start(disk / "run", 1, 1, (1, 1, 1), steps=STEPS)
            (later,) = toy_run.finish(running)
            assert running[0].returncode == 0, later[-3000:]
        return ended(disk / "run", alone, said.strip().splitlines()[-1] if status else "", saved)
    finally:
        subprocess.run(["umount", disk], check=True)


def ended(struck: Path, alone: Path, said: str, continued_from) -> dict:
    step = max((row["step"] for row in run_rows.read_rows(struck / "metrics.jsonl")), default=0)
    same = fault_campaign.same(struck, alone)
    return {"step": step, "continued_from": continued_from, "restarts": int(bool(said)), "same": same, "said": said}


def faults(folder: Path, randomly: random.Random) -> Iterator[tuple[str, str, Callable[[Path], dict]]]:
    """(fault, where, what tries it in a folder of its own and says what came of it)."""
    alone, template = folder / "alone", folder / "half"
    run(alone)
    half(template)
    assert files_of(template / "checkpoints") and not (template / "state.npz").exists()
    newest = Path("checkpoints") / str(SAVED[-1])
    files = [newest / file for file in files_of(template / newest)]
    for what, file, damage in changes(files, randomly):
        yield (
            what,
            str(file),
            lambda struck, file=file, damage=damage: strike_checkpoint(template, struck, alone, file, damage),
        )
    for what, file, damage in changes([Path("config.json")], randomly):
        yield (
            what,
            str(file),
            lambda struck, file=file, damage=damage: strike_settings(template, struck, alone, file, damage),
        )
    texts = toy.annotate(folder / "texts")
    for under in (False, True):
        for what, file, damage in changes(files_of(texts), randomly):
            yield (
                what,
                f"texts/{file}{', under the run' * under}",
                lambda struck, file=file, damage=damage, under=under: strike_texts(
                    template, struck, alone, file, damage, under
                ),
            )
    spread, mesh = folder / "half_spread", (1, 2, 1)
    run(folder / "alone_spread", mesh)
    half(spread, mesh)
    for step, device in ((6, 0), (6, 1), (7, 0), (8, 1), (9, 0)):
        yield (
            "NaN",
            f"device {device}",
            lambda struck, step=step, device=device: strike_memory(
                spread, struck, folder / "alone_spread", step, device, mesh
            ),
        )


def disks(folder: Path, sizes: list[int]) -> Iterator[tuple[str, str, Callable[[Path], dict]]]:
    """As faults: runs on disks of so many KiB."""
    fault_campaign.keep_compiled(folder)
    toy_run.finish(toy_run.start(folder / "alone", 1, 1, (1, 1, 1), steps=STEPS))
    for kib in sizes:
        yield "full disk", f"{kib} KiB", lambda struck, kib=kib: strike_disk(struck, folder / "alone", kib)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="words that the place of a fault must hold one of")
    parser.add_argument("--disks", type=int, nargs="*", default=[], help="KiB of each")
    parser.add_argument("--results", default="experiments/results/faults.csv")
    given = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    lost = 0
    with tempfile.TemporaryDirectory() as name, fault_campaign.table(Path(given.results)) as write:
        folder = Path(name)
        every = disks(folder, given.disks) if given.disks else faults(folder, random.Random(given.seed))
        for fault, where, attempt in every:
            if not given.disks and given.only and not any(word in where for word in given.only):
                continue
            began, struck = time.time(), folder / "struck"
            row = attempt(struck)
            shutil.rmtree(struck, ignore_errors=True)
            lost += not row["same"]
            said = row["said"].replace(str(folder), "").partition("\n")[0][:300]
            found = {"processes": 1, "fault": fault, "aimed_at": where, "seconds": round(time.time() - began, 1)}
            write(found | row | {"said": said})
    print(f"{lost} runs lost something")
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
