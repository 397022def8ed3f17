"""What is done to the storages for clusters that are written in parts, step by step, and when something fails."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from storages import Gate, MemoryStorage
from trio.testing import MockClock, wait_all_tasks_blocked

from cowfs.block import partial
from cowfs.block.disk import Disk
from cowfs.block.extent import Extent, Kind
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.block.moves import Source
from cowfs.block.partial import Below, PartialClusters
from cowfs.block.quiescence import Readers
from cowfs.errors import StorageError
from cowfs.formats import qcow2, qed
from cowfs.formats.raw import RawImage
from cowfs.jobs.commit import Commit
from cowfs.jobs.job import State

CLUSTER = 65536
SIZE = 32 * CLUSTER
#: bytes; the first cluster is written to before all tests, so that the tables are there
FIRST = CLUSTER
DRIVERS = {"qcow2": qcow2, "qed": qed}


class Setup:
    """An overlay in memory over a raw base whose reads can be held up or fail."""

    def __init__(self, disk: Disk, top: MemoryStorage, base: MemoryStorage, format: str) -> None:
        self.disk = disk
        self.top = top
        self.base = base
        self.model = bytearray(base.content)
        self.format = format

    def write(self, offset: int, length: int) -> None:
        """A write that needs nothing but memory."""
        data = bytes([offset // 512 % 255 + 1]) * length
        assert self.disk.write_now(offset, data)
        self.model[offset : offset + length] = data

    @property
    def partial(self) -> list[int]:
        found = self.disk.layers[0].partial
        assert found is not None
        return sorted(found.clusters)

    def writes(self) -> list[tuple[int, int]]:
        """Offset and length of the writes to the overlay since the last call."""
        found = [(offset, length) for what, offset, length in self.top.log if what == "write"]
        self.top.log.clear()
        return found

    async def verify(self) -> None:
        """The disk, and what a flush leaves of it for the next one who opens the image."""
        assert await self.disk.read(0, SIZE) == self.model
        await self.disk.flush()
        assert self.partial == []
        image = await DRIVERS[self.format].open_image(MemoryStorage("top", bytes(self.top.content), read_only=True))
        again = Disk([Layer(image), Layer(RawImage(MemoryStorage("base", bytes(self.base.content), read_only=True)))])
        assert await again.read(0, SIZE) == self.model
        result = await image.check()
        assert (result.corruptions, result.messages) == (0, [])


@asynccontextmanager
async def setup(format: str, *, has_base: bool = True) -> AsyncIterator[Setup]:
    content = bytes(i // 512 % 251 + 1 for i in range(0, SIZE, 512) for _ in range(512)) if has_base else bytes(SIZE)
    base = MemoryStorage("base", content, cold=True, read_only=True)
    top = MemoryStorage("top")
    driver = DRIVERS[format]
    await driver.create(top, SIZE, Backing("base", "raw") if has_base else None, {"cluster_size": str(CLUSTER)})
    layers = [Layer(await driver.open_image(top)), *([Layer(RawImage(base))] if has_base else [])]
    disk = Disk(layers, flush_interval=1e9, copy_on_read=False)
    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        made = Setup(disk, top, base, format)
        await disk.write(0, bytes(content[:512]))
        await disk.flush()
        top.log.clear()
        base.log.clear()
        yield made
        await made.verify()
        nursery.cancel_scope.cancel()


@pytest.fixture(params=DRIVERS)
def format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A format; nothing is completed in the background."""
    monkeypatch.setattr(partial, "QUIET", 1e9)
    return str(request.param)


async def test_a_write_costs_its_own_bytes_and_the_rest_is_copied_by_the_flush(format: str) -> None:
    async with setup(format) as s:
        s.write(FIRST + 4096, 4096)
        assert [length for _, length in s.writes()] == [4096]
        assert s.partial == [1]
        assert [extent.kind for extent in s.disk.layers[0].map_now(FIRST, CLUSTER) or ()] == [
            Kind.UNALLOCATED,
            Kind.DATA,
            Kind.UNALLOCATED,
        ]
        await s.disk.flush()
        assert s.partial == []
        lengths = [length for _, length in s.writes()]
        assert 4096 in lengths and CLUSTER - 2 * 4096 in lengths
        assert len(s.disk.layers[0].map_now(FIRST, CLUSTER) or ()) == 1


async def test_nothing_is_copied_of_what_the_guest_writes_itself(format: str) -> None:
    async with setup(format) as s:
        for offset in range(FIRST, FIRST + CLUSTER, 8192):
            s.write(offset, 8192)
        await s.disk.flush()
        assert not [step for step in s.base.log if step[0] == "read"]


async def test_zeros_are_not_written_where_the_file_has_none_yet(format: str) -> None:
    async with setup(format, has_base=False) as s:
        s.write(FIRST + 4096, 4096)
        s.writes()
        await s.disk.flush()
        data = s.disk.layers[0].map_now(FIRST, CLUSTER) or []
        place = data[0].host_offset
        # one sector, so that the file ends with the cluster
        assert [length for offset, length in s.writes() if place <= offset < place + CLUSTER] == [512]
        assert s.top.length >= place + CLUSTER


