"""QED and power cuts: every prefix of what was written, and random subsets of what was not flushed."""

import random
from collections.abc import Iterator

import pytest
from powercut import RecordingStorage, after_cut
from qedtools import disk_over
from storages import MemoryStorage

from cowfs.block.writetracker import WriteTracker
from cowfs.formats import qed
from cowfs.formats.qed.image import QedImage
from cowfs.formats.qed.layout import Header

CLUSTER = 4096
TABLES = 10
#: subsets that are tried for each moment, besides nothing lost
SUBSETS = 2


class Scene:
    """A disk with one L2 table after another, and what its clusters hold; steps are recorded from `begin`."""

    def __init__(self, seed: int) -> None:
        self.chooser = random.Random(seed)
        self.table_size = self.chooser.choice([1, 2, 4])
        self.span = self.table_size * CLUSTER // 8 * CLUSTER
        head = Header(CLUSTER, self.table_size, 1, 0, 0, 0, CLUSTER, self.span * TABLES).pack()
        content = head.ljust(CLUSTER * (1 + self.table_size), b"\0")
        self.storage = RecordingStorage("disk", content, cold=bool(seed % 2))
        self.model: dict[int, bytes] = {}

    async def fill(self) -> None:
        self.disk = disk_over(await qed.open_image(self.storage))
        for number in self.chooser.sample(range(TABLES), TABLES):
            for offset in range(0, self.chooser.choice([1, 1, 2, 5]) * CLUSTER, CLUSTER):
                await self.write(number * self.span + offset)
            if self.chooser.random() < 0.3:
                await self.disk.layers[0].write_zeroes(number * self.span + 20 * CLUSTER, CLUSTER)
        await self.disk.flush()

    async def write(self, offset: int) -> None:
        self.model[offset] = self.chooser.randbytes(CLUSTER)
        await self.disk.write(offset, self.model[offset])

    async def drop(self, offset: int) -> None:
        del self.model[offset]
        assert await self.disk.drop(offset, CLUSTER, WriteTracker(1))

    def begin(self) -> None:
        self.storage.begin()

    def cuts(self) -> Iterator[bytes]:
        for end in range(len(self.storage.steps) + 1):
            yield after_cut(self.storage.start, self.storage.steps[:end], None)
            for _ in range(SUBSETS):
                yield after_cut(self.storage.start, self.storage.steps[:end], self.chooser)


async def assert_sound(content: bytes, model: dict[int, bytes]) -> None:
    """No damage, leaks only under the mark, all of ``model`` there; and writing goes on without leaving leaks."""
    image = await qed.open_image(MemoryStorage("cut", content, read_only=True))
    result = await image.check()
    assert not result.corruptions, result.messages
    assert not result.leaks or image.dirty
    disk = disk_over(image)
    for offset, data in model.items():
        assert await disk.read(offset, CLUSTER) == data
    storage = MemoryStorage("cut", content)
    disk = disk_over(await qed.open_image(storage))
    await disk.write(100, b"x" * 5000)
    await disk.close()
    result = await (await qed.open_image(MemoryStorage("cut", bytes(storage.content), read_only=True))).check()
    assert (result.corruptions, result.leaks) == (0, 0), result.messages


@pytest.mark.parametrize("seed", range(8))
async def test_compact(seed: int) -> None:
    scene = Scene(seed)
    await scene.fill()
    for offset in scene.chooser.sample(sorted(scene.model), len(scene.model) * 2 // 3):
        await scene.drop(offset)
    await scene.disk.flush()
    scene.begin()
    await scene.disk.compact()
    image = scene.disk.layers[0].image
    assert isinstance(image, QedImage)
    tables = sum(map(bool, image.l1.entries))
    assert scene.storage.length == (1 + (1 + tables) * scene.table_size + len(scene.model)) * CLUSTER
    await image.settle()
    for content in scene.cuts():
        await assert_sound(content, scene.model)


@pytest.mark.parametrize("seed", range(4))
async def test_writes_and_flushes(seed: int) -> None:
    """What was flushed before the recording begins is not touched by what comes then."""
    scene = Scene(seed)
    await scene.fill()
    flushed = dict(scene.model)
    scene.begin()
    for number in range(25):
        await scene.write(number % TABLES * scene.span + (30 + number) * CLUSTER)
        if number % 4 == 0:
            dropped = scene.chooser.choice(sorted(set(scene.model) & set(flushed)))
            await scene.drop(dropped)
            del flushed[dropped]
        if number % 5 == 0:
            await scene.disk.flush()
    await scene.disk.close()
    for content in scene.cuts():
        await assert_sound(content, flushed)
