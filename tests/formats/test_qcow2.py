"""qcow2 against the real thing: QEMU's tools make, fill and judge the images."""

import json
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from imagetools import qemu_check

from cowfs.block.image import Backing
from cowfs.errors import CowfsError
from cowfs.formats import qcow2
from cowfs.formats.chain import open_disk, open_image
from cowfs.jobs.commit import Commit
from cowfs.storage import FileStorage


def qemu(*words: str | Path | int) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_clean(path: Path) -> None:
    found = qemu_check(path)
    assert not (found.get("corruptions") or found.get("leaks") or found["check-errors"]), found


async def make(path: Path, size: int, backing: Backing | None = None, **options: str) -> Path:
    storage = FileStorage.create(str(path))
    await qcow2.create(storage, size, backing, options)
    await storage.close()
    return path


async def content(path: Path) -> bytes:
    disk = await open_disk(str(path))
    data = bytearray(disk.size)
    step = 300_001
    for offset in range(0, disk.size, step):
        part = memoryview(data)[offset : offset + step]
        if not disk.readinto_now(offset, part):
            await disk.readinto(offset, part)
    await disk.close()
    return bytes(data)


def qemu_content(path: Path, tmp_path: Path) -> bytes:
    flat = tmp_path / "flat"
    qemu("qemu-img", "convert", "-O", "raw", path, flat)
    return flat.read_bytes()


def fill_with_qemu(path: Path, size: int, seed: int, *, zeroes: bool = True) -> None:
    """Random writes, and zero writes, of all alignments that a sector allows."""
    rnd = random.Random(seed)
    commands: list[str | Path] = []
    for number in range(24):
        offset = rnd.randrange(size // 512) * 512
        length = min(rnd.choice([512, 4096, 65536, 200_704]), size - offset)
        flag = "-z" if zeroes and number % 5 == 4 else f"-P {rnd.randrange(1, 256)}"
        commands += ["-c", f"write {flag} {offset} {length}"]
    qemu("qemu-io", "-f", "qcow2", *commands, path)


async def fill(path: Path, model: bytearray, seed: int, count: int = 60) -> None:
    rnd = random.Random(seed)
    disk = await open_disk(str(path), writable=True)
    for _ in range(count):
        offset = rnd.randrange(len(model))
        data = rnd.randbytes(min(rnd.choice([1, 512, 4096, 70_000, 200_000]), len(model) - offset))
        if not disk.write_now(offset, data):
            await disk.write(offset, data)
        model[offset : offset + len(data)] = data
        if rnd.random() < 0.1:
            await disk.flush()
    await disk.close()


async def test_clusters_shared_with_internal_snapshots_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "image"
    size = 20 << 20
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, size)
    fill_with_qemu(path, size, 1)
    before = qemu_content(path, tmp_path)
    qemu("qemu-img", "snapshot", "-c", "one", path)
    model = bytearray(before)
    await fill(path, model, 2)
    assert_clean(path)
    qemu("qemu-img", "snapshot", "-c", "two", path)
    await fill(path, model, 3)
    assert_clean(path)
    assert qemu_content(path, tmp_path) == model
    qemu("qemu-img", "snapshot", "-a", "one", path)
    assert qemu_content(path, tmp_path) == before
    qemu("qemu-img", "snapshot", "-d", "two", path)
    await fill(path, bytearray(before), 4)
    assert_clean(path)


async def test_the_refcount_table_grows(tmp_path: Path) -> None:
    size = 24 << 20
    path = await make(tmp_path / "image", size, cluster_size="512", refcount_bits="64")
    disk = await open_disk(str(path), writable=True)
    model = bytearray(size)
    rnd = random.Random(8)
    for offset in range(0, size, 1 << 20):
        model[offset : offset + (1 << 19)] = rnd.randbytes(1 << 19)
        await disk.write(offset, model[offset : offset + (1 << 19)])
        await disk.flush()
    await disk.close()
    assert_clean(path)
    assert qemu_content(path, tmp_path) == model


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
async def test_preallocation(tmp_path: Path, preallocation: str) -> None:
    path = await make(tmp_path / "image", 5 << 20, preallocation=preallocation)
    assert_clean(path)
    assert qemu_check(path)["allocated-clusters"] == 80
    assert qemu_content(path, tmp_path) == bytes(5 << 20)
    reference = tmp_path / "reference"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"preallocation={preallocation}", reference, "5M")
    if preallocation != "metadata":
        assert path.stat().st_blocks * 512 >= 5 << 20