async def test_zeros_are_written_where_a_cluster_was_used_before(format: str) -> None:
    async with setup(format, has_base=False) as s:
        s.write(FIRST, CLUSTER // 2)
        await s.disk.flush()
        place = (s.disk.layers[0].map_now(FIRST, CLUSTER) or [])[0].host_offset
        await s.disk.layers[0].deallocate(FIRST, CLUSTER)
        s.model[FIRST : FIRST + CLUSTER] = bytes(CLUSTER)
        await s.disk.flush()
        # whatever else the host may have there
        s.top.content[place : place + CLUSTER] = b"old " * (CLUSTER // 4)
        s.write(2 * CLUSTER + 512, 512)
        assert (s.disk.layers[0].map_now(2 * CLUSTER + 512, 512) or [])[0].host_offset == place + 512


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
async def test_many_gaps_over_many_sources_cost_no_more_than_their_sum(format: str, used: bool) -> None:
    cluster, step = 256 << 10, 3 * 512
    looks = 0

    class Counted(Source):
        __slots__ = ()

        @property
        def end(self) -> int:
            nonlocal looks
            looks += 1
            return super().end

    async def not_asked(offset: int, length: int) -> bytearray:
        raise AssertionError("the sources are known")

    base = MemoryStorage("base", bytes(i // 512 % 251 + 1 for i in range(0, cluster, 512) for _ in range(512)))
    content = bytearray(base.content)
    sources: list[Source] = []
    for number, offset in enumerate(range(0, cluster, step)):
        length = min(step, cluster - offset)
        sources.append(Counted(offset, length, None if number % 3 else base, offset))
        if number % 3:
            content[offset : offset + length] = bytes(length)
    top = MemoryStorage("top")
    await DRIVERS[format].create(top, cluster * 2, None, {"cluster_size": str(cluster)})
    image = await DRIVERS[format].open_image(top)
    layer = Layer(image)
    await layer.write_clusters(cluster, [b"x" * cluster])
    if used:
        reservation = await image.reserve(0, cluster)
        await top.write(reservation.runs[0].host_offset, [b"x" * cluster])
        image.release(reservation)
        await image.flush()
    below = Below(lambda offset, length: sources, not_asked)
    layer.partial = found = PartialClusters(image, below, Readers())
    for offset in range(512, cluster, 1024):
        assert found.write_now(offset, b"y" * 512)
        content[offset : offset + 512] = b"y" * 512
    await found.complete(0, cluster)
    extents = await layer.map(0, cluster)
    assert len(extents) == 1
    assert await top.read_bytes(extents[0].host_offset, cluster) == content
    assert looks < 6 * (len(sources) + cluster // 1024)


async def test_a_write_into_a_gap_waits_for_the_copy_and_one_elsewhere_does_not(format: str) -> None:
    async with setup(format) as s:
        s.write(FIRST, 4096)
        gate = s.base.gates["read"] = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.disk.flush)
            await gate.arrived.wait()
            assert not s.disk.write_now(FIRST + 8192, b"x" * 512)
            s.write(FIRST, 512)
            s.write(5 * CLUSTER, 512)
            data = b"gap " * 128
            s.model[FIRST + 8192 : FIRST + 8704] = data
            nursery.start_soon(s.disk.write, FIRST + 8192, data)
            await wait_all_tasks_blocked()
            assert gate.waiting == 1
            gate.open()
        assert s.partial == [5]


async def test_a_write_that_waited_goes_where_the_cluster_is_by_then(format: str) -> None:
    async with setup(format) as s:
        s.write(FIRST, 4096)
        async with trio.open_nursery() as nursery, s.disk.lock.hold(FIRST, FIRST + CLUSTER):
            nursery.start_soon(s.disk.write, FIRST + 512, b"y" * 512)
            await wait_all_tasks_blocked()
            await s.disk.flush()
        s.model[FIRST + 512 : FIRST + 1024] = b"y" * 512
        assert s.partial == []


async def test_a_base_that_fails_costs_no_write_that_does_not_need_it(format: str) -> None:
    async with setup(format) as s:
        s.write(FIRST, 4096)
        s.write(3 * CLUSTER, 4096)
        whole = CLUSTER * 6
        for offset in range(whole, whole + CLUSTER, 32768):
            s.write(offset, 32768)
        # the step for all of them, then each by itself
        s.base.failures["read"] = [StorageError("broken", errno=errno.EIO, file="base")] * 2
        with pytest.raises(StorageError, match="broken"):
            await s.disk.flush()
        assert s.partial == [1]
        assert await s.disk.read(FIRST, 4096) == s.model[FIRST : FIRST + 4096]


async def test_a_write_over_several_clusters_needs_no_base_where_it_covers_them(format: str) -> None:
    async with setup(format) as s:
        s.write(FIRST + 4096, 4096)
        s.base.failures["read"] = [StorageError("broken", errno=errno.EIO)] * 9
        await s.disk.write(FIRST, b"new" * CLUSTER)
        s.model[FIRST : FIRST + 3 * CLUSTER] = b"new" * CLUSTER
        await s.disk.flush()
        assert s.partial == []
        s.base.failures.clear()


async def test_a_full_host_refuses_the_write_and_takes_nothing(format: str) -> None:
    async with setup(format) as s:
        s.top.failures["write"] = [StorageError("no space left", errno=errno.ENOSPC, file="top") for _ in range(9)]
        # it may be owed, which takes more than a moment to find out
        assert not s.disk.write_now(FIRST, b"x" * 512)
        assert s.partial == []
        with pytest.raises(StorageError, match="no space"):
            await s.disk.write(FIRST, b"x" * 512)
        assert s.partial == []
        s.top.failures["write"].clear()


async def test_beyond_the_bound_the_rest_is_copied_with_the_write(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "BOUND", 0)
    monkeypatch.setattr(partial, "MIN_CLUSTERS", 2)
    async with setup(format) as s:
        s.write(FIRST, 512)
        s.write(2 * CLUSTER, 512)
        assert not s.disk.write_now(3 * CLUSTER, b"x" * 512)
        await s.disk.write(3 * CLUSTER, b"x" * 512)
        s.model[3 * CLUSTER : 3 * CLUSTER + 512] = b"x" * 512
        assert s.partial == [1, 2]


async def test_when_no_writes_come_any_more_the_rest_is_copied(
    format: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(partial, "QUIET", 1.0)
    monkeypatch.setattr(partial, "BATCH", 2)
    async with setup(format) as s:
        for number in range(1, 6):
            s.write(number * CLUSTER, 512)
            await trio.sleep(0.6)
            assert len(s.partial) == number
        await trio.sleep(2)
        assert s.partial == []


async def test_a_lookup_that_meets_the_completion_finds_the_data(format: str) -> None:
    async with setup(format) as s:
        s.write(FIRST, 4096)
        top = s.disk.layers[0]
        image, real = top.image, top.image.map
        asked = trio.Event()

        async def late(offset: int, length: int) -> list[Extent]:
            found = await real(offset, length)
            if not asked.is_set():
                asked.set()
                await wait_all_tasks_blocked()
            return found

        image.map = late  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.disk.flush)
            assert [extent.kind for extent in await top.map(FIRST, CLUSTER)] == [Kind.DATA]
        image.map = real  # type: ignore[method-assign]


async def test_a_commit_takes_partial_clusters_along(format: str) -> None:
    async with setup(format) as s:
        s.base.cold = False
        s.write(FIRST, 4096)
        s.write(9 * CLUSTER + 512, 512)
        job = Commit(s.disk)
        await job.run()
        assert job.state is State.COMPLETED, job.error
        assert s.base.content == s.model


async def test_who_waits_while_an_overlay_is_put_on_top_finds_its_clusters(format: str) -> None:
    """Two writes to one cluster of the new layer, which were two clusters before, must not overtake each other."""
    async with setup(format) as s:
        s.write(FIRST, 4096)
        below = bytes(s.model)
        top = MemoryStorage("new")
        await qcow2.create(top, SIZE, Backing("top", format), {"cluster_size": str(4 * CLUSTER)})
        layer = Layer(await qcow2.open_image(top))
        old = s.disk.layers[0]
        async with trio.open_nursery() as nursery, s.disk.lock.hold(0, CLUSTER):
            nursery.start_soon(s.disk.push, layer)
            await wait_all_tasks_blocked()
            for number in range(4, 8):
                data = bytes([number]) * CLUSTER
                s.model[number * CLUSTER : (number + 1) * CLUSTER] = data
                nursery.start_soon(s.disk.write, number * CLUSTER, data)
            await wait_all_tasks_blocked()
        assert s.disk.layers[:2] == (layer, old)
        assert await s.disk.read(0, SIZE, 1) == below
        assert await s.disk.read(0, SIZE) == s.model
        s.write(8 * CLUSTER, 512)
        await s.disk.flush()
        assert await s.disk.read(0, SIZE) == s.model
        # what the end of the test looks at
        s.top, s.format = top, "qcow2"
        s.base = MemoryStorage("base", bytes(await s.disk.read(0, SIZE, 1)), read_only=True)


async def test_on_a_host_that_is_nearly_full_nothing_is_put_off(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "ALLOWANCE", 1)
    async with setup(format) as s:
        free = 9 * CLUSTER
        monkeypatch.setattr(s.top, "free_space", lambda: free)
        for number in range(1, 5):
            s.write(number * CLUSTER, 512)
        assert not s.disk.write_now(5 * CLUSTER, b"x" * 512)
        s.write(4 * CLUSTER + 512, 512)
        free = 100 * CLUSTER
        s.write(5 * CLUSTER, 512)
