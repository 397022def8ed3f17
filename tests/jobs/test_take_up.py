"""Jobs and their journals: in step while a job is active, gone when it has ended, and enough to start it again."""

import errno
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from commandline import PATIENCE, ok, qemu_img
from storages import MemoryStorage
from trio.testing import wait_all_tasks_blocked

from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.errors import Busy, CowfsError, StorageError, UsageError
from cowfs.formats.backingnames import BackingNames
from cowfs.formats.chain import PLAIN, open_disk
from cowfs.formats.raw import RawImage
from cowfs.jobs import control, journal
from cowfs.jobs.commit import Pivot
from cowfs.jobs.control import KINDS, JobControl, Kind, progress
from cowfs.jobs.job import Job, OnError, State
from cowfs.jobs.journal import SUFFIX, Entry, read_journal, write_journal

pytestmark = pytest.mark.needs("qemu-img")

SIZE = 1 << 20


class _Stub(Job):
    """Does what a test tells it, step by step."""

    verb = "commit"

    def __init__(
        self,
        disk: Disk,
        *,
        speed: int = 0,
        on_error: OnError = OnError.REPORT,
        pivot: Pivot = Pivot.NO,
        names: BackingNames = BackingNames.KEEP,
        **layers: Layer,
    ) -> None:
        super().__init__(disk, speed=speed, on_error=on_error)
        self.layers = {key: layer.name for key, layer in layers.items()}
        self.pivot = pivot
        self.names = names
        self.steps = trio.Semaphore(0)
        self.done = 0
        self.failure: CowfsError | None = None
        self.seen: list[bool] = []

    async def work(self) -> None:
        self.seen.append(read_journal(f"{self.disk.layers[0].name}{SUFFIX}") is not None)
        while self.done < 3:
            await self.attempt(self._step)
            await self.advance(self.done, 0)
        if self.pivot is Pivot.WAIT:
            await self.ready()

    async def _step(self) -> None:
        await self.steps.acquire()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        self.done += 1

    def finish(self) -> None:
        for _ in range(3):
            self.steps.release()


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    for verb in KINDS:
        monkeypatch.setitem(control.KINDS, verb, Kind(_Stub, KINDS[verb].keys))


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """An active layer over b over a over a base."""
    (tmp_path / "base").write_bytes(bytes(SIZE))
    below, format = "base", "raw"
    for name in ("a", "b", "top"):
        ok(qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", format, name, cwd=tmp_path))
        below, format = name, "qcow2"
    return tmp_path / "top"


class Setup:
    def __init__(self, path: Path, disk: Disk, jobs: JobControl, nursery: trio.Nursery) -> None:
        self.path = path
        self.disk = disk
        self.jobs = jobs
        self.nursery = nursery
        self.at = f"{path}{SUFFIX}"

    @property
    def job(self) -> _Stub:
        job = self.jobs.active
        assert isinstance(job, _Stub)
        return job

    def entry(self) -> Entry:
        entry = read_journal(self.at)
        assert entry is not None
        return entry

    def kill(self) -> None:
        """End as a server does that is told to."""
        self.nursery.cancel_scope.cancel()

    async def end(self, state: State) -> None:
        """Wait for the end of the job."""
        recorded = self.jobs._recorded
        assert recorded is not None
        await recorded.over.wait()
        assert recorded.job.state is state


@asynccontextmanager
async def serving(path: Path, *, writable: bool = True) -> AsyncIterator[Setup]:
    disk = await open_disk(str(path), writable=writable, copy_on_read=False)
    try:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                yield Setup(path, disk, JobControl(disk, nursery), nursery)
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await disk.close()


async def test_the_journal_is_there_before_the_first_step_and_gone_after_the_last(chain: Path) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start speed=5 on-error=stop")
        assert s.job.seen == [] or s.job.seen == [True]
        assert s.entry() == Entry(
            "commit", str(chain), 5, "stop", base=str(chain.parent / "b"), top=str(chain), pivot="no"
        )
        assert progress(s.job)["resumes"] == "yes"
        await wait_all_tasks_blocked()
        assert s.job.seen == [True]
        job = s.job
        job.finish()
        await s.end(State.COMPLETED)
        assert read_journal(s.at) is None
        assert progress(job)["resumes"] == "no"


async def test_it_resumes_until_its_journal_is_gone(chain: Path) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start")
        job, changes = s.job, s.jobs.changes["commit"]
        with deferred_removal() as gate:
            job.finish()
            await job.wait()
            # the power may still go: then the next mount finds the journal
            assert (progress(job)["state"], progress(job)["resumes"]) == ("completed", "yes")
            before = changes.count
            gate.set()
            await s.end(State.COMPLETED)
        assert progress(job)["resumes"] == "no"
        assert read_journal(s.at) is None
        assert changes.count == before + 1, "who polls learns of it"


async def test_the_end_of_one_journal_is_no_beginning_of_the_next_job(chain: Path) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start")
        first = s.job
        with deferred_removal() as gate, deferred_writing() as second:
            first.finish()
            await first.wait()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(s.jobs.command, "commit", "start")
                await wait_all_tasks_blocked()
                job, recorded = s.job, s.jobs._recorded
                assert recorded is not None
                told = trio.Event()
                s.jobs.changes["commit"].call_once(told, told.set)
                gate.set()
                await told.wait()
                assert not first.resumes
                assert (job.state, recorded.begun.is_set()) == (State.NONE, False)
                second.set()
        assert job.state is State.RUNNING


async def test_a_stream_of_all_names_no_layer(chain: Path) -> None:
    async with serving(chain) as s:
        await s.jobs.command("stream", "start")
        assert s.entry() == Entry("stream", str(chain))
        await s.jobs.command("stream", "cancel")
        await s.jobs.command("stream", "start base=0")
        assert s.entry() == Entry("stream", str(chain), base=str(chain.parent / "base"))


async def test_a_job_that_fails_or_is_cancelled_does_not_go_on(chain: Path) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start")
        s.job.failure = StorageError("broken", errno=errno.EIO)
        s.job.finish()
        await s.end(State.FAILED)
        assert read_journal(s.at) is None
        await s.jobs.command("commit", "start")
        await s.jobs.command("commit", "cancel")
        # the answer to the command promises it
        assert read_journal(s.at) is None
        await s.jobs.command("commit", "start")
        await s.jobs.command("commit", "pause")
        await s.jobs.command("commit", "cancel")
        assert read_journal(s.at) is None


async def test_a_server_that_ends_leaves_the_journal(chain: Path) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start base=0 speed=7")
        job = s.job
        s.kill()
    assert job.state is State.CANCELLED
    entry = s.entry()
    async with serving(chain) as s:
        await s.jobs.take_up(wanted=True)
        assert s.entry() == entry
        assert (s.job.state, s.job.speed, s.job.resumes) == (State.RUNNING, 7, True)
        assert s.job.layers == {"top": str(chain), "base": str(chain.parent / "base")}
        s.job.finish()
        await s.end(State.COMPLETED)
        assert read_journal(s.at) is None
    async with serving(chain) as s:
        await s.jobs.take_up(wanted=True)
        assert s.jobs.active is None


async def test_a_job_told_to_cancel_does_not_go_on_though_the_server_ends_first(chain: Path) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start")
        await wait_all_tasks_blocked()
        s.job.cancel()
        s.kill()
    assert read_journal(s.at) is None


async def test_what_a_job_is_told_is_in_its_journal(chain: Path) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start pivot=wait base=1")
        assert (s.entry().speed, s.entry().paused, s.entry().pivot) == (0, False, "wait")
        await s.jobs.command("commit", "speed=64k")
        assert s.entry().speed == 1 << 16
        await s.jobs.command("commit", "pause")
        assert s.entry().paused
        with pytest.raises(UsageError, match=r"^cannot complete a commit job that is paused$"):
            await s.jobs.command("commit", "complete")
        await s.jobs.command("commit", "resume")
        assert not s.entry().paused
        with pytest.raises(UsageError, match=r"^cannot complete a commit job that is running$"):
            await s.jobs.command("commit", "complete")
        s.job.finish()
        await wait_all_tasks_blocked()
        assert (s.job.state, s.entry().pivot) == (State.READY, "wait")
        with deferred_removal() as gate:
            await s.jobs.command("commit", "complete")
            assert s.entry().pivot == "yes"
            gate.set()
        await s.end(State.COMPLETED)
        assert read_journal(s.at) is None


@contextmanager
def deferred(name: str) -> Iterator[threading.Event]:
    """A function of the journal's module, called in threads, does nothing until the event is set."""
    gate, real = threading.Event(), getattr(journal, name)

    def call(*args: object) -> object:
        assert gate.wait(PATIENCE)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, name, call)
        try:
            yield gate
        finally:
            gate.set()


