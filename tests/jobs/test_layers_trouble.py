"""Jobs that rearrange a chain of four, failed at any storage operation, or cancelled at any step.

Whatever happens: the disk shows the same, in memory, to whoever opens it after a crash then, and after it is closed; no
lock is held, and nothing is left open for writing that need not be; guests can write; and the job, run again, ends as
it would have.
"""

from collections.abc import Callable, Iterator
from errno import EIO, ENOSPC
from typing import Any, NamedTuple

import pytest
import trio
from crashing import DRIVERS, K, assert_sound
from faults import FaultyStorage, Trouble
from steadysteps import steady_steps
from storages import MemoryStorage

from cowfs.block.disk import Disk
from cowfs.block.image import Backing, Image
from cowfs.block.layer import Layer
from cowfs.block.stack import EVERYWHERE
from cowfs.errors import CowfsError, StorageError
from cowfs.formats.raw import RawImage
from cowfs.jobs import commit as commit_job
from cowfs.jobs.commit import Commit, Pivot
from cowfs.jobs.job import Job, State
from cowfs.jobs.stream import Stream

CLUSTER = 4096
SIZE = 256 * K
#: files of the chain, active layer first; their clusters, in bytes; the deepest is raw
NAMES = ["top", "mid2", "mid1", "base"]
CLUSTERS = {"top": 4096, "mid2": 8192, "mid1": 4096}
#: where guests have written in each, or made zeros
WRITTEN = {"base": range(64), "mid1": range(3, 24, 2), "mid2": range(2, 40, 5), "top": range(1, 60, 9)}
ZEROS = {"mid1": range(30, 32), "mid2": range(40, 44), "top": range(50, 52)}

Files = dict[str, bytes]


class Kind(NamedTuple):
    """A job, and the files of the chain when it has ended."""

    make: Callable[[Disk], Job]
    final: list[str]


def _of(disk: Disk, name: str) -> Layer:
    return next(layer for layer in disk.layers if layer.name == name)


KINDS = {
    "stream": Kind(lambda disk: Stream(disk, base=_of(disk, "base")), ["top", "base"]),
    "between": Kind(lambda disk: Commit(disk, top=_of(disk, "mid2"), base=_of(disk, "base")), ["top", "base"]),
    "deeper": Kind(lambda disk: Commit(disk, top=_of(disk, "mid1"), base=_of(disk, "base")), ["top", "mid2", "base"]),
    "active": Kind(lambda disk: Commit(disk, base=_of(disk, "mid1")), ["top", "mid1", "base"]),
    "pivot": Kind(lambda disk: Commit(disk, base=_of(disk, "mid1"), pivot=Pivot.YES), ["mid1", "base"]),
    "pivot deep": Kind(lambda disk: Commit(disk, base=_of(disk, "base"), pivot=Pivot.YES), ["base"]),
}
CASES = [(kind, format) for kind in KINDS for format in DRIVERS]


async def _image(storage: MemoryStorage, format: str) -> Image:
    image: Image = RawImage(storage) if storage.name == "base" else await DRIVERS[format].open_image(storage)
    return image


async def _files(format: str) -> Files:
    """What the chain is made of."""
    storages = {name: MemoryStorage(name) for name in NAMES}
    storages["base"].content.extend(bytes(SIZE))
    for depth in range(len(NAMES) - 1, -1, -1):
        name = NAMES[depth]
        if name != "base":
            below = NAMES[depth + 1]
            backing = Backing(below, "raw" if below == "base" else format)
            options = {"cluster_size": str(CLUSTERS[name]), **({"table_size": "2"} if format == "qed" else {})}
            await DRIVERS[format].create(storages[name], SIZE, backing, options)
        disk = Disk([Layer(await _image(storages[lower], format)) for lower in NAMES[depth:]])
        for number in WRITTEN[name]:
            await disk.write(number * CLUSTER, bytes([number + depth * 64 or 1]) * CLUSTER)
        for number in ZEROS.get(name, ()):
            await disk.zero_layer(0, number * CLUSTER, CLUSTER)
        await disk.close()
    return {name: bytes(storage.content) for name, storage in storages.items()}


