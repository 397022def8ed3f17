"""The life of a job, on a clock that only the test moves."""

import pytest
import trio
from storages import MemoryStorage
from trio.testing import MockClock, wait_all_tasks_blocked

from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.errors import CorruptImage, UsageError
from cowfs.formats.raw import RawImage
from cowfs.jobs.job import Job, State

STEP = 1 << 20
LENGTH = 20 * STEP


def make_disk() -> Disk:
    return Disk([Layer(RawImage(MemoryStorage("disk", bytes(LENGTH))))])


class Steps(Job):
    """Copies nothing, a step at a time, each when the test lets it."""

    verb = "steps"

    def __init__(self, disk: Disk, *, speed: int = 0, failure: Exception | None = None) -> None:
        super().__init__(disk, speed=speed)
        self.failure = failure
        self.states: list[State] = []
        self.on_change = lambda: self.states.append(self.state)
        self.turn, self.take_turns = trio.Semaphore(0), False

    async def work(self) -> None:
        for position in range(STEP, LENGTH + STEP, STEP):
            if self.take_turns:
                await self.turn.acquire()
            await self.advance(position, STEP)
        if self.failure:
            raise self.failure


async def test_a_job_runs_to_its_end() -> None:
    job = Steps(make_disk())
    assert (job.state, job.percent) == (State.NONE, 0.0)
    await job.run()
    assert job.states == [State.RUNNING, State.COMPLETED]
    assert (job.offset, job.length, job.percent, job.rate, job.eta) == (LENGTH, LENGTH, 100.0, 0, None)
    await job.wait()


async def test_a_speed_limit_is_kept(autojump_clock: MockClock) -> None:
    job = Steps(make_disk(), speed=STEP)
    started = trio.current_time()
    await job.run()
    assert 19 <= trio.current_time() - started <= 21


async def test_speed_changes_take_effect_at_once(autojump_clock: MockClock) -> None:
    job = Steps(make_disk(), speed=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.run)
        await trio.sleep(10)
        assert job.offset == STEP
        started = trio.current_time()
        job.set_speed(0)
        await job.wait()
    assert trio.current_time() == started


async def test_rate_and_eta(autojump_clock: MockClock) -> None:
    job = Steps(make_disk(), speed=2 * STEP)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.run)
        await trio.sleep(4.9)
        assert job.rate == pytest.approx(2 * STEP, rel=0.3)
        assert job.eta == pytest.approx(5, abs=2)
        nursery.cancel_scope.cancel()
    assert job.state is State.CANCELLED


async def test_a_paused_job_stands_still_until_it_is_resumed() -> None:
    job = Steps(make_disk())
    job.take_turns = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.run)
        await wait_all_tasks_blocked()
        job.pause()
        job.turn.release()
        job.turn.release()
        await wait_all_tasks_blocked()
        assert (job.state, job.offset, job.rate) == (State.PAUSED, STEP, 0)
        job.resume()
        await wait_all_tasks_blocked()
        assert (job.state, job.offset) == (State.RUNNING, 2 * STEP)
        job.cancel()
    assert job.states == [State.RUNNING, State.PAUSED, State.RUNNING, State.CANCELLED]
    assert job.offset == 2 * STEP


async def test_a_paused_job_can_be_cancelled() -> None:
    job = Steps(make_disk())
    async with trio.open_nursery() as nursery:
        job.take_turns = True
        nursery.start_soon(job.run)
        await wait_all_tasks_blocked()
        job.pause()
        job.turn.release()
        await wait_all_tasks_blocked()
        job.cancel()
    assert job.state is State.CANCELLED


async def test_a_known_error_is_the_jobs_outcome() -> None:
    job = Steps(make_disk(), failure=CorruptImage("is broken", file="x.qed"))
    await job.run()
    assert (job.state, job.error) == (State.FAILED, "x.qed: is broken")


async def test_a_bug_fails_the_job_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    job = Steps(make_disk(), failure=KeyError("oops"))
    await job.run()
    assert (job.state, job.error) == (State.FAILED, "internal error; the log has the details")
    assert "KeyError" in caplog.text


async def test_commands_that_do_not_fit_the_state_are_refused() -> None:
    job = Steps(make_disk())
    for command in (job.pause, job.resume, job.cancel, job.complete):
        with pytest.raises(UsageError):
            command()
    await job.run()
    for command in (job.pause, job.resume, job.cancel, job.complete):
        with pytest.raises(UsageError, match="a steps job that is completed"):
            command()
