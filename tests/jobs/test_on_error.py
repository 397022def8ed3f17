"""Jobs whose steps fail: end, wait for better times, or do the rest."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from storages import MemoryStorage
from trio.testing import MockClock, wait_all_tasks_blocked

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.errors import StorageError
from cowfs.formats import qcow2
from cowfs.formats.raw import RawImage
from cowfs.jobs.commit import Commit
from cowfs.jobs.job import SKIPPED, Job, OnError, State
from cowfs.jobs.stream import Stream

STEP = 1 << 20
SIZE = 8 * STEP


class Setup:
    def __init__(self, disk: Disk, base: MemoryStorage) -> None:
        self.disk = disk
        self.base = base
        self.model = bytearray(base.content)

    def fail(self, operation: str, *, after: int, times: int) -> None:
        """Let steps of the base fail, ``after`` some that succeed."""
        error = StorageError("broken", errno=errno.EIO, file="base")
        self.base.failures[operation] = [*[None] * after, *[error] * times]

    async def write(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        await self.disk.write(offset, data)

    async def verify(self) -> None:
        assert await self.disk.read(0, SIZE) == self.model


@asynccontextmanager
async def setup() -> AsyncIterator[Setup]:
    content = bytes(number % 251 + 1 for number in range(SIZE // 4096) for _ in range(4096))
    base = MemoryStorage("base", content, cold=True, read_only=True)
    top = MemoryStorage("top")
    await qcow2.create(top, SIZE, Backing("base", "raw"), {})
    disk = Disk([Layer(await qcow2.open_image(top)), Layer(RawImage(base))], copy_on_read=False)
    made = Setup(disk, base)
    yield made
    base.failures.clear()
    await made.verify()


async def paused(job: Job) -> None:
    await wait_all_tasks_blocked()
    assert (job.state, job.error) == (State.PAUSED, "base: broken")


async def test_stream_ends_at_the_first_error_unless_told_otherwise() -> None:
    async with setup() as s:
        s.fail("read", after=3, times=1)
        job = Stream(s.disk)
        await job.run()
        assert (job.state, job.error, len(s.disk.layers)) == (State.FAILED, "base: broken", 2)
        assert job.offset < SIZE


async def test_stream_stops_and_goes_on_where_it_was() -> None:
    async with setup() as s:
        s.fail("read", after=3, times=2)
        job = Stream(s.disk, on_error=OnError.STOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            await paused(job)
            offset = job.offset
            job.resume()
            await paused(job)
            assert job.offset == offset
            job.resume()
        assert (job.state, job.error, len(s.disk.layers)) == (State.COMPLETED, "", 1)


async def test_a_job_that_has_stopped_can_be_cancelled() -> None:
    async with setup() as s:
        s.fail("read", after=3, times=1)
        job = Stream(s.disk, on_error=OnError.STOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            await paused(job)
            job.cancel()
        assert (job.state, len(s.disk.layers)) == (State.CANCELLED, 2)


async def test_stream_ignores_errors_until_the_end_and_keeps_the_backing_file(autojump_clock: MockClock) -> None:
    async with setup() as s:
        s.fail("read", after=3, times=2)
        job = Stream(s.disk, on_error=OnError.IGNORE)
        await job.run()
        assert (job.state, job.error, len(s.disk.layers)) == (State.FAILED, "base: broken", 2)
        left = [extent.length for extent in await s.disk.layers[0].map(0, SIZE) if extent.kind.name == "UNALLOCATED"]
        # steps double until they have what an error may cost: these are the fourth and the fifth
        assert sum(left) == 2 * SKIPPED
        job = Stream(s.disk)
        await job.run()
        assert (job.state, len(s.disk.layers)) == (State.COMPLETED, 1)


@pytest.mark.parametrize("operation", ["write", "flush"])
@pytest.mark.parametrize("policy", OnError)
async def test_commit(operation: str, policy: OnError) -> None:
    async with setup() as s:
        for number in range(0, 8, 2):
            await s.write(number * STEP, bytes([number + 7]) * STEP)
        s.fail(operation, after=2 if operation == "write" else 0, times=1)
        job = Commit(s.disk, on_error=policy)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            if policy is OnError.STOP:
                await paused(job)
                job.resume()
        if policy is OnError.STOP:
            assert (job.state, job.error) == (State.COMPLETED, "")
        else:
            assert (job.state, job.error) == (State.FAILED, "base: broken")
        await s.verify()
        if policy is not OnError.REPORT:
            # what was skipped the first time is tried again at the end
            assert s.base.content == s.model
        await Commit(s.disk).run()
        assert s.base.content == s.model