class Scene:
    """The chain in use; content is what guests have written, all of it durable until the job has ended."""

    def __init__(self, format: str, storages: dict[str, FaultyStorage], disk: Disk) -> None:
        self.format = format
        self.storages = storages
        self.disk = disk
        self.content = bytearray()
        #: steps by which the job ended before it was to be cancelled
        self.left = 0

    @classmethod
    async def open(cls, format: str, files: Files) -> "Scene":
        storages = {name: FaultyStorage(name, files[name], read_only=name != "top") for name in NAMES}
        disk = Disk([Layer(await _image(storages[name], format)) for name in NAMES], flush_interval=1e9)
        scene = cls(format, storages, disk)
        scene.content = bytearray(await disk.read(0, SIZE))
        return scene

    async def entry(self) -> str:
        """What a user opens: "top", or what that was merged into if it says so."""
        image = await _image(MemoryStorage("top", bytes(self.storages["top"].content)), self.format)
        merged = image.backing is not None and image.backing.name.startswith("merged by a commit")
        return self.disk.layers[0].name if merged else "top"

    async def verify_files(self, *, names: list[str] | None = None) -> None:
        """As whoever finds the files as they are now."""
        layers = []
        name: str | None = await self.entry()
        while name is not None:
            storage = MemoryStorage(name, bytes(self.storages[name].content), read_only=True)
            image = await _image(storage, self.format)
            layers.append(Layer(image))
            name = image.backing.name if image.backing else None
        assert await Disk(layers).read(0, SIZE) == self.content
        if names is not None:
            assert [layer.name for layer in layers] == names
        for file in NAMES:
            await assert_sound(await _image(MemoryStorage(file, bytes(self.storages[file].content)), self.format))

    def verify_state(self, *, failed: bool = False) -> None:
        """Nothing is held, or open for writing without need; what could not be flushed as a job failed stays so."""
        disk = self.disk
        assert disk.lock.is_free(0, EVERYWHERE)
        assert disk.copies_on_read == (disk.copy_on_read and disk._populator is not None)
        writable = [name for name in NAMES if not self.storages[name].read_only and not self.storages[name].closings]
        if self.is_lost:
            # what cannot be flushed stays open for writing
            return
        assert disk.sink is None
        assert writable == [disk.layers[0].name] or (failed and len(writable) == 2)
        assert disk._trackers == []

    async def guest(self) -> None:
        """Writes that a guest makes afterwards."""
        for offset in (0, 5 * CLUSTER + 512, 20 * CLUSTER, SIZE - 1024):
            try:
                if not self.disk.write_now(offset, b"G" * 1024):
                    await self.disk.write(offset, b"G" * 1024)
            except StorageError:
                # a write may have to flush before it changes what cannot be flushed any more
                assert self.is_lost
            else:
                self.content[offset : offset + 1024] = b"G" * 1024

    @property
    def is_lost(self) -> bool:
        """Whether anything can never be flushed any more."""
        return any(storage.flush_error for storage in self.storages.values())

    async def again(self, kind: str) -> None:
        """The job is run once more, and the disk is closed."""
        disk, final, failed = self.disk, KINDS[kind].final, False
        assert await disk.read(0, SIZE) == self.content
        if [layer.name for layer in disk.layers] != final or "top" in final:
            try:
                job = KINDS[kind].make(disk)
            except StopIteration:
                # it has been merged already
                failed = True
            else:
                await job.run()
                assert (job.state, job.error) == (State.COMPLETED, "")
        assert [layer.name for layer in disk.layers] == final
        self.verify_state(failed=failed)
        assert await disk.read(0, SIZE) == self.content
        await disk.close()
        await self.verify_files(names=final if await self.entry() == final[0] else None)
        for name in NAMES:
            assert self.storages[name].closings == 1


