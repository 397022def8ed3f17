"""Streams to a base, commits from and into any layer: on chains of all kinds, with QEMU's word on what is left."""

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from chains import GROWING, MIXED, PLAIN, PLANS, SHRINKING, SIZE, ChainFiles, K, M, Writer, completed, view
from commandline import ok, qemu_img, qemu_io
from steadysteps import steady_steps

from cowfs.block.disk import Disk
from cowfs.block.extent import Kind
from cowfs.block.layer import Layer
from cowfs.block.writetracker import WriteTracker
from cowfs.errors import Stale, UsageError
from cowfs.formats.chain import open_chain, open_disk
from cowfs.jobs import commit
from cowfs.jobs.commit import Commit, Pivot
from cowfs.jobs.job import Job, State
from cowfs.jobs.stream import Stream

#: bytes; of the images that say nothing else
CLUSTER = 64 << 10


def layer(disk: Disk, number: int) -> Layer:
    """A layer by the number that users know it by."""
    return disk.layers[len(disk.layers) - 1 - number]


async def assert_refused(path: Path) -> None:
    with pytest.raises(Stale, match=r"was merged into layer\d\.\w+ by a commit, and is no disk of its own any more"):
        await open_chain(str(path))
    # and by whoever knows nothing of cowfs
    found = qemu_img("map", path)
    assert found.returncode != 0
    assert "merged by a commit into" in found.stderr


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("base", [None, 0, 1, 2])
@pytest.mark.parametrize("busy", [False, True])
async def test_stream_down_to_a_base(tmp_path: Path, plan: str, base: int | None, busy: bool) -> None:
    files = ChainFiles(tmp_path, PLANS[plan])
    if base is not None and base >= len(files.paths) - 1:
        base = 0
    async with files.opened() as disk:
        writer = Writer(disk, files.views[-1])
        async with trio.open_nursery() as nursery:
            if busy:
                nursery.start_soon(writer.run)
            await completed(Stream(disk, base=None if base is None else layer(disk, base)))
            nursery.cancel_scope.cancel()
        assert len(disk.layers) == (1 if base is None else base + 2)
        assert await disk.read(0, disk.size) == writer.model
    assert view(files.top, files.formats[-1]) == writer.model
    files.check(*range(len(files.paths)))
    # nothing below has changed
    for path, format, content in list(zip(files.paths, files.formats, files.views, strict=True))[:-1]:
        assert view(path, format) == content
    backing = next(iter(ok(qemu_img("info", files.top)).split("backing file: ")[1:]), "")
    assert backing.split(" ")[0].split("\n")[0] == ("" if base is None else files.paths[base].name)


async def test_zeros_between_hide_the_base_without_taking_space(tmp_path: Path) -> None:
    files = ChainFiles(tmp_path, PLAIN[:3])
    async with files.opened() as disk:
        await disk.set_layer_writable(1, True)
        await disk.zero_layer(1, 0, SIZE)
        await disk.set_layer_writable(1, False)
        await disk.drop(0, SIZE, WriteTracker(SIZE))
        await disk.flush()
        before = files.top.stat().st_size
        job = Stream(disk, base=layer(disk, 0))
        await completed(job)
        assert (disk.stats.copied_up_bytes, len(disk.layers)) == (0, 2)
        assert not any(await disk.read(0, SIZE))
    assert files.top.stat().st_size <= before
    assert view(files.top, "qcow2") == bytes(SIZE)
    files.check(2)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("top", "base"), [(2, 1), (2, 0), (1, 0)])