#: no journal is removed, or written, until the event is set
deferred_removal = partial(deferred, "remove_journal")
deferred_writing = partial(deferred, "write_journal")


async def test_a_job_that_an_error_has_stopped_is_not_one_that_is_paused(chain: Path) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start on-error=stop")
        s.job.failure = StorageError("broken", errno=errno.EIO)
        s.job.steps.release()
        await wait_all_tasks_blocked()
        assert s.job.state is State.PAUSED
        await s.jobs.command("commit", "speed=1")
        assert (s.entry().paused, s.entry().speed) == (False, 1)
        s.kill()
    async with serving(chain) as s:
        await s.jobs.take_up(wanted=True)
        assert s.job.state is State.RUNNING


async def test_a_paused_job_stays_paused_and_touches_nothing(chain: Path) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start")
        await s.jobs.command("commit", "pause")
        s.kill()
    async with serving(chain) as s:
        await s.jobs.take_up(wanted=True)
        s.job.finish()
        await wait_all_tasks_blocked()
        assert (s.job.state, s.job.seen, s.job.done) == (State.PAUSED, [], 0)
        await s.jobs.command("commit", "resume")
        assert not s.entry().paused
        await s.end(State.COMPLETED)
    async with serving(chain) as s:
        await s.jobs.command("commit", "start")
        await s.jobs.command("commit", "pause")
        s.kill()
    async with serving(chain) as s:
        await s.jobs.take_up(wanted=True)
        await s.jobs.command("commit", "cancel")
        await s.end(State.CANCELLED)
        assert read_journal(s.at) is None


