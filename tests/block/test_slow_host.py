"""Hosts whose every operation may take seconds, while everything else goes on. Gates hold them; nothing sleeps."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType

import pytest
import trio
from commandline import ok, qemu_img
from storages import Gate, MemoryStorage
from trio.testing import wait_all_tasks_blocked

from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.errors import CowfsError, OutOfRange
from cowfs.formats import qcow2, qed

K = 1024
CLUSTER = 4 * K
#: driver, options, bytes of the disk that one table maps
FORMATS: dict[str, tuple[ModuleType, dict[str, str], int]] = {
    "qcow2": (qcow2, {"cluster_size": "4k"}, 512 * CLUSTER),
    "qcow2-ext": (qcow2, {"cluster_size": "16k", "extended_l2": "on"}, 1024 * 16 * K),
    "qcow2-data": (qcow2, {"cluster_size": "4k", "data_file": "data"}, 512 * CLUSTER),
    "qed": (qed, {"cluster_size": "4k", "table_size": "2"}, 1024 * CLUSTER),
}
#: more tables than the smallest cache holds
TABLES = 24


class Scene:
    """One image with a small cache, what ought to be in it, and the storage that its flushes wait for."""

    def __init__(self, name: str) -> None:
        self.driver, self.options, self.span = FORMATS[name]
        self.format = name.partition("-")[0]
        self.size = TABLES * self.span
        self.top = MemoryStorage("top")
        self.data = MemoryStorage("data") if "data_file" in self.options else None
        self.model: dict[int, bytes] = {}

    async def open(self) -> Disk:
        image = await self.driver.open_image(self.top, cache_size=0)
        if self.data is not None:
            image.attach_data(self.data)
        return Disk([Layer(image)], flush_interval=1e9)

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[Disk]:
        await self.driver.create(self.top, self.size, None, self.options)
        if self.data is not None:
            await self.data.truncate(self.size)
        self.disk = await self.open()
        async with trio.open_nursery() as nursery:
            await nursery.start(self.disk.run)
            yield self.disk
            nursery.cancel_scope.cancel()
        await self.disk.close()

    async def write(self, offset: int, byte: bytes) -> None:
        self.model[offset] = byte * CLUSTER
        if not self.disk.write_now(offset, self.model[offset]):
            await self.disk.write(offset, self.model[offset])

    async def verify(self, disk: Disk | None = None) -> None:
        wrong = [at for at, data in self.model.items() if await (disk or self.disk).read(at, CLUSTER) != data]
        assert not wrong

    async def verify_file(self, folder: Path) -> None:
        """As QEMU sees it, and a new session."""
        file = folder / "top"
        file.write_bytes(self.top.content)
        if self.data is not None:
            (folder / "data").write_bytes(self.data.content)
        ok(qemu_img("check", "-q", "-f", self.format, file))
        disk = await self.open()
        await self.verify(disk)
        await disk.close()


@pytest.fixture(params=sorted(FORMATS))
def scene(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    # where a data file is made, which is not used
    monkeypatch.chdir(tmp_path)
    return Scene(request.param)


async def _evict(scene: Scene, how: str) -> None:
    if how == "reads":
        for number in range(1, TABLES - 1):
            await scene.disk.readinto(number * scene.span, memoryview(bytearray(512)))
    else:
        scene.disk.layers[0].image.rest()


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("how", ["reads", "rest"])
@pytest.mark.parametrize("where", ["image", "data file"])
async def test_what_an_fsync_is_writing_can_be_read_all_the_while(
    scene: Scene, how: str, where: str, tmp_path: Path
) -> None:
    """At each flush of the storage that an fsync takes, everything else goes on, with few tables in memory."""
    storage = scene.top if where == "image" or scene.data is None else scene.data
    async with scene.in_use() as disk:
        for number in range(TABLES - 1):
            await scene.write(number * scene.span, b"A")
        await disk.flush()
        for turn, byte in enumerate((b"B", b"C", b"D"), start=1):
            for number in (0, 7, TABLES - 1):
                await scene.write(number * scene.span + turn * CLUSTER * 4, byte)
            seen = 0
            async with trio.open_nursery() as nursery:
                gate = storage.gates["flush"] = Gate()
                nursery.start_soon(disk.flush)
                await gate.arrived.wait()
                while "flush" in storage.gates:
                    await _evict(scene, how)
                    await scene.verify()
                    seen += 1
                    # lets go of this one, and holds the next, if there is one
                    following = Gate()
                    storage.gates["flush"] = following
                    gate.open()
                    await wait_all_tasks_blocked()
                    if not following.waiting:
                        del storage.gates["flush"]
                    gate = following
            assert seen
            await scene.write(turn * CLUSTER * 4 + CLUSTER, byte)
        await disk.flush()
        await scene.verify()
    await scene.verify_file(tmp_path)


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("held", ["flush", "write"])
async def test_a_disk_shrinks_only_once_a_flush_under_way_is_over(held: str, tmp_path: Path) -> None:
    scene = Scene("qcow2")
    async with scene.in_use() as disk:
        for number in range(3):
            await scene.write(number * scene.span, b"A")
        scene.top.cold = True
        gate = scene.top.gates[held] = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.flush)
            await gate.arrived.wait()
            nursery.start_soon(disk.shrink, 4 * scene.span)
            await wait_all_tasks_blocked()
            assert disk.size == scene.size
            del scene.top.gates[held]
            gate.open()
        assert disk.size == 4 * scene.span
        scene.top.cold = False
        await scene.verify()
        await scene.write(scene.span + CLUSTER, b"B")
        await disk.flush()
    await scene.verify_file(tmp_path)


@pytest.mark.needs("qemu-img")
async def test_a_disk_shrinks_only_once_what_a_flush_frees_is_free(tmp_path: Path) -> None:
    """A hole that is punched late would hit what has been given the place meanwhile."""
    scene = Scene("qcow2")
    async with scene.in_use() as disk:
        for number in range(40):
            await scene.write(number * CLUSTER, b"A")
        await disk.flush()
        await disk.discard(0, 20 * CLUSTER)
        scene.model = {at: data for at, data in scene.model.items() if at >= 20 * CLUSTER}
        gate = scene.top.gates["punch"] = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.flush)
            await gate.arrived.wait()
            nursery.start_soon(disk.shrink, 30 * CLUSTER)
            await wait_all_tasks_blocked()
            assert disk.size == scene.size
            del scene.top.gates["punch"]
            gate.open()
        scene.model = {at: data for at, data in scene.model.items() if at < 30 * CLUSTER}
        for number in range(10):
            await scene.write(number * CLUSTER, b"B")
        await disk.flush()
        await scene.verify()
    await scene.verify_file(tmp_path)


async def test_flushes_without_end_do_not_keep_a_disk_from_shrinking() -> None:
    scene = Scene("qcow2")
    async with scene.in_use() as disk:
        await scene.write(0, b"A")
        async with trio.open_nursery() as nursery:

            async def go_on() -> None:
                while True:
                    await disk.flush()

            for _ in range(3):
                nursery.start_soon(go_on)
            await disk.shrink(scene.span)
            nursery.cancel_scope.cancel()
        assert disk.size == scene.span


async def test_a_write_that_waited_while_the_disk_shrank_is_beyond_its_end() -> None:
    scene = Scene("qcow2")
    async with scene.in_use() as disk:
        await scene.write(0, b"A")
        await disk.flush()
        outcome: list[CowfsError] = []

        async def write() -> None:
            try:
                await disk.write(scene.span, b"B" * CLUSTER)
            except CowfsError as error:
                outcome.append(error)

        gate = scene.top.gates["flush"] = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.shrink, scene.span)
            await gate.arrived.wait()
            nursery.start_soon(write)
            await wait_all_tasks_blocked()
            del scene.top.gates["flush"]
            gate.open()
        assert [type(error) for error in outcome] == [OutOfRange]
        assert (await disk.layers[0].image.check()).corruptions == 0


@pytest.mark.needs("qemu-img")
async def test_marks_of_use_stay_until_what_a_flush_frees_is_free(tmp_path: Path) -> None:
    scene = Scene("qed")
    async with scene.in_use() as disk:
        for number in range(8):
            await scene.write(number * CLUSTER, b"A")
        await disk.flush()
        image = disk.layers[0].image
        await image.deallocate(0, 4 * CLUSTER)
        scene.model = {at: data for at, data in scene.model.items() if at >= 4 * CLUSTER}
        gate = scene.top.gates["punch"] = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.flush)
            await gate.arrived.wait()
            nursery.start_soon(disk.settle)
            await wait_all_tasks_blocked()
            marks = [image.dirty]
            del scene.top.gates["punch"]
            gate.open()
        assert [*marks, image.dirty] == [True, False]
        await scene.verify()
    await scene.verify_file(tmp_path)


async def _any_gate(storages: list[MemoryStorage], chooser: random.Random, work: Callable[[], Awaitable[None]]) -> None:
    """Do something while an operation of a storage is held for as long as anything else can go on."""
    storage, operation = chooser.choice(storages), chooser.choice(["read", "write", "flush", "punch"])
    gate = storage.gates[operation] = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await wait_all_tasks_blocked()
        del storage.gates[operation]
        gate.open()


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("seed", range(6))
async def test_guests_and_the_background_on_a_host_that_holds_anything(scene: Scene, seed: int, tmp_path: Path) -> None:
    chooser = random.Random(seed)
    places = [number * scene.span + at * CLUSTER * 4 for number in range(TABLES) for at in range(6)]
    async with scene.in_use() as disk:
        storages = [scene.top] if scene.data is None else [scene.top, scene.data]
        for storage in storages:
            storage.cold = True

        async def turn() -> None:
            chosen = chooser.sample(places, 12)
            async with trio.open_nursery() as nursery:
                for number, place in enumerate(chosen):
                    what = chooser.choice(["write"] * 5 + ["discard", "flush", "rest", "settle", "sector"])
                    if what == "write":
                        nursery.start_soon(scene.write, place, bytes([chooser.randrange(1, 256)]))
                    elif what == "discard":
                        scene.model[place] = bytes(CLUSTER)
                        nursery.start_soon(disk.discard, place, CLUSTER)
                    elif what == "sector" and place in scene.model:
                        sector = bytes([number]) * 512
                        scene.model[place] = sector + scene.model[place][512:]
                        nursery.start_soon(disk.write, place, sector)
                    elif what == "flush":
                        nursery.start_soon(disk.flush)
                    elif what == "settle":
                        nursery.start_soon(disk.settle)
                    else:
                        disk.layers[0].image.rest()

        for _ in range(12):
            await _any_gate(storages, chooser, turn)
            await scene.verify()
        await disk.flush()
        for storage in storages:
            storage.cold = False
    await scene.verify_file(tmp_path)
