"""What goes on while the power is cut: each kind of run makes a `Scene` and leaves its journal.

``scripts/crashtest`` tries many states of many runs, the test suite a few of each kind.
"""

import random
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import crashchains
import pytest
import trio
from crashchains import beside
from crashing import VARIANTS, Files, Guest, K, Scene, open_one
from qcow2damage import Anatomy, damage_counts, wreck_refcounts
from steadysteps import steady_steps
from storages import MemoryStorage
from trio._core import _run

from cowfs.block import metacache
from cowfs.block.chain import Chain
from cowfs.block.check import Repair
from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.formats.raw import RawImage
from cowfs.formats.rebase import _Rebase
from cowfs.jobs import commit as commit_job
from cowfs.jobs.commit import Commit
from cowfs.jobs.job import State
from cowfs.jobs.stream import Stream
from cowfs.storage import host

SECTOR = 512
#: when snapshots are made
DATE = (1_700_000_000, 5)
#: bytes that jobs copy at once, and that a commit drops at once: small, so that there are many steps
STEP, BATCH = 16_384, 65_536
#: one state in so many is used again afterwards, by cowfs
USED = 4


async def guest(scene: Scene) -> None:
    """Whatever guests do, in two sessions."""
    await scene.create()
    scene.begin()
    for _ in range(2):
        async with scene.session():
            await scene.work(25, "zero", "discard", "drop", "settle")


async def outgrow(scene: Scene) -> None:
    """A file that becomes too large for its refcount table."""
    size = 2500 * K
    scene.resized(size)
    await scene.create()
    async with scene.session(copy_on_read=False):
        scene.guest.note(0, data := scene.chooser.randbytes(1900 * K))
        await scene.disk.write(0, data)
    scene.begin()
    table = scene.storages["top"].content[48:56]
    async with scene.session(copy_on_read=False):
        for offset in range(1900 * K, size - 40 * K, 12 * K):
            await scene.write(offset)
            await scene.work(1)
    assert scene.storages["top"].content[48:56] != table


async def stream(scene: Scene) -> None:
    """Streaming to its end, beside guests; the base is not needed any more."""
    await scene.create()
    scene.begin()
    async with scene.session():
        await scene.work(4)
        await beside(scene, Stream(scene.disk), "zero", "discard")
        assert scene.disk.layers[0].backing is None
        await scene.work(5)
    async with scene.session():
        await scene.work(5)


async def commit(scene: Scene) -> None:
    """Commit, beside guests, into a base of the same format or a raw one; then again."""
    formatted = scene.chooser.random() < 0.5
    if formatted:
        await _base_of_same_format(scene)
    await scene.create(scene.variant.format if formatted else "raw")
    async with scene.session():
        await scene.work(10)
    scene.begin()
    async with scene.session():
        await beside(scene, Commit(scene.disk), "discard")
        await scene.work(3)
        await beside(scene, Commit(scene.disk), "discard")


async def _base_of_same_format(scene: Scene) -> None:
    base = scene.add("base")
    scene.formats["base"] = scene.variant.format
    await scene.driver.create(base, scene.variant.size, None, scene.variant.options)
    disk = Disk([Layer(await open_one(base, scene.variant.format))])
    for start, end in scene.variant.spots:
        await disk.write(start, scene.below[start:end])
    await disk.close()
    base.read_only = True


async def snapshots(scene: Scene) -> None:
    """Internal snapshots, made, applied and deleted, with guests' sessions in between."""
    await scene.create()
    async with scene.session():
        await scene.work(6, "zero", "discard")
    scene.begin()
    kept: dict[str, bytes] = {}
    states = scene.snapshots = [(0, 0, kept)]
    for number in range(7):
        image = await scene.driver.open_image(scene.storages["top"])
        begun = len(scene.journal)
        change = scene.chooser.choice(["create", "apply", "delete"] if number > 1 else ["create"])
        names = sorted(kept)
        if change == "create" or not names:
            kept = {**kept, f"s{number}": bytes(scene.guest.now)}
            states.append((begun, 1 << 60, kept))
            await image.create_snapshot(f"s{number}", DATE)
        elif change == "delete":
            gone = scene.chooser.choice(names)
            kept = {name: content for name, content in kept.items() if name != gone}
            states.append((begun, 1 << 60, kept))
            await image.delete_snapshot(gone)
        else:
            name = scene.chooser.choice(names)
            scene.guest.note(0, kept[name])
            mark = scene.guest.mark()
            await image.apply_snapshot(name)
            scene.guest.acknowledge(mark, len(scene.journal))
        states[-1] = (states[-1][0], min(states[-1][1], len(scene.journal)), states[-1][2])
        await image.close()
        async with scene.session():
            await scene.work(5, "zero", "discard")


