"""Kinds of runs on chains of four images, for `crashkinds`: jobs that merge some of them and rearrange the chain."""

import trio
from crashing import DRIVERS, Guest, Scene, open_one
from storages import MemoryStorage

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.jobs.commit import Commit, Pivot
from cowfs.jobs.job import Job, State
from cowfs.jobs.stream import Stream

SECTOR = 512
#: files of the chain, deepest first
NAMES = ["base", "mid1", "mid2", "top"]


async def beside(scene: Scene, job: Job, *also: str) -> None:
    """Run a job to its end while guests work."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.run)
        while job.state is State.NONE or job.state.is_active:
            await scene.work(1, *also)
            await trio.lowlevel.checkpoint()
    assert (job.state, job.error) == (State.COMPLETED, "")


async def _create(scene: Scene) -> None:
    """Four images of a few sizes and cluster sizes with something in each; the deepest may be raw."""
    chooser = scene.chooser
    if chooser.random() < 0.5:
        del scene.formats["base"]
    for depth, name in enumerate(NAMES):
        format = scene.formats.get(name, scene.variant.format)
        # what QED has below it is raw or QED, since it says no more of it
        backing = (
            None if not depth else Backing(NAMES[depth - 1], scene.formats.get(NAMES[depth - 1], scene.variant.format))
        )
        if format != "raw":
            await DRIVERS[format].create(scene.add(name), _size(scene, name), backing, _options(scene))
        if name != "top":
            await _fill(scene, NAMES[: depth + 1])
    content = await _content(scene)
    assert len(content) == scene.variant.size
    scene.guest = Guest(content)


def _size(scene: Scene, name: str) -> int:
    size = scene.variant.size
    # version 2 cannot hide what a longer backing file has when it grows
    if name == "top" or "compat" in scene.variant.options:
        return size
    return size - scene.chooser.choice([0, 0, 1, 9, 100]) * SECTOR


def _options(scene: Scene) -> dict[str, str]:
    options = dict(scene.variant.options)
    size = options["cluster_size"]
    count, unit = (int(size), "") if size.isdigit() else (int(size[:-1]), size[-1])
    factors = [1, 2] if "extended_l2" in options else [1, 1, 2, 8]
    options["cluster_size"] = f"{count * scene.chooser.choice(factors)}{unit}"
    return options


async def _fill(scene: Scene, names: list[str]) -> None:
    """Write to the last of some images, which lie on each other."""
    chooser = scene.chooser
    layers = [
        Layer(await open_one(scene.storages[name], scene.formats.get(name, scene.variant.format)))
        for name in reversed(names)
    ]
    scene.storages[names[-1]].read_only = False
    disk = Disk(layers, copy_on_read=False)
    for _ in range(12):
        length = chooser.choice([SECTOR, 4096, 20_000, 40_960])
        offset = min(scene.place(length), disk.size - length) // SECTOR * SECTOR
        if chooser.random() < 0.25:
            await disk.zero_layer(0, offset, length // SECTOR * SECTOR)
        else:
            await disk.write(offset, chooser.randbytes(length))
    await disk.close()
    scene.storages[names[-1]].read_only = True


async def _content(scene: Scene) -> bytes:
    layers = []
    for name in reversed(NAMES):
        storage = MemoryStorage(name, bytes(scene.storages[name].content), read_only=True)
        layers.append(Layer(await open_one(storage, scene.formats.get(name, scene.variant.format))))
    disk = Disk(layers)
    return bytes(await disk.read(0, disk.size))


def _named(disk: Disk, name: str) -> Layer | None:
    return next((layer for layer in disk.layers if layer.name == name), None)


async def _run(scene: Scene, *also: str) -> None:
    """Guests, the job beside them, guests again, and then in another session."""
    scene.begin()
    async with scene.session():
        await scene.work(8)
        assert scene.rerun is not None
        job = scene.rerun(scene.disk)
        assert job is not None
        await beside(scene, job, *also)
        assert [layer.name for layer in scene.disk.layers] == scene.final
        assert all(layer.storage.read_only for layer in scene.disk.layers[1:])
        await scene.work(6)
    async with scene.session():
        await scene.work(4)


async def shorten(scene: Scene) -> None:
    """Streaming down to a layer that stays."""
    await _create(scene)
    base = scene.chooser.choice(NAMES[:2])
    scene.rerun = lambda disk: Stream(disk, base=_named(disk, base))
    scene.final = ["top", *reversed(NAMES[: NAMES.index(base) + 1])]
    await _run(scene, "zero", "discard")


def _commit(scene: Scene, top: str, base: str, pivot: Pivot = Pivot.NO) -> None:
    def job(disk: Disk) -> Job | None:
        upper, lower = _named(disk, top), _named(disk, base)
        if upper is None or upper is lower or lower is disk.layers[0]:
            return None
        return Commit(disk, top=upper, base=lower, pivot=pivot)

    scene.rerun = job
    above = [] if pivot is not Pivot.NO else NAMES[NAMES.index(top) + (top != "top") :]
    scene.final = [*reversed(above), *reversed(NAMES[: NAMES.index(base) + 1])]


async def _verify_marks(scene: Scene) -> None:
    """What is no part of the chain any more says so."""
    for name in NAMES:
        image = await open_one(scene.storages[name], scene.formats.get(name, scene.variant.format))
        marked = image.backing is not None and image.backing.name.startswith("merged by a commit into ")
        assert marked == (name not in scene.final), name


async def between(scene: Scene) -> None:
    """Commit of layers that lie between the active one and another."""
    await _create(scene)
    top, base = scene.chooser.choice([("mid2", "mid1"), ("mid2", "base"), ("mid1", "base")])
    _commit(scene, top, base)
    await _run(scene, "zero", "discard")
    await _verify_marks(scene)


async def deep(scene: Scene) -> None:
    """Commit of the active layer into one that is not right below it."""
    await _create(scene)
    _commit(scene, "top", scene.chooser.choice(["base", "mid1"]))
    await _run(scene, "discard")
    await _verify_marks(scene)


async def pivot(scene: Scene) -> None:
    """What is merged is left behind, and guests go on with the base; that must not be larger than the disk."""
    await _create(scene)
    scene.merged_into = scene.chooser.choice(NAMES[:3])
    _commit(scene, "top", scene.merged_into, Pivot.YES)
    await _run(scene, "discard")
    await _verify_marks(scene)