@pytest.mark.parametrize("busy", [False, True])
async def test_commit_of_a_layer_in_the_middle(tmp_path: Path, plan: str, top: int, base: int, busy: bool) -> None:
    files = ChainFiles(tmp_path, PLANS[plan])
    if top == len(files.paths) - 1:
        top, base = 1, 0
    async with files.opened(copy_on_read=True) as disk:
        writer = Writer(disk, files.views[-1])
        async with trio.open_nursery() as nursery:
            if busy:
                nursery.start_soon(writer.run)
            await completed(Commit(disk, top=layer(disk, top), base=layer(disk, base)))
            nursery.cancel_scope.cancel()
        assert [Path(left.name) for left in disk.layers[::-1]] == [*files.paths[: base + 1], *files.paths[top + 1 :]]
        assert all(left.storage.read_only for left in disk.layers[1:])
        assert await disk.read(0, disk.size) == writer.model
    kept = [*range(base + 1), *range(top + 1, len(files.paths))]
    files.check(*kept)
    assert view(files.top, files.formats[-1]) == writer.model
    for number in kept[:-1]:
        if number == base:
            # all of what the topmost of the merged layers showed, and behind that what was there
            merged = files.views[top] + files.views[base][len(files.views[top]) :]
            assert view(files.paths[base], files.formats[base]) == merged
        else:
            assert view(files.paths[number], files.formats[number]) == files.views[number]
    for number in range(base + 1, top + 1):
        await assert_refused(files.paths[number])
    # what is left is one chain to whoever opens it, and remembers that
    disk = await open_disk(str(files.top), files.formats[-1], writable=True)
    assert await disk.read(0, disk.size) == writer.model
    await disk.close()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("base", [0, 1, 2])
@pytest.mark.parametrize("busy", [False, True])
async def test_commit_of_the_active_layer(tmp_path: Path, plan: str, base: int, busy: bool) -> None:
    files = ChainFiles(tmp_path, PLANS[plan])
    base = min(base, len(files.paths) - 2)
    async with files.opened() as disk:
        writer = Writer(disk, files.views[-1])
        async with trio.open_nursery() as nursery:
            if busy:
                nursery.start_soon(writer.run)
            await completed(Commit(disk, base=layer(disk, base)))
            nursery.cancel_scope.cancel()
        assert [Path(left.name) for left in disk.layers[::-1]] == [*files.paths[: base + 1], files.top]
        assert disk.sink is None
        assert disk.layers[1].storage.read_only
        if not busy:
            assert all(e.kind.name == "UNALLOCATED" for e in await disk.layers[0].map(0, disk.size))
            assert await disk.read(0, disk.size, 1) == writer.model
        assert await disk.read(0, disk.size) == writer.model
        await writer.write()
    assert view(files.top, files.formats[-1]) == writer.model
    files.check(*range(base + 1), -1)
    for number in range(base):
        assert view(files.paths[number], files.formats[number]) == files.views[number]
    for number in range(base + 1, len(files.paths) - 1):
        await assert_refused(files.paths[number])
    disk = await open_disk(str(files.top), files.formats[-1], writable=True)
    assert await disk.read(0, disk.size) == writer.model
    await disk.close()


@pytest.mark.parametrize("plan", ["plain", "mixed", "old", "growing"])
@pytest.mark.parametrize("base", [0, 1, 2])
@pytest.mark.parametrize("busy", [False, True])
async def test_pivot(tmp_path: Path, plan: str, base: int, busy: bool) -> None:
    files = ChainFiles(tmp_path, PLANS[plan])
    base = min(base, len(files.paths) - 2)
    async with files.opened(copy_on_read=True) as disk:
        writer = Writer(disk, files.views[-1])
        async with trio.open_nursery() as nursery:
            if busy:
                nursery.start_soon(writer.run)
            job = Commit(disk, base=layer(disk, base), pivot=Pivot.YES)
            await completed(job)
            if busy:
                # the guest goes on, on the base now
                target = writer.writes + 30
                while writer.writes < target:
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert [Path(left.name) for left in disk.layers[::-1]] == files.paths[: base + 1]
        assert await disk.read(0, disk.size) == writer.model
        await disk.flush()
        assert job.longest_pause < 60
    assert view(files.paths[base], files.formats[base]) == writer.model
    files.check(*range(base + 1))
    for number in range(base + 1, len(files.paths)):
        await assert_refused(files.paths[number])
    disk = await open_disk(str(files.paths[base]), files.formats[base], writable=True)
    assert await disk.read(0, disk.size) == writer.model
    await disk.close()


async def test_a_job_that_is_to_wait_is_ready_until_it_is_told_to_complete(tmp_path: Path) -> None:
    files = ChainFiles(tmp_path, MIXED)
    async with files.opened() as disk, trio.open_nursery() as nursery:
        writer = Writer(disk, files.views[-1])
        job = Commit(disk, base=layer(disk, 1), pivot=Pivot.WAIT)
        nursery.start_soon(job.run)
        while job.state is not State.READY:
            await writer.write()
            await trio.lowlevel.checkpoint()
        for _ in range(100):
            await writer.write()
            await writer.read()
        with pytest.raises(UsageError, match="cannot pause a commit job that is ready"):
            job.pause()
        job.complete()
        await job.wait()
        assert (job.state, len(disk.layers)) == (State.COMPLETED, 2)
        assert await disk.read(0, disk.size) == writer.model
    assert view(files.paths[1], files.formats[1]) == writer.model
    files.check(0, 1)


