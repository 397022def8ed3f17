"""The power goes at any moment: of guests' writes, copy-on-read, streaming to its end, and commit.

Whatever the moment, and whatever was lost of what no flush had made durable: every image is structurally sound,
what a flush acknowledged is there, and everything else is, sector by sector, something the guest has written
there or what was there before.
"""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from powercut import RecordingStorage, Step, after_cut
from storages import MemoryStorage

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.formats import qcow2, qed
from cowfs.formats.raw import RawImage
from cowfs.jobs import commit
from cowfs.jobs.commit import Commit
from cowfs.jobs.job import State
from cowfs.jobs.stream import Stream

SECTOR = 512
SIZE = 160 * 4096
DRIVERS = {"qcow2": qcow2, "qed": qed}
OPTIONS = {
    "qcow2": {"cluster_size": "4k"},
    "qcow2-extended": {"cluster_size": "16k", "extended_l2": "on"},
    "qcow2-512": {"cluster_size": "512", "refcount_bits": "64"},
    "qed": {"cluster_size": "4k", "table_size": "2"},
}
#: random losses that are tried for each moment, besides none
LOSSES = 2
#: moments that are tried of one run, evenly spread
MOMENTS = 60


class Scene:
    """An overlay on a raw base; what the guest wrote, and what of it was acknowledged by a flush and when."""

    def __init__(self, variant: str, seed: int) -> None:
        self.driver = DRIVERS[variant.partition("-")[0]]
        self.options = OPTIONS[variant]
        self.chooser = random.Random(seed)
        self.journal: list[tuple[str, Step]] = []
        self.base = RecordingStorage("base", self.chooser.randbytes(SIZE), journal=self.journal, read_only=True)
        self.top = RecordingStorage("top", journal=self.journal)
        self.model = bytearray(self.base.content)
        # per sector: what it may hold, oldest first
        self.allowed = [[bytes(self.model[at : at + SECTOR])] for at in range(0, SIZE, SECTOR)]
        # moment of the journal after which only the later ones of these may be seen: (moment, sector, how many gone)
        self.flushed: list[tuple[int, list[int]]] = []

    async def open(self) -> None:
        await self.driver.create(self.top, SIZE, Backing("base", "raw"), self.options)
        self.journal.clear()
        self.start = {"base": bytes(self.base.content), "top": bytes(self.top.content)}
        image = await self.driver.open_image(self.top)
        self.disk = Disk([Layer(image), Layer(RawImage(self.base))], flush_interval=1e9)

    async def write(self) -> None:
        offset = self.chooser.randrange(SIZE // SECTOR) * SECTOR
        length = min(self.chooser.choice([512, 4096, 9 * 512, 40_960]), SIZE - offset)
        data = self.chooser.randbytes(length)
        for at in range(0, length, SECTOR):
            self.allowed[(offset + at) // SECTOR].append(data[at : at + SECTOR])
        self.model[offset : offset + length] = data
        if not self.disk.write_now(offset, data):
            await self.disk.write(offset, data)

    async def flush(self) -> None:
        before = [len(contents) - 1 for contents in self.allowed]
        await self.disk.flush()
        self.flushed.append((len(self.journal), before))

    async def assert_sound(self, moment: int, losing: random.Random | None) -> None:
        """Cut the power after ``moment`` steps, and look at what is there."""
        done = self.journal[:moment]
        content = {
            name: after_cut(start, [step for where, step in done if where == name], losing)
            for name, start in self.start.items()
        }
        image = await self.driver.open_image(MemoryStorage("top", content["top"], read_only=True))
        result = await image.check()
        assert not result.corruptions, result.messages
        layers = [Layer(image)]
        if image.backing is not None:
            layers.append(Layer(RawImage(MemoryStorage("base", content["base"], read_only=True))))
        seen = await Disk(layers).read(0, SIZE)
        oldest = max((gone for when, gone in self.flushed if when <= moment), default=[0] * len(self.allowed))
        for number, contents in enumerate(self.allowed):
            at = number * SECTOR
            assert bytes(seen[at : at + SECTOR]) in contents[oldest[number] :], f"sector {number} at moment {moment}"

    async def assert_all_moments(self) -> None:
        count = len(self.journal)
        moments = sorted({*range(0, count + 1, max(1, count // MOMENTS)), count})
        for moment in moments:
            await self.assert_sound(moment, None)
            for _ in range(LOSSES):
                await self.assert_sound(moment, self.chooser)


@asynccontextmanager
async def scene(variant: str, seed: int) -> AsyncIterator[Scene]:
    made = Scene(variant, seed)
    await made.open()
    async with trio.open_nursery() as nursery:
        await nursery.start(made.disk.run)
        yield made
        nursery.cancel_scope.cancel()


@pytest.fixture(params=OPTIONS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_writes_and_flushes(variant: str) -> None:
    async with scene(variant, 1) as s:
        for number in range(40):
            await s.write()
            if number % 7 == 6:
                await s.flush()
        await s.disk.close()
    await s.assert_all_moments()


async def test_copy_on_read_beside_writes(variant: str) -> None:
    async with scene(variant, 2) as s:
        for number in range(30):
            buffer = bytearray(4096)
            offset = s.chooser.randrange(SIZE - 4096)
            if not s.disk.readinto_now(offset, memoryview(buffer)):
                await s.disk.readinto(offset, memoryview(buffer))
            assert buffer == s.model[offset : offset + 4096]
            if number % 3 == 0:
                await s.write()
            if number % 7 == 6:
                await s.flush()
        await s.disk.populated()
        await s.disk.close()
    await s.assert_all_moments()


async def test_stream_to_its_end_beside_writes(variant: str) -> None:
    async with scene(variant, 3) as s:
        job = Stream(s.disk)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            for number in range(20):
                await s.write()
                await trio.lowlevel.checkpoint()
                if number % 5 == 4:
                    await s.flush()
        assert job.state is State.COMPLETED, job.error
        assert s.disk.layers[0].backing is None
        for _ in range(5):
            await s.write()
        await s.disk.close()
    await s.assert_all_moments()


async def test_commit_beside_writes(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "STEP", 16_384)
    monkeypatch.setattr(commit, "BATCH", 65_536)
    async with scene(variant, 4) as s:
        for _ in range(15):
            await s.write()
        await s.flush()
        job = Commit(s.disk)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            for _ in range(15):
                await s.write()
                await s.flush()
        assert job.state is State.COMPLETED, job.error
        await s.disk.close()
    await s.assert_all_moments()