async def test_growing_relocates_l1_and_hides_a_longer_backing_file(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(random.Random(1).randbytes(3 << 20))
    path = await make(tmp_path / "top", (1 << 20) + 700, Backing("base", "raw"), cluster_size="512")
    model = bytearray(base.read_bytes()[: (1 << 20) + 700])
    disk = await open_disk(str(path), writable=True)
    await disk.write(5, b"hello")
    model[5:10] = b"hello"
    await disk.grow(40 << 20)
    model += bytes((40 << 20) - len(model))
    await disk.write((39 << 20) + 1, b"far")
    model[(39 << 20) + 1 : (39 << 20) + 4] = b"far"
    await disk.close()
    assert_clean(path)
    assert qemu_content(path, tmp_path) == model
    assert await content(path) == model


async def test_dropping_the_backing_changes_the_header_only(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"x" * 100_000)
    path = await make(tmp_path / "top", 1 << 20, Backing("base", "raw"))
    disk = await open_disk(str(path), writable=True)
    await disk.copy_up(0, 1 << 20)
    await disk.drop_backing()
    await disk.close()
    (tmp_path / "base").unlink()
    info = json.loads(qemu("qemu-img", "info", "--output=json", path))
    assert "backing-filename" not in info
    assert_clean(path)
    assert qemu_content(path, tmp_path) == b"x" * 100_000 + bytes((1 << 20) - 100_000)


async def test_commit_gives_the_space_of_the_overlay_back(tmp_path: Path) -> None:
    size = 64 << 20
    base = await make(tmp_path / "base", size // 2)
    path = await make(tmp_path / "top", size, Backing("base", "qcow2"), cluster_size="4k")
    model = bytearray(size)
    await fill(base, memoryview_of(model, size // 2), 1)
    await fill(path, model, 2, count=100)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -z 0 1M", path)
    model[: 1 << 20] = bytes(1 << 20)
    before = path.stat().st_blocks
    disk = await open_disk(str(path), writable=True)
    job = Commit(disk)
    await job.run()
    assert job.state.value == "completed", job.error
    await disk.close()
    assert_clean(path)
    assert_clean(base)
    assert qemu_content(base, tmp_path) == model
    assert qemu_content(path, tmp_path) == model
    assert qemu_check(path).get("allocated-clusters", 0) == 0
    assert path.stat().st_blocks < before / 10


def memoryview_of(model: bytearray, size: int) -> bytearray:
    """Fill a part of a model: a view that `fill` can assign to."""
    part = bytearray(size)

    class Part(bytearray):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            model[key] = value

    return Part(part)


async def test_unknown_autoclear_bits_are_cleared_before_the_first_write(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 0 1M", path)
    data = bytearray(path.read_bytes())
    data[88:96] = (1 << 63 | 1 << 40 | 1 << 2).to_bytes(8, "big")
    path.write_bytes(data)
    assert await content(path) == qemu_content(path, tmp_path)
    assert path.read_bytes() == data, "reading changes nothing"
    disk = await open_disk(str(path), writable=True)
    assert not disk.write_now(0, b"in place"), "the first write has to see to the bits"
    await disk.write(0, b"in place")
    assert path.read_bytes()[88:96] == bytes(8)
    assert disk.write_now(0, b"IN PLACE")
    await disk.close()
    assert_clean(path)


# -- check


@pytest.mark.parametrize("seed", range(40))
async def test_check_counts_what_qemu_counts_on_damaged_images(tmp_path: Path, seed: int) -> None:
    rnd = random.Random(seed)
    path = tmp_path / "image"
    bits = rnd.choice([9, 12, 16])
    order = rnd.choice([1, 4, 16])
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={1 << bits},refcount_bits={order}", path, "4M")
    fill_with_qemu(path, 4 << 20, seed)
    header = struct.unpack(">4sIQIIQIIQQIIQ", path.read_bytes()[:72])
    l1_entries, l1_offset, table_offset = header[7], header[8], header[9]
    data = bytearray(path.read_bytes())

    def entries(offset: int, count: int) -> list[int]:
        return [int.from_bytes(data[offset + 8 * i : offset + 8 * i + 8], "big") for i in range(count)]

    mask = 0x00FF_FFFF_FFFF_FE00
    tables = [entry & mask for entry in entries(l1_offset, l1_entries) if entry & mask]
    for _ in range(rnd.randrange(1, 4)):
        table = rnd.choice(tables)
        position = table + 8 * rnd.randrange((1 << bits) // 8)
        kind = rnd.randrange(5)
        if kind == 0:  # a cluster is forgotten: a leak
            data[position : position + 8] = bytes(8)
        elif kind == 1:  # one that belongs to somebody else
            other = rnd.choice([entry for entry in entries(table, (1 << bits) // 8) if entry & mask] or [0])
            data[position : position + 8] = other.to_bytes(8, "big")
        elif kind == 2:  # the copied flag is wrong
            data[position] ^= 0x80
        elif kind == 3:  # beyond the end of the file
            data[position : position + 8] = ((1 << 63) | (1 << 50)).to_bytes(8, "big")
        else:  # a count is wrong
            block = entries(table_offset, 1)[0] & mask
            counts = min(len(data) >> bits, (8 << bits) // order)
            data[block + rnd.randrange(counts) * order // 8] ^= 1
    path.write_bytes(data)
    expected = qemu_check(path)
    image = await open_image(str(path))
    result = await image.check()
    await image.close()
    assert result.corruptions == expected.get("corruptions", 0), (result.messages, expected)
    assert result.leaks == expected.get("leaks", 0), (result.messages, expected)


async def test_a_truncated_l2_table_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 0 64k", path)
    data = path.read_bytes()
    l1_offset = int.from_bytes(data[40:48], "big")
    table = int.from_bytes(data[l1_offset : l1_offset + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    path.write_bytes(data[: table + 100])
    disk = await open_disk(str(path))
    with pytest.raises(CowfsError, match=f"L2 table at offset {table:#x} lies beyond the end of the file"):
        await disk.read(0, 512)
    await disk.close()
