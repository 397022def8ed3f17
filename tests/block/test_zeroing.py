"""Discards on disks in memory: what becomes of clusters, of parts of them, and of what goes on at the same time."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from commandline import PATIENCE
from storages import Gate, MemoryStorage
from trio.testing import wait_all_tasks_blocked

from cowfs.block import seek
from cowfs.block.disk import Disk
from cowfs.block.extent import NO_OFFSET, Extent, Kind
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.block.owners import Piece
from cowfs.errors import StorageError
from cowfs.formats import qcow2, qed
from cowfs.formats.raw import RawImage
from cowfs.jobs.commit import Commit
from cowfs.jobs.job import State

CLUSTER = 65_536
SIZE = 32 * CLUSTER
BASE = bytes(i // 512 % 251 + 1 for i in range(0, SIZE, 512) for _ in range(512))


class Stack:
    """An overlay in memory, with or without a raw base."""

    def __init__(self, disk: Disk, top: MemoryStorage, base: MemoryStorage | None) -> None:
        self.disk, self.top, self.base = disk, top, base

    def extents(self) -> list[Extent]:
        found = self.disk.layers[0].map_now(0, SIZE)
        assert found is not None
        return found

    def kinds(self) -> list[Kind]:
        """What the overlay holds, cluster by cluster."""
        found = [self.disk.layers[0].map_now(offset, CLUSTER) for offset in range(0, SIZE, CLUSTER)]
        return [extents[0].kind for extents in found if extents is not None]


@asynccontextmanager
async def stack(
    base: bytes | None = BASE, *, cold: bool = False, copy_on_read: bool = False, **options: str
) -> AsyncIterator[Stack]:
    top = MemoryStorage("top", cold=cold)
    backing = Backing("base", "raw") if base is not None else None
    await qcow2.create(top, SIZE, backing, {"cluster_size": str(CLUSTER), **options})
    layers = [Layer(await qcow2.open_image(top))]
    below = None
    if base is not None:
        below = MemoryStorage("base", base, cold=True, read_only=True)
        layers.append(Layer(RawImage(below)))
    disk = Disk(layers, copy_on_read=copy_on_read, flush_interval=1e9)
    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        yield Stack(disk, top, below)
        nursery.cancel_scope.cancel()


async def write(disk: Disk, offset: int, data: bytes) -> None:
    if not disk.write_now(offset, data):
        await disk.write(offset, data)


async def test_clusters_over_a_backing_file_become_zero_clusters() -> None:
    async with stack() as s:
        await write(s.disk, 0, b"x" * 4 * CLUSTER)
        await s.disk.discard(CLUSTER, 6 * CLUSTER)
        assert s.kinds()[:8] == [Kind.DATA, *[Kind.ZERO] * 6, Kind.UNALLOCATED]
        assert all(extent.host_offset == NO_OFFSET for extent in s.extents() if extent.kind is Kind.ZERO)
        assert await s.disk.read(CLUSTER, 6 * CLUSTER) == bytes(6 * CLUSTER)
        assert await s.disk.read(7 * CLUSTER, CLUSTER) == BASE[7 * CLUSTER : 8 * CLUSTER]


async def test_clusters_without_a_backing_file_become_unallocated() -> None:
    async with stack(None) as s:
        await write(s.disk, 0, b"x" * 4 * CLUSTER)
        await s.disk.discard(CLUSTER, 6 * CLUSTER)
        assert s.kinds()[:3] == [Kind.DATA, Kind.UNALLOCATED, Kind.UNALLOCATED]


async def test_behind_a_shorter_backing_file_nothing_has_to_be_hidden() -> None:
    async with stack(BASE[: 3 * CLUSTER + 512]) as s:
        await write(s.disk, 0, b"x" * SIZE)
        await s.disk.discard(0, SIZE)
        assert s.kinds() == [*[Kind.ZERO] * 4, *[Kind.UNALLOCATED] * 28]
        assert await s.disk.read(0, SIZE) == bytes(SIZE)


async def test_what_holds_nothing_stays_as_it_is() -> None:
    async with stack(None) as s:
        before = bytes(s.top.content)
        await s.disk.discard(0, SIZE)
        await s.disk.write_zeroes(100, 3 * CLUSTER, unmap=False)
        await s.disk.flush()
        assert s.top.content[512:] == before[512:], "no table is made for it"


async def test_freed_clusters_are_punched_after_the_flush_and_used_again() -> None:
    async with stack() as s:
        await write(s.disk, 0, b"x" * 4 * CLUSTER)
        await s.disk.flush()
        length = s.top.length
        s.top.log.clear()
        await s.disk.discard(0, 4 * CLUSTER)
        assert not [step for step in s.top.log if step[0] == "punch"], "the tables on disk still lead there"
        await s.disk.flush()
        operations = [step[0] for step in s.top.log]
        assert operations.index("punch") > operations.index("flush")
        assert sum(step[2] for step in s.top.log if step[0] == "punch") == 4 * CLUSTER
        await write(s.disk, 10 * CLUSTER, b"y" * 4 * CLUSTER)
        assert s.top.length == length


async def test_parts_of_clusters_are_zeroed_where_they_are() -> None:
    async with stack() as s:
        await write(s.disk, 0, b"x" * 3 * CLUSTER)
        model = bytearray(b"x" * 3 * CLUSTER + BASE[3 * CLUSTER :])
        for offset, length in ((1000, 100), (20_000, 9000), (2 * CLUSTER - 5000, 10_000), (5 * CLUSTER + 1, 10)):
            await s.disk.discard(offset, length)
            model[offset : offset + length] = bytes(length)
            assert await s.disk.read(0, SIZE) == model
        assert s.kinds()[:3] == [Kind.DATA] * 3


async def test_a_cluster_of_which_only_zeros_are_left_is_given_up() -> None:
    async with stack() as s:
        await write(s.disk, 0, b"x" * 2 * CLUSTER)
        await s.disk.discard(CLUSTER + 40_000, CLUSTER - 40_000)
        await s.disk.discard(CLUSTER, 20_000)
        assert s.kinds()[:2] == [Kind.DATA, Kind.DATA]
        await s.disk.discard(CLUSTER + 20_000, 20_000)
        assert s.kinds()[:2] == [Kind.DATA, Kind.ZERO]


async def test_zeros_without_unmap_keep_the_space() -> None:
    async with stack() as s:
        await write(s.disk, 0, b"x" * 2 * CLUSTER)
        places = s.extents()[0]
        await s.disk.write_zeroes(0, 4 * CLUSTER, unmap=False)
        assert s.extents()[0] == places
        assert s.kinds()[:4] == [Kind.DATA, Kind.DATA, Kind.ZERO, Kind.ZERO]
        assert await s.disk.read(0, 4 * CLUSTER) == bytes(4 * CLUSTER)


async def test_partial_clusters_are_given_up_without_being_copied() -> None:
    async with stack() as s:
        await write(s.disk, 9 * CLUSTER, b"first")
        await s.disk.flush()
        await write(s.disk, 4096, b"x" * 512)
        await write(s.disk, CLUSTER + 512, b"y" * 512)
        partial = s.disk.layers[0].partial
        assert partial is not None
        assert sorted(partial.clusters) == [0, 1]
        assert s.base is not None
        s.base.log.clear()
        await s.disk.discard(0, CLUSTER)
        assert sorted(partial.clusters) == [1]
        assert not s.base.log, "nothing is read only to be thrown away"
        assert await s.disk.read(0, CLUSTER) == bytes(CLUSTER)
        assert await s.disk.read(CLUSTER, 1024) == BASE[CLUSTER : CLUSTER + 512] + b"y" * 512
        await s.disk.flush()
        # that it is free is a matter of the next one
        await s.disk.flush()
        assert s.kinds()[:2] == [Kind.ZERO, Kind.DATA]
        found = await s.disk.layers[0].image.check()
        assert (found.corruptions, found.leaks) == (0, 0)


async def test_a_reader_never_sees_the_backing_file_through_a_discard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A partial cluster is what the overlay holds until its table says something else; a flush waits for that."""
    async with stack() as s:
        await write(s.disk, 9 * CLUSTER, b"first")
        await write(s.disk, CLUSTER, b"y" * 512)
        before = await s.disk.read(CLUSTER, CLUSTER)
        assert before == b"y" * 512 + BASE[CLUSTER + 512 : 2 * CLUSTER]
        image = s.disk.layers[0].image
        real, gates = image.write_zeroes, (Gate(), Gate())

        async def slow(offset: int, length: int) -> bool:
            await gates[0].pass_through()
            done = await real(offset, length)
            await gates[1].pass_through()
            return done

        monkeypatch.setattr(image, "write_zeroes", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.disk.discard, CLUSTER, CLUSTER)
            for gate in gates:
                await gate.arrived.wait()
                assert await s.disk.read(CLUSTER, CLUSTER) == before
                if gate is gates[0]:
                    nursery.start_soon(s.disk.flush)
                    await wait_all_tasks_blocked()
                gate.open()
        assert await s.disk.read(CLUSTER, CLUSTER) == bytes(CLUSTER)
        await s.disk.flush()
        assert s.kinds()[1] is Kind.ZERO