async def test_a_job_that_is_ready_can_be_cancelled(tmp_path: Path) -> None:
    files = ChainFiles(tmp_path, PLAIN[:2])
    async with files.opened() as disk, trio.open_nursery() as nursery:
        writer = Writer(disk, files.views[-1])
        job = Commit(disk, pivot=Pivot.WAIT)
        nursery.start_soon(job.run)
        while job.state is not State.READY:
            await trio.lowlevel.checkpoint()
        for _ in range(50):
            await writer.write()
        job.cancel()
        await job.wait()
        assert (job.state, len(disk.layers), disk.sink) == (State.CANCELLED, 2, None)
        assert await disk.read(0, disk.size, 1) == writer.model
        await writer.write()
        assert await disk.read(0, disk.size, 1) != writer.model
    assert view(files.top, "qcow2") == writer.model
    files.check(1)


class Watched(Commit):
    """A commit that notes how far it says that it is, of how many layers, and whether the disk's start is dropped."""

    def __init__(self, disk: Disk, base: Layer) -> None:
        super().__init__(disk, base=base)
        self.seen: list[tuple[int, int, bool]] = []

    async def advance(self, offset: int, copied: int) -> None:
        await super().advance(offset, copied)
        first = (await self.disk.layers[0].map(0, CLUSTER))[0]
        self.seen.append((self.offset, len(self.disk.layers), first.kind is Kind.UNALLOCATED))


async def test_what_lies_between_is_the_first_half_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady_steps(monkeypatch, CLUSTER)
    files = ChainFiles(tmp_path, PLAIN[:3])
    async with files.opened() as disk:
        job = Watched(disk, layer(disk, 0))
        await completed(job)
        between = [offset for offset, layers, _ in job.seen if layers == 3]
        drained = [offset for offset, layers, _ in job.seen if layers == 2]
    assert len(set(between)) > 10
    assert len(set(drained)) > 10
    assert between == sorted(between)
    assert drained == sorted(drained)
    assert between[-1] == SIZE // 2 <= drained[0]
    assert drained[-1] == SIZE
    assert view(files.top, "qcow2") == files.views[-1]


async def test_a_slow_commit_drops_what_it_has_copied_before_that_is_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady_steps(monkeypatch, CLUSTER)
    monkeypatch.setattr(commit, "BATCH_SECONDS", 0)
    files = ChainFiles(tmp_path, PLAIN[:2])
    async with files.opened() as disk:
        await disk.write(0, files.views[-1])
        job = Watched(disk, layer(disk, 0))
        await completed(job)
    assert [dropped for offset, _, dropped in job.seen if 0 < offset < SIZE].count(False) <= 1


class Growing(Commit):
    """A commit whose disk grows before its step number ``when``; the guest writes to what is new, from its start on."""

    def __init__(self, disk: Disk, pivot: Pivot, when: int) -> None:
        super().__init__(disk, pivot=pivot)
        self.steps = 0
        self._when = when

    async def advance(self, offset: int, copied: int) -> None:
        self.steps += 1
        if self.steps == self._when:
            size = self.disk.size
            await self.disk.grow(size + 80 * K)
            await self.disk.write(size, b"new" * 10_000)
        await super().advance(offset, copied)
        assert self.offset <= self.length


@pytest.mark.parametrize("gentle", [0, 2])
@pytest.mark.parametrize(("below", "pivot"), [(SIZE - 60 * K, Pivot.YES), (SIZE + M, Pivot.NO)])
async def test_what_is_written_when_the_disk_has_grown_while_it_is_drained_is_kept(
    tmp_path: Path, gentle: int, below: int, pivot: Pivot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "GENTLE_PASSES", gentle)
    monkeypatch.setattr(commit, "FIRM_STEP", M)
    steady_steps(monkeypatch, M)
    grown = 0
    while True:
        folder = tmp_path / str(grown)
        folder.mkdir()
        files = ChainFiles(folder, [("raw", {}, below), ("qcow2", {}, SIZE - 3 * 512)])
        async with files.opened() as disk:
            await disk.write(0, files.views[-1])
            job = Growing(disk, pivot, grown + 1)
            await completed(job)
            if job.steps <= grown:
                break
            expected = files.views[-1] + (b"new" * 10_000).ljust(80 * K, b"\0")
            kept = await disk.read(0, disk.size) == expected
            assert kept, f"not if it grows before step {grown + 1}"
        grown += 1
    assert grown > SIZE // M


