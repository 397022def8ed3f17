"""Disks in memory whose power can be cut at any moment of what was done to them, and what must be there then.

A `Scene` is an overlay over a base, in storages that remember. What guests write goes through it, so that it knows
for every sector what may be found there after a cut: the last content that a flush acknowledged, or one written later.
"""

import json
import random
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import trio
from imagetools import reach_of_drop
from powercut import SECTOR, Flushed, Journal, RecordingStorage, Remains
from slowstorage import Holding
from storages import MemoryStorage

from cowfs.block.check import Repair
from cowfs.block.disk import Disk
from cowfs.block.image import Backing, Image
from cowfs.block.layer import Layer
from cowfs.block.writetracker import WriteTracker
from cowfs.formats import qcow2, qed
from cowfs.formats.raw import RawImage
from cowfs.jobs.job import Job, State
from cowfs.storage.base import Storage

K = 1 << 10
DRIVERS: dict[str, ModuleType] = {"qcow2": qcow2, "qed": qed}
#: what every file holds, by name
Files = dict[str, bytes]


class Variant(NamedTuple):
    """A format with options; bytes of the disk and of its base, and where guests write: around borders of tables."""

    format: str
    options: dict[str, str]
    size: int
    below: int
    spots: tuple[tuple[int, int], ...]


_SMALL = (640 * K, 600 * K - SECTOR, ((0, 640 * K),))
VARIANTS = {
    "qcow2": Variant("qcow2", {"cluster_size": "4k"}, *_SMALL),
    "qcow2-extended": Variant("qcow2", {"cluster_size": "16k", "extended_l2": "on"}, *_SMALL),
    "qcow2-512": Variant("qcow2", {"cluster_size": "512", "refcount_bits": "64"}, *_SMALL),
    "qcow2-v2": Variant("qcow2", {"cluster_size": "4k", "compat": "0.10"}, *_SMALL),
    "qcow2-1bit": Variant("qcow2", {"cluster_size": "4k", "refcount_bits": "1"}, *_SMALL),
    "qed": Variant(
        "qed",
        {"cluster_size": "4k", "table_size": "2"},
        4096 * K + 40 * K,
        2048 * K + 100 * K - SECTOR,
        ((0, 100 * K), (2000 * K, 2148 * K), (4036 * K, 4136 * K)),
    ),
}


