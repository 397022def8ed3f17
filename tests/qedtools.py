"""What the tests of QED share: images made here and by QEMU, QEMU's verdict, and what stands on disk."""

import json
import random
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from imagetools import reach_of_drop

from cowfs.block.check import CheckResult
from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.block.writetracker import WriteTracker
from cowfs.formats import qed
from cowfs.formats.chain import open_disk
from cowfs.formats.qed.image import QedImage
from cowfs.formats.qed.layout import Feature, Header
from cowfs.storage import create_storage, open_storage

#: nothing was written: every drop may go ahead
NO_WRITES = WriteTracker(1)
M = 1 << 20


def qemu_create(path: Path, size: int | None = None, *options: str) -> None:
    arguments = ["qemu-img", "create", "-q", "-f", "qed", *options, str(path)]
    subprocess.run(arguments + ([str(size)] if size else []), check=True)


def qemu_io(path: Path, *commands: str) -> None:
    arguments = ["qemu-io", "-f", "qed", str(path)]
    for command in commands:
        arguments += ["-c", command]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "failed" not in done.stdout, done.stdout


def qemu_check(path: Path, *options: str) -> dict[str, int]:
    words = ["qemu-img", "check", "-f", "qed", "--output=json", *options, str(path)]
    done = subprocess.run(words, capture_output=True, check=False)
    found: dict[str, int] = json.loads(done.stdout)
    assert found["check-errors"] == 0
    return found


def qemu_info(path: Path) -> dict[str, object]:
    done = subprocess.run(["qemu-img", "info", "--output=json", path], capture_output=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def assert_clean(path: Path) -> None:
    found = qemu_check(path)
    assert found.get("corruptions", 0) == 0
    assert found.get("leaks", 0) == 0
    assert not features_on_disk(path) & Feature.NEED_CHECK
    assert path.stat().st_size % header_on_disk(path).cluster_size == 0


def qemu_content(path: Path) -> bytes:
    flat = path.with_suffix(".flat")
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, flat], check=True)
    return flat.read_bytes()


def header_on_disk(path: Path) -> Header:
    return Header(*struct.unpack("<IIIQQQQQII", path.read_bytes()[4:64]))


def features_on_disk(path: Path) -> int:
    return header_on_disk(path).features


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def pattern(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


@asynccontextmanager
async def opened(path: Path, *, writable: bool = True) -> AsyncIterator[Disk]:
    disk = await open_disk(str(path), "qed", writable=writable, copy_on_read=False)
    try:
        yield disk
    finally:
        await disk.close()


async def make(path: Path, size: int, backing: Backing | None = None, **options: str) -> Path:
    storage = await create_storage(str(path))
    await qed.create(storage, size, backing, options)
    await storage.close()
    return path


def image_of(disk: Disk, depth: int = 0) -> QedImage:
    image = disk.layers[depth].image
    assert isinstance(image, QedImage)
    return image


async def crash(disk: Disk) -> None:
    for layer in disk.layers:
        await layer.storage.close()


async def drop(disk: Disk, offset: int, length: int) -> int:
    """Have what is below shine through in a range, as far as that reaches; returns how many bytes do."""
    assert await disk.drop(offset, length, NO_WRITES)
    return max(0, reach_of_drop(disk, offset + length) - offset)


async def check_file(path: Path) -> CheckResult:
    storage = await open_storage(str(path), writable=False)
    try:
        return await (await qed.open_image(storage)).check()
    finally:
        await storage.close()


def disk_over(image: QedImage) -> Disk:
    return Disk([Layer(image)], copy_on_read=False)


async def assert_same_counts(path: Path) -> None:
    theirs, ours = qemu_check(path), await check_file(path)
    assert ours.total_clusters == theirs["total-clusters"]
    assert ours.allocated_clusters == theirs.get("allocated-clusters", 0)
    assert ours.fragmented_clusters == theirs.get("fragmented-clusters", 0)
    assert ours.corruptions == theirs.get("corruptions", 0)
    assert ours.leaks == theirs.get("leaks", 0)
    assert bool(ours.messages) == bool(ours.corruptions or ours.leaks)