async def test_nothing_goes_on_unless_wanted_and_possible(chain: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start")
        s.kill()
    for wanted, writable, reason in (
        (False, True, "jobs are not to be resumed"),
        (True, False, "the disk can only be read"),
    ):
        async with serving(chain, writable=writable) as s:
            caplog.clear()
            await s.jobs.take_up(wanted=wanted)
            assert s.jobs.active is None
            assert caplog.messages == [f"{s.at}: the commit job that was broken off does not go on, since {reason}"]
    async with serving(chain) as s:
        await s.jobs.take_up(wanted=True)
        assert s.job.state is State.RUNNING


async def test_a_new_job_takes_the_place_of_one_that_did_not_go_on(chain: Path) -> None:
    write_journal(f"{chain}{SUFFIX}", Entry("stream", str(chain), speed=9))
    async with serving(chain) as s:
        await s.jobs.take_up(wanted=False)
        await s.jobs.command("commit", "start")
        assert s.entry().verb == "commit"


async def test_the_removal_of_one_journal_does_not_hit_the_next(chain: Path) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start")
        with deferred_removal() as gate:
            s.job.finish()
            await s.job.wait()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(s.jobs.command, "stream", "start")
                await wait_all_tasks_blocked()
                assert s.job.state is State.NONE
                with pytest.raises(Busy):
                    await s.jobs.command("commit", "start")
                gate.set()
        assert s.entry().verb == "stream"


async def test_a_job_without_a_journal_runs_and_says_so(chain: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = StorageError("cannot write: No space left on device", errno=errno.ENOSPC, file="journal")
    write_journal(f"{chain}{SUFFIX}", Entry("stream", str(chain)))
    async with serving(chain) as s:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "write_journal", _raising(full))
            await s.jobs.command("commit", "start")
            assert (s.job.state, progress(s.job)["resumes"]) == (State.RUNNING, "no")
            # that of an earlier job must not be taken for this one's
            assert read_journal(s.at) is None
            await s.jobs.command("commit", "speed=1")
        why = "journal: cannot write: No space left on device"
        assert caplog.messages == [
            f"the commit job will not go on after a restart: {why}",
            f"the commit job will not go on after a restart: {why}",
        ]
        assert {record.levelno for record in caplog.records} == {logging.WARNING}
        # once there is room again
        await s.jobs.command("commit", "speed=2")
        assert (s.entry().speed, s.job.resumes) == (2, True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "write_journal", _raising(full))
            await s.jobs.command("commit", "speed=3")
        assert (s.job.speed, s.entry().speed, s.job.resumes) == (3, 2, True)
        assert caplog.messages[2:] == [f"the commit job would go on after a restart as it was told before: {why}"]


def _raising(error: Exception) -> Any:
    def call(*args: object) -> None:
        raise error

    return call


async def test_a_journal_that_cannot_be_removed_is_reported(chain: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start")
        job = s.job
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "remove_journal", _raising(StorageError("cannot remove", errno=errno.EIO, file="j")))
            await s.jobs.command("commit", "cancel")
            assert progress(job)["resumes"] == "yes"
        assert caplog.messages == ["j: cannot remove; the next mount takes it for that of a job to go on with"]


async def test_what_is_no_local_file_has_no_journal(caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk([Layer(RawImage(MemoryStorage(name, bytes(SIZE), read_only=name == "base"))) for name in ("x", "base")])
    async with trio.open_nursery() as nursery:
        jobs = JobControl(disk, nursery)
        await jobs.take_up(wanted=True)
        await jobs.command("commit", "start")
        job = jobs.active
        assert progress(job)["resumes"] == "no"
        await jobs.command("commit", "pause")
        await jobs.command("commit", "cancel")
    assert caplog.messages == [
        "the commit job will not go on after a restart: x: is no local file, which could have a journal beside it"
    ]


@pytest.fixture
def nonsense(chain: Path) -> Path:
    """Where the journal of the chain should be."""
    path = Path(f"{chain}{SUFFIX}")
    path.write_text("what is this\n")
    return path


async def test_a_journal_that_is_not_understood_is_left_alone(chain: Path, nonsense: Path) -> None:
    async with serving(chain) as s:
        with pytest.raises(CowfsError, match=r"^.*\.cowfs-job: is damaged$"):
            await s.jobs.take_up(wanted=True)
        assert s.jobs.active is None
        assert await trio.Path(nonsense).read_text() == "what is this\n"
        await s.jobs.command("commit", "start")
        assert s.entry().verb == "commit"


async def test_a_journal_of_another_chain_is_removed(chain: Path) -> None:
    async with serving(chain) as s:
        await s.jobs.command("commit", "start base=0")
        s.kill()
    ok(qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "a", chain))
    async with serving(chain) as s:
        with pytest.raises(CowfsError, match=r"\.cowfs-job: the chain is not the one any more on which a commit job"):
            await s.jobs.take_up(wanted=True)
        assert s.jobs.active is None
        assert read_journal(s.at) is None


async def test_after_the_last_link_only_the_marks_are_missing(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[tuple[object, ...]] = []

    async def mark(*arguments: object) -> None:
        assert read_journal(f"{chain}{SUFFIX}") is not None
        marked.append(arguments)

    monkeypatch.setattr(control, "mark_merged", mark)
    folder = chain.parent
    async with serving(chain) as s:
        await s.jobs.command("commit", "start top=2 base=0")
        assert s.entry().above == str(chain)
        s.kill()
    ok(qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "base", chain))
    async with serving(chain) as s:
        await s.jobs.take_up(wanted=True)
        assert s.jobs.active is None
        assert marked == [
            (f"{folder}/b", "qcow2", f"{folder}/base", PLAIN),
            (f"{folder}/a", "qcow2", f"{folder}/base", PLAIN),
        ]
        assert read_journal(s.at) is None


async def test_links_to_the_image_lead_to_the_same_journal(chain: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    for name in ("top", "b", "a", "base"):
        (other / name).symlink_to(tmp_path / name)
    async with serving(other / "top") as s:
        await s.jobs.command("commit", "start top=1")
        s.kill()
    assert read_journal(s.at) is None
    async with serving(chain) as s:
        assert s.entry().top == f"{tmp_path}/a"
        await s.jobs.take_up(wanted=True)
        assert s.job.layers == {"top": f"{tmp_path}/a", "base": f"{tmp_path}/base"}