async def keep(scene: Scene) -> None:
    """Snapshots that take from the base are given what they take, as the disk lets go of it or changes it."""
    await scene.create()
    kept: dict[str, bytes] = {}
    for number in range(3):
        async with scene.session(copy_on_read=False):
            await scene.work(3, "zero", "discard")
        image = await scene.driver.open_image(scene.storages["top"])
        kept[f"s{number}"] = bytes(scene.guest.now)
        await image.create_snapshot(f"s{number}", DATE)
        await image.close()
    scene.begin()
    scene.snapshots = [(0, 0, kept)]
    async with scene.session(copy_on_read=False):
        job = scene.chooser.choice([Stream, Commit])(scene.disk, alone=True)
        await job.run()
        assert (job.state, job.error) == (State.COMPLETED, "")
    async with scene.session():
        await scene.work(5)


async def resize(scene: Scene) -> None:
    """Larger and smaller, beside guests' work; L1 tables have to move. QED only grows."""
    await scene.create()
    scene.begin()
    for _ in range(2):
        async with scene.session():
            for _ in range(3):
                await scene.work(4, "zero", "discard")
                await _resize(scene)
            await scene.work(4, "zero", "discard")


async def _resize(scene: Scene) -> None:
    now = len(scene.guest.now)
    size = now + scene.chooser.randrange(1, 500) * SECTOR
    # version 2 has no zeros with which to hide a longer base when the disk grows again
    if scene.variant.format == "qcow2" and "compat" not in scene.variant.options and scene.chooser.random() < 0.5:
        size = now - scene.chooser.randrange(1, min(400, now // SECTOR // 2)) * SECTOR
    # what was written before must be durable, or a state before the change could not be told from one without it
    await scene.flush()
    scene.guest.resize(size, len(scene.journal))
    gone = scene.guest.mark()
    await (scene.disk.shrink(size) if size < now else scene.disk.grow(size))
    scene.guest.acknowledge(gone, len(scene.journal))


async def rebase(scene: Scene) -> None:
    """Onto another backing file, and from that onto none; content stays."""
    other = bytearray(scene.storages["base"].content)
    for start, end in scene.variant.spots:
        part = other[start : (start + end) // 2]
        other[start : start + len(part)] = scene.chooser.randbytes(len(part))
    scene.add("other", bytes(other), read_only=True)
    scene.formats["other"] = "raw"
    await scene.create()
    scene.begin()
    for name in ("other", "base", None)[: scene.chooser.randrange(1, 4)]:
        async with scene.session(copy_on_read=False):
            await scene.work(6, "zero", "discard")
        async with scene.session(copy_on_read=False, alone=True):
            below = RawImage(MemoryStorage(name, bytes(scene.storages[name].content), read_only=True)) if name else None
            await _Rebase(scene.disk, Chain([Layer(below)]) if below else None, lambda done, size: None).run()
            await scene.disk.flush()
            await scene.disk.layers[0].set_backing(Backing(name, "raw") if name else None)


async def overlay(scene: Scene) -> None:
    """New overlays put on top of the disk, beside guests and on their own."""
    await scene.create()
    scene.begin()
    async with scene.session():
        await scene.work(8, "zero", "discard")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_put_overlay, scene, "second")
            await scene.work(8)
        await scene.work(4, "zero", "discard")
        await _put_overlay(scene, "third")
        await scene.work(6, "zero", "discard")
    async with scene.session():
        await scene.work(4)


async def _put_overlay(scene: Scene, name: str) -> None:
    storage = scene.add(name)
    active = scene.disk.layers[0]
    backing = Backing(active.name, active.format)
    await scene.driver.create(storage, scene.disk.size, backing, scene.variant.options)
    await scene.disk.push(Layer(await scene.driver.open_image(storage)))
    scene.tops.append((len(scene.journal), name))


async def relabel(scene: Scene) -> None:
    """Names of other lengths for the same backing file, and stamps of it, while guests write."""
    names = ["b", "base" * 20, "c" * 200, "d" * 30]
    scene.aliases = dict.fromkeys(names, "base")
    await scene.create()
    scene.begin()
    states = scene.headers = [(0, 0, "base", None)]
    async with scene.session():
        image = scene.disk.layers[0].image
        for _ in range(10):
            await scene.work(3)
            begun, (_, _, name, stamp) = len(scene.journal), states[-1]
            if scene.chooser.random() < 0.5:
                name, stamp = scene.chooser.choice(names), None
                states.append((begun, 1 << 60, name, stamp))
                async with scene.disk.lock.hold(0, 1 << 63):
                    await scene.disk.layers[0].set_backing(Backing(name, "raw"))
            else:
                stamp = scene.chooser.choice([None, scene.chooser.randbytes(73)])
                states.append((begun, 1 << 60, name, stamp))
                await scene.disk.layers[0].begin()
                if not await image.set_stamp(stamp):
                    states[-1] = (begun, 1 << 60, name, image.stamp)
            states[-1] = (begun, len(scene.journal), *states[-1][2:])
        await scene.work(3)


async def again(scene: Scene) -> None:
    """After a first power cut guests go on, and the power is cut again."""
    await guest(scene)
    await _cut(scene)
    async with scene.session():
        await scene.work(20, "zero", "discard", "settle")


async def _cut(scene: Scene) -> None:
    """Cut the power; what is found then is where the scene begins anew."""
    _, moment, files = scene.chooser.choice(list(scene.cuts(30, 1)))
    content = await scene.verify(moment, files)
    for name, data in files.items():
        scene.add(name, data, read_only=name == "base")
    scene.begin()
    scene.guest = Guest(content)


async def repair(scene: Scene) -> None:
    """``check -r all`` after a power cut and damage that takes no content away."""
    await guest(scene)
    await _cut(scene)
    top = scene.storages["top"]
    content = _damaged(bytes(top.content), scene)
    scene.add("top", content)
    scene.begin()
    scene.repairs = True
    image = await scene.driver.open_image(scene.storages["top"], for_repair=True)
    await image.check(Repair.ALL)
    await image.close()


def _damaged(content: bytes, scene: Scene) -> bytes:
    rnd = scene.chooser
    if scene.variant.format == "qed":
        # clusters that nothing refers to, which the mark says are there
        marked = bytearray(content.ljust(-(-len(content) // 4096) * 4096, b"\0"))
        marked[16] |= 2
        return bytes(marked) + rnd.randbytes(4096 * rnd.randrange(1, 9))
    image = Anatomy(content)
    # of an entry with subclusters the first half
    places = [place for place in image.l2_places() if "extended_l2" not in scene.variant.options or not place % 16]
    for _ in range(rnd.randrange(1, 12)):
        damage_counts(image, rnd)
        if places:
            image.data[rnd.choice(places)] ^= 0x80
    if rnd.random() < 0.5:
        kinds = ["entry is 0", "entry out of the file", "entry unaligned", "block is zero", "block points to the table"]
        wreck_refcounts(image, rnd.choice(kinds), rnd)
    return bytes(image.data)


_QCOW2 = [name for name in VARIANTS if name.startswith("qcow2")]
#: variants that have internal snapshots, and that can be resized with a backing file that is longer
_COUNTING = [name for name in _QCOW2 if name != "qcow2-1bit"]
KINDS: dict[str, tuple[Callable[[Scene], Awaitable[None]], list[str]]] = {
    "guest": (guest, list(VARIANTS)),
    "outgrow": (outgrow, ["qcow2-512"]),
    "stream": (stream, list(VARIANTS)),
    "commit": (commit, list(VARIANTS)),
    "shorten": (crashchains.shorten, list(VARIANTS)),
    "between": (crashchains.between, list(VARIANTS)),
    "deep": (crashchains.deep, list(VARIANTS)),
    "pivot": (crashchains.pivot, list(VARIANTS)),
    "snapshots": (snapshots, _COUNTING),
    "keep": (keep, _COUNTING),
    "resize": (resize, list(VARIANTS)),
    "rebase": (rebase, list(VARIANTS)),
    "overlay": (overlay, list(VARIANTS)),
    "relabel": (relabel, list(VARIANTS)),
    "again": (again, list(VARIANTS)),
    "repair": (repair, list(VARIANTS)),
}
#: begins the name of a kind of which everything is the same, but that storages hold operations
HELD = "held-"
KINDS |= {HELD + kind: run for kind, run in KINDS.items()}
PAIRS = [(kind, variant) for kind, (_, variants) in KINDS.items() for variant in variants]


async def _record(kind: str, variant: str, seed: int) -> Scene:
    scene = Scene(variant, seed, held=kind.startswith(HELD))
    # also none: then guests are held off each part of the disk while it is copied, made durable and dropped
    gentle = (seed + len(variant)) % 3
    with (
        patch.multiple(commit_job, FIRM_STEP=STEP, BATCH=BATCH, GENTLE_PASSES=gentle),
        # who rests keeps nothing
        patch.object(metacache, "RESTING_BOUND", 0),
        pytest.MonkeyPatch.context() as patches,
    ):
        steady_steps(patches, STEP)
        await KINDS[kind][0](scene)
    return scene


@dataclass
class Outcome:
    """States of one run that were tried, and of those that are wrong: name of the state, what is wrong."""

    states: int = 0
    with_qemu: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def try_states(
    kind: str, variant: str, seed: int, *, moments: int, losses: int, qemu: float = 0, only: str | None = None
) -> Outcome:
    """Record one run and look at states of it; ``qemu`` is the share that QEMU looks at too.

    The same run is the same again: trio, which runs tasks in random order, is told which, and nothing is done in
    threads, which take as long as they like.
    """
    _run._r.seed(f"{kind} {variant} {seed}")
    with patch.object(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True), patch.object(host, "ask", _ask_here):
        return trio.run(_try_states, kind, variant, seed, moments, losses, qemu, only)


async def _ask_here(call: Callable[..., Any], *args: object, file: str, undo: object = None) -> Any:
    """`host.ask` without a thread."""
    await trio.lowlevel.checkpoint()
    return call(*args)


async def _try_states(
    kind: str, variant: str, seed: int, moments: int, losses: int, qemu: float, only: str | None
) -> Outcome:
    outcome = Outcome()
    try:
        scene = await _record(kind, variant, seed)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is a finding
        outcome.failures.append(("run", _told(error)))
        return outcome
    for number, (name, moment, files) in enumerate(scene.cuts(moments, losses)):
        if only is not None and name != only:
            continue
        ask_qemu = random.Random(f"{seed} {name}").random() < qemu
        outcome.states += 1
        outcome.with_qemu += ask_qemu
        try:
            await _look(scene, moment, files, used=number % USED == 0, ask_qemu=ask_qemu)
        except Exception as error:  # noqa: BLE001
            outcome.failures.append((name, _told(error)))
    return outcome


def _told(error: BaseException) -> str:
    """In one line: what, and where in the code."""
    # trio wraps what happens in a nursery into groups, which Python 3.10 has no name for
    while inner := getattr(error, "exceptions", ()):
        error = inner[0]
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].name}, line {frames[-1].lineno}" if frames else "nowhere"
    return f"{type(error).__name__}: {str(error) or 'without a text'} ({place})"


async def _look(scene: Scene, moment: int, files: Files, *, used: bool, ask_qemu: bool) -> None:
    content = await scene.verify(moment, files)
    if scene.repairs and (used or ask_qemu):
        files = await scene.repaired(files)
    if used:
        await scene.verify_use(moment, files, content)
    if scene.rerun is not None and (used or ask_qemu):
        await scene.verify_again(moment, files, content)
    if ask_qemu:
        scene.verify_qemu(*await scene.entry(moment, files), files, content)