async def test_a_disk_may_end_while_it_is_drained(tmp_path: Path) -> None:
    files = ChainFiles(tmp_path, PLAIN[:2])
    # in whatever order all that it consists of ends
    for attempt in range(20):
        disk = await open_disk(str(files.top), writable=True)
        job = Commit(disk, pivot=Pivot.WAIT)
        async with trio.open_nursery() as nursery:
            await nursery.start(disk.run)
            nursery.start_soon(job.run)
            while job.state is not State.READY:
                await trio.lowlevel.checkpoint()
            if attempt % 2:
                await disk.write(4096, b"written below")
            nursery.cancel_scope.cancel()
        assert (job.state, job.error, disk.sink) == (State.CANCELLED, "", None)
        await disk.close()
    assert view(files.top, "qcow2")[4096:][:13] == b"written below"


async def test_a_commit_that_is_cancelled_when_the_chain_has_changed_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ChainFiles(tmp_path, PLAIN)
    async with files.opened() as disk:
        job = Commit(disk, top=layer(disk, 1))
        cut_out = disk.cut_out

        async def cancel(*args: Any) -> list[Layer] | None:
            removed = await cut_out(*args)
            job.cancel()
            return removed

        monkeypatch.setattr(disk, "cut_out", cancel)
        await completed(job)
        assert len(disk.layers) == 3
        # also layers that are only read know what they lie on
        assert all(above.image.stamp is not None for above in disk.layers[:2])
        assert await disk.read(0, SIZE) == files.views[-1]


