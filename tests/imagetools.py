"""What the tests of snapshots and sizes share: filling images, and QEMU's word on them."""

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from commandline import ok, qemu_img, qemu_io
from storages import MemoryStorage

from cowfs.block.check import CheckResult, Repair
from cowfs.block.disk import Disk
from cowfs.block.image import Image
from cowfs.block.layer import Layer
from cowfs.errors import CowfsError
from cowfs.formats import qcow2
from cowfs.formats.chain import open_disk, open_image
from cowfs.formats.qcow2.image import Qcow2Image

#: when snapshots of the tests are made
DATE = (1_700_000_000, 123_456_789)


@asynccontextmanager
async def image_at(path: Path) -> AsyncIterator[Image]:
    """An image that is open for writing, without its backing file."""
    image = await open_image(str(path), writable=True)
    try:
        yield image
    finally:
        await image.close()


@asynccontextmanager
async def disk_at(path: Path) -> AsyncIterator[Disk]:
    """A chain that is open for writing."""
    disk = await open_disk(str(path), writable=True, copy_on_read=False)
    try:
        yield disk
    finally:
        await disk.close()


async def in_memory(content: bytes) -> Qcow2Image:
    return await qcow2.open_image(MemoryStorage("image", content))


async def disk_content(image: Image) -> bytes:
    """All bytes of the disk of an image that stands alone."""
    disk = Disk([Layer(image)], copy_on_read=False)
    return bytes(await disk.read(0, disk.size))


def qemu_create(path: Path, size: int, **options: object) -> None:
    words = ",".join(f"{name}={value}" for name, value in options.items())
    ok(qemu_img("create", "-q", "-f", "qcow2", *(["-o", words] if words else []), path, str(size)))


def qemu_content(path: Path, *options: str) -> bytes:
    flat = path.with_suffix(".flat")
    ok(qemu_img("convert", "-q", *options, "-f", "qcow2", "-O", "raw", path, flat))
    return flat.read_bytes()


def assert_clean(path: Path) -> None:
    found = qemu_img("check", "-f", "qcow2", path)
    assert found.returncode == 0, found.stdout + found.stderr


def qemu_snapshots(path: Path) -> list[dict[str, Any]]:
    facts = json.loads(ok(qemu_img("info", "--output=json", path)))
    found: list[dict[str, Any]] = facts.get("snapshots", [])
    return found


def commands(rnd: random.Random, size: int, count: int, *, zeroes: bool = True) -> list[str]:
    """Writes, zero writes and discards for ``qemu-io``, of all alignments that a sector allows."""
    words = []
    for _ in range(count):
        offset = rnd.randrange(size // 512) * 512
        length = min(rnd.choice([512, 4096, 65_536, 200_704]), size - offset)
        kind = rnd.random()
        if zeroes and kind < 0.15:
            words.append(f"write -z {offset} {length}")
        elif zeroes and kind < 0.25:
            words.append(f"discard {offset} {length}")
        else:
            words.append(f"write -P {rnd.randrange(1, 256)} {offset} {length}")
    return words


def qemu_fill(path: Path, size: int, seed: int, count: int = 12, *, zeroes: bool = True) -> None:
    qemu_io(path, "qcow2", *commands(random.Random(seed), size, count, zeroes=zeroes))


async def fill(disk: Disk, seed: int, count: int = 12) -> None:
    """Random writes at random places."""
    rnd = random.Random(seed)
    for _ in range(count):
        offset = rnd.randrange(disk.size)
        await disk.write(offset, rnd.randbytes(min(rnd.choice([1, 512, 5000, 70_000, 200_000]), disk.size - offset)))


def qemu_check(path: Path, *options: str) -> dict[str, Any]:
    """What ``qemu-img check`` finds, whatever that is."""
    found: dict[str, Any] = json.loads(qemu_img("check", "--output=json", *options, path).stdout)
    return found


async def check_image(path: Path, format: str, repair: Repair = Repair.NONE) -> CheckResult:
    """What cowfs finds, and mends where asked to."""
    repairs = repair is not Repair.NONE
    image = await open_image(str(path), format, writable=repairs, for_repair=repairs)
    try:
        return await image.check(repair)
    finally:
        await image.close()


async def readable_clusters(path: Path, format: str) -> list[bytes | None]:
    """Content of the disk by clusters; None where it cannot be read."""
    disk = await open_disk(str(path), format)
    found: list[bytes | None] = []
    for offset in range(0, disk.size, disk.cluster_size):
        try:
            found.append(bytes(await disk.read(offset, disk.cluster_size)))
        except CowfsError:
            found.append(None)
    await disk.close()
    return found


def reach_of_drop(disk: Disk, end: int) -> int:
    """Return where `Disk.drop` of a range that goes to ``end`` stops: what is not below has no copy there."""
    below = disk.layers[1].size if len(disk.layers) > 1 else disk.size
    return end if below >= disk.size else min(end, below // disk.cluster_size * disk.cluster_size)
