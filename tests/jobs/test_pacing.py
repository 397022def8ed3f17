"""Jobs that leave guests alone, in virtual time."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from storages import Gate, MemoryStorage
from trio.testing import MockClock, wait_all_tasks_blocked

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.formats import qcow2
from cowfs.formats.raw import RawImage
from cowfs.jobs.job import Job, OnError, State
from cowfs.jobs.pacing import LEAST, LONG, MIN_RATE, MOST, QUIET, SEARCHING, TRUST, Pacer
from cowfs.jobs.stream import Stream
from cowfs.storage.base import ReadBuffers

LENGTH = 1 << 40
PERIOD = LEAST / MIN_RATE
CLUSTER = 65536


def make_disk() -> Disk:
    return Disk([Layer(RawImage(MemoryStorage("disk", bytes(1 << 20))))])


class Copy(Job):
    """Copies nothing, in steps that take ``took(size)`` seconds each."""

    verb = "copy"
    unit = 1

    def __init__(self, disk: Disk, *, speed: int = 0, took: Callable[[int], float] = lambda size: 0.001) -> None:
        super().__init__(disk, speed=speed)
        self.took = took
        self.sizes: list[int] = []
        self.times: list[float] = []

    async def work(self) -> None:
        self.length = LENGTH
        while self.offset < LENGTH:
            size = self.step(self.unit)
            self.sizes.append(size)
            self.times.append(trio.current_time())
            await trio.sleep(self.took(size))
            await self.advance(self.offset + size, size)

    @property
    def copied(self) -> int:
        return sum(self.sizes)


@asynccontextmanager
async def running(job: Job) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.run)
        yield nursery
        nursery.cancel_scope.cancel()


async def make_requests(disk: Disk, interval: float) -> None:
    while True:
        await trio.sleep(interval)
        disk.stats.reads += 1


async def test_an_idle_disk_is_copied_without_a_pause(autojump_clock: MockClock) -> None:
    job = Copy(make_disk())
    async with running(job):
        await trio.sleep(1.0005)
        assert len(job.sizes) == 1001
    assert job.sizes[:9] == [min(LEAST << number, MOST) for number in range(9)]
    assert set(job.sizes[9:]) == {MOST}


@pytest.mark.parametrize("interval", [0.0001, QUIET * 0.9])
async def test_a_busy_guest_is_left_alone_but_for_the_minimum_rate(autojump_clock: MockClock, interval: float) -> None:
    job = Copy(make_disk())
    async with running(job) as nursery:
        nursery.start_soon(make_requests, job.disk, interval)
        await trio.sleep(1)
        start = job.copied
        await trio.sleep(10)
        assert 0.98 <= (job.copied - start) / 10 / MIN_RATE <= 1.02
    assert set(job.sizes[-100:]) == {LEAST}


async def test_requests_that_are_under_way_count_before_they_are_answered(autojump_clock: MockClock) -> None:
    job = Copy(make_disk())
    job.disk.waiting = 1
    async with running(job):
        await trio.sleep(10.001)
        assert job.copied == pytest.approx(10 * MIN_RATE, rel=0.02)


async def test_a_step_that_comes_late_is_made_up_for(autojump_clock: MockClock) -> None:
    """Every tenth step takes three times the period."""
    job = Copy(make_disk())
    job.took = lambda size: 3 * PERIOD if len(job.sizes) % 10 == 0 else 0.0
    job.disk.waiting = 1
    async with running(job):
        await trio.sleep(20.001)
        assert job.copied == pytest.approx(20 * MIN_RATE, rel=0.02)


async def test_a_cluster_is_the_least_and_counts_in_full(autojump_clock: MockClock) -> None:
    job = Copy(make_disk())
    job.unit = 2 << 20
    job.disk.waiting = 1
    async with running(job):
        await trio.sleep(60.001)
        assert set(job.sizes) == {2 << 20}
        assert job.copied == pytest.approx(60 * MIN_RATE, rel=0.05)


async def test_what_was_copied_while_the_guest_was_idle_is_not_held_against_the_job(autojump_clock: MockClock) -> None:
    job = Copy(make_disk())
    async with running(job):
        await trio.sleep(1)
        assert job.sizes[-1] == MOST
        job.disk.waiting = 1
        await trio.sleep(0.1)
        steps = len(job.sizes)
        await trio.sleep(1)
        assert len(job.sizes) - steps == pytest.approx(1 / PERIOD, abs=1)


async def test_pauses_of_the_guest_are_used(autojump_clock: MockClock) -> None:
    """It works for half of every second."""
    job = Copy(make_disk())
    async with running(job):
        for _ in range(10):
            with trio.move_on_after(0.5):
                await make_requests(job.disk, 0.0005)
            await trio.sleep(0.5)
    # steps may take a part of the time that it has been quiet for; once they are as large as can be, one a millisecond
    idle = (0.5 - QUIET - 0.03) * MOST / 0.001
    assert 10 * idle <= job.copied <= 10 * (0.501 * MOST / 0.001 + MIN_RATE)
    late = [size for size, time in zip(job.sizes, job.times, strict=True) if 0.01 < time % 1 < 0.5]
    assert set(late) == {LEAST}


async def test_a_guest_that_pauses_for_a_moment_is_not_held_up_by_long_steps(autojump_clock: MockClock) -> None:
    """It pauses for 20 milliseconds at a time."""
    job = Copy(make_disk(), took=lambda size: size / (1 << 30))
    async with running(job) as nursery:
        await trio.sleep(1)
        assert job.sizes[-1] == MOST
        nursery.start_soon(make_requests, job.disk, 0.02)
        await trio.sleep(0.1)
        steps = len(job.sizes)
        await trio.sleep(10)
    assert max(job.took(size) for size in job.sizes[steps:]) <= 2 * 0.02 * TRUST
    # and its pauses are used all the same
    assert sum(job.sizes[steps:]) > 10 * 10 * MIN_RATE


async def test_a_server_that_was_kept_from_running_first_looks_what_was_asked_of_it(mock_clock: MockClock) -> None:
    """When it runs again, the job has waited for long enough, and a request has come that it has not read yet."""
    disk = make_disk()
    pacer = Pacer(disk)
    for _ in range(50):
        disk.stats.reads += 1
        pacer.go()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pacer.give_way, LEAST)
            nursery.start_soon(make_requests, disk, QUIET)
            await wait_all_tasks_blocked()
            mock_clock.jump(QUIET)
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 2, "the job goes on beside a guest that is not idle"
            nursery.cancel_scope.cancel()


async def test_steps_that_take_long_become_small(autojump_clock: MockClock) -> None:
    job = Copy(make_disk(), took=lambda size: size / (50 << 20))
    async with running(job):
        await trio.sleep(5)
    assert max(job.took(size) for size in job.sizes) <= LONG


@pytest.mark.parametrize("busy", [False, True])
async def test_a_speed_limit_is_kept_beside(autojump_clock: MockClock, busy: bool) -> None:
    job = Copy(make_disk(), speed=MIN_RATE // 4)
    job.disk.waiting = int(busy)
    async with running(job):
        await trio.sleep(60)
        assert job.copied == pytest.approx(60 * MIN_RATE // 4, rel=0.02)
    assert max(job.sizes) <= MIN_RATE // 4 // 10 + LEAST


async def test_a_speed_limit_above_the_minimum_rate_hurries_nobody(autojump_clock: MockClock) -> None:
    job = Copy(make_disk(), speed=10 * MIN_RATE)
    job.disk.waiting = 1
    async with running(job):
        await trio.sleep(10.001)
        assert job.copied == pytest.approx(10 * MIN_RATE, rel=0.02)


async def test_the_speed_changes_while_the_job_gives_way(autojump_clock: MockClock) -> None:
    job = Copy(make_disk())
    job.unit = 8 << 20
    job.disk.waiting = 1
    async with running(job):
        await trio.sleep(0.5)
        job.set_speed(1 << 20)
        await trio.sleep(0.5)
        steps = len(job.sizes)
        job.disk.waiting = 0
        await trio.sleep(80)
        # what was copied before the limit came is not held against it; then 8 seconds a step
        assert 10 <= len(job.sizes) - steps <= 12
        job.set_speed(0)
        await trio.sleep(0.1)
        assert len(job.sizes) - steps > 50


async def test_a_job_that_gives_way_can_be_paused_and_resumed(autojump_clock: MockClock) -> None:
    job = Copy(make_disk())
    job.unit = 8 << 20
    job.disk.waiting = 1
    async with running(job):
        await trio.sleep(0.5)
        job.pause()
        await trio.sleep(60)
        assert (job.state, len(job.sizes)) == (State.PAUSED, 1)
        job.resume()
        await trio.sleep(0.01)
        # the time that it stood still counts as waiting
        assert len(job.sizes) == 2
        job.disk.waiting = 0
        job.pause()
        await trio.sleep(60)
        job.resume()
        await trio.sleep(0.0105)
        assert len(job.sizes) > 5


async def test_a_job_that_gives_way_can_be_cancelled(autojump_clock: MockClock) -> None:
    job = Copy(make_disk())
    job.unit = 64 << 20
    job.disk.waiting = 1
    async with running(job):
        await trio.sleep(1)
        assert len(job.sizes) == 1
        job.cancel()
        start = trio.current_time()
        await job.wait()
        assert (job.state, trio.current_time()) == (State.CANCELLED, start)


async def test_looking_for_something_to_copy_takes_a_part_of_the_time(autojump_clock: MockClock) -> None:
    disk = make_disk()
    pacer = Pacer(disk)
    disk.waiting = 1
    for _ in range(20):
        pacer.go()
        start = trio.current_time()
        await trio.sleep(0.01)
        await pacer.give_way(0)
        assert trio.current_time() - start == pytest.approx(0.01 / SEARCHING)
    disk.waiting = 0
    await trio.sleep(QUIET)
    start = trio.current_time()
    for _ in range(20):
        await pacer.give_way(0)
    assert trio.current_time() == start


async def test_rate_and_eta_follow_the_guest(autojump_clock: MockClock) -> None:
    job = Copy(make_disk())
    async with running(job):
        await trio.sleep(10)
        assert job.rate == pytest.approx(MOST / 0.001, rel=0.02)
        assert job.eta == pytest.approx((LENGTH - job.offset) / (MOST / 0.001), rel=0.02)
        job.disk.waiting = 1
        await trio.sleep(10)
        assert job.rate == pytest.approx(MIN_RATE, rel=0.05)
        job.pause()
        await trio.sleep(3600)
        assert (job.rate, job.eta) == (0, None)
        job.resume()
        await trio.sleep(4)
        assert job.rate == pytest.approx(MIN_RATE, rel=0.1)


async def test_eta_knows_of_what_is_passed_over(autojump_clock: MockClock) -> None:
    class Sparse(Copy):
        async def work(self) -> None:
            self.length = 1000 << 20
            for position in range(0, self.length, 10 << 20):
                await trio.sleep(1)
                await self.advance(position + (10 << 20), 1 << 20)

    job = Sparse(make_disk())
    async with running(job):
        await trio.sleep(50.5)
        assert job.rate == pytest.approx(1 << 20, rel=0.2)
        assert job.eta == pytest.approx(50, abs=6)


# -- a stream, and what the disk tells of its guests


@asynccontextmanager
async def streaming(size: int, on_error: OnError = OnError.REPORT) -> AsyncIterator[tuple[Stream, MemoryStorage]]:
    base = MemoryStorage("base", b"\1" * size, cold=True, read_only=True)
    top = MemoryStorage("top")
    await qcow2.create(top, size, Backing("base", "raw"), {})
    disk = Disk([Layer(await qcow2.open_image(top)), Layer(RawImage(base))], copy_on_read=False)
    yield Stream(disk, on_error=on_error), base


async def test_a_stream_of_cold_data_keeps_to_the_minimum_rate_while_the_guest_is_busy(
    autojump_clock: MockClock,
) -> None:
    async with streaming(64 << 20) as (job, base), running(job) as nursery:
        read = base.read

        async def read_slowly(offset: int, buffers: ReadBuffers) -> None:
            await trio.sleep(0.002)
            await read(offset, buffers)

        base.read = read_slowly  # type: ignore[method-assign]
        nursery.start_soon(make_requests, job.disk, 0.001)
        await trio.sleep(4.001)
        assert 3.9 * MIN_RATE <= job.offset <= 4.1 * MIN_RATE
        nursery.cancel_scope.cancel()


async def test_a_guest_that_waits_for_cold_data_keeps_a_stream_away(autojump_clock: MockClock) -> None:
    async with streaming(64 << 20) as (job, base), trio.open_nursery() as nursery:
        gate = base.gates["read"] = Gate()
        nursery.start_soon(job.disk.readinto, 0, memoryview(bytearray(512)))
        await gate.arrived.wait()
        del base.gates["read"]
        assert job.disk.waiting == 1
        nursery.start_soon(job.run)
        await trio.sleep(1.001)
        assert 0.9 * MIN_RATE <= job.offset <= 1.1 * MIN_RATE
        gate.open()
        await job.wait()
        assert (job.disk.waiting, job.state) == (0, State.COMPLETED)


@pytest.mark.parametrize("operation", ["read", "write", "flush"])
async def test_who_gives_up_waiting_waits_no_longer(operation: str) -> None:
    async with streaming(1 << 20) as (job, base):
        disk = job.disk
        storage = disk.layers[0].storage if operation == "flush" else base
        assert isinstance(storage, MemoryStorage)
        gate = storage.gates["flush" if operation == "flush" else "read"] = Gate()
        call = {
            "read": lambda: disk.readinto(0, memoryview(bytearray(512))),
            "write": lambda: disk.write(0, bytes(512)),
            "flush": disk.flush,
        }[operation]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await gate.arrived.wait()
            assert disk.waiting == 1
            nursery.cancel_scope.cancel()
        assert disk.waiting == 0


async def test_ignored_errors_cost_little(autojump_clock: MockClock) -> None:
    async with streaming(64 << 20, on_error=OnError.IGNORE) as (job, _):
        lengths: list[int] = []
        copy_up = job.disk.copy_up

        async def watch(offset: int, length: int, base: int | None = None) -> int:
            lengths.append(length)
            return await copy_up(offset, length, base)

        job.disk.copy_up = watch  # type: ignore[method-assign]
        await job.run()
        assert (job.state, max(lengths)) == (State.COMPLETED, 1 << 20)


async def test_a_stream_stands_still_as_soon_as_it_is_paused() -> None:
    async with streaming(1 << 20) as (job, base), trio.open_nursery() as nursery:
        gate = base.gates["read"] = Gate()
        nursery.start_soon(job.run)
        await gate.arrived.wait()
        job.pause()
        gate.open()
        await wait_all_tasks_blocked()
        assert (job.state, job.offset) == (State.PAUSED, LEAST)
        job.cancel()
