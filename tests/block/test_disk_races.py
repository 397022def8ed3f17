"""What must not happen when things happen at once. Every order is forced; nothing sleeps."""

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from storages import Gate, MemoryStorage
from trio.testing import wait_all_tasks_blocked

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.block.seek import next_hole
from cowfs.block.stack import Span
from cowfs.errors import StorageError
from cowfs.formats import qcow2, qed
from cowfs.formats.raw import RawImage
from cowfs.jobs.commit import Commit
from cowfs.jobs.job import State
from cowfs.jobs.stream import Stream

CLUSTER = 65536
SIZE = 32 * CLUSTER


class Stack:
    """An overlay in memory over a raw base of a known pattern, whose reads can be held up."""

    def __init__(self, disk: Disk, top: MemoryStorage, base: MemoryStorage, content: bytes) -> None:
        self.disk = disk
        self.top = top
        self.base = base
        self.model = bytearray(content)

    async def write(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        if not self.disk.write_now(offset, data):
            await self.disk.write(offset, data)

    async def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        if not self.disk.readinto_now(offset, memoryview(buffer)):
            await self.disk.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    async def verify(self) -> None:
        assert await self.disk.read(0, SIZE) == self.model


@asynccontextmanager
async def stack(format: str) -> AsyncIterator[Stack]:
    content = bytes(i // 512 % 251 + 1 for i in range(0, SIZE, 512) for _ in range(512))
    base = MemoryStorage("base", content, cold=True, read_only=True)
    top = MemoryStorage("top")
    driver = {"qcow2": qcow2, "qed": qed}[format]
    await driver.create(top, SIZE, Backing("base", "raw"), {"cluster_size": str(CLUSTER)})
    image = await driver.open_image(top)
    disk = Disk([Layer(image), Layer(RawImage(base))], flush_interval=1e9)
    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        yield Stack(disk, top, base, content)
        nursery.cancel_scope.cancel()


@pytest.fixture(params=["qcow2", "qed"])
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_a_write_during_a_held_up_copy_on_read_survives(format: str) -> None:
    async with stack(format) as s:
        # the reader is answered; the copy-up behind it hangs in its read of the base
        assert await s.read(4096, 4096) == bytes(s.model[4096:8192])
        gate = s.base.gates["read"] = Gate()
        await gate.arrived.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.write, 4096, b"W" * 4096)
            await wait_all_tasks_blocked()
            assert gate.waiting == 1, "the write waits for the copy-up, not beside it"
            gate.open()
        await s.disk.populated()
        assert s.disk.stats.copied_up_bytes == CLUSTER
        await s.verify()


async def test_a_copy_up_that_comes_second_leaves_the_write_alone(format: str) -> None:
    async with stack(format) as s:
        gate = s.base.gates["read"] = Gate()
        async with trio.open_nursery() as nursery:
            # a partial write hangs while it reads the rest of its cluster
            nursery.start_soon(s.write, 100, b"W" * 1000)
            await gate.arrived.wait()
            nursery.start_soon(s.disk.copy_up, 0, CLUSTER)
            await wait_all_tasks_blocked()
            assert gate.waiting == 1
            gate.open()
        await s.verify()
        assert s.disk.stats.copied_up_bytes == 0


async def test_a_reader_is_answered_before_its_copy_up(format: str) -> None:
    async with stack(format) as s:
        await s.read(0, 4096)
        assert s.disk.stats.copied_up_bytes == 0
        await s.disk.populated()
        assert s.disk.stats.copied_up_bytes == CLUSTER
        extents = await s.disk.resolve(0, 2 * CLUSTER)
        assert [(piece.depth, piece.extent.length) for piece in extents] == [(0, CLUSTER), (1, CLUSTER)]


async def test_a_failed_copy_up_is_counted_and_harms_nobody(format: str) -> None:
    async with stack(format) as s:
        await s.read(0, 4096)
        s.base.failures["read"].append(StorageError("unplugged", errno=5, file="base"))
        await s.disk.populated()
        assert s.disk.stats.copied_up_bytes == 0
        await s.verify()


async def test_copy_on_read_can_be_switched_off(format: str) -> None:
    async with stack(format) as s:
        s.disk.copy_on_read = False
        await s.read(0, CLUSTER)
        await s.disk.populated()
        assert s.disk.stats.copied_up_bytes == 0


async def test_writes_to_different_clusters_do_not_wait_for_each_other(format: str) -> None:
    async with stack(format) as s:
        gate = s.base.gates["read"] = Gate()
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(s.write, number * CLUSTER + 10, b"x" * 100)
            await wait_all_tasks_blocked()
            assert gate.waiting == 8
            gate.open()
        await s.verify()


@pytest.mark.parametrize("cancel", [True, False])
async def test_an_allocation_that_fails_or_is_cancelled_leaves_the_old_content(format: str, cancel: bool) -> None:
    async with stack(format) as s:
        s.top.cold = True
        old = bytes(s.model)
        # marks in the header are made by the first allocation, and are not what is looked at here
        await s.write(0, bytes(s.model[:CLUSTER]))
        await s.disk.flush()
        gate = s.top.gates["write"] = Gate()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_write_and_report, s, CLUSTER, b"n" * CLUSTER)
                await gate.arrived.wait()
                if cancel:
                    scope.cancel()
                else:
                    s.top.failures["write"].append(StorageError("no space", errno=28))
                    gate.open()
        s.top.cold = False
        s.top.gates.clear()
        assert await s.disk.read(CLUSTER, CLUSTER) == old[CLUSTER : 2 * CLUSTER]
        await s.write(CLUSTER, b"again" * 100)
        s.model[CLUSTER : 2 * CLUSTER] = old[CLUSTER : 2 * CLUSTER]
        s.model[CLUSTER : CLUSTER + 500] = b"again" * 100
        await s.disk.flush()
        await s.disk.layers[0].image.settle()
        result = await s.disk.layers[0].image.check()
        assert (result.corruptions, result.leaks) == (0, 0), result.messages
        assert await s.disk.read(CLUSTER, CLUSTER) == s.model[CLUSTER : 2 * CLUSTER]


