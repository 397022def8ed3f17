"""Freed clusters are used again: writing, zeroing, dropping and rewriting does not make the file grow for ever."""

import random

import pytest
from powercut import RecordingStorage, after_cut
from storages import MemoryStorage

from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.formats import qcow2

#: options, bytes of the disk
IMAGES: dict[str, tuple[dict[str, str], int]] = {
    "512": ({"cluster_size": "512", "refcount_bits": "64"}, 300 << 10),
    "4k": ({"cluster_size": "4k", "refcount_bits": "1"}, 3 << 20),
    "64k": ({"cluster_size": "64k"}, 8 << 20),
    "64k extended": ({"cluster_size": "64k", "extended_l2": "on"}, 8 << 20),
}


class Churn:
    """Random changes of one disk, and what it ought to hold."""

    def __init__(self, seed: int, size: int) -> None:
        self.chooser = random.Random(seed)
        self.storage = RecordingStorage("image")
        self.model = bytearray(size)

    async def open(self) -> None:
        self.disk = Disk([Layer(await qcow2.open_image(self.storage))], flush_interval=1e9)

    async def step(self) -> None:
        kind = self.chooser.random()
        if kind < 0.6:
            await self._write()
        elif kind < 0.8:
            await self._give_back()
        elif kind < 0.95:
            await self.disk.flush()
        else:
            await self.disk.close()
            await self.open()

    async def _write(self) -> None:
        offset = self.chooser.randrange(len(self.model))
        cluster = self.disk.cluster_size
        length = min(self.chooser.choice([100, 4096, cluster, 5 * cluster, 30 * cluster]), len(self.model) - offset)
        data = self.chooser.randbytes(length)
        self.model[offset : offset + length] = data
        if not self.disk.write_now(offset, data):
            await self.disk.write(offset, data)

    async def _give_back(self) -> None:
        cluster = self.disk.cluster_size
        start = self.chooser.randrange(len(self.model) // cluster) * cluster
        length = min(self.chooser.randrange(1, 20) * cluster, len(self.model) - start)
        layer = self.disk.layers[0]
        await (layer.write_zeroes if self.chooser.random() < 0.5 else layer.deallocate)(start, length)
        self.model[start : start + length] = bytes(length)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("image", IMAGES)
async def test_churn_neither_damages_nor_grows_the_file(image: str, seed: int) -> None:
    options, size = IMAGES[image]
    churn = Churn(seed, size)
    await qcow2.create(churn.storage, size, None, options)
    churn.storage.begin()
    await churn.open()
    for _ in range(120):
        await churn.step()
    assert await churn.disk.read(0, size) == churn.model
    await churn.disk.close()
    assert churn.storage.length < 1.1 * size + 16 * churn.disk.cluster_size
    again = await qcow2.open_image(MemoryStorage("again", bytes(churn.storage.content), read_only=True))
    result = await again.check()
    assert (result.corruptions, result.leaks) == (0, 0), result.messages[:5]
    assert await Disk([Layer(again)]).read(0, size) == churn.model
    steps = churn.storage.steps
    for moment in churn.chooser.sample(range(len(steps) + 1), 12):
        cut = MemoryStorage("cut", after_cut(churn.storage.start, steps[:moment], churn.chooser), read_only=True)
        result = await (await qcow2.open_image(cut)).check()
        assert not result.corruptions, (moment, result.messages[:5])
