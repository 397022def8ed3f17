"""Every kind of qcow2 image, and every operation on it, by QEMU and by cowfs in turns.

`LAYOUTS` says what there is, `layouts` chooses some of it, and a `Player` makes the moves.
"""

import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from covering import Row, covering
from imagetools import DATE
from qcow2twin import Twin, qemu

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.formats.chain import open_disk, open_image
from cowfs.formats.create import create_image
from cowfs.units import parse_size

LAYOUTS = {
    "compat": ("0.10", "1.1"),
    "cluster_size": ("512", "1k", "4k", "16k", "64k", "2M"),
    "refcount_bits": ("1", "2", "4", "8", "16", "32", "64"),
    # of the clusters that are written compressed
    "compression": ("none", "zlib", "zstd"),
    "extended_l2": ("off", "on"),
    "lazy_refcounts": ("off", "on"),
    "data_file": ("none", "plain", "raw"),
    "backing": ("none", "short raw", "long qcow2"),
    "snapshots": ("none", "some"),
    "maker": ("cowfs", "qemu"),
}


def is_possible(layout: Row) -> bool:
    """Whether there are such images."""
    small = layout["cluster_size"] in ("512", "1k", "4k")
    if layout["compat"] == "0.10" and (
        layout["refcount_bits"] != "16"
        or "on" in (layout["extended_l2"], layout["lazy_refcounts"])
        or layout["compression"] == "zstd"
        or layout["data_file"] != "none"
    ):
        return False
    if layout["extended_l2"] == "on" and small:
        return False
    if layout["data_file"] != "none" and (layout["snapshots"], layout["compression"]) != ("none", "none"):
        return False
    if layout["data_file"] == "raw" and layout["backing"] != "none":
        return False
    # what shares host clusters, and is shared, needs counts that go far
    narrow = layout["refcount_bits"] in ("2", "4", "8") and layout["compression"] != "none"
    return layout["snapshots"] == "none" or not (layout["refcount_bits"] == "1" or narrow)


def layouts(strength: int, seed: int) -> list[Row]:
    """Layouts in which all combinations of ``strength`` properties occur."""
    return covering(LAYOUTS, is_possible, strength, seed)


