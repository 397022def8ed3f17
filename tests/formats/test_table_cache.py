"""The bound on tables in memory holds, however large the disk and whatever is done to it."""

import random
from pathlib import Path

import pytest

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