async def test_a_copy_on_read_that_was_under_way_does_not_undo_a_discard() -> None:
    async with stack(copy_on_read=True) as s:
        assert s.base is not None
        buffer = bytearray(4096)
        await s.disk.readinto(0, memoryview(buffer))
        gate = s.base.gates["read"] = Gate()
        await gate.arrived.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.disk.discard, 0, CLUSTER)
            await wait_all_tasks_blocked()
            gate.open()
        await s.disk.populated()
        assert await s.disk.read(0, CLUSTER) == bytes(CLUSTER)
        # and one that was queued before looks again
        await s.disk.readinto(4 * CLUSTER, memoryview(buffer))
        await s.disk.discard(4 * CLUSTER, CLUSTER)
        await s.disk.populated()
        assert await s.disk.read(4 * CLUSTER, CLUSTER) == bytes(CLUSTER)


async def test_a_commit_moves_zeros_down_that_were_made_while_it_ran() -> None:
    base = MemoryStorage("base")
    await qcow2.create(base, SIZE, None, {})
    top = MemoryStorage("top")
    await qcow2.create(top, SIZE, Backing("base", "qcow2"), {})
    disk = Disk([Layer(await qcow2.open_image(top)), Layer(await qcow2.open_image(base))], flush_interval=1e9)
    await disk.layers[1].set_writable(True)
    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        await write(disk, 0, b"x" * 20 * CLUSTER)
        await disk.flush()
        base.cold = True
        gate = base.gates["write"] = Gate()
        job = Commit(disk)
        nursery.start_soon(job.run)
        await gate.arrived.wait()
        async with trio.open_nursery() as guests:
            guests.start_soon(disk.discard, 0, 2 * CLUSTER)
            guests.start_soon(disk.discard, 15 * CLUSTER, 3 * CLUSTER)
            await wait_all_tasks_blocked()
            gate.open()
        with trio.fail_after(PATIENCE):
            while job.state is State.NONE or job.state.is_active:
                await trio.lowlevel.checkpoint()
        assert job.state is State.COMPLETED, job.error
        model = bytearray(b"x" * 20 * CLUSTER).ljust(SIZE, b"\0")
        model[: 2 * CLUSTER] = bytes(2 * CLUSTER)
        model[15 * CLUSTER : 18 * CLUSTER] = bytes(3 * CLUSTER)
        assert await disk.read(0, SIZE) == model
        assert await disk.read(0, SIZE, 1) == model
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("cancel_at", range(6))
async def test_a_discard_that_is_cancelled_or_fails_leaves_old_content_or_zeros(cancel_at: int) -> None:
    async with stack(cold=True) as s:
        await s.disk.write(0, b"x" * 3 * CLUSTER)
        await s.disk.write(5 * CLUSTER + 512, b"p" * 512)
        before = await s.disk.read(0, SIZE)
        if cancel_at % 2:
            s.top.failures["punch"] = [None] * (cancel_at // 2) + [StorageError("full", errno=28)]
        with trio.CancelScope() as scope:
            steps = 0

            class Tracer(trio.abc.Instrument):
                def before_task_step(self, task: trio.lowlevel.Task) -> None:
                    nonlocal steps
                    steps += 1
                    if steps == 3 * cancel_at + 2:
                        scope.cancel()

            tracer = Tracer()
            trio.lowlevel.add_instrument(tracer)
            try:
                await s.disk.discard(1000, 7 * CLUSTER)
            except StorageError:
                pass
            finally:
                trio.lowlevel.remove_instrument(tracer)
        s.top.failures.clear()
        found = await s.disk.read(0, SIZE)
        assert all(one in (old, 0) for one, old in zip(found, before, strict=True))
        partial = s.disk.layers[0].partial
        assert partial is not None
        assert not any(cluster.busy for cluster in partial.clusters.values())
        await s.disk.discard(1000, 7 * CLUSTER)
        assert await s.disk.read(0, SIZE) == before[:1000] + bytes(7 * CLUSTER) + before[1000 + 7 * CLUSTER :]
        await s.disk.flush()
        await s.disk.flush()
        result = await s.disk.layers[0].image.check()
        assert (result.corruptions, result.leaks) == (0, 0)


async def test_qed_keeps_the_place_and_punches_it() -> None:
    top = MemoryStorage("top")
    await qed.create(top, SIZE, None, {})
    disk = Disk([Layer(await qed.open_image(top))])
    await disk.write(0, b"x" * 4 * CLUSTER)
    top.log.clear()
    await disk.discard(CLUSTER, 2 * CLUSTER)
    assert [step[2] for step in top.log if step[0] == "punch"] == [2 * CLUSTER]
    assert await disk.read(0, 4 * CLUSTER) == b"x" * CLUSTER + bytes(2 * CLUSTER) + b"x" * CLUSTER


async def test_a_head_that_is_guarded_is_looked_at() -> None:
    storage = MemoryStorage("disk", b"?" * 4096)
    image = RawImage(storage)
    seen: list[bytes] = []

    def refusal(head: bytes) -> str | None:
        seen.append(head)
        return "no" if head == bytes(4) + b"????" else None

    image.guard_head(8, refusal)
    disk = Disk([Layer(image)])
    with pytest.raises(Exception, match="no"):
        await disk.discard(0, 4)
    assert storage.content == b"?" * 4096
    await disk.discard(0, 4096)
    assert seen == [bytes(4) + b"????", bytes(8)]


# -- finding holes


async def test_holes_and_data_of_a_chain() -> None:
    async with stack(BASE[: 4 * CLUSTER]) as s:
        await write(s.disk, 10 * CLUSTER, b"x" * CLUSTER)
        await s.disk.discard(CLUSTER, CLUSTER)
        expected = [(0, CLUSTER), (2 * CLUSTER, 4 * CLUSTER), (10 * CLUSTER, 11 * CLUSTER)]
        found = []
        position = 0
        while (start := await seek.next_data(s.disk, position)) is not None:
            position = await seek.next_hole(s.disk, start)
            found.append((start, position))
        assert found == expected
        assert await seek.next_data(s.disk, 3 * CLUSTER + 5) == 3 * CLUSTER + 5
        assert await seek.next_hole(s.disk, 5 * CLUSTER + 5) == 5 * CLUSTER + 5
        assert await seek.next_data(s.disk, 0, 1) == 0
        assert await seek.next_data(s.disk, 4 * CLUSTER, 1) is None
        assert await seek.next_hole(s.disk, 0, 1) == 4 * CLUSTER


async def test_a_hole_that_is_near_is_found_without_looking_at_what_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stack() as s:
        await s.disk.discard(CLUSTER, CLUSTER)
        looked: list[int] = []
        resolve = s.disk.resolve

        async def watched(offset: int, length: int, depth: int, *, holes: bool) -> list[Piece]:
            looked.append(length)
            return await resolve(offset, length, depth, holes=holes)

        monkeypatch.setattr(s.disk, "resolve", watched)
        assert await seek.next_hole(s.disk, 0) == CLUSTER
        assert looked == [SIZE // 2]


async def test_holes_in_windows_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rnd = random.Random(5)
    async with stack() as s:
        for _ in range(12):
            number = rnd.randrange(32)
            if rnd.random() < 0.5:
                await s.disk.discard(number * CLUSTER, CLUSTER)
            else:
                await write(s.disk, number * CLUSTER, b"x" * CLUSTER)
        holes = [not any(await s.disk.read(number * CLUSTER, CLUSTER)) for number in range(32)] + [True]
        for window in (1, CLUSTER, 3 * CLUSTER + 5, SIZE):
            monkeypatch.setattr(seek, "WINDOW", window * 1024 if window == 1 else window)
            for number in range(32):
                data = await seek.next_data(s.disk, number * CLUSTER)
                hole = await seek.next_hole(s.disk, number * CLUSTER)
                following = [n for n in range(number, 32) if not holes[n]]
                assert data == (following[0] * CLUSTER if following else None)
                assert hole == next(n for n in range(number, 33) if holes[n]) * CLUSTER


async def test_a_huge_empty_disk_is_searched_at_once() -> None:
    top = MemoryStorage("top")
    await qcow2.create(top, 1 << 40, None, {})
    disk = Disk([Layer(await qcow2.open_image(top))])
    looks = 0
    resolve = disk.resolve

    async def counted(*args: int, **how: bool) -> list[object]:
        nonlocal looks
        looks += 1
        return await resolve(*args, **how)  # type: ignore[return-value]

    disk.resolve = counted  # type: ignore[assignment,method-assign]
    assert await seek.next_data(disk, 0) is None
    await disk.write((1 << 40) - 100, b"last")
    assert await seek.next_data(disk, 0) == (1 << 40) - CLUSTER
    assert looks <= 10
