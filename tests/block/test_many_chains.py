"""What chains of one base share, and what a disk gives back that nobody uses."""

import os
import subprocess
import sys
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing
from commandline import ok, qemu_img, qemu_io

from cowfs.block import heap, metacache
from cowfs.block.disk import Disk
from cowfs.block.heap import Heap
from cowfs.block.metacache import Level, Table
from cowfs.block.twolevel import TwoLevelImage
from cowfs.block.upkeep import IDLE
from cowfs.formats.chain import Opening, open_disk
from cowfs.jobs.commit import Commit

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

MIB = 1 << 20
SIZE = 8 * MIB
#: bytes; a table of them maps 2 MiB
CLUSTER = 4096


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An image of 8 MiB with something in each table, and two overlays beside it."""
    path = tmp_path / "base"
    options = f"cluster_size={CLUSTER}"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE)))
    qemu_io(path, "qcow2", *(f"write -P {number + 1} {2 * number}M 1M" for number in range(4)))
    for name in ("a", "b"):
        ok(qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", path, "-F", "qcow2", tmp_path / name))
    return path


@asynccontextmanager
async def opened(path: Path, *, trusting: bool = False) -> AsyncIterator[Disk]:
    disk = await open_disk(str(path), writable=True, copy_on_read=False, opening=Opening(trusting=trusting))
    try:
        yield disk
    finally:
        await disk.close()


def tables(disk: Disk, depth: int) -> dict[int, Table]:
    """The L2 tables of a layer that are in memory, by host offset."""
    image = cast("TwoLevelImage", disk.layers[depth].image)
    found = [image.tables.get(image.table_offset(entry)) for entry in image.l1.entries]
    return {table.offset: table for table in found if table is not None}


async def test_tables_of_a_common_base_are_in_memory_once(base: Path) -> None:
    async with opened(base.with_name("a")) as first, opened(base.with_name("b")) as second:
        assert await first.read(0, SIZE) == await second.read(0, SIZE)
        ours, theirs = tables(first, 1), tables(second, 1)
        assert len(ours) == len(theirs) == 4
        for offset, table in ours.items():
            assert table is not theirs[offset]
            assert table.entries is theirs[offset].entries


async def test_a_base_that_is_written_has_its_own(base: Path) -> None:
    async with opened(base.with_name("a")) as first:
        async with opened(base.with_name("b")) as second:
            await first.read(0, SIZE)
            await second.read(0, SIZE)
            before = {offset: bytes(table.entries) for offset, table in tables(second, 1).items()}
            kept = tables(second, 1)
        await first.write(MIB + 4096, b"x" * MIB)
        await first.write(0, b"y" * 4096)
        await Commit(first).run()
        assert {offset: bytes(table.entries) for offset, table in kept.items()} == before
        whole = await first.read(0, SIZE)
        async with opened(base.with_name("b"), trusting=True) as third:
            assert await third.read(0, SIZE) == whole
            assert whole[:4096] == b"y" * 4096
            assert whole[MIB + 4096 :][:MIB] == b"x" * MIB


def _empty_tables(path: Path, offsets: list[int]) -> None:
    """Zero tables without leaving a trace in inode, length and time."""
    before = path.stat()
    with path.open("r+b") as file:
        for offset in offsets:
            os.pwrite(file.fileno(), bytes(CLUSTER), offset)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


async def test_what_a_closed_chain_knew_is_forgotten(base: Path) -> None:
    """Even if the base has the same inode, length and time, and something still holds the old tables."""
    async with opened(base.with_name("a")) as first:
        await first.read(0, SIZE)
    _empty_tables(base, list(tables(first, 1)))
    async with opened(base.with_name("a"), trusting=True) as second:
        assert await second.read(0, SIZE) == bytes(SIZE)


async def test_without_locks_nothing_is_shared(base: Path) -> None:
    opening = Opening(locking=False)
    disks = [await open_disk(str(base.with_name(name)), opening=opening) for name in ("a", "b")]
    for disk in disks:
        await disk.read(0, SIZE)
    for offset, table in tables(disks[0], 1).items():
        assert table.entries is not tables(disks[1], 1)[offset].entries
    for disk in disks:
        await disk.close()


async def test_a_disk_that_nobody_uses_keeps_few_tables(
    base: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metacache, "RESTING_BOUND", 2 * CLUSTER)
    async with opened(base.with_name("a")) as disk, trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        for offset in range(0, SIZE, 2 * MIB):
            await disk.write(offset, b"w" * 4096)
        expected = await disk.read(0, SIZE)
        for _ in range(3):
            # used all the time
            await trio.sleep(IDLE - 1)
            await disk.readinto(0, memoryview(bytearray(512)))
        assert [len(tables(disk, depth)) for depth in (0, 1)] == [4, 4]
        # the clock does not wait for a flush, whose tables stay as long as it is under way
        await disk.flush()
        await trio.sleep(2 * IDLE + 1)
        assert [len(tables(disk, depth)) for depth in (0, 1)] == [2, 2]
        assert await disk.read(0, SIZE) == expected
        nursery.cancel_scope.cancel()
    ok(qemu_img("check", "-q", base.with_name("a")))


async def test_memory_is_given_back_once_it_is_worth_it(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    monkeypatch.setattr(heap, "_trim", lambda pad: times.append(trio.from_thread.run_sync(trio.current_time)))
    start = trio.current_time()
    ours = Heap()
    await ours.give_back(heap.WORTHWHILE - 1)
    assert not times
    await ours.give_back(1)
    await ours.give_back(heap.WORTHWHILE)
    assert times == [start]
    await trio.sleep(heap.INTERVAL)
    await ours.give_back(0)
    await ours.give_back(0)
    assert times == [start, start + heap.INTERVAL]


def test_the_real_heap_shrinks() -> None:
    script = (
        "import re\nfrom cowfs.block import heap\n"
        "def rss(): return int(re.search(r'Rss:\\s+(\\d+)', open('/proc/self/smaps_rollup').read())[1])\n"
        "blocks = [bytes(65536 - 100) for _ in range(1600)]\nfull = rss()\n"
        "keep = blocks[::40]\ndel blocks\nheap._trim(0)\nprint(full - rss())\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(result.stdout) > 50_000


def test_a_shared_table_is_copied_before_it_changes() -> None:
    entries = array("Q", [1, 2, 3])
    table = Table(0, entries, Level.LINK, fresh=False)
    table.shared = True
    table.set(1, 7)
    assert list(entries) == [1, 2, 3]
    assert list(table.entries) == [1, 7, 3]
    kept = table.entries
    table.set(2, 8)
    assert table.entries is kept


async def test_what_may_change_is_shared_with_nobody(base: Path) -> None:
    async with opened(base.with_name("a")) as disk:
        storages = [layer.storage for layer in disk.layers]
        assert [storage.common is None for storage in storages] == [True, False]
        await disk.set_layer_writable(1, True)
        assert [storage.common for storage in storages] == [None, None]
        await disk.set_layer_writable(1, False)
        # it may be another one than those remember who read it before
        assert [storage.common for storage in storages] == [None, None]
