"""A disk with its jobs, beside a model of what it and every layer of it must show.

The model is an array of bytes for the disk and one for each layer below. It knows which layers a job is to leave, and
what may be in a layer that a job writes to.
"""

import hashlib
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import trio
from chains import ChainFiles, view
from commandline import ok, qemu_img
from stillness import StillLoop

from cowfs.block.alignment import align_down, align_up
from cowfs.block.disk import Disk
from cowfs.errors import Busy, OutOfRange, Stale, Unsupported
from cowfs.formats.chain import open_chain
from cowfs.fuse.control import MOUNT_FILES
from cowfs.fuse.handles import LayerHandle
from cowfs.fuse.images import Mount, Served, Source
from cowfs.fuse.options import Settings
from cowfs.fuse.tree import LayerFile
from cowfs.jobs.job import Job, State
from cowfs.jobs.journal import SUFFIX, read_journal

#: the only thing for which a job may fail, or a disk not grow: version 2 of qcow2 has no zeros without data
UNSUPPORTED = "this version of qcow2 cannot hide a longer backing file when it grows"

#: a guest's write: offset, data
Write = tuple[int, bytes]


@dataclass(eq=False)
class Level:
    """A layer: its file, what it shows (of the active one, the model says that), what the file was when last seen."""

    path: Path
    format: str
    view: bytes
    digest: bytes | None = None


@dataclass
class Running:
    """A job, and how things were when it was started. ``top`` and ``base`` are numbers of layers, 0 the deepest."""

    verb: str
    job: Job
    top: int
    base: int
    pivots: bool
    levels: list[Level]
    #: what the disk showed, and how many writes had been made
    content: bytes
    writes: int
    offset: int = 0
    length: int = 0
    was_paused: bool = False

    @property
    def touched(self) -> list[Level]:
        """Layers that show no disk while a commit is under way; the topmost that it merges still shows what it did."""
        if self.verb == "stream":
            return []
        return self.levels[self.base + 1 : self.top - 1 if self.is_active else self.top]

    @property
    def parts(self) -> list[bytes]:
        """What the base of a commit consists of, beside what guests write to a disk that is drained."""
        levels = self.levels
        merged = self.content if self.is_active else levels[self.top].view
        # what is merged first of a chain whose active layer is to follow
        return [levels[self.base].view, merged, *(level.view for level in levels[self.top - 1 : self.base : -1][:1])]

    @property
    def is_active(self) -> bool:
        """Whether it is about the active layer."""
        return self.top == len(self.levels) - 1


def digest_of(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes()).digest()


def require_explained(shown: bytes, candidates: Sequence[bytes], writes: Sequence[Write], what: str) -> None:
    """Each byte must be what one of the candidates has there (zero beyond its end), or one of the writes."""
    found = np.frombuffer(shown, np.uint8)
    wrong = np.ones(len(found), bool)
    for candidate in candidates:
        wrong &= found != np.frombuffer(candidate[: len(shown)].ljust(len(shown), b"\0"), np.uint8)
    for offset, data in writes:
        part = found[offset : offset + len(data)]
        wrong[offset : offset + len(part)] &= part != np.frombuffer(data[: len(part)], np.uint8)
    if wrong.any():
        first = int(wrong.argmax())
        last = len(wrong) - 1 - int(wrong[::-1].argmax())
        raise AssertionError(f"{what}: {int(wrong.sum())} bytes are wrong, from {first:#x} to {last:#x}")


def _within(writes: Sequence[Write], offset: int, length: int) -> list[Write]:
    """Writes as seen from a range."""
    seen = [(max(start - offset, 0), data[max(offset - start, 0) :]) for start, data in writes]
    return [(start, data) for start, data in seen if start < length]