def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steady_steps(monkeypatch, 128 * K)
    monkeypatch.setattr(commit_job, "FIRM_STEP", 64 * K)
    monkeypatch.setattr(commit_job, "BATCH", 128 * K)


def _troubles(nth: int) -> Iterator[Trouble]:
    yield Trouble(nth, EIO)
    yield Trouble(nth, ENOSPC, short=True)


@pytest.mark.parametrize(("kind", "format"), CASES)
async def test_any_operation_fails(kind: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _small_steps(monkeypatch)
    files = await _files(format)
    struck = 0
    for nth in range(2000):
        for trouble in _troubles(nth):
            scene = await Scene.open(format, files)
            await _with_trouble(scene, kind, trouble)
            if not trouble.struck:
                assert struck > 50
                return
            struck += 1
            if trouble.struck not in ("write", "truncate"):
                break
    raise AssertionError("trouble without end")


async def _with_trouble(scene: Scene, kind: str, trouble: Trouble) -> None:
    disk = scene.disk
    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        for storage in scene.storages.values():
            storage.trouble = trouble
        job = KINDS[kind].make(disk)
        await job.run()
        for storage in scene.storages.values():
            storage.trouble = None
        if job.state is State.FAILED:
            assert job.error
            assert "\n" not in job.error
        else:
            assert job.state is State.COMPLETED
            assert not job.error or "could not be marked" in job.error
        assert await disk.read(0, SIZE) == scene.content
        await scene.verify_files()
        scene.verify_state(failed=job.state is State.FAILED)
        await scene.guest()
        assert await disk.read(0, SIZE) == scene.content
        if disk.sink is not None:
            with pytest.raises(StorageError):
                await disk.flush()
        nursery.cancel_scope.cancel()
    if scene.is_lost:
        with trio.CancelScope(shield=True):
            try:
                await disk.close()
            except CowfsError:
                return
    elif not job.error:
        await disk.close()
    else:
        await scene.again(kind)


class _Axe(trio.abc.Instrument):
    """Cancels a job after so many steps of its task."""

    def __init__(self, job: Job, steps: int) -> None:
        self.job = job
        self.left = steps
        self.task: Any = None

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.left -= 1
            if not self.left and self.job.state.is_active:
                self.job.cancel()


@pytest.mark.parametrize(("kind", "format"), CASES)
async def test_cancelled_at_any_step(kind: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _small_steps(monkeypatch)
    files = await _files(format)
    cancelled = 0
    for steps in range(1, 2000):
        scene = await Scene.open(format, files)
        state = await _cancelled(scene, kind, steps)
        cancelled += state is State.CANCELLED
        if state is State.COMPLETED and not scene.left > 0:
            continue
        if state is State.COMPLETED:
            assert cancelled > 20
            return
    raise AssertionError("a job without end")


async def _cancelled(scene: Scene, kind: str, steps: int) -> State:
    disk = scene.disk
    for storage in scene.storages.values():
        # every operation is a step
        storage.cold = True
    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        job = KINDS[kind].make(disk)
        axe = _Axe(job, steps)

        async def run() -> None:
            axe.task = trio.lowlevel.current_task()
            await job.run()

        trio.lowlevel.add_instrument(axe)
        async with trio.open_nursery() as inner:
            inner.start_soon(run)
        trio.lowlevel.remove_instrument(axe)
        scene.left = axe.left
        for storage in scene.storages.values():
            storage.cold = False
        assert job.state in (State.CANCELLED, State.COMPLETED), job.error
        assert await disk.read(0, SIZE) == scene.content
        await scene.verify_files()
        scene.verify_state()
        await scene.guest()
        assert await disk.read(0, SIZE) == scene.content
        nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await scene.again(kind)
    return job.state
