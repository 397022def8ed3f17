"""Allocation runs in parallel: what is in flight at once is seen at the storage, whose writes are held up."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from storages import Gate, MemoryStorage
from trio.testing import wait_all_tasks_blocked

from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.errors import StorageError
from cowfs.formats import qcow2, qed
from cowfs.formats.raw import RawImage

CLUSTER = 4096
#: bytes of the disk that one L2 table maps, and how many tables there are
SPANS = {"qcow2": 512 * CLUSTER, "qed": 2 * 512 * CLUSTER}
TABLES = 12
DRIVERS = {"qcow2": qcow2, "qed": qed}
OPTIONS = {"qcow2": {"cluster_size": "4k"}, "qed": {"cluster_size": "4k", "table_size": "2"}}


@pytest.fixture(params=["qcow2", "qed"])
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Scene:
    def __init__(self, disk: Disk, storage: MemoryStorage, format: str) -> None:
        self.disk = disk
        self.storage = storage
        self.span = SPANS[format]
        self.format = format
        self.errors: list[StorageError] = []

    async def write(self, offset: int, length: int = CLUSTER) -> None:
        await self.disk.write(offset, bytes([offset // CLUSTER % 255 + 1]) * length)

    async def write_or_note(self, offset: int) -> None:
        try:
            await self.write(offset)
        except StorageError as error:
            self.errors.append(error)

    def hold(self) -> Gate:
        """From now on every write is held up, and the log is empty."""
        self.storage.cold = True
        self.storage.log.clear()
        gate = self.storage.gates["write"] = Gate()
        return gate

    def let_go(self) -> None:
        gate = self.storage.gates.pop("write")
        self.storage.cold = False
        gate.open()

    async def linked(self, offset: int) -> bool:
        """Whether the cluster at an offset is allocated."""
        return (await self.disk.layers[0].map(offset, CLUSTER))[0].host_offset >= 0

    async def assert_clean(self) -> None:
        """Nothing leaked, nothing damaged, on disk."""
        await self.disk.close()
        driver = DRIVERS[self.format]
        image = await driver.open_image(MemoryStorage("again", bytes(self.storage.content), read_only=True))
        result = await image.check()
        assert (result.corruptions, result.leaks) == (0, 0), result.messages


@asynccontextmanager
async def scene(format: str) -> AsyncIterator[Scene]:
    storage = MemoryStorage("image")
    driver = DRIVERS[format]
    await driver.create(storage, TABLES * SPANS[format], None, OPTIONS[format])
    disk = Disk([Layer(await driver.open_image(storage))])
    made = Scene(disk, storage, format)
    # marks that the first allocation makes in the header are not what is looked at here
    await made.write((TABLES - 1) * made.span + 100 * CLUSTER)
    await disk.flush()
    yield made


async def test_allocations_under_different_new_tables_are_all_in_flight_at_once(format: str) -> None:
    async with scene(format) as s:
        gate = s.hold()
        async with trio.open_nursery() as nursery:
            for number in range(TABLES - 1):
                nursery.start_soon(s.write, number * s.span)
            await wait_all_tasks_blocked()
            assert gate.waiting == TABLES - 1
            offsets = [offset for operation, offset, length in s.storage.log]
            assert len(set(offsets)) == TABLES - 1, "each has clusters of its own"
            s.let_go()
        for number in range(TABLES - 1):
            assert await s.linked(number * s.span)
        await s.assert_clean()


async def test_allocations_under_one_new_table_share_it(format: str) -> None:
    async with scene(format) as s:
        gate = s.hold()
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(s.write, number * CLUSTER)
            await wait_all_tasks_blocked()
            assert gate.waiting == 8, "nobody waits for the table either: it is made in memory"
            s.let_go()
        tables = s.disk.layers[0].image.l1.entries  # type: ignore[attr-defined]
        assert sum(map(bool, tables)) == 2
        await s.assert_clean()


async def test_those_who_need_the_same_old_table_wait_for_one_load(format: str) -> None:
    async with scene(format) as s:
        await s.disk.close()
        image = await DRIVERS[format].open_image(s.storage)
        disk = Disk([Layer(image)])
        base = (TABLES - 1) * s.span
        await disk.write(0, b"x" * CLUSTER)
        s.storage.cold = True
        s.storage.log.clear()
        gate = s.storage.gates["read"] = Gate()
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(disk.write, base + number * CLUSTER, b"y" * CLUSTER)
            for number in range(1, 5):
                nursery.start_soon(disk.write, number * s.span, b"z" * CLUSTER)
            await wait_all_tasks_blocked()
            assert gate.waiting == 1
            assert sum(operation == "write" for operation, _, _ in s.storage.log) == 4, "others go ahead"
            s.storage.gates.pop("read")
            gate.open()
        s.storage.cold = False
        assert sum(operation == "read" for operation, _, _ in s.storage.log) == 1
        s.disk = disk
        await s.assert_clean()


def writes(s: Scene) -> list[int]:
    """Lengths of the writes since the log was cleared, in order."""
    return [length for operation, _, length in s.storage.log if operation == "write"]


async def test_a_write_of_many_clusters_is_one_write_of_data_and_one_update_of_the_table(format: str) -> None:
    """The counts of qcow2 are one more update."""
    async with scene(format) as s:
        for offset, tables in ((0, 2), (s.span, 2), (s.span + s.span // 2, 1)):
            s.storage.log.clear()
            await s.write(offset, 1 << 20)
            assert writes(s) == [1 << 20]
            await s.disk.flush()
            # the table, and for a new one the entry that leads to it
            assert len(writes(s)) == 1 + tables + (format == "qcow2")
            assert max(writes(s)[1:]) <= 2 * CLUSTER
        await s.assert_clean()


async def test_neighbours_that_are_written_at_once_share_one_update_of_the_table(format: str) -> None:
    async with scene(format) as s:
        await s.write(200 * CLUSTER)
        await s.disk.flush()
        s.storage.log.clear()
        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(s.write, number * 4 * CLUSTER, 4 * CLUSTER)
        assert writes(s) == [4 * CLUSTER] * 16
        await s.disk.flush()
        assert len(writes(s)) == 16 + 1 + (format == "qcow2")
        await s.assert_clean()


async def test_over_a_backing_file_only_the_ends_are_read_and_all_is_one_write(format: str) -> None:
    async with scene(format) as s:
        content = bytes(range(256)) * 8192
        base = MemoryStorage("base", content, cold=True, read_only=True)
        await s.write(300 * CLUSTER)
        await s.disk.flush()
        disk = Disk([*s.disk.layers, Layer(RawImage(base))])
        s.storage.log.clear()
        await disk.write(1000, b"n" * (1 << 20))
        end = 1000 + (1 << 20)
        assert base.log == [("read", 0, 1000), ("read", end, CLUSTER - 1000)]
        assert writes(s) == [(1 << 20) + CLUSTER]
        await disk.flush()
        assert len(writes(s)) == 1 + 1 + (format == "qcow2")
        assert await disk.read(0, end + CLUSTER) == content[:1000] + b"n" * (1 << 20) + content[end : end + CLUSTER]
        s.disk = Disk(s.disk.layers)
        await s.assert_clean()


async def test_a_copy_up_is_one_read_and_one_write(format: str) -> None:
    async with scene(format) as s:
        base = MemoryStorage("base", b"b" * s.disk.size, cold=True, read_only=True)
        disk = Disk([*s.disk.layers, Layer(RawImage(base))])
        s.storage.log.clear()
        assert await disk.copy_up(0, 1 << 20) == 1 << 20
        assert base.log == [("read", 0, 1 << 20)]
        assert writes(s) == [1 << 20]
        s.disk = Disk(s.disk.layers)
        await s.assert_clean()


Break = Callable[[Scene, trio.CancelScope], None]


def cancel(s: Scene, scope: trio.CancelScope) -> None:
    scope.cancel()


def fail(s: Scene, scope: trio.CancelScope) -> None:
    s.storage.failures["write"].append(StorageError("no space", errno=28))


@pytest.mark.parametrize("break_one", [cancel, fail])
async def test_one_that_fails_or_is_cancelled_harms_no_other_and_leaks_nothing(format: str, break_one: Break) -> None:
    async with scene(format) as s:
        gate = s.hold()
        scope = trio.CancelScope()

        async def first() -> None:
            with scope:
                await s.write_or_note(0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await gate.arrived.wait()
            for number in range(1, 9):
                nursery.start_soon(s.write_or_note, number * CLUSTER)
            nursery.start_soon(s.write_or_note, s.span)
            await wait_all_tasks_blocked()
            break_one(s, scope)
            await wait_all_tasks_blocked()
            s.let_go()
        assert len(s.errors) == (break_one is fail)
        linked = [await s.linked(offset) for offset in (*range(0, 9 * CLUSTER, CLUSTER), s.span)]
        assert linked.count(False) == 1
        await s.assert_clean()


async def test_all_fail_and_the_next_one_succeeds(format: str) -> None:
    async with scene(format) as s:
        s.storage.failures["write"] = [StorageError("unplugged", errno=5) for _ in range(TABLES - 1)]
        for number in range(TABLES - 1):
            await s.write_or_note(number * s.span)
        assert len(s.errors) == TABLES - 1
        for number in range(TABLES - 1):
            assert not await s.linked(number * s.span)
            await s.write(number * s.span + CLUSTER)
        await s.assert_clean()


async def test_copy_ups_are_in_flight_at_once_too(format: str) -> None:
    async with scene(format) as s:
        base = MemoryStorage("base", b"b" * s.disk.size, cold=True, read_only=True)
        disk = Disk([*s.disk.layers, Layer(RawImage(base))])
        gate = base.gates["read"] = Gate()
        async with trio.open_nursery() as nursery:
            for number in range(TABLES - 1):
                nursery.start_soon(disk.copy_up, number * s.span, CLUSTER)
            await wait_all_tasks_blocked()
            assert gate.waiting == TABLES - 1
            gate.open()
        assert disk.stats.copied_up_bytes == (TABLES - 1) * CLUSTER
        s.disk = Disk(s.disk.layers)
        await s.assert_clean()