class Player(Twin):
    """An image of some layout, beside the bytes that it and its snapshots ought to hold."""

    def __init__(self, folder: Path, layout: Row, seed: int) -> None:
        self.layout = layout
        large = layout["cluster_size"] == "2M"
        size = 9_000_448 if large else 2_000_384
        below = {"none": None, "short raw": size // 3 & -512, "long qcow2": size + (1 << 20)}[layout["backing"]]
        super().__init__(folder, size, seed, base_size=below)
        self.largest = size + (1 << 20)
        self.below = (folder / "base").read_bytes() if below else b""
        if layout["backing"] == "long qcow2":
            qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "base", "base.qcow2", cwd=folder)
            self.backing = Backing("base.qcow2", "qcow2")
        self.cluster_size = parse_size(layout["cluster_size"])
        self.version = 2 if layout["compat"] == "0.10" else 3
        self.raw_data = layout["data_file"] == "raw"
        self.snapshots: dict[str, bytes] = {}
        # counts of two bits go up to three
        self.most_snapshots = 0 if layout["snapshots"] == "none" else 2 if layout["refcount_bits"] == "2" else 3
        #: what has happened, for whoever has to find out why
        self.story: list[str] = []

    # -- what can be done with such an image

    @property
    def resizes(self) -> bool:
        """Version 2 has no way to hide a longer backing file, nor a size of its own for each snapshot."""
        return self.version == 3 or (self.backing is None and not self.most_snapshots)

    @property
    def packs(self) -> bool:
        return self.layout["compression"] != "none"

    async def make(self) -> None:
        """Create the image, by cowfs or by QEMU."""
        options = {name: self.layout[name] for name in ("compat", "cluster_size", "lazy_refcounts", "extended_l2")}
        if self.version == 3:
            options["refcount_bits"] = self.layout["refcount_bits"]
            if self.packs:
                options["compression_type"] = self.layout["compression"]
        if self.layout["data_file"] != "none":
            options |= {"data_file": "data", "data_file_raw": "on" if self.raw_data else "off"}
        if self.layout["maker"] == "cowfs":
            await create_image(str(self.path), "qcow2", self.size, self.backing, options)
            return
        words = ",".join(f"{name}={value}" for name, value in options.items())
        chain = ["-b", self.backing.name, "-F", str(self.backing.format)] if self.backing else []
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", words, *chain, "top", self.size, cwd=self.folder)
        self._cut_data()

    def _put(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data

    def _clusters(self, unit: int, most: int = 12) -> tuple[int, int]:
        """Some whole clusters; the last one of the disk may be cut off by its end."""
        first = self.rnd.randrange(-(-self.size // unit))
        return first * unit, min(self.rnd.randrange(1, most) * unit, self.size - first * unit)

    def _new_size(self) -> int:
        return self.rnd.choice([1 << 20, self.rnd.randrange(2048, self.largest // 512) * 512, self.largest])

    def _resized(self, size: int) -> None:
        self.model = bytearray(self.model[:size].ljust(size, b"\0"))
        self.size = size

    # -- moves of cowfs

    async def cowfs_moves(self) -> None:
        """Everything once, in any order, among reads and writes; the image is now and then opened anew."""
        moves: list[Callable[[Disk], Awaitable[None]]] = [*[self._write] * 8, *[self._read] * 3]
        moves += [self._zero, self._zero, self._discard, self._flush, self._copy_up]
        if self.packs:
            moves += [self._write_packed] * 3
        if self.resizes:
            moves += [self._resize]
        moves = self.rnd.sample(moves, len(moves))
        for start in range(0, len(moves), 10):
            disk = await open_disk(str(self.path), writable=True)
            try:
                for move in moves[start : start + 10]:
                    await move(disk)
                await self._read_all(disk)
            finally:
                await disk.close()
        if self.most_snapshots:
            await self._change_snapshots()

    async def _read_all(self, disk: Disk) -> None:
        found = await disk.read(0, disk.size)
        assert len(found) == self.size
        if found != self.model:
            sectors = range(0, self.size, 512)
            wrong = [start for start in sectors if found[start : start + 512] != self.model[start : start + 512]]
            pytest.fail("\n".join([f"differs at {wrong[0]} and in {len(wrong) - 1} more sectors", *self.story]))

    async def _write(self, disk: Disk) -> None:
        offset, length = self._area(1)
        self.story.append(f"cowfs: write {offset} {length}")
        data = self.rnd.randbytes(length)
        if not disk.write_now(offset, data):
            await disk.write(offset, data)
        self._put(offset, data)

    async def _read(self, disk: Disk) -> None:
        offset, length = self._area(1)
        found = bytearray(length)
        if not disk.readinto_now(offset, memoryview(found)):
            await disk.readinto(offset, memoryview(found))
        assert found == self.model[offset : offset + length], (offset, length, self.story)

    async def _zero(self, disk: Disk) -> None:
        offset, length = self._area(1)
        self.story.append(f"cowfs: zero {offset} {length}")
        await disk.zero_layer(0, offset, length)
        self._put(offset, bytes(length))

    async def _discard(self, disk: Disk) -> None:
        """What is below shines through again, but for what lies beyond its end."""
        offset, length = self._clusters(disk.cluster_size)
        self.story.append(f"cowfs: discard {offset} {length}")
        await disk.layers[0].deallocate(offset, -(-length // disk.cluster_size) * disk.cluster_size)
        self._put(offset, self.below[offset : offset + length].ljust(length, b"\0"))

    async def _write_packed(self, disk: Disk) -> None:
        unit = disk.cluster_size
        offset, length = self._clusters(unit, 2)
        self.story.append(f"cowfs: write packed {offset}")
        part = min(unit // 8, 2048)
        data = self.rnd.randbytes(part) * (unit // part)
        packed = disk.layers[0].image.pack(data)
        assert packed is not None
        await disk.layers[0].write_packed(offset, packed)
        self._put(offset, data[:length])

    async def _flush(self, disk: Disk) -> None:
        await disk.flush()

    async def _copy_up(self, disk: Disk) -> None:
        offset, length = self._area(1)
        self.story.append(f"cowfs: copy up {offset} {length}")
        await disk.copy_up(offset, length)

    async def _resize(self, disk: Disk) -> None:
        size = self._new_size()
        if self.layout["data_file"] != "none":
            size = max(size, self.size)
        self.story.append(f"cowfs: resize {size}")
        await (disk.shrink if size < self.size else disk.grow)(size)
        self._resized(size)

    async def _change_snapshots(self) -> None:
        image = await open_image(str(self.path), writable=True)
        try:
            for _ in range(2):
                what, name = self._next_snapshot("cowfs")
                if what == "-c":
                    await image.create_snapshot(name, DATE)
                elif what == "-a":
                    await image.apply_snapshot(name)
                else:
                    await image.delete_snapshot(name)
        finally:
            await image.close()

    def _next_snapshot(self, who: str) -> tuple[str, str]:
        """Choose what to do with which snapshot, as an option of ``qemu-img snapshot`` and a name, and expect it."""
        number = len(self.snapshots)
        # QEMU counts a snapshot once more while it applies it
        full = who == "qemu" and self.layout["refcount_bits"] == "2" and number == 2
        choices = ["-c"] * (number < self.most_snapshots) + ["-a"] * (number and not full) + ["-d"] * bool(number)
        what = self.rnd.choice(choices)
        if what == "-c":
            name = f"number {len(self.story)}"
            self.snapshots[name] = bytes(self.model)
        else:
            name = self.rnd.choice(list(self.snapshots))
            if what == "-a":
                self.model = bytearray(self.snapshots[name])
                self.size = len(self.model)
            else:
                del self.snapshots[name]
        self.story.append(f"{who}: snapshot {what} {name}")
        return what, name

    # -- moves of QEMU

    def qemu_moves(self) -> None:
        """The same, as far as QEMU's tools offer it."""
        commands = [self._qemu_write() for _ in range(10)]
        for _ in range(2):
            commands += self._qemu_discard()
        self._qemu_io(commands)
        if self.resizes:
            size = self._new_size()
            if self.packs and self.layout["extended_l2"] == "on" and self.size % self.cluster_size:
                # QEMU does not zero the rest of a compressed cluster
                size = min(size, self.size)
            self.story.append(f"qemu: resize {size}")
            qemu("qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", "top", size, cwd=self.folder)
            self._resized(size)
        self._qemu_io([self._qemu_write() for _ in range(3)])
        if self.most_snapshots:
            qemu("qemu-img", "snapshot", *self._next_snapshot("qemu"), "top", cwd=self.folder)
        self._cut_data()

    def _cut_data(self) -> None:
        """QEMU fills the last cluster of a data file, also where the disk ends inside of it."""
        if self.layout["data_file"] != "none":
            os.truncate(self.folder / "data", self.size)

    def _qemu_io(self, commands: list[str]) -> None:
        self.story += [f"qemu: {command}" for command in commands]
        words = [word for command in commands for word in ("-c", command)]
        qemu("qemu-io", "-d", "unmap", "-f", "qcow2", *words, "top", cwd=self.folder)

    def _qemu_write(self) -> str:
        offset, length = self._area(512)
        value = 0 if self.rnd.random() < 0.3 else self.rnd.randrange(1, 256)
        self._put(offset, bytes([value]) * length)
        flag = f"-P {value}" if value else self.rnd.choice(["-z", "-z -u"])
        return f"write {flag} {offset} {length}"

    def _qemu_discard(self) -> list[str]:
        """Discard, and write compressed clusters there: QEMU writes those only where nothing is."""
        if self.version == 2 and self.backing:
            # a discard does nothing there
            return []
        offset, length = self._clusters(self.cluster_size)
        self._put(offset, bytes(length))
        commands = [f"discard {offset} {length}"]
        if self.packs:
            value = self.rnd.randrange(1, 256)
            length = min(length, self.cluster_size)
            self._put(offset, bytes([value]) * length)
            commands.append(f"write -c -P {value} {offset} {length}")
        return commands

    # -- after each round

    async def verify(self) -> None:
        """See `Twin.verify`; besides, both read what the snapshots hold, and a raw data file holds the disk."""
        try:
            await super().verify()
            await self._verify_snapshots()
            if self.raw_data:
                assert (self.folder / "data").read_bytes()[: self.size] == self.model
        except AssertionError as error:
            raise AssertionError("\n".join([str(error), str(self.layout), *self.story])) from error

    async def _verify_snapshots(self) -> None:
        facts = json.loads(qemu("qemu-img", "info", "--output=json", "top", cwd=self.folder))
        assert [found["name"] for found in facts.get("snapshots", [])] == list(self.snapshots)
        for name, expected in self.snapshots.items():
            disk = await open_disk(str(self.path), snapshot=name)
            assert await disk.read(0, disk.size) == expected, name
            await disk.close()
        if self.snapshots:
            name = self.rnd.choice(list(self.snapshots))
            which = f"snapshot.name={name}"
            qemu("qemu-img", "convert", "-l", which, "-f", "qcow2", "-O", "raw", "top", "flat", cwd=self.folder)
            # QEMU shows a snapshot with the size that the disk has now
            common = min(self.size, len(self.snapshots[name]))
            assert (self.folder / "flat").read_bytes()[:common] == self.snapshots[name][:common], name