@dataclass
class World:
    """The chain in a folder of its own, served by a mount without a kernel."""

    loop: StillLoop
    levels: list[Level]
    model: bytearray
    copy_on_read: bool
    running: Running | None = None
    #: all writes of guests, and those that have not been answered
    written: list[Write] = field(default_factory=list)
    under_way: list[Write] = field(default_factory=list)
    #: layers that streams have left behind, and those that commits have merged
    left: list[Level] = field(default_factory=list)
    merged: list[Path] = field(default_factory=list)
    #: layers that lie on what commits have changed that did not complete, since the disk was opened
    spoiled: set[Level] = field(default_factory=set)
    #: how many writes there were before the last thing that was done, and the disk then
    mark: int = 0
    before: bytes = b""

    def __post_init__(self) -> None:
        top = self.levels[-1]
        self._active = (str(top.path), "vm", top.format)
        self._resizing = trio.Lock()
        # of the disk: that have begun, and whether one is under way
        self._shrinks = 0
        self._shrinking = False
        # what it has lost by them, as the writes that they count as
        self._cut_off: list[Write] = []
        self._neighbours = 0
        self.snapshots_under_way = 0

    @classmethod
    def copied(cls, loop: StillLoop, files: ChainFiles, folder: Path, *, copy_on_read: bool) -> "World":
        """Make a world of a chain's files."""
        levels = []
        for path, format, content in zip(files.paths, files.formats, files.views, strict=True):
            shutil.copy2(path, folder)
            levels.append(Level(folder / path.name, format, content, digest_of(path)))
        levels[-1].digest = None
        return cls(loop, levels, bytearray(files.views[-1]), copy_on_read)

    # -- serving

    async def open(self, *, resume: bool = True) -> None:
        settings = Settings(copy_on_read=self.copy_on_read, resume_jobs=resume, cache_size=0, allow_shrink=True)
        self._mount = Mount("/nowhere", settings, frozenset(MOUNT_FILES))
        await self._mount.add(Source(*self._active))
        self.spoiled.clear()
        self._ended = trio.Event()
        await self.loop.nursery.start(self._serve)

    async def _serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await self._mount.start(nursery)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._ended.set()

    async def close(self) -> None:
        """As at the end of a mount; a job that goes on is broken off."""
        served = self.served
        if self.running is not None:
            self.running.was_paused = self.running.job.state is State.PAUSED
        assert await self._mount.close()
        self._nursery.cancel_scope.cancel()
        await self._ended.wait()
        top = served.disk.layers[0]
        self._active = (top.name, "vm", top.format)

    async def restart(self, *, resume: bool = True) -> None:
        """Close everything, have QEMU look at it, and open it again; a job that was broken off goes on, or does not."""
        broken_off = self.running
        await self.close()
        if broken_off is not None:
            # what it left has to be known before it can be judged
            await self.open(resume=False)
            await self.settle_job()
            await self.close()
        self.judge()
        await self.judge_merged()
        await self.open(resume=resume)
        if resume:
            self._take_up(broken_off)
        else:
            assert self.served.jobs.active is None

    def _take_up(self, broken_off: Running | None) -> None:
        """A job that was broken off before its end must go on as it was; so may one that was left alone before."""
        job = self.served.jobs.active
        if broken_off is not None and broken_off.job.state is State.CANCELLED:
            # but for one that had done everything but say so
            is_relinked = not broken_off.is_active and self.levels != broken_off.levels
            assert job is not None or is_relinked, "a job is forgotten"
        if job is None:
            return
        if broken_off is not None:
            assert (job.verb, job.speed) == (broken_off.verb, broken_off.job.speed)
            assert (job.state is State.PAUSED) is broken_off.was_paused
        entry = read_journal(self._active[0] + SUFFIX)
        assert entry is not None
        numbers = {str(level.path): number for number, level in enumerate(self.levels)}
        top = numbers[entry.top] if entry.top is not None else len(self.levels) - 1
        base = numbers[entry.base] if entry.base is not None else -1
        self._run(job, top, base, pivots=entry.pivot not in (None, "no"))

    @property
    def served(self) -> Served:
        return self._mount.images["vm"]

    @property
    def disk(self) -> Disk:
        return self.served.disk

    # -- guests

    async def write(self, offset: int, data: bytes) -> None:
        self.written.append((offset, data))
        self.under_way.append((offset, data))
        try:
            with self._may_be_cut_off():
                if not self.disk.write_now(offset, data):
                    await self.disk.write(offset, data)
                self.model[offset : offset + len(data)] = data
        finally:
            self.under_way.remove((offset, data))

    @contextmanager
    def _may_be_cut_off(self) -> Iterator[None]:
        """What is asked for may come to lie beyond the end, if the disk is made smaller meanwhile."""
        begun = self._shrinks - self._shrinking
        try:
            yield
        except OutOfRange:
            assert self._shrinks > begun, "it is beyond the end although the disk has not shrunk"

    async def zero(self, offset: int, length: int, unmap: bool) -> None:
        """A guest says that a range is zeros, or discards it."""
        data = bytes(length)
        self.written.append((offset, data))
        self.under_way.append((offset, data))
        is_done = False
        with self._may_be_cut_off():
            if unmap:
                await self.disk.discard(offset, length)
            else:
                await self.disk.write_zeroes(offset, length, unmap=False)
            self.model[offset : offset + length] = data
            is_done = True
        if not is_done:
            # step by step: as far as it has come
            async with self._resizing:
                before = bytes(self.model[offset : offset + length])
                found = bytes(await self.disk.read(offset, len(before))) if before else b""
                require_explained(found, [before], [(0, data)], "what was zeroed in part")
                self.model[offset : offset + len(found)] = found
        self.under_way.remove((offset, data))

    async def read(self, offset: int, length: int) -> None:
        """What was answered before must be there; of a write that is under way, any part."""
        before, seen = bytes(self.model[offset : offset + length]), len(self.written)
        racing = list(self.under_way)
        buffer = bytearray(length)
        with self._may_be_cut_off():
            if not self.disk.readinto_now(offset, memoryview(buffer)):
                await self.disk.readinto(offset, memoryview(buffer))
            self._check_read(offset, bytes(buffer), before, seen, racing)

    def _check_read(self, offset: int, data: bytes, before: bytes, seen: int, racing: list[Write]) -> None:
        racing += self.written[seen:]
        require_explained(data, [before], _within(racing, offset, len(data)), "a read")

    async def verify(self) -> None:
        """All of the disk, at rest or not."""
        disk = self.disk
        assert disk.size == len(self.model)
        shown = bytes(await disk.read(0, disk.size))
        require_explained(shown, [bytes(self.model)], self.under_way, "the disk")

    async def look(self, number: int, offset: int, length: int) -> None:
        """Read the file of a layer below the active one as the kernel does."""
        number %= len(self.levels)
        level, running = self.levels[number], self.running
        layer = next((layer for layer in self.disk.layers if layer.name == str(level.path)), None)
        if layer is None:
            assert running is not None, "a layer has left the chain although no job has taken it out"
            return
        expected = bytes(self.model) if number == len(self.levels) - 1 else level.view
        seen = len(self.written)
        racing = list(self.under_way) if number == len(self.levels) - 1 else []
        handle = LayerHandle(cast("LayerFile", SimpleNamespace(served=self.served, layer=layer)))
        try:
            data = bytes(await handle.read(offset, length))
        except Stale:
            # one may have begun meanwhile
            running = running or self.running
            if level in self.spoiled:
                return
            assert running is not None, "a layer is refused although no job has touched it"
            left = not any(kept.name == str(level.path) for kept in self.disk.layers)
            assert left or level in running.touched
            return
        finally:
            handle.close()
        if racing or self.written[seen:]:
            return
        running = running or self.running
        if running is not None and running.verb == "commit" and level is running.levels[running.base]:
            parts = [part[offset : offset + length] for part in (expected, *running.parts)]
            require_explained(data, parts, _within(self._drained(running), offset, length), "the base of a commit")
            return
        # zeros behind that, if it has grown meanwhile
        require_explained(data, [expected[offset : offset + length]], [], f"layer {number}")

    # -- commands

    async def start(self, verb: str, keys: Mapping[str, int | str]) -> None:
        """Start a job, whose keys are right."""
        deepest = len(self.levels) - 1
        top = cast("int", keys.get("top", deepest))
        base = cast("int", keys.get("base", top - 1 if verb == "commit" else -1))
        await self.command(verb, " ".join(["start", *(f"{key}={value}" for key, value in keys.items())]))
        self._run(self.served.jobs.jobs[verb], top, base, pivots=keys.get("pivot", "no") != "no")

    def _run(self, job: Job, top: int, base: int, *, pivots: bool) -> None:
        content, writes = bytes(self.model), len(self.written)
        self.running = Running(job.verb, job, top, base, pivots, list(self.levels), content, writes)
        if job.verb == "commit":
            for level in self.levels[base:]:
                level.digest = None

    async def command(self, verb: str, text: str) -> None:
        await self.served.jobs.command(verb, text)

    async def snapshot(self, name: str, format: str) -> None:
        """Put an overlay on top. What is frozen has each write that was under way, or has it not."""
        before, seen, racing = bytes(self.model), len(self.written), list(self.under_way)
        begun = self._shrinks - self._shrinking
        path = self.levels[-1].path.with_name(name)
        self.snapshots_under_way += 1
        try:
            await self.served.put_overlay(name, format)
        except Busy:
            changed = self.disk.size != len(before) or self._shrinks > begun
            assert changed, "it is refused although the disk has kept its size"
            assert not path.exists()
            return
        finally:
            self.snapshots_under_way -= 1
        racing += self.written[seen:]
        # it may have grown before that
        frozen = bytes(await self.disk.read(0, self.disk.layers[1].size, 1))
        before = before.ljust(len(frozen), b"\0")
        for offset, data in racing:
            if (offset, data) in self._cut_off:
                continue
            part = frozen[offset : offset + len(data)]
            assert part in (data, before[offset : offset + len(data)]), "a write is half in a snapshot"
        require_explained(frozen, [before], racing, "what a snapshot froze")
        self.levels[-1].view = frozen
        self.levels.append(Level(path, format, b""))

    async def grow_by(self, length: int, largest: int) -> None:
        """Grow to whole sectors more, one after the other."""
        async with self._resizing:
            size = min(largest, align_up(len(self.model) + length, 512))
            if size > len(self.model):
                try:
                    await self.served.resize(size)
                except Unsupported as error:
                    assert error.message == UNSUPPORTED
                    return
                self.model.extend(bytes(size - len(self.model)))

    async def shrink_by(self, length: int) -> None:
        """Shrink by whole sectors, one after the other; refused where a job or a snapshot is under way."""
        async with self._resizing:
            before = len(self.model)
            size = max(512, align_down(before - length, 512))
            if size >= before:
                return
            lost = (size, bytes(before - size))
            self.written.append(lost)
            self.under_way.append(lost)
            self._cut_off.append(lost)
            self._shrinks += 1
            self._shrinking = True
            beside = self.running is not None or self.snapshots_under_way
            try:
                await self.served.resize(size)
                del self.model[size:]
            except Busy:
                assert beside or self.running is not None or self.snapshots_under_way
            except Unsupported:
                assert self.levels[-1].format == "qed"
            finally:
                self._shrinking = False
                self.under_way.remove(lost)

    # -- behind the disk

    def rest(self) -> None:
        """As on a disk that nobody has used for a while."""
        for layer in self.disk.layers:
            layer.image.rest()

    def flush_behind(self) -> None:
        """Begin a flush for which nobody waits."""
        self._nursery.start_soon(self.disk.sync)

    async def compact(self) -> None:
        """As at the end of jobs, which do it themselves."""
        if self.running is None:
            await self.disk.compact()

    async def neighbour(self, number: int) -> None:
        """Add a layer below the active one to the mount as a disk of its own, look at it, and take it out again."""
        level, running = self.levels[number % len(self.levels)], self.running
        if level is self.levels[-1]:
            return
        self._neighbours += 1
        name = f"neighbour{self._neighbours}"
        try:
            await self._mount.add(Source(str(level.path), name, level.format, read_only=True))
        except (Busy, Stale):
            assert running is not None or self.running is not None or level in self.spoiled
            return
        disk = self._mount.images[name].disk
        shown = bytes(await disk.read(0, disk.size))
        if running is None and self.running is None:
            assert shown == level.view, f"a disk of {level.path.name} shows something else"
        await self._mount.remove(name)

    # -- what jobs leave

    def progress(self) -> None:
        """A job only goes forward."""
        running = self.running
        if running is not None:
            job = running.job
            assert running.offset <= job.offset <= job.length
            assert running.length <= job.length
            if job.state.is_active:
                # a layer may be longer than a disk that was made smaller; afterwards, it may be made so again
                longest = max(len(self.model), *(len(level.view) for level in running.levels))
                assert job.length <= longest, (job.length, longest)
            running.offset, running.length = job.offset, job.length

    async def settle_job(self) -> None:
        """If the job is over: what it left must be what it was to leave."""
        running = self.running
        if running is None or running.job.state.is_active:
            return
        state = running.job.state
        assert state is not State.FAILED or running.job.error == UNSUPPORTED, running.job.error
        names = [Path(layer.name) for layer in reversed(self.disk.layers)]
        ends = self._ends(running)
        full = [level.path for level in running.levels]
        paths = [[level.path for level in end] for end in ends]
        assert names in (paths[-1:] if state is State.COMPLETED else [full, *paths[:-1]]), (state, names)
        kept = running.levels if names == full else ends[paths.index(names)]
        gone = [level for level in running.levels if level not in kept]
        self.levels = list(kept)
        self.running = None
        if running.verb == "stream":
            self.left += gone
            return
        self.merged += [level.path for level in gone]
        self.spoiled.update(level for level in running.touched if level in kept)
        await self._adopt(running, completed=state is State.COMPLETED)

    def _ends(self, running: Running) -> list[list[Level]]:
        """Chains that the job makes one after the other."""
        levels, base, top = running.levels, running.base, running.top
        if running.verb == "stream":
            return [[*levels[: base + 1], levels[-1]]]
        if not running.is_active:
            return [[*levels[: base + 1], *levels[top + 1 :]]]
        relinked = [*levels[: base + 1], levels[-1]]
        return [relinked, levels[: base + 1]] if running.pivots else [relinked, relinked]

    def _drained(self, running: Running) -> list[Write]:
        """Writes that may have gone into the base of a commit."""
        return self.written[running.writes :] if running.is_active else []

    async def _adopt(self, running: Running, *, completed: bool) -> None:
        """See what a commit has made of its base and of the layers on it that are still there."""
        disk, levels, is_active = self.disk, running.levels, running.is_active
        base, old = levels[running.base], levels[running.base].view
        parts, writes = running.parts, self._drained(running)
        shown = {}
        for number, level in enumerate(reversed(self.levels)):
            if number or level is base:
                shown[level.path] = bytes(await disk.read(0, disk.layers[number].size, number))
        found = shown[base.path]
        assert len(found) >= len(old)
        require_explained(found, parts, writes, "the base")
        if completed and not is_active:
            merged = levels[running.top].view
            assert found == merged + old[len(merged) :], "the base is not what was merged into it"
        if completed and is_active:
            # what guests wrote at the very end may be above
            ends = [content + old[len(content) :] for content in (bytes(self.model), self.before)]
            require_explained(found, ends, self.written[self.mark :], "the base that is done")
        for level in running.touched:
            if level in self.levels:
                require_explained(shown[level.path], [level.view, *parts], writes, "a layer")
                level.view = shown[level.path]
        base.view = found
        for level in self.levels[self.levels.index(base) + 1 : -1]:
            assert shown[level.path] == level.view, f"{level.path.name} shows something else"

    # -- at rest

    def judge(self) -> None:
        """QEMU's word on files that nobody has open."""
        dirty = False
        for number, level in enumerate(self.levels):
            is_top = number == len(self.levels) - 1
            digest = digest_of(level.path)
            assert level.digest in (None, digest), f"{level.path.name} was changed by nobody"
            dirty = dirty or level.digest is None
            if dirty:
                if level.format != "raw":
                    ok(qemu_img("check", "-q", "-f", level.format, level.path))
                shown = view(level.path, level.format)
                content = bytes(self.model) if is_top else level.view
                require_explained(shown, [content], [], f"{level.path.name} to QEMU")
                assert len(shown) == len(content)
            level.digest = None if is_top else digest
        for level in self.left:
            assert level.digest in (None, digest_of(level.path)), f"{level.path.name} was left, and changed"

    async def judge_merged(self) -> None:
        for path in self.merged:
            try:
                await open_chain(str(path))
            except Stale:
                continue
            raise AssertionError(f"{path.name} was merged, and is opened as if it were not")


def fresh_bytes(number: int, length: int) -> bytes:
    """Data that nothing else is."""
    return random.Random(number).randbytes(length)
