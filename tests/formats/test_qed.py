"""QED, with QEMU's tools as the oracle."""

import json
import os
import random
import struct
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from errno import EIO
from pathlib import Path

import pytest
import trio
import trio.testing
from storages import Gate, MemoryStorage

from cowfs.block.check import CheckResult
from cowfs.block.disk import Disk
from cowfs.block.extent import Kind
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.block.writetracker import WriteTracker
from cowfs.errors import CorruptImage, CowfsError, InvalidImage, StorageError, Unsupported, UsageError
from cowfs.formats import qed
from cowfs.formats.chain import open_disk
from cowfs.formats.qed.image import QedImage
from cowfs.formats.qed.layout import Feature, Header, max_size
from cowfs.jobs.commit import Commit
from cowfs.jobs.job import State
from cowfs.jobs.stream import Stream
from cowfs.storage import create_storage, open_storage

NO_BACKING = WriteTracker(1)
M = 1 << 20


# -- tools


def qemu_create(path: Path, size: int | None = None, *options: str) -> None:
    arguments = ["qemu-img", "create", "-q", "-f", "qed", *options, str(path)]
    subprocess.run(arguments + ([str(size)] if size else []), check=True)


def qemu_io(path: Path, *commands: str) -> None:
    arguments = ["qemu-io", "-f", "qed", str(path)]
    for command in commands:
        arguments += ["-c", command]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "failed" not in done.stdout, done.stdout


def qemu_check(path: Path) -> dict[str, int]:
    done = subprocess.run(["qemu-img", "check", "-f", "qed", "--output=json", path], capture_output=True, check=False)
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


async def drop(disk: Disk, offset: int, length: int) -> None:
    assert await disk.drop(offset, length, NO_BACKING)


async def check_file(path: Path) -> CheckResult:
    storage = await open_storage(str(path), writable=False)
    try:
        return await (await qed.open_image(storage)).check()
    finally:
        await storage.close()


# -- reading what QEMU wrote


@pytest.mark.parametrize("cluster_size", [1 << 12, 1 << 14, 1 << 16, 1 << 20])
@pytest.mark.parametrize("table_size", [2, 4, 16])
async def test_reads_what_qemu_wrote(tmp_path: Path, cluster_size: int, table_size: int) -> None:
    path = tmp_path / "disk.qed"
    size = 24 * M + 512
    qemu_create(path, size, "-o", f"cluster_size={cluster_size},table_size={table_size}")
    qemu_io(
        path,
        "write -P 1 0 100k",
        f"write -P 2 {size - 512} 512",
        "write -P 3 9000k 3M",
        f"write -z 4M {2 * cluster_size}",
        "write -P 4 3M 4k",
        "write -P 5 2M 4k",
        "write -z 9400k 64k",
    )
    expected = qemu_content(path)
    async with opened(path, writable=False) as disk:
        assert await disk.read(0, size) == expected
        for offset, length in ((1, 511), (size - 513, 513), (9000 * 1024 - 1, 3 * M + 2), (4 * M - 5, 10)):
            view = bytearray(length)
            assert disk.readinto_now(offset, memoryview(view))
            assert view == expected[offset : offset + length]
        assert [extent.kind for extent in await disk.layers[0].map(4 * M, 2 * cluster_size)] == [Kind.ZERO]


async def test_agrees_with_qemu_on_counts(tmp_path: Path) -> None:
    path = tmp_path / "disk.qed"
    qemu_create(path, 64 * M, "-o", "cluster_size=4096,table_size=2")
    chooser = random.Random(7)
    writes = (f"write -P 9 {chooser.randrange(15000) * 4096} 8k" for _ in range(60))
    qemu_io(path, *writes, "write -z 1M 2M")
    await assert_same_counts(path)


async def assert_same_counts(path: Path) -> None:
    theirs, ours = qemu_check(path), await check_file(path)
    assert ours.total_clusters == theirs["total-clusters"]
    assert ours.allocated_clusters == theirs.get("allocated-clusters", 0)
    assert ours.fragmented_clusters == theirs.get("fragmented-clusters", 0)
    assert ours.corruptions == theirs.get("corruptions", 0)
    assert ours.leaks == theirs.get("leaks", 0)
    assert bool(ours.messages) == bool(ours.corruptions or ours.leaks)


Damage = Callable[[Path, int, int], None]


