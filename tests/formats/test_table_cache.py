"""The bound on tables in memory holds, however large the disk and whatever is done to it."""

import random
from pathlib import Path

import pytest
import trio
from commandline import ok, qemu_img

from cowfs.block.disk import Disk
from cowfs.block.twolevel import TwoLevelImage
from cowfs.formats.chain import Opening, open_disk
from cowfs.formats.create import create_image

K, M, T = 1 << 10, 1 << 20, 1 << 40
BOUND = M


def _image(disk: Disk) -> TwoLevelImage:
    image = disk.layers[0].image
    assert isinstance(image, TwoLevelImage)
    return image


async def _opened(path: Path) -> tuple[Disk, TwoLevelImage, int]:
    disk = await open_disk(str(path), writable=True, opening=Opening(cache_size=BOUND))
    image = _image(disk)
    return disk, image, image.tables.bound


@pytest.mark.parametrize(("format", "size", "table"), [("qcow2", 16 * T, 64 * K), ("qed", 16 * T, 256 * K)])
async def test_random_access_to_a_huge_disk(tmp_path: Path, format: str, size: int, table: int) -> None:
    path = tmp_path / "image"
    await create_image(str(path), format, size)
    rnd = random.Random(1)
    places = [rnd.randrange(size // 65536) * 65536 for _ in range(250)]
    disk, image, bound = await _opened(path)
    assert bound == max(BOUND, 8 * table)
    # nobody asks for a flush, so all tables are dirty
    for number, offset in enumerate(places):
        await disk.write(offset, bytes([number % 255 + 1]) * 512)
        assert image.tables.resident <= bound
    assert len(places) * table > 4 * bound
    await disk.close()
    ok(qemu_img("check", "-q", "-f", format, path))
    disk, image, bound = await _opened(path)
    for number, offset in enumerate(places):
        assert await disk.read(offset, 512) == bytes([number % 255 + 1]) * 512
        assert image.tables.resident <= bound
        if number % 3 == 0:
            await disk.write(rnd.choice(places) + 65024, b"z" * 512)
            assert image.tables.resident <= bound
    await disk.layers[0].deallocate(0, size)
    assert image.tables.resident <= bound
    await disk.flush()
    assert image.tables.resident <= bound
    await disk.close()
    ok(qemu_img("check", "-q", "-f", format, path))


@pytest.mark.parametrize(
    ("format", "options", "table"),
    [("qcow2", {}, 64 * K), ("qcow2", {"cluster_size": "2M"}, 2 * M), ("qed", {"table_size": "16"}, M)],
)
async def test_requests_side_by_side_need_a_table_each_beyond_the_bound(
    tmp_path: Path, format: str, options: dict[str, str], table: int
) -> None:
    path = tmp_path / "image"
    await create_image(str(path), format, 16 * T, options=options)
    disk, image, bound = await _opened(path)
    tasks, rnd = 16, random.Random(1)
    written: dict[int, int] = {}
    most = 0

    async def work(task: int) -> None:
        nonlocal most
        for _ in range(10):
            # no two tasks write to the same cluster of 2 MiB, few to the same table
            offset = (rnd.randrange(16 * T // (2 * M) // tasks) * tasks + task) * 2 * M
            await disk.write(offset, bytes([task + 1]) * 512)
            written[offset] = task + 1
            most = max(most, image.tables.resident)
            await disk.read(rnd.randrange(16 * T // 512) * 512, 512)
            most = max(most, image.tables.resident)

    async with trio.open_nursery() as nursery:
        for task in range(tasks):
            nursery.start_soon(work, task)
    assert most <= bound + tasks * table
    # nobody is under way any more
    await disk.write(0, b"\1")
    await disk.flush()
    assert image.tables.resident <= bound
    for offset, byte in written.items():
        assert await disk.read(offset, 512) == bytes([byte if offset else 1]) + bytes([byte]) * 511
    await disk.close()
    ok(qemu_img("check", "-q", "-f", format, path))


async def test_counts_of_clusters_all_over_the_file(tmp_path: Path) -> None:
    """Freeing touches a block of counts for every stretch of the file."""
    path = tmp_path / "image"
    await create_image(str(path), "qcow2", 1 << 30, options={"cluster_size": "4k", "refcount_bits": "64"})
    disk, _, _ = await _opened(path)
    for offset in range(0, 1 << 30, 2 * M):
        await disk.write(offset, b"x" * 64 * K)
    await disk.close()
    assert path.stat().st_size // (2 * M) * 4 * K < BOUND, "blocks"
    disk = await open_disk(str(path), writable=True, opening=Opening(cache_size=1))
    image = _image(disk)
    assert image.tables.bound == 32 * K
    most = 0
    for offset in range(0, 1 << 30, 128 * M):
        await disk.layers[0].deallocate(offset, 128 * M)
        most = max(most, image.tables.resident)
        await disk.flush()
        most = max(most, image.tables.resident)
    assert most <= 32 * K
    await image.settle()
    result = await image.check()
    assert (result.corruptions, result.leaks, result.allocated_clusters) == (0, 0, 0)
    await disk.close()
