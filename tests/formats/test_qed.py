"""QED, with QEMU's tools as the oracle: content, backing files, counts of a check."""

import os
import random
import struct
from collections.abc import Callable
from errno import EIO
from pathlib import Path

import pytest
import trio
import trio.testing
from commandline import ok, qemu_img
from qedtools import (
    M,
    assert_clean,
    assert_same_counts,
    disk_over,
    drop,
    features_on_disk,
    header_on_disk,
    image_of,
    make,
    opened,
    patch,
    pattern,
    qemu_content,
    qemu_create,
    qemu_info,
    qemu_io,
)
from storages import MemoryStorage

from cowfs.block.disk import Disk
from cowfs.block.extent import Kind
from cowfs.block.image import Backing
from cowfs.errors import StorageError, Unsupported, UsageError
from cowfs.formats import qed
from cowfs.formats.qed.layout import Feature, max_size
from cowfs.jobs.job import State
from cowfs.jobs.stream import Stream
from cowfs.storage import open_storage

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


Damage = Callable[[Path, int, int], None]


def _l1(value: int) -> Damage:
    """Put a value into the first L1 entry."""
    return lambda path, l1, l2: patch(path, l1, struct.pack("<Q", value))


def _l2(index: int, value: int) -> Damage:
    """Put a value into an entry of the first L2 table."""
    return lambda path, l1, l2: patch(path, l2 + 8 * index, struct.pack("<Q", value))


DAMAGES: dict[str, Damage] = {
    "misaligned data": _l2(0, 0x5200),
    "data far beyond the end": _l2(1, 1 << 62),
    "data just beyond the end": lambda path, l1, l2: _l2(1, path.stat().st_size)(path, l1, l2),
    "data in an L2 table": lambda path, l1, l2: _l2(2, l2)(path, l1, l2),
    "data in L1": lambda path, l1, l2: _l2(2, l1)(path, l1, l2),
    "data twice in one table": lambda path, l1, l2: patch(path, l2 + 24, path.read_bytes()[l2 : l2 + 8] * 2),
    "unlinked data": _l2(0, 0),
    "unlinked table": _l1(0),
    "table misaligned": _l1(0x5008),
    "table in the header": _l1(0x100),
    "table beyond the end": _l1(1 << 40),
    "table with its tail cut off": lambda path, l1, l2: _l1(path.stat().st_size - 4096)(path, l1, l2),
    "table twice": lambda path, l1, l2: patch(path, l1 + 8, struct.pack("<Q", l2)),
    "table in L1": lambda path, l1, l2: _l1(l1)(path, l1, l2),
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
        length = await drop(disk, start, length)
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
    qemu_io(path, f"read -P 0 {max_size(4096, 2) - 4096} 3584")
    tail = tmp_path / "tail.raw"
    where = f"if={path}", f"of={tail}", "bs=512", f"skip={max_size(4096, 2) // 512 - 1}"
    ok(qemu_img("dd", "-f", "qed", "-O", "raw", *where))
    assert tail.read_bytes() == b"end".rjust(512, b"\0")