def _entry(offset: int, value: int) -> Damage:
    """Put a value into the L1 table (offset below 0) or the first L2 table."""
    return lambda path, l1, l2: patch(path, l1 - offset - 8 if offset < 0 else l2 + offset, struct.pack("<Q", value))


DAMAGES: dict[str, Damage] = {
    "misaligned data": _entry(0, 0x5200),
    "data in the header": _entry(0, 0x0FFF & ~0xFFF or 0x0800),
    "data far beyond the end": _entry(8, 1 << 62),
    "data just beyond the end": lambda path, l1, l2: _entry(8, path.stat().st_size)(path, l1, l2),
    "data in an L2 table": lambda path, l1, l2: _entry(16, l2)(path, l1, l2),
    "data in L1": lambda path, l1, l2: _entry(16, l1)(path, l1, l2),
    "data twice in one table": lambda path, l1, l2: patch(path, l2 + 24, path.read_bytes()[l2 : l2 + 8] * 2),
    "unlinked data": _entry(0, 0),
    "unlinked table": _entry(-8, 0),
    "table misaligned": _entry(-8, 0x5008),
    "table in the header": _entry(-8, 0x100),
    "table beyond the end": _entry(-8, 1 << 40),
    "table with its tail cut off": lambda path, l1, l2: _entry(-8, path.stat().st_size - 4096)(path, l1, l2),
    "table twice": lambda path, l1, l2: patch(path, l1 + 8, struct.pack("<Q", l2)),
    "table in L1": lambda path, l1, l2: _entry(-8, l1)(path, l1, l2),
    "cut off": lambda path, l1, l2: os.truncate(path, path.stat().st_size - 9000),
    "longer by some clusters": lambda path, l1, l2: os.truncate(path, path.stat().st_size + 9000),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_agrees_with_qemu_on_damage(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "disk.qed"
    qemu_create(path, 64 * M, "-o", "cluster_size=4096,table_size=2")
    qemu_io(path, "write -P 1 0 64k", "write -P 2 20M 64k", "write -P 3 40M 64k", "write -P 3 1M 12k")
    l1 = header_on_disk(path).l1_offset
    l2 = struct.unpack("<Q", path.read_bytes()[l1 : l1 + 8])[0]
    DAMAGES[damage](path, l1, l2)
    await assert_same_counts(path)


# -- writing


@pytest.mark.parametrize("cluster_size", [1 << 12, 1 << 16, 1 << 20])
@pytest.mark.parametrize("table_size", [2, 4, 16])
async def test_qemu_reads_what_was_written(tmp_path: Path, cluster_size: int, table_size: int) -> None:
    size = 20 * M + 1024
    path = await make(tmp_path / "disk.qed", size, cluster_size=str(cluster_size), table_size=str(table_size))
    assert_clean(path)
    model = bytearray(size)
    chooser = random.Random(cluster_size + table_size)
    async with opened(path) as disk:
        for number in range(60):
            offset = chooser.randrange(size)
            data = pattern(min(chooser.choice([1, 512, 4096, 70_000, 300_000]), size - offset), number)
            if not (number % 3 == 0 and disk.write_now(offset, data)):
                await disk.write(offset, data)
            model[offset : offset + len(data)] = data
        assert await disk.read(0, size) == model
    assert_clean(path)
    assert qemu_content(path) == model
    await assert_same_counts(path)


@pytest.mark.parametrize("seed", range(6))
async def test_random_operations(tmp_path: Path, seed: int) -> None:
    chooser = random.Random(seed)
    cluster = chooser.choice([1 << 12, 1 << 13])
    size = 4 * M
    base = tmp_path / "base.raw"
    below = pattern(size - chooser.choice([0, M + 512]), seed)
    base.write_bytes(below)
    below = below.ljust(size, b"\0")
    path = await make(
        tmp_path / "disk.qed",
        size,
        Backing("base.raw", "raw"),
        cluster_size=str(cluster),
        table_size=str(chooser.choice([2, 4, 8])),
    )
    model = bytearray(below)
    for _ in range(4):
        async with opened(path) as disk:
            for number in range(40):
                await _random_operation(disk, chooser, model, below, number)
            assert await disk.read(0, size) == model
        assert_clean(path)
        assert qemu_content(path) == model


async def _random_operation(disk: Disk, chooser: random.Random, model: bytearray, below: bytes, number: int) -> None:
    size, cluster = len(model), disk.cluster_size
    kind = chooser.randrange(10)
    if kind < 4:
        offset = chooser.randrange(size)
        data = pattern(min(chooser.randrange(1, 8 * cluster), size - offset), number)
        await disk.write(offset, data)
        model[offset : offset + len(data)] = data
        return
    start = chooser.randrange(size // cluster) * cluster
    length = min(chooser.randrange(1, 40) * cluster, size - start)
    if kind < 6:
        assert await disk.layers[0].write_zeroes(start, length)
        model[start : start + length] = bytes(length)
    elif kind < 8:
        await drop(disk, start, length)
        model[start : start + length] = below[start : start + length]
    elif kind == 8:
        await disk.flush()
    else:
        await disk.compact()
        result = await image_of(disk).check()
        assert (result.corruptions, result.leaks) == (0, 0)


async def test_parallel_writes(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", 64 * M, cluster_size="4096", table_size="2")
    model = bytearray(64 * M)

    async def write(disk: Disk, offset: int, seed: int) -> None:
        data = pattern(9000, seed)
        await disk.write(offset, data)
        model[offset : offset + len(data)] = data

    async with opened(path) as disk, trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(write, disk, number * 300_000, number)
    assert_clean(path)
    assert qemu_content(path) == model


async def test_failed_write_leaves_no_leaks() -> None:
    storage = MemoryStorage("disk", cold=True)
    await qed.create(storage, M, None, {"cluster_size": "4096", "table_size": "2"})
    disk = disk_over(await qed.open_image(storage))
    storage.failures["write"] = [StorageError("cannot write", errno=EIO) for _ in range(2)]
    for _ in range(2):
        with pytest.raises(StorageError):
            await disk.write(0, b"x" * 20_000)
    await disk.write(8192, b"y" * 4096)
    await disk.close()
    result = await (await qed.open_image(storage)).check()
    assert (result.corruptions, result.leaks, result.allocated_clusters) == (0, 0, 1)


async def test_zeros_over_data_leave_no_leaks(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", 4 * M)
    async with opened(path) as disk:
        await disk.write(0, b"x" * M)
        assert await disk.layers[0].write_zeroes(65536, 3 * M)
        assert await disk.read(0, 4 * M) == b"x" * 65536 + bytes(4 * M - 65536)
    assert path.stat().st_size < 2 * M
    assert_clean(path)


# -- backing files


@pytest.mark.parametrize("length", [512, M - 512, M, 3 * M])
async def test_backing_of_any_length(tmp_path: Path, length: int) -> None:
    content = pattern(length, length)
    (tmp_path / "base.raw").write_bytes(content)
    path = tmp_path / "disk.qed"
    qemu_create(path, 2 * M, "-b", "base.raw", "-F", "raw")
    model = bytearray(content.ljust(2 * M, b"\0")[: 2 * M])
    async with opened(path) as disk:
        assert disk.layers[0].backing == Backing("base.raw", "raw")
        assert await disk.read(0, 2 * M) == model
        for offset in (100, M - 700, M + 70_000, 2 * M - 100):
            await disk.write(offset, b"z" * 100)
            model[offset : offset + 100] = b"z" * 100
        assert await disk.read(0, 2 * M) == model
    assert_clean(path)
    assert qemu_content(path) == model


async def test_only_raw_is_recorded(tmp_path: Path) -> None:
    qemu_create(tmp_path / "base.qed", M)
    path = await make(tmp_path / "disk.qed", M, Backing("base.qed", "qed"))
    assert features_on_disk(path) == Feature.BACKING_FILE
    async with opened(path) as disk:
        assert disk.layers[0].backing == Backing("base.qed", None)
    path = await make(tmp_path / "disk.qed", M, Backing("base.qed", "raw"))
    assert features_on_disk(path) == Feature.BACKING_FILE | Feature.BACKING_IS_RAW
    assert qemu_info(path)["backing-filename-format"] == "raw"


async def test_stream_drops_the_backing(tmp_path: Path) -> None:
    content = pattern(3 * M, 1)
    (tmp_path / "base.raw").write_bytes(content)
    path = await make(tmp_path / "disk.qed", 3 * M, Backing("base.raw", "raw"))
    async with opened(path) as disk:
        job = Stream(disk)
        await job.run()
        assert job.state is State.COMPLETED
        assert disk.layers[0].backing is None
    header = header_on_disk(path)
    assert (header.features, header.backing_offset, header.backing_size) == (0, 0, 0)
    assert_clean(path)
    assert qemu_content(path) == content


async def test_backing_can_be_changed_again_and_again(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", M, Backing("n" * 1000, "raw"), cluster_size="4096")
    patch(path, 4000, b"somebody's")
    storage = await open_storage(str(path), writable=True)
    image = await qed.open_image(storage)
    for number in range(20):
        name = str(number) * (900 // len(str(number)))
        await image.set_backing(Backing(name, "raw" if number % 2 else None))
        assert (await qed.open_image(storage)).backing == Backing(name, "raw" if number % 2 else None)
    with pytest.raises(UsageError, match="from 1 to 1023 bytes"):
        await image.set_backing(Backing("n" * 1024, None))
    await image.set_backing(None)
    await image.close()
    assert path.read_bytes()[4000:4010] == b"somebody's"
    assert_clean(path)


async def test_backing_is_refused_without_room(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", M, Backing("base", "raw"), cluster_size="4096")
    patch(path, 512, b"x" * (4096 - 512))
    before = path.read_bytes()
    storage = await open_storage(str(path), writable=True)
    image = await qed.open_image(storage)
    with pytest.raises(Unsupported, match="no room"):
        await image.set_backing(Backing("other", None))
    await image.close()
    assert path.read_bytes() == before


async def test_failed_header_write_changes_nothing() -> None:
    storage = MemoryStorage("disk", cold=True)
    await qed.create(storage, M, Backing("base", "raw"), {})
    image = await qed.open_image(storage)
    storage.failures["write"] = [StorageError("cannot write", errno=EIO)]
    with pytest.raises(StorageError):
        await image.set_backing(None)
    assert image.backing == Backing("base", "raw")
    await image.close()
    assert (await qed.open_image(storage)).backing == Backing("base", "raw")


# -- the need-check bit


async def test_need_check_is_on_disk_while_dirty(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", M)
    async with opened(path) as disk:
        assert not features_on_disk(path)
        await disk.write(0, b"x")
        assert features_on_disk(path) == Feature.NEED_CHECK
        assert image_of(disk).dirty
        await disk.flush()
        assert features_on_disk(path) == Feature.NEED_CHECK
        await image_of(disk).settle()
        assert not features_on_disk(path)
        assert disk.write_now(5, b"y")
        assert not features_on_disk(path)
        await disk.write(70_000, b"z")
        assert features_on_disk(path) == Feature.NEED_CHECK
    assert_clean(path)


async def test_preparing_is_shared() -> None:
    storage = MemoryStorage("disk", cold=True)
    await qed.create(storage, M, None, {})
    image = await qed.open_image(storage)
    gate = storage.gates["flush"] = Gate()
    storage.log.clear()
    done: list[int] = []

    async def prepare(number: int) -> None:
        await image.prepare()
        assert storage.content[16] & Feature.NEED_CHECK
        done.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(prepare, number)
        await trio.testing.wait_all_tasks_blocked()
        assert not done
        gate.open()
    assert len(done) == 5
    assert [entry[0] for entry in storage.log] == ["flush", "write", "flush"]


async def test_failed_preparing_fails_all_and_is_tried_again() -> None:
    storage = MemoryStorage("disk", cold=True)
    await qed.create(storage, M, None, {})
    image = await qed.open_image(storage)
    gate = storage.gates["flush"] = Gate()
    storage.failures["flush"] = [StorageError("cannot flush", errno=EIO)]
    failed: list[int] = []

    async def prepare(number: int) -> None:
        with pytest.raises(StorageError):
            await image.prepare()
        failed.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(prepare, number)
        await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert len(failed) == 3
    await image.prepare()
    assert storage.content[16] & Feature.NEED_CHECK


async def test_cancelled_preparing_is_taken_over() -> None:
    storage = MemoryStorage("disk", cold=True)
    await qed.create(storage, M, None, {})
    image = await qed.open_image(storage)
    gate = storage.gates["flush"] = Gate()
    async with trio.open_nursery() as outer:
        async with trio.open_nursery() as inner:
            inner.start_soon(image.prepare)
            await gate.arrived.wait()
            outer.start_soon(image.prepare)
            await trio.testing.wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
        gate.open()
    assert storage.content[16] & Feature.NEED_CHECK


async def test_crash_leaves_leaks_that_are_found_and_used(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", 8 * M, cluster_size="4096")
    disk = await open_disk(str(path), "qed", writable=True)
    await disk.write(0, b"a" * M)
    await disk.flush()
    await disk.write(M, b"b" * M)
    await crash(disk)
    found = qemu_check(path)
    assert found["leaks"] == 256
    assert "corruptions" not in found
    length = path.stat().st_size
    async with opened(path, writable=False) as reader:
        assert await reader.read(0, M) == b"a" * M
    assert features_on_disk(path) == Feature.NEED_CHECK
    async with opened(path) as disk:
        await disk.write(2 * M, b"c" * M)
        assert features_on_disk(path) == Feature.NEED_CHECK
    assert path.stat().st_size == length
    assert_clean(path)


async def test_leaks_of_a_crash_are_gone_after_opening_and_closing(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", 8 * M, cluster_size="4096")
    disk = await open_disk(str(path), "qed", writable=True)
    await disk.write(0, b"a" * M)
    await crash(disk)
    os.truncate(path, path.stat().st_size - 1000)
    async with opened(path):
        pass
    assert_clean(path)
    assert path.stat().st_size == 5 * 4096


async def test_damage_after_a_crash_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qed"
    qemu_create(path, 8 * M, "-o", "cluster_size=4096")
    qemu_io(path, "write 0 64k")
    l1 = header_on_disk(path).l1_offset
    l2 = struct.unpack("<Q", path.read_bytes()[l1 : l1 + 8])[0]
    patch(path, l2, struct.pack("<Q", l2))
    patch(path, 16, b"\x02")
    before = path.read_bytes()
    with pytest.raises(CorruptImage, match="qemu-img check -r all"):
        await open_disk(str(path), "qed", writable=True)
    async with opened(path, writable=False) as disk:
        assert await disk.read(4096, 60_000) == b"\xcd" * 60_000
        await disk.layers[0].set_writable(True)
        with pytest.raises(CorruptImage, match="qemu-img check -r all"):
            await disk.layers[0].begin()
        await disk.layers[0].storage.reopen(writable=False)
    assert path.read_bytes() == before


async def test_autoclear_bits_are_cleared_before_a_write(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", M)
    async with opened(path) as disk:
        await disk.write(0, b"x")
    patch(path, 24, struct.pack("<QQ", 1 << 63 | 5, 1 << 62))
    async with opened(path, writable=False) as disk:
        assert await disk.read(0, 1) == b"x"
    async with opened(path) as disk:
        assert not disk.write_now(0, b"y")
        await disk.write(0, b"y")
        assert header_on_disk(path).autoclear_features == 0
    assert header_on_disk(path).compat_features == 1 << 63 | 5
    assert_clean(path)


# -- growing


async def test_grow(tmp_path: Path) -> None:
    content = pattern(3 * M, 5)
    (tmp_path / "base.raw").write_bytes(content)
    path = await make(tmp_path / "disk.qed", M + 512, Backing("base.raw", "raw"), cluster_size="4096", table_size="2")
    async with opened(path) as disk:
        await disk.grow(4 * M)
        assert await disk.read(0, 4 * M) == content[: M + 512] + bytes(3 * M - 512)
        with pytest.raises(UsageError, match="multiple of 512"):
            await disk.grow(4 * M + 1)
        with pytest.raises(Unsupported, match="cannot grow"):
            await disk.grow(max_size(4096, 2) + 512)
        await disk.grow(max_size(4096, 2))
        await disk.write(max_size(4096, 2) - 3, b"end")
    assert_clean(path)
    assert header_on_disk(path).size == max_size(4096, 2)
    assert qemu_content(path)[-3:] == b"end"


# -- giving back


@pytest.mark.parametrize("pivot_after_writes", [False, True])
async def test_commit_leaves_no_leaks(tmp_path: Path, pivot_after_writes: bool) -> None:
    base = await make(tmp_path / "base.qed", 32 * M, cluster_size="8192", table_size="2")
    path = await make(tmp_path / "disk.qed", 40 * M, Backing("base.qed", "qed"), cluster_size="4096", table_size="2")
    empty = path.stat().st_size
    model = bytearray(40 * M)
    chooser = random.Random(3)
    async with opened(path) as disk:
        for number in range(50):
            offset, data = chooser.randrange(39 * M), pattern(chooser.randrange(1, 200_000), number)
            await disk.write(offset, data)
            model[offset : offset + len(data)] = data
        await disk.layers[0].write_zeroes(8 * M, 2 * M)
        model[8 * M : 10 * M] = bytes(2 * M)
        for _ in range(2):
            job = Commit(disk)
            await job.run()
            assert job.state is State.COMPLETED, job.error
            assert await disk.read(0, len(model)) == model
        assert path.stat().st_size == empty
        if pivot_after_writes:
            await disk.write(5, b"after")
            model[5:10] = b"after"
    assert_clean(path)
    assert_clean(base)
    assert qemu_content(path) == model


@pytest.mark.parametrize("table_size", [2, 4, 16])
@pytest.mark.parametrize("seed", range(4))
async def test_compact_moves_data_and_tables(tmp_path: Path, table_size: int, seed: int) -> None:
    """One table maps at least 2 MiB; the disk has many, among data of which most is dropped."""
    chooser = random.Random(seed)
    size = table_size * 48 * M
    span = table_size * 512 * 4096
    path = await make(tmp_path / "disk.qed", size, cluster_size="4096", table_size=str(table_size))
    kept: dict[int, bytes] = {}
    async with opened(path) as disk:
        tables = [*range(0, size, span)]
        chooser.shuffle(tables)
        for start in tables:
            for number in range(chooser.choice([1, 2, 7])):
                offset = start + number * 40_960
                kept[offset] = pattern(chooser.choice([4096, 20_480]), offset)
                await disk.write(offset, kept[offset])
        before = path.stat().st_size
        for offset in chooser.sample(sorted(kept), len(kept) * 3 // 4):
            await drop(disk, offset, len(kept.pop(offset)))
        await disk.compact()
        result = await image_of(disk).check()
        assert (result.corruptions, result.leaks) == (0, 0)
        assert path.stat().st_size < before
        for offset, data in kept.items():
            assert await disk.read(offset, len(data)) == data
    assert_clean(path)
    result = await check_file(path)
    assert result.allocated_clusters == sum(len(data) // 4096 for data in kept.values())
    async with opened(path, writable=False) as disk:
        for offset, data in kept.items():
            assert await disk.read(offset, len(data)) == data


async def test_compact_where_only_narrow_gaps_are_left(tmp_path: Path) -> None:
    """Between tables of four clusters each a single one is free."""
    span = 4 * 512 * 4096
    path = await make(tmp_path / "disk.qed", 20 * span, cluster_size="4096", table_size="4")
    async with opened(path) as disk:
        image = image_of(disk)
        for number in range(20):
            await disk.write(number * span, bytes([number]) * 4096)
        for number in range(20):
            await image.write_zeroes(number * span + 4096, 4096)
            await drop(disk, number * span, 4096)
        await disk.compact()
        assert image.space.end == 1 + 4 + 20 * 4
        await disk.write(0, b"again")
    assert_clean(path)


async def test_compact_waits_for_readers(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", M, cluster_size="4096")
    async with opened(path) as disk:
        await disk.write(0, b"a" * 65536)
        await disk.write(65536, b"b" * 4096)
        await drop(disk, 0, 65536)
        place = (await disk.layers[0].map(65536, 4096))[0].host_offset
        async with trio.open_nursery() as nursery:
            with disk.readers.inside():
                nursery.start_soon(disk.compact)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert await disk.layers[0].storage.read_bytes(place, 4096) == b"b" * 4096
        assert (await disk.layers[0].map(65536, 4096))[0].host_offset < place
        assert await disk.read(65536, 4096) == b"b" * 4096
    assert_clean(path)


async def test_compact_refuses_a_damaged_image(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", M, cluster_size="4096")
    async with opened(path) as disk:
        await disk.write(0, b"a" * 65536)
    l1 = header_on_disk(path).l1_offset
    l2 = struct.unpack("<Q", path.read_bytes()[l1 : l1 + 8])[0]
    patch(path, l2, struct.pack("<Q", l2))
    before = path.read_bytes()
    async with opened(path) as disk:
        with pytest.raises(CorruptImage, match="errors in its tables"):
            await image_of(disk).compact()
    assert path.read_bytes() == before


@pytest.mark.parametrize("operation", ["write", "flush", "read", "truncate"])
async def test_compact_that_fails_anywhere_loses_nothing(operation: str) -> None:
    """Fail the Nth operation, for every N; the file is then opened as it is."""
    for nth in range(60):
        storage = MemoryStorage("disk", cold=True)
        await qed.create(storage, 16 * M, None, {"cluster_size": "4096", "table_size": "2"})
        disk = disk_over(await qed.open_image(storage))
        model = bytearray(16 * M)
        for number in range(8):
            data = pattern(16_384, number)
            await disk.write(number * 2 * M, data)
            model[number * 2 * M : number * 2 * M + len(data)] = data
        for number in (0, 1, 4):
            await drop(disk, number * 2 * M, 16_384)
            model[number * 2 * M : number * 2 * M + 16_384] = bytes(16_384)
        await disk.flush()
        steps = sum(entry[0] == operation for entry in storage.log)
        storage.failures[operation] = Nth(nth, StorageError(f"cannot {operation}", errno=EIO))  # type: ignore[assignment]
        try:
            await disk.compact()
        except StorageError:
            failed = True
        else:
            failed = False
        storage.failures.clear()
        assert await disk.read(0, 16 * M) == model
        after = disk_over(await qed.open_image(MemoryStorage("after", bytes(storage.content))))
        assert await after.read(0, 16 * M) == model
        result = await image_of(after).check()
        assert result.corruptions == 0
        await disk.write(100, b"goes on")
        await disk.close()
        result = await (await qed.open_image(storage)).check()
        assert result.corruptions == 0
        if not failed:
            assert result.leaks == 0
            return
        assert not result.leaks or storage.content[16] & Feature.NEED_CHECK
        assert steps
    raise AssertionError("compaction never came through")


class Nth(list[Exception]):
    """A list of failures that fails one operation only, after ``count`` others."""

    def __init__(self, count: int, error: Exception) -> None:
        super().__init__([error])
        self._count = count

    def __bool__(self) -> bool:
        self._count -= 1
        return self._count == -1


def disk_over(image: QedImage) -> Disk:
    return Disk([Layer(image)], copy_on_read=False)


# -- hostile files


def header(**fields: int) -> bytes:
    usual = Header(65536, 4, 1, 0, 0, 0, 65536, M)
    return usual._replace(**fields).pack()


HOSTILE: dict[str, tuple[bytes, type[CowfsError], str]] = {
    "other magic": (b"QFI\xfb" + bytes(600), InvalidImage, "is not a qed image"),
    "empty": (b"", InvalidImage, "is not a qed image"),
    "cut off": (header()[:63], InvalidImage, "is too short to be a qed image"),
    "unknown feature": (header(features=1 << 3 | 1 << 40), Unsupported, "incompatible feature bits 3, 40"),
    "no cluster size": (header(cluster_size=0), InvalidImage, "cluster size of 0"),
    "small clusters": (header(cluster_size=2048), InvalidImage, "cluster size of 2048"),
    "huge clusters": (header(cluster_size=1 << 27), InvalidImage, "cluster size"),
    "odd clusters": (header(cluster_size=65537), InvalidImage, "cluster size"),
    "no table": (header(table_size=0), InvalidImage, "table size of 0"),
    "odd table": (header(table_size=3), InvalidImage, "table size of 3"),
    "large table": (header(table_size=32), InvalidImage, "table size of 32"),
    "huge table": (header(table_size=16, cluster_size=1 << 26), Unsupported, "tables of 1073741824 bytes"),
    "no header": (header(header_size=0), InvalidImage, "header of 0 clusters"),
    "header longer than the file": (header(header_size=0xFFFFFFFF), InvalidImage, "header of 4294967295 clusters"),
    "odd disk": (header(size=1000), InvalidImage, "no multiple of 512"),
    "huge disk": (header(size=1 << 62), InvalidImage, "its tables can map"),
    "L1 misaligned": (header(l1_offset=65536 + 512), CorruptImage, "not aligned"),
    "L1 nowhere": (header(l1_offset=0), CorruptImage, "inside the header"),
    "L1 in the header": (header(l1_offset=65536, header_size=2), CorruptImage, "inside the header"),
    "L1 beyond the end": (header(l1_offset=2 * 65536), CorruptImage, "beyond the end"),
    "L1 far beyond the end": (header(l1_offset=(1 << 64) - 65536), CorruptImage, "beyond the end"),
    "long name": (header(features=1, backing_size=1024), InvalidImage, "1024 bytes"),
    "name outside": (header(features=1, backing_offset=65530, backing_size=7), InvalidImage, "outside of the header"),
    "zero byte in the name": (header(features=1, backing_offset=64, backing_size=3), InvalidImage, "zero byte"),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_hostile_header(case: str) -> None:
    content, error, message = HOSTILE[case]
    if len(content) == 64:
        content = content.ljust(5 * 65536, b"\0")
    with pytest.raises(error, match=message) as caught:
        await qed.open_image(MemoryStorage("disk", content, read_only=True))
    assert not caught.value.message.endswith(".")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("entry", [2, 512, 4097, 0, 1 << 40, (1 << 64) - 4096])
async def test_senseless_entries(tmp_path: Path, entry: int) -> None:
    path = tmp_path / "disk.qed"
    qemu_create(path, 64 * M, "-o", "cluster_size=4096,table_size=2")
    qemu_io(path, "write 0 64k", "write 4M 64k")
    l1 = header_on_disk(path).l1_offset
    tables = struct.unpack("<QQ", path.read_bytes()[l1 : l1 + 16])
    patch(path, tables[0] + 8, struct.pack("<Q", entry))
    patch(path, l1 + 8, struct.pack("<Q", entry))
    async with opened(path) as disk:
        assert await disk.read(0, 4096) == b"\xcd" * 4096
        for offset in (4096, 4 * M):
            if entry:
                with pytest.raises(CorruptImage):
                    await disk.read(offset, 4096)
                with pytest.raises(CorruptImage):
                    await disk.write(offset, b"x")
            else:
                assert await disk.read(offset, 4096) == bytes(4096)


def test_probe() -> None:
    assert qed.probe(header())
    assert qed.probe(b"QED\0")
    assert not qed.probe(b"QED")
    assert not qed.probe(b"QFI\xfb" + bytes(508))


# -- creating


async def test_create_as_qemu_does(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(M))
    for number, (ours, theirs) in enumerate(
        (
            ({}, []),
            ({"cluster_size": "4K", "table_size": "16"}, ["-o", "cluster_size=4096,table_size=16"]),
            ({"cluster_size": "1M"}, ["-o", "cluster_size=1M"]),
        )
    ):
        for backing in (None, Backing("base.raw", "raw")):
            mine = await make(tmp_path / f"mine{number}.qed", 10 * M, backing, **ours)
            reference = tmp_path / f"reference{number}.qed"
            qemu_create(reference, 10 * M, *theirs, *(["-b", "base.raw", "-F", "raw"] if backing else []))
            assert mine.read_bytes() == reference.read_bytes()
            assert_clean(mine)


async def test_create_rounds_up(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", 1025)
    assert header_on_disk(path).size == 1536


@pytest.mark.parametrize(
    ("size", "backing", "options", "message"),
    [
        (max_size(4096, 2) + 1, None, {"cluster_size": "4096", "table_size": "2"}, "does not fit"),
        (M, None, {"cluster_size": "2048"}, "cluster_size=2048"),
        (M, None, {"cluster_size": "128M"}, "cluster_size=128M"),
        (M, None, {"cluster_size": "5000"}, "cluster_size=5000"),
        (M, None, {"table_size": "1"}, "table_size=1"),
        (M, None, {"table_size": "3"}, "table_size=3"),
        (M, None, {"table_size": "32"}, "table_size=32"),
        (M, None, {"table_size": "16", "cluster_size": "64M"}, "too large"),
        (M, None, {"lazy_refcounts": "on"}, "no option 'lazy_refcounts'"),
        (M, Backing("n" * 1024, None), {}, "1023 bytes"),
        (M, Backing("", None), {}, "1023 bytes"),
    ],
)
async def test_create_refuses(size: int, backing: Backing | None, options: dict[str, str], message: str) -> None:
    storage = MemoryStorage("disk")
    with pytest.raises(UsageError, match=message):
        await qed.create(storage, size, backing, options)
    assert not storage.log
    assert not storage.content


async def test_tables_of_one_cluster() -> None:
    """The specification has them; QEMU's own check of table offsets does not."""
    head = Header(4096, 1, 1, 0, 0, 0, 4096, 64 * M).pack()
    storage = MemoryStorage("disk", head.ljust(8192, b"\0"))
    disk = disk_over(await qed.open_image(storage))
    for number in range(32):
        await disk.write(number * 2 * M, bytes([number]) * 5000)
    for number in range(0, 32, 2):
        await drop(disk, number * 2 * M, 8192)
    await disk.compact()
    await disk.close()
    disk = disk_over(await qed.open_image(storage))
    for number in range(32):
        assert await disk.read(number * 2 * M, 5001) == (bytes([number]) * 5000 if number % 2 else bytes(5000)) + b"\0"
    result = await image_of(disk).check()
    assert (result.corruptions, result.leaks, result.allocated_clusters) == (0, 0, 32)
    assert storage.length == 4096 * (2 + 16 * 3)


async def test_details_are_empty(tmp_path: Path) -> None:
    async with opened(await make(tmp_path / "disk.qed", M)) as disk:
        assert disk.layers[0].image.details() == {}
