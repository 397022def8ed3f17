"""One qcow2 image in turns used by cowfs and by QEMU, and compared with an array of bytes."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

from cowfs.block.image import Backing
from cowfs.cli.check import CORRUPT
from cowfs.formats.chain import open_disk, open_image
from cowfs.formats.create import create_image
from cowfs.formats.mapping import MapEntry, map_entries

MASK = 0x00FF_FFFF_FFFF_FE00


def qemu(*words: str | Path | int, cwd: Path) -> str:
    """Run one of QEMU's tools; names of data files are meant from where it runs."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def qemu_check(path: Path) -> dict[str, Any]:
    words = ["qemu-img", "check", "--output=json", path.name]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=path.parent)
    assert done.returncode in (0, CORRUPT, 3), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class Twin:
    """An image ``top`` in a folder of its own, maybe over a raw ``base``, and the bytes that it ought to hold."""

    def __init__(self, folder: Path, size: int, seed: int = 1, *, base_size: int | None = None) -> None:
        self.folder, self.path = folder, folder / "top"
        self.rnd = random.Random(seed)
        self.size = size
        self.backing = None if base_size is None else Backing("base", "raw")
        below = self.rnd.randbytes(base_size or 0)
        if base_size is not None:
            (folder / "base").write_bytes(below)
        self.model = bytearray(below[:size].ljust(size, b"\0"))

    async def create(self, **options: str) -> "Twin":
        await create_image(str(self.path), "qcow2", self.size, self.backing, options)
        return self

    def create_with_qemu(self, **options: str) -> "Twin":
        text = ",".join(f"{key}={value}" for key, value in options.items())
        chain = ["-b", "base", "-F", "raw"] if self.backing else []
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", text, *chain, "top", self.size, cwd=self.folder)
        return self

    def _area(self, unit: int) -> tuple[int, int]:
        offset = self.rnd.randrange(self.size // unit) * unit
        length = self.rnd.choice([1, 512, 2048, 4096, 10_240, 65_536, 70_144, 200_704])
        return offset, min(-(-length // unit) * unit, self.size - offset)

    async def use(self, count: int = 40) -> None:
        """Write, zero and flush through cowfs, at any byte."""
        disk = await open_disk(str(self.path), writable=True)
        for _ in range(count):
            offset, length = self._area(1)
            data = self.rnd.randbytes(length)
            if self.rnd.random() < 0.25:
                data = bytes(length)
                await disk.zero_layer(0, offset, length)
            elif not disk.write_now(offset, data):
                await disk.write(offset, data)
            self.model[offset : offset + length] = data
            if self.rnd.random() < 0.1:
                await disk.flush()
        assert await disk.read(0, self.size) == self.model
        await disk.close()

    def use_with_qemu(self, count: int = 24) -> None:
        """Write and zero through QEMU, at any sector."""
        commands: list[str] = []
        for _ in range(count):
            offset, length = self._area(512)
            value = 0 if self.rnd.random() < 0.3 else self.rnd.randrange(1, 256)
            flag = self.rnd.choice(["-z", "-z -u"]) if not value else f"-P {value}"
            commands += ["-c", f"write {flag} {offset} {length}"]
            self.model[offset : offset + length] = bytes([value]) * length
        qemu("qemu-io", "-d", "unmap", "-f", "qcow2", *commands, "top", cwd=self.folder)

    async def verify(self) -> None:
        """Both read the model, both find the image clean, and they agree on what lies where."""
        found = qemu_check(self.path)
        assert not (found.get("corruptions") or found.get("leaks") or found["check-errors"]), found
        await assert_same_check(self.path)
        flat = self.folder / "flat"
        flat.write_bytes(self.model)
        qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "flat", "top", cwd=self.folder)
        disk = await open_disk(str(self.path))
        try:
            assert await disk.read(0, self.size) == self.model
            expected = json.loads(qemu("qemu-img", "map", "--output=json", "top", cwd=self.folder))
            disk.layers[0].image.block_status = disk.layers[0].image.map  # type: ignore[method-assign]
            places = _places(await map_entries(disk), self.size)
            wanted = _places([MapEntry(**{"offset": None, **entry}) for entry in expected], self.size)
            differing = [both for both in enumerate(zip(places, wanted, strict=True)) if both[1][0] != both[1][1]]
            assert not differing, differing[:4]
        finally:
            await disk.close()


def _places(entries: list[MapEntry], size: int) -> list[tuple[object, ...]]:
    """Facts of every sector, so that how neighbours are merged, and holes in raw files, do not matter."""
    places: list[tuple[object, ...]] = []
    for entry in entries:
        for start in range(entry.start, entry.start + entry.length, 512):
            # QEMU looks for holes where tables were made in advance, and tells places that hold nothing yet
            offset = None if entry.offset is None or not entry.present else entry.offset + start - entry.start
            facts = (entry.depth, entry.present, entry.zero and not entry.data, entry.data, offset)
            places.append(facts if entry.depth == 0 else (entry.depth,))
    assert len(places) == -(-size // 512)
    return places


async def assert_same_check(path: Path) -> None:
    """The check of cowfs finds what that of QEMU finds, in numbers."""
    expected = qemu_check(path)
    image = await open_image(str(path))
    found = await image.check()
    await image.close()
    counts = {
        "corruptions": found.corruptions,
        "leaks": found.leaks,
        "allocated-clusters": found.allocated_clusters,
        "fragmented-clusters": found.fragmented_clusters,
        "compressed-clusters": found.compressed_clusters,
        "image-end-offset": found.image_end_offset,
    }
    assert counts == {key: expected.get(key, 0) for key in counts}, found.messages


def damage(path: Path, rnd: random.Random, entry_size: int) -> None:
    """Break up to three L2 entries of an image."""
    data = bytearray(path.read_bytes())

    def number(place: int) -> int:
        return int.from_bytes(data[place : place + 8], "big")

    l1, count, size = number(40), int.from_bytes(data[36:40], "big"), 1 << int.from_bytes(data[20:24], "big")
    tables = [number(l1 + 8 * i) & MASK for i in range(count) if number(l1 + 8 * i) & MASK]
    for _ in range(rnd.randrange(1, 4)):
        table = rnd.choice(tables)
        place = table + entry_size * rnd.randrange(min(size // entry_size, 64))
        other = table + entry_size * rnd.randrange(8)
        kind = rnd.randrange(8)
        if kind == 0:
            data[place : place + 8] = bytes(8)
        elif kind == 1:
            data[place : place + entry_size] = data[other : other + entry_size]
        elif kind == 2:  # the copied flag
            data[place] ^= 0x80
        elif kind == 3:
            data[place : place + 8] = (1 << 63 | 1 << 50).to_bytes(8, "big")
        elif kind == 4:  # an offset inside of a cluster
            data[place + 6] ^= 2
        elif kind == 5:  # compressed
            data[place] = 0x40 | rnd.choice([0, 0x80])
        elif kind == 6:  # a reserved bit
            data[place + 7] ^= 0x10
        elif entry_size == 16:  # any bit of a bitmap
            data[place + 8 + rnd.randrange(8)] ^= 1 << rnd.randrange(8)
    path.write_bytes(data)