@pytest.mark.parametrize("kind", ["stream", "active", "between"])
async def test_what_guests_discard_hides_the_layer_that_will_be_below(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ChainFiles(tmp_path, [("raw", {}, SIZE), ("qcow2", {}, 3 * M), ("qcow2", {}, SIZE)])
    qemu_io(files.paths[0], "raw", f"write -P 1 0 {SIZE}")
    qemu_io(files.paths[1], "qcow2", "write -z 0 256k")
    # what is between has zeros there, or ends before that
    for offset in (0, 4 * M):
        qemu_io(files.top, "qcow2", f"write -P 2 {offset} 256k")
    async with files.opened() as disk:
        model = bytearray(await disk.read(0, SIZE))
        if kind == "stream":
            job: Job = Stream(disk, base=layer(disk, 0))
        else:
            job = Commit(disk, top=layer(disk, 1 if kind == "between" else 2), base=layer(disk, 0))
        cut_out = disk.cut_out

        async def discard(*args: Any) -> list[Layer] | None:
            # by now the job has passed
            for offset in (0, 4 * M):
                await disk.discard(offset + CLUSTER, 2 * CLUSTER)
                model[offset + CLUSTER : offset + 3 * CLUSTER] = bytes(2 * CLUSTER)
            return await cut_out(*args)

        monkeypatch.setattr(disk, "cut_out", discard)
        await completed(job)
        assert len(disk.layers) == 2
        same = await disk.read(0, SIZE) == model
        assert same
    same = view(files.top, "qcow2") == model
    assert same
    files.check(0, 2)


@pytest.mark.parametrize("verb", ["stream", "commit"])
async def test_a_job_that_is_paused_changes_no_chain(
    tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ChainFiles(tmp_path, PLAIN[:3])
    async with files.opened() as disk, trio.open_nursery() as nursery:
        job = Stream(disk) if verb == "stream" else Commit(disk, top=layer(disk, 1))
        # the last thing before the chain is changed
        flushed = layer(disk, 2 if verb == "stream" else 0)
        flush = flushed.flush

        async def pause() -> None:
            if job.offset == job.length and job.state is State.RUNNING:
                monkeypatch.undo()
                job.pause()
            await flush()

        monkeypatch.setattr(flushed, "flush", pause)
        nursery.start_soon(job.run)
        while job.state is not State.PAUSED:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (job.state, len(disk.layers)) == (State.PAUSED, 3)
        job.resume()
        await job.wait()
        assert (job.state, len(disk.layers)) == (State.COMPLETED, 1 if verb == "stream" else 2)


async def test_a_base_that_is_larger_is_left_so_and_no_pivot_makes_the_disk_larger(tmp_path: Path) -> None:
    files = ChainFiles(tmp_path, SHRINKING)
    async with files.opened() as disk:
        with pytest.raises(UsageError, match="with a pivot the disk would grow"):
            Commit(disk, base=layer(disk, 0), pivot=Pivot.YES)
        await completed(Commit(disk, base=layer(disk, 0)))
        assert (disk.size, disk.layers[1].size) == (5 * M, SIZE)
        assert await disk.read(0, disk.size) == files.views[-1]
    assert view(files.paths[0], "raw") == files.views[-1] + files.views[0][5 * M :]


async def test_a_base_that_is_smaller_grows(tmp_path: Path) -> None:
    files = ChainFiles(tmp_path, GROWING)
    async with files.opened() as disk:
        job = Commit(disk, top=layer(disk, 2), base=layer(disk, 0))
        # what there is to do is known from the beginning
        assert job.length == 5 * M + 3 * 512
        await completed(job)
        assert job.length == disk.layers[1].size == 5 * M + 3 * 512
    assert view(files.paths[0], "qcow2") == files.views[2]


@pytest.mark.parametrize("base", [0, 1])
async def test_the_disk_may_grow_while_it_is_drained(tmp_path: Path, base: int) -> None:
    files = ChainFiles(tmp_path, PLAIN[:3])
    async with files.opened() as disk, trio.open_nursery() as nursery:
        job = Commit(disk, base=layer(disk, base), pivot=Pivot.WAIT)
        nursery.start_soon(job.run)
        while job.state is not State.READY:
            await trio.lowlevel.checkpoint()
        await disk.grow(SIZE + M)
        await disk.write(SIZE + 4096, b"new" * 5000)
        job.complete()
        await job.wait()
        assert (job.state, job.error) == (State.COMPLETED, "")
        content = await disk.read(0, disk.size)
        assert content == files.views[-1] + (bytes(4096) + b"new" * 5000).ljust(M, b"\0")
    assert view(files.paths[base], files.formats[base]) == content


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"top": 0}, "no layer below it to commit into"),
        ({"top": 1, "base": 2}, "does not lie below"),
        ({"top": 1, "base": 1}, "does not lie below"),
        ({"base": 3}, "does not lie below"),
        ({"top": 1, "pivot": Pivot.YES}, "pivot=yes is for commits of the active layer"),
    ],
)
async def test_what_makes_no_sense_is_refused(tmp_path: Path, keys: dict[str, int | Pivot], sentence: str) -> None:
    files = ChainFiles(tmp_path, PLAIN)
    async with files.opened() as disk:
        made = {key: layer(disk, value) if isinstance(value, int) else value for key, value in keys.items()}
        with pytest.raises(UsageError, match=sentence):
            Commit(disk, **made)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="lies below the active layer"):
            Stream(disk, base=disk.layers[0])


class Overrun(Commit):
    """A commit whose guest writes to four times what each step has copied before the next."""

    def __init__(self, disk: Disk, writer: Writer) -> None:
        super().__init__(disk, pivot=Pivot.YES)
        self.writer = writer
        self.steps = 0

    async def advance(self, offset: int, copied: int) -> None:
        self.steps += 1
        for _ in range(4 * copied // CLUSTER + 1):
            await self.writer.write()
        await super().advance(offset, copied)


async def test_a_guest_that_writes_faster_than_the_job_copies_does_not_keep_it_from_its_end(tmp_path: Path) -> None:
    files = ChainFiles(tmp_path, PLAIN[:2])
    async with files.opened() as disk:
        # all of the disk is in the active layer, and all of it is hot
        await disk.write(0, files.views[-1])
        writer = Writer(disk, files.views[-1])
        job = Overrun(disk, writer)
        await completed(job)
        assert job.steps <= 4 * SIZE // CLUSTER + 10
        assert writer.writes > 2 * SIZE // CLUSTER
        assert len(disk.layers) == 1
        assert await disk.read(0, disk.size) == writer.model
    assert view(files.paths[0], "raw") == writer.model