class Guest:
    """What was written to a disk, sector by sector, and what of it was acknowledged."""

    def __init__(self, content: bytes) -> None:
        self.now = bytearray(content)
        #: per sector what it held, oldest first
        self.held = [[content[at : at + SECTOR]] for at in range(0, len(content), SECTOR)]
        self._moments = [0]
        self._gone = [[0] * len(self.held)]
        #: sizes that the disk had: moment at which the change began, moment at which it was durable, bytes
        self.sizes = [(0, 0, len(content))]

    def note(self, offset: int, data: bytes | bytearray) -> None:
        """Something is about to be written."""
        self.now[offset : offset + len(data)] = data
        for number in range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)):
            self.held[number].append(bytes(self.now[number * SECTOR : (number + 1) * SECTOR]))

    def resize(self, size: int, moment: int) -> None:
        """The size is about to change; sectors that the disk loses or gains are zeros when it has them next."""
        old = len(self.now)
        self.held += [[bytes(SECTOR)] for _ in range(size // SECTOR - len(self.held))]
        for sector in self.held[min(size, old) // SECTOR :]:
            sector.append(bytes(SECTOR))
        del self.now[size:]
        self.now.extend(bytes(size - len(self.now)))
        self.sizes.append((moment, 1 << 60, size))

    def mark(self) -> list[int]:
        """To be called before a flush, when no write is under way."""
        return [len(held) - 1 for held in self.held]

    def acknowledge(self, gone: list[int], moment: int) -> None:
        """The flush has succeeded: what was there before the mark is gone for ever."""
        self._moments.append(moment)
        self._gone.append(gone)
        begun, done, size = self.sizes[-1]
        self.sizes[-1] = (begun, min(done, moment), size)

    def verify(self, moment: int, content: bytes | bytearray) -> None:
        """Fail unless the disk may have this content if the power goes after ``moment`` steps."""
        last = max(index for index, (_, done, _) in enumerate(self.sizes) if done <= moment)
        sizes = {size for begun, _, size in self.sizes[last:] if begun <= moment}
        assert len(content) in sizes, f"{len(content)} bytes, not {sizes}, at moment {moment}"
        gone = self._gone[bisect_right(self._moments, moment) - 1]
        for number in range(len(content) // SECTOR):
            found = content[number * SECTOR : (number + 1) * SECTOR]
            held = self.held[number]
            first = gone[number] if number < len(gone) else 0
            assert found == held[-1] or found in held[first:], f"sector {number} at moment {moment}"


class Scene:
    """An overlay "top" over "base"; ``journal`` is what was done to all files since `begin`.

    With ``held``, storages hold operations while everything else goes on, with what goes on behind a disk let loose.
    """

    def __init__(self, variant: str, seed: int, *, held: bool = False) -> None:
        self.variant = VARIANTS[variant]
        self.driver = DRIVERS[self.variant.format]
        self.chooser = random.Random(f"{variant} {seed}")
        self.holding = Holding(f"{variant} {seed}") if held else None
        self.journal: Journal = []
        self.storages: dict[str, RecordingStorage] = {}
        #: other names of files
        self.aliases: dict[str, str] = {}
        #: active layers: moment since which it is the one, name
        self.tops = [(0, "top")]
        #: whether the image is repaired before it is looked at
        self.repairs = False
        #: formats of files that do not have the variant's
        self.formats = {"base": "raw"}
        #: what the active layer is merged into, if it may say that it was
        self.merged_into = ""
        #: a job that is run again after each cut, None if there is nothing left to do; names of the chain's files then
        self.rerun: Callable[[Disk], Job | None] | None = None
        self.final: list[str] = []
        #: internal snapshots: moment at which a change began, moment at which it was durable, content by name
        self.snapshots: list[tuple[int, int, dict[str, bytes]]] = []
        #: name of the backing file and stamp: moments as before, and both
        self.headers: list[tuple[int, int, str, bytes | None]] = []
        self.add("base", self._made_up(self.variant.below), read_only=True)
        self.resized(self.variant.size)

    def resized(self, size: int) -> None:
        """The disk is going to be made with another size; to be called before `create`."""
        self.variant = self.variant._replace(size=size)
        self.below = bytes(self.storages["base"].content).ljust(size, b"\0")
        self.guest = Guest(self.below)

    def _made_up(self, length: int) -> bytes:
        """Bytes where guests write, zeros elsewhere."""
        content = bytearray(length)
        for start, end in self.variant.spots:
            part = content[start:end]
            content[start : start + len(part)] = self.chooser.randbytes(len(part))
        return bytes(content)

    def add(self, name: str, content: bytes = b"", *, read_only: bool = False) -> RecordingStorage:
        """A file, in place of one of that name."""
        cold = self.chooser.random() < 0.3
        storage = RecordingStorage(name, content, cold=cold, read_only=read_only, journal=self.journal)
        storage.holding = self.holding
        self.storages[name] = storage
        return storage

    async def create(self, format: str = "raw") -> None:
        """Make the overlay; ``format`` is the base's."""
        await self.driver.create(self.add("top"), self.variant.size, Backing("base", format), self.variant.options)

    def begin(self) -> None:
        """What was done so far is durable."""
        for storage in self.storages.values():
            storage.begin()

    @asynccontextmanager
    async def session(self, *, copy_on_read: bool = True, alone: bool = False) -> AsyncIterator[None]:
        """Have the disk open, and close it, which acknowledges everything; ``alone``, for who takes no locks."""
        files = {name: bytes(storage.content) for name, storage in self.storages.items()}
        layers = await self._open(dict(self.storages), *await self.entry(len(self.journal), files))
        self.disk = Disk(layers, copy_on_read=copy_on_read, flush_interval=1e9)
        async with trio.open_nursery() as nursery:
            await nursery.start(self.disk.run)
            if self.holding is not None and not alone:
                self.holding.on_hold = self._rest
                nursery.start_soon(self._unrest, self.holding)
            yield
            nursery.cancel_scope.cancel()
        if self.holding is not None:
            self.holding.on_hold = lambda: None
        gone = self.guest.mark()
        await self.disk.close()
        self.guest.acknowledge(gone, len(self.journal))

    def _rest(self) -> None:
        """As on a disk that was idle: most tables go."""
        if self.chooser.random() < 0.5:
            for layer in self.disk.layers:
                layer.image.rest()

    async def _unrest(self, holding: Holding) -> None:
        """While one thing is held, everything begins that guests did not ask for."""
        while True:
            await holding.held_again()
            await getattr(self.disk, self.chooser.choice(["sync", "sync", "settle", "compact"]))()

    def top_at(self, moment: int) -> str:
        """Name of the image that is the active layer after so many steps."""
        return [name for since, name in self.tops if since <= moment][-1]

    async def entry(self, moment: int, files: Files) -> tuple[str, str]:
        """Name and format of what a user opens: the active layer or, if that says so, what it was merged into."""
        name = self.top_at(moment)
        image = await open_one(MemoryStorage(name, files[name], read_only=True), self.variant.format)
        if image.backing is not None and image.backing.name.startswith("merged by a commit"):
            name = self.merged_into
        return name, self.formats.get(name, self.variant.format)

    async def _open(self, storages: dict[str, MemoryStorage], name: str, format: str) -> list[Layer]:
        """Open a chain as the headers name it."""
        layers: list[Layer] = []
        while True:
            image = await open_one(storages[self.aliases.get(name, name)], format)
            layers.append(Layer(image))
            if image.backing is None:
                return layers
            # QED records no format but raw
            name, format = image.backing.name, image.backing.format or self.variant.format

    # -- what guests do

    def place(self, length: int) -> int:
        """Return an offset on the disk for so many bytes, where guests write."""
        start, end = self.chooser.choice(self.variant.spots)
        return self.chooser.randrange(start, max(start + 1, min(end, len(self.guest.now)) - length + 1))

    async def write(self, offset: int | None = None) -> None:
        """Sectors, or bytes of any alignment."""
        length = self.chooser.choice([512, 4096, 9 * 512, 40_960, 100, 3000])
        offset = self.place(length) if offset is None else offset
        if not length % SECTOR:
            offset -= offset % SECTOR
        data = self.chooser.randbytes(min(length, len(self.guest.now) - offset))
        self.guest.note(offset, data)
        if not self.disk.write_now(offset, data):
            await self.disk.write(offset, data)

    async def write_together(self) -> None:
        """Requests side by side, which touch no sector both, and a flush of what was there before."""
        places = {self.place(1) // (48 * K) * 48 * K for _ in range(4)}
        gone = self.guest.mark()
        async with trio.open_nursery() as nursery:
            for place in sorted(places):
                if place < len(self.guest.now):
                    nursery.start_soon(self.write, place)
            nursery.start_soon(self.disk.flush)
        self.guest.acknowledge(gone, len(self.journal))

    async def read(self) -> None:
        offset = self.place(6000)
        buffer = bytearray(min(6000, len(self.guest.now) - offset))
        if not self.disk.readinto_now(offset, memoryview(buffer)):
            await self.disk.readinto(offset, memoryview(buffer))
        assert buffer == self.guest.now[offset : offset + len(buffer)]

    def _clusters(self) -> tuple[int, int]:
        """Some whole clusters within the disk: offset, length."""
        size = self.disk.cluster_size
        offset = self.place(1) // size * size
        return offset, max(0, min(self.chooser.randrange(1, 5) * size, (len(self.guest.now) - offset) // size * size))

    async def zero(self) -> None:
        offset, length = self._clusters()
        async with self.disk.lock.hold(offset, offset + length):
            self.guest.note(offset, bytes(length))
            await self.disk.zero_layer(0, offset, length)

    async def discard(self) -> None:
        """Zeros of any alignment; with and without giving the space back."""
        length = self.chooser.choice([512, 4096, 9 * 512, 40_960, 100, 30_000, 200_000])
        offset = self.place(length)
        length = min(length, len(self.guest.now) - offset)
        self.guest.note(offset, bytes(length))
        if self.chooser.random() < 0.2:
            await self.disk.write_zeroes(offset, length, unmap=False)
        else:
            await self.disk.discard(offset, length)

    async def drop(self) -> None:
        """What is below shines through again, as far as that reaches."""
        offset, length = self._clusters()
        end = reach_of_drop(self.disk, offset + length)
        if offset < end:
            self.guest.note(offset, self.below[offset:end])
        assert await self.disk.drop(offset, length, WriteTracker(1))

    async def flush(self) -> None:
        gone = self.guest.mark()
        await self.disk.flush()
        self.guest.acknowledge(gone, len(self.journal))

    async def settle(self) -> None:
        """As after a while without writes."""
        await self.flush()
        async with self.disk.lock.hold(0, 1 << 63):
            await self.disk.layers[0].settle()

    async def work(self, count: int, *also: str) -> None:
        """Do so many things at random: writes, reads, flushes, and what else is named."""
        # where things are held, there is something to do meanwhile
        together = ["write_together"] * (1 if self.holding is None else 4)
        for _ in range(count):
            await getattr(self, self.chooser.choice(["write"] * 6 + ["read", "flush", *together, *also]))()

    # -- what must be there when the power goes

    def cuts(self, moments: int, losses: int) -> Iterator[tuple[str, int, Files]]:
        """(name, moment, files) for all turning points and so many other moments.

        For each all was made, or ``losses`` times some of what no flush covers.
        """
        count = len(self.journal)
        wanted = {0, count, *self._turning_points(), *self.chooser.sample(range(count + 1), min(moments, count + 1))}
        left = {name: Remains(storage.start) for name, storage in self.storages.items()}
        for moment in range(count + 1):
            if moment in wanted:
                yield f"{moment}.0", moment, {name: remains.with_all() for name, remains in left.items()}
                for loss in range(1, losses + 1):
                    losing = random.Random(f"{moment} {loss} {self.variant}")
                    files = {name: remains.with_some(losing) for name, remains in left.items()}
                    yield f"{moment}.{loss}", moment, files
            if moment < count:
                name, step = self.journal[moment]
                left[name].add(step)

    def _turning_points(self) -> set[int]:
        """Moments before and after each write of a header's first sector, and after each flush of the base."""
        found: set[int] = set()
        for moment, (name, step) in enumerate(self.journal):
            if isinstance(step, tuple) and step[0] < SECTOR:
                found |= {moment, moment + 1}
            elif isinstance(step, Flushed) and name == "base":
                found.add(moment + 1)
        return found

    async def verify(self, moment: int, files: Files) -> bytes:
        """Look at the chain as it was left; returns the disk's content."""
        if self.repairs:
            files = await self.repaired(files)
        storages = {name: MemoryStorage(name, content, read_only=True) for name, content in files.items()}
        layers = await self._open(storages, *await self.entry(moment, files))
        for layer in layers:
            await assert_sound(layer.image)
        for name in files if self.rerun is not None else ():
            # those that are no part of the chain any more
            await assert_sound(await open_one(storages[name], self.formats.get(name, self.variant.format)))
        disk = Disk(layers)
        content = await disk.read(0, disk.size)
        self.guest.verify(moment, content)
        if self.headers:
            self._verify_header(moment, layers[0].image)
        if self.snapshots:
            await self._verify_snapshots(moment, files)
        return bytes(content)

    async def _verify_snapshots(self, moment: int, files: Files) -> None:
        """All are there, with all of their content, as before a change or as after it."""
        found, top = {}, files["top"]
        for snapshot in await (await self.driver.open_image(MemoryStorage("top", top, read_only=True))).snapshots():
            image = await self.driver.open_image(MemoryStorage("top", top, read_only=True))
            await image.show_snapshot(snapshot.id)
            below = [image.backing.name] if image.backing is not None else []
            base = [Layer(RawImage(MemoryStorage(name, files[name], read_only=True))) for name in below]
            found[snapshot.name] = bytes(await Disk([Layer(image), *base]).read(0, image.size))
        last = max(index for index, (_, done, _) in enumerate(self.snapshots) if done <= moment)
        possible = [kept for begun, _, kept in self.snapshots[last:] if begun <= moment]
        assert found in possible, f"snapshots {sorted(found)} at moment {moment}"

    def _verify_header(self, moment: int, image: Image) -> None:
        """A stamp speaks of the name for which it was made, so they may change one after the other."""
        last = max(index for index, (_, done, _, _) in enumerate(self.headers) if done <= moment)
        possible = [(name, stamp) for begun, _, name, stamp in self.headers[last:] if begun <= moment]
        assert image.backing is not None
        assert image.backing.name in [name for name, _ in possible]
        assert image.stamp in [stamp for _, stamp in possible]

    async def repaired(self, files: Files) -> Files:
        """What ``check -r all`` makes of the overlay, which must leave nothing wrong."""
        top = MemoryStorage("top", files["top"])
        image = await self.driver.open_image(top, for_repair=True)
        result = await image.check(Repair.ALL)
        assert (result.corruptions, result.leaks) == (0, 0), result.messages
        await image.close()
        return {**files, "top": bytes(top.content)}

    async def verify_use(self, moment: int, files: Files, content: bytes) -> None:
        """Write to the disk as it was left, and close it: nothing else changes, and leaks can be given back."""
        top, format = await self.entry(moment, files)
        storages = {name: MemoryStorage(name, data, read_only=name != top) for name, data in files.items()}
        layers = await self._open(storages, top, format)
        disk = Disk(layers, copy_on_read=False)
        at = self.chooser.randrange(len(content) - 9000)
        await disk.write(at, b"o" * 9000)
        expected = content[:at] + b"o" * 9000 + content[at + 9000 :]
        assert await disk.read(0, disk.size) == expected
        await disk.close()
        if format == "raw":
            return
        again = await self.driver.open_image(MemoryStorage(top, bytes(storages[top].content)), for_repair=True)
        result = await again.check(Repair.LEAKS)
        assert (result.corruptions, result.leaks) == (0, 0), result.messages

    async def verify_again(self, moment: int, files: Files, content: bytes) -> None:
        """Run the job again that was cut off: it ends as it would have, and nothing can be seen of it."""
        assert self.rerun is not None
        top, format = await self.entry(moment, files)
        storages = {name: MemoryStorage(name, data, read_only=name != top) for name, data in files.items()}
        disk = Disk(await self._open(storages, top, format), copy_on_read=False)
        job = self.rerun(disk)
        if job is not None:
            await job.run()
            assert (job.state, job.error) == (State.COMPLETED, "")
        assert await disk.read(0, disk.size) == content
        assert all(layer.storage.read_only for layer in disk.layers[1:])
        await disk.close()
        after = {name: bytes(storage.content) for name, storage in storages.items()}
        entry = await self.entry(moment, after)
        storages = {name: MemoryStorage(name, data, read_only=True) for name, data in after.items()}
        layers = await self._open(storages, *entry)
        assert [layer.name for layer in layers] == self.final
        assert await Disk(layers).read(0, len(content)) == content
        for name in files:
            await assert_sound(await open_one(storages[name], self.formats.get(name, self.variant.format)))

    def verify_qemu(self, name: str, format: str, files: Files, content: bytes) -> None:
        """QEMU finds no error, reads the same, and can repair what is left to repair."""
        with tempfile.TemporaryDirectory(prefix="cowfs-crash.") as folder:
            for file, data in files.items():
                Path(folder, file).write_bytes(data)
            for alias, file in self.aliases.items():
                Path(folder, alias).symlink_to(file)
            top = Path(folder, name)
            if format != "raw":
                found = _qemu_check(top, format)
                assert not found.get("corruptions", 0), found
            flat = Path(folder, "flat")
            words = ["qemu-img", "convert", "-f", format, "-O", "raw", str(top), str(flat)]
            subprocess.run(words, check=True, capture_output=True)
            assert flat.read_bytes() == content
            if format == "qcow2":
                found = _qemu_check(top, "qcow2", "-r", "leaks")
                assert not found.get("leaks", 0), found
            elif format == "qed":
                # QEMU gives nothing back; it repairs as it opens the image for writing
                subprocess.run(["qemu-io", "-f", "qed", "-c", "write 0 512", str(top)], check=True, capture_output=True)
                found = _qemu_check(top, "qed")
                assert not found.get("corruptions", 0), found


def _qemu_check(path: Path, format: str, *options: str) -> dict[str, int]:
    words = ["qemu-img", "check", "-f", format, "--output=json", *options, str(path)]
    done = subprocess.run(words, capture_output=True, check=False)
    found: dict[str, int] = json.loads(done.stdout)
    assert found["check-errors"] == 0, found
    return found


async def open_one(storage: Storage, format: str) -> Image:
    if format == "raw":
        return RawImage(storage)
    # of tables, as few as can be are kept
    image: Image = await DRIVERS[format].open_image(storage, cache_size=0)
    return image


async def assert_sound(image: Image) -> None:
    """No errors; leaks only where the format lets them be."""
    if image.format == "raw":
        return
    result = await image.check()
    assert not result.corruptions, result.messages
    assert not result.leaks or image.format == "qcow2" or image.dirty, result.messages