async def _write_and_report(s: Stack, offset: int, data: bytes) -> None:
    try:
        await s.disk.write(offset, data)
    except StorageError as error:
        assert error.errno == 28


async def test_a_reader_in_the_backing_delays_closing_it(format: str) -> None:
    async with stack(format) as s:
        s.disk.copy_on_read = False
        await s.disk.copy_up(0, SIZE)
        s.top.cold = True
        gate = s.top.gates["read"] = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.read, 0, 4096)
            await gate.arrived.wait()
            nursery.start_soon(s.disk.drop_backing)
            await wait_all_tasks_blocked()
            assert len(s.disk.layers) == 1
            assert s.base.closings == 0
            gate.open()
        assert s.base.closings == 1
        await s.verify()


async def test_who_looks_for_holes_keeps_the_backing_file_open(format: str) -> None:
    async with stack(format) as s:
        gate = s.base.gates["regions"] = Gate()
        found: list[int] = []

        async def seek() -> None:
            found.append(await next_hole(s.disk, 0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(seek)
            await gate.arrived.wait()
            del s.base.gates["regions"]
            nursery.start_soon(Stream(s.disk).run)
            await wait_all_tasks_blocked()
            assert len(s.disk.layers) == 1
            assert s.base.closings == 0, "another file may have its descriptor's number next"
            gate.open()
        assert found == [SIZE]
        assert s.base.closings == 1


async def test_stream_with_a_writer_and_a_reader(format: str) -> None:
    async with stack(format) as s:
        job = Stream(s.disk)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            for number in range(64):
                await s.write(number * 30011, bytes([number]) * 20000)
                await trio.lowlevel.checkpoint()
        assert job.state is State.COMPLETED
        assert len(s.disk.layers) == 1
        assert s.disk.layers[0].backing is None
        await s.verify()


async def test_a_write_between_copy_and_drop_stays_in_the_overlay(format: str) -> None:
    async with stack(format) as s:
        await s.write(0, b"one" * 1000)
        with s.disk.track_writes(CLUSTER) as tracker:
            await s.disk.set_layer_writable(1, True)
            await s.disk.copy_down(0, CLUSTER, Span(0, 0, 1))
            await s.write(0, b"two" * 1000)
            assert not await s.disk.drop(0, CLUSTER, tracker)
        await s.verify()


async def test_commit_with_a_writer_and_a_reader(format: str) -> None:
    async with stack(format) as s:
        s.base.cold = False
        for number in range(0, 32, 3):
            await s.write(number * CLUSTER + 5, bytes([number + 1]) * 70000 if number < 30 else b"x")
        job = Commit(s.disk)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            for number in range(64):
                await s.write(number * 30011, bytes([number]) * 20000)
                assert await s.read(number * 20000, 5000) == bytes(s.model[number * 20000 : number * 20000 + 5000])
        assert job.state is State.COMPLETED, job.error
        await s.verify()
        assert s.base.read_only


async def test_a_commit_with_nobody_writing_empties_the_overlay(format: str) -> None:
    async with stack(format) as s:
        await s.write(5, b"x" * 300000)
        await Commit(s.disk).run()
        assert bytes(s.base.content) == bytes(s.model)
        assert {piece.depth for piece in await s.disk.resolve(0, SIZE)} == {1}
        await s.disk.flush()
        await s.disk.layers[0].image.settle()
        result = await s.disk.layers[0].image.check()
        assert (result.corruptions, result.leaks) == (0, 0), result.messages


async def test_freed_space_is_not_reused_under_a_reader(format: str) -> None:
    async with stack(format) as s:
        await s.write(0, b"a" * CLUSTER)
        await s.disk.flush()
        s.top.cold = True
        gate = s.top.gates["read"] = Gate()
        seen = bytearray(4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.disk.readinto, 0, memoryview(seen))
            await gate.arrived.wait()
            s.top.cold = False
            s.disk._holds_copying += 1
            await s.disk.layers[0].deallocate(0, CLUSTER)
            await s.disk.flush()
            for number in range(4, 8):
                await s.disk.write(number * CLUSTER, b"b" * CLUSTER)
            gate.open()
        assert bytes(seen) == b"a" * 4096


@pytest.mark.parametrize("flush", range(4))
async def test_cancelling_a_stream_at_its_end_leaves_memory_and_header_agreed(format: str, flush: int) -> None:
    async with stack(format) as s:
        s.base.cold = False
        job = Stream(s.disk)
        async with trio.open_nursery() as nursery:
            gates = [Gate() for _ in range(flush + 1)]
            s.top.gates["flush"] = gates[0]
            nursery.start_soon(job.run)
            for gate, following in itertools.pairwise(gates):
                await _arrived_or_over(gate, job)
                s.top.gates["flush"] = following
                gate.open()
            await _arrived_or_over(gates[-1], job)
            if job.state is State.RUNNING:
                job.cancel()
                await wait_all_tasks_blocked()
            s.top.gates.clear()
            for gate in gates:
                gate.open()
        await s.verify()
        await s.disk.flush()
        again = await {"qcow2": qcow2, "qed": qed}[format].open_image(
            MemoryStorage("again", bytes(s.top.content), read_only=True)
        )
        assert (again.backing is None) == (len(s.disk.layers) == 1)
        assert again.backing == s.disk.layers[0].backing


async def _arrived_or_over(gate: Gate, job: Stream) -> None:
    async with trio.open_nursery() as nursery:

        async def watch(wait: Callable[[], Awaitable[None]]) -> None:
            await wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch, gate.arrived.wait)
        nursery.start_soon(watch, job.wait)


async def test_a_disk_that_is_to_grow_when_an_overlay_is_put_on_it_grows_there(format: str) -> None:
    async with stack(format) as s:
        storage = MemoryStorage("new")
        await qcow2.create(storage, SIZE, Backing("top", format), {})
        overlay = Layer(await qcow2.open_image(storage))
        async with trio.open_nursery() as nursery, s.disk.lock.hold(0, 1):
            nursery.start_soon(s.disk.push, overlay)
            await wait_all_tasks_blocked()
            nursery.start_soon(s.disk.grow, 2 * SIZE)
            await wait_all_tasks_blocked()
        assert [layer.size for layer in s.disk.layers] == [2 * SIZE, SIZE, SIZE]
        assert await s.disk.read(0, 2 * SIZE) == s.model + bytes(SIZE)
