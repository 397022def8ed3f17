"""The power goes before, in and after every single storage operation of requests that allocate side by side.

Whatever was made of what no flush had made durable: the image can be opened, is sound after the check at the open,
leaves no leaks when it is used and closed again, and has what a flush acknowledged; everything else is, sector by
sector, something that was written there or what was there before.
"""

import random

import pytest
import trio
from powercut import SECTOR, RecordingStorage, every_cut
from storages import MemoryStorage

from cowfs.block.check import Repair
from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.block.writetracker import WriteTracker
from cowfs.formats import qcow2, qed
from cowfs.formats.raw import RawImage

CLUSTER = 4096
#: driver, options, bytes of the disk that one L2 table maps
VARIANTS = {
    "qcow2": (qcow2, {"cluster_size": "4k"}, 512 * CLUSTER),
    "qcow2-512": (qcow2, {"cluster_size": "512", "refcount_bits": "64"}, 64 * 512),
    "qed": (qed, {"cluster_size": "4k", "table_size": "2"}, 1024 * CLUSTER),
}
TABLES = 4


class Scene:
    """An overlay over a short raw base; per sector that is looked at, what it may hold, oldest first."""

    def __init__(self, variant: str, *, cold: bool) -> None:
        self.driver, self.options, self.span = VARIANTS[variant]
        self.size = self.span * TABLES - SECTOR
        self.base = random.Random(1).randbytes(self.size - self.span)
        self.top = RecordingStorage("top")
        #: whether nothing can be done without suspending, as on a slow disk
        self.cold = cold
        self.allowed: dict[int, list[bytes]] = {}
        #: number of steps, and how many contents of each sector were gone by then
        self.acknowledged: list[tuple[int, dict[int, int]]] = [(0, {})]
        self.chooser = random.Random(2)

    def over_base(self, storage: MemoryStorage, image: object) -> Disk:
        base = MemoryStorage("base", self.base, read_only=True)
        layers = [Layer(image), Layer(RawImage(base))]  # type: ignore[arg-type]
        return Disk(layers, copy_on_read=False, flush_interval=1e9)

    async def open(self) -> None:
        await self.driver.create(self.top, self.size, Backing("base", "raw"), self.options)
        self.top.begin()
        self.top.cold = self.cold
        self.disk = self.over_base(self.top, await self.driver.open_image(self.top))

    def note(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), SECTOR):
            below = self.base[offset + at : offset + at + SECTOR].ljust(SECTOR, b"\0")
            self.allowed.setdefault(offset + at, [below]).append(data[at : at + SECTOR])

    async def write(self, offset: int, length: int) -> None:
        data = self.chooser.randbytes(length)
        self.note(offset, data)
        await self.disk.write(offset, data)

    async def drop(self, offset: int, length: int) -> None:
        self.note(offset, self.base[offset : offset + length].ljust(length, b"\0"))
        assert await self.disk.drop(offset, length, WriteTracker(1))

    async def zero(self, offset: int, length: int) -> None:
        self.note(offset, bytes(length))
        assert await self.disk.layers[0].write_zeroes(offset, length)

    async def flush(self) -> None:
        """To be called when no write is under way."""
        gone = {offset: len(contents) - 1 for offset, contents in self.allowed.items()}
        await self.disk.flush()
        self.acknowledged.append((len(self.top.steps), gone))

    async def run(self) -> None:
        """Allocate under new tables and old ones, beside flushes, and again what was let go of."""
        span = self.span
        async with trio.open_nursery() as nursery:
            for offset, length in ((0, CLUSTER), (CLUSTER + SECTOR, 7 * SECTOR), (2 * span - CLUSTER, 2 * CLUSTER)):
                nursery.start_soon(self.write, offset, length)
        await self.flush()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.write, 4 * CLUSTER, CLUSTER)
            nursery.start_soon(self.write, 3 * span + SECTOR, SECTOR)
            nursery.start_soon(self.disk.flush)
        await self.flush()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.drop, 0, CLUSTER)
            nursery.start_soon(self.zero, 2 * span - CLUSTER, CLUSTER)
            nursery.start_soon(self.write, 4 * CLUSTER, SECTOR)
        await self.flush()
        await self.write(span, 2 * CLUSTER)
        await self.disk.layers[0].image.settle()
        await self.write(self.size - SECTOR, SECTOR)

    async def assert_sound(self, begun: int, content: bytes) -> None:
        storage = MemoryStorage("cut", content)
        image = await self.driver.open_image(storage)
        disk = self.over_base(storage, image)
        result = await image.check()
        assert not result.corruptions, result.messages
        gone = max((entry for entry in self.acknowledged if entry[0] <= begun), key=lambda entry: entry[0])[1]
        for offset, contents in self.allowed.items():
            found = bytes(await disk.read(offset, SECTOR))
            assert found in contents[gone.get(offset, 0) :], f"sector {offset // SECTOR} after {begun} steps"
        await disk.write(self.span + 8 * CLUSTER, b"on" * CLUSTER)
        await disk.close()
        image = await self.driver.open_image(MemoryStorage("again", bytes(storage.content)))
        result = await image.check(Repair.LEAKS if self.driver is qcow2 else Repair.NONE)
        assert (result.corruptions, result.leaks) == (0, 0), result.messages


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
@pytest.mark.parametrize("variant", VARIANTS)
async def test_every_operation(variant: str, cold: bool) -> None:
    scene = Scene(variant, cold=cold)
    await scene.open()
    async with trio.open_nursery() as nursery:
        await nursery.start(scene.disk.run)
        await scene.run()
        nursery.cancel_scope.cancel()
    await scene.disk.close()
    cuts = 0
    for begun, content in every_cut(scene.top):
        await scene.assert_sound(begun, content)
        cuts += 1
    assert cuts > len(scene.top.steps) > 30
