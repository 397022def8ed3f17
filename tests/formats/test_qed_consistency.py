"""QED: giving back space, and leaving no leaks."""

import random
import struct
from errno import EIO
from pathlib import Path

import pytest
import trio
import trio.testing
from qedtools import (
    M,
    assert_clean,
    check_file,
    disk_over,
    drop,
    header_on_disk,
    image_of,
    make,
    opened,
    patch,
    pattern,
    qemu_content,
)
from storages import MemoryStorage

from cowfs.block.image import Backing
from cowfs.errors import CorruptImage, StorageError
from cowfs.formats import qed
from cowfs.formats.qed.layout import Feature
from cowfs.jobs.commit import Commit
from cowfs.jobs.job import State

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
