"""Where qcow2 puts clusters: what is free is used again, the file stays short, what belongs together stays together."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from commandline import ok, qemu_img, qemu_io
from imagetools import qemu_check
from powercut import RecordingStorage
from qcow2damage import MASK, Anatomy
from storages import Gate, MemoryStorage

from cowfs.block.disk import Disk
from cowfs.block.extent import Kind
from cowfs.block.layer import Layer
from cowfs.errors import CorruptImage
from cowfs.formats import qcow2
from cowfs.formats.chain import open_disk
from cowfs.formats.qcow2 import refcounts
from cowfs.formats.qcow2.image import Qcow2Image

K, M = 1 << 10, 1 << 20


def assert_clean(path: Path) -> None:
    found = qemu_check(path)
    assert not (found.get("corruptions") or found.get("leaks") or found["check-errors"]), found


def create(path: Path, size: str, options: str = "cluster_size=4k") -> Path:
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, size))
    return path


async def opened(path: Path) -> Disk:
    return await open_disk(str(path), writable=True)


async def pieces(disk: Disk, offset: int, length: int) -> int:
    """How many separate places of the file a range lies in."""
    extents = await disk.layers[0].map(offset, length)
    assert all(extent.kind is Kind.DATA for extent in extents)
    return len(extents)


async def fill(disk: Disk, start: int, end: int, step: int) -> None:
    for offset in range(start, end, step):
        await disk.write(offset, bytes([offset // step % 255 + 1]) * step)


# -- reuse


async def test_what_an_earlier_session_freed_is_used_again(tmp_path: Path) -> None:
    disk = await opened(path := create(tmp_path / "image", "64M"))
    await fill(disk, 0, 16 * M, M)
    await disk.layers[0].deallocate(4 * M, 8 * M)
    await disk.close()
    size = path.stat().st_size
    disk = await opened(path)
    await fill(disk, 32 * M, 39 * M, M)
    await disk.close()
    assert path.stat().st_size <= size + 16 * K
    assert_clean(path)


async def test_what_qemu_left_free_is_used_again(tmp_path: Path) -> None:
    path = create(tmp_path / "image", "64M")
    qemu_io(path, "qcow2", "write 0 16M", "discard 2M 10M")
    size = path.stat().st_size
    disk = await opened(path)
    await fill(disk, 32 * M, 41 * M, 64 * K)
    await disk.close()
    assert path.stat().st_size <= size + 64 * K
    assert_clean(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
async def test_free_clusters_are_found_whatever_the_width_of_a_count(tmp_path: Path, bits: int) -> None:
    path = create(tmp_path / "image", "16M", f"cluster_size=512,refcount_bits={bits}")
    disk = await opened(path)
    await fill(disk, 0, 4 * M, 64 * K)
    await disk.layers[0].deallocate(M, M)
    await disk.layers[0].deallocate(3 * M, 512 * K)
    await disk.close()
    size = path.stat().st_size
    disk = await opened(path)
    await fill(disk, 8 * M, 8 * M + 1280 * K, 64 * K)
    await disk.close()
    assert path.stat().st_size <= size + 64 * K
    assert_clean(path)


async def test_opening_an_image_reads_no_counts() -> None:
    storage = MemoryStorage("image")
    await qcow2.create(storage, 64 * M, None, {"cluster_size": "4k", "preallocation": "metadata"})
    storage.cold = True
    storage.log.clear()
    image = await qcow2.open_image(storage)
    blocks = {entry & MASK for entry in image.refcounts.table.entries if entry}
    assert len(blocks) > 8
    assert not [offset for what, offset, _ in storage.log if what == "read" and offset in blocks]


async def test_growing_looks_at_a_few_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refcounts, "SEARCH_CLUSTERS", 1)
    storage = MemoryStorage("image")
    await qcow2.create(storage, 64 * M, None, {"cluster_size": "4k", "preallocation": "metadata"})
    disk = Disk([Layer(await qcow2.open_image(storage))])
    await disk.grow(128 * M)
    await disk.close()
    image = await qcow2.open_image(storage)
    disk = Disk([Layer(image)])
    blocks = [entry & MASK for entry in image.refcounts.table.entries if entry]
    seen = [0]
    for number in range(4):
        await disk.write(64 * M + number * 64 * K, b"x" * 64 * K)
        seen.append(sum(image.tables.get(offset) is not None for offset in blocks))
    # the first write takes an L2 table besides, and reads the block of the end of the file
    assert all(after - before <= 3 for before, after in pairwise(seen))
    assert seen[-1] < len(blocks)
    await disk.close()


async def test_clusters_of_tables_are_never_taken_for_free(tmp_path: Path) -> None:
    path = create(tmp_path / "image", "64M")
    qemu_io(path, "qcow2", "write 0 4M")
    image = Anatomy(path)
    block = image.get(image.blocks()[0]) & MASK
    table = (image.get(image.l1_places()[0]) & MASK) >> image.bits
    image.put(block + 2 * table, 0, 2)
    image.write(path)
    before = bytes(image.data)
    disk = await opened(path)
    for _ in range(2):
        with pytest.raises(CorruptImage, match="which counts as free; repair it with 'cowfs check -r all'"):
            await disk.write(32 * M, b"x")
    await disk.close()
    assert path.read_bytes()[: len(before)] == before


# -- the end of the file


async def test_the_file_is_cut_off_when_its_end_becomes_free(tmp_path: Path) -> None:
    disk = await opened(path := create(tmp_path / "image", "64M"))
    await fill(disk, 0, 4 * M, M)
    await disk.close()
    size = path.stat().st_size
    disk = await opened(path)
    # no further than one refcount block reaches
    await fill(disk, 6 * M, 9 * M, M)
    await disk.layers[0].deallocate(6 * M, 4 * M)
    await disk.close()
    assert path.stat().st_size == size
    assert_clean(path)
    disk = await opened(path)
    await fill(disk, 8 * M, 32 * M, M)
    await disk.close()
    assert_clean(path)


async def test_tables_that_map_nothing_any_more_are_given_up(tmp_path: Path) -> None:
    disk = await opened(path := create(tmp_path / "image", "64M"))
    await fill(disk, 0, 8 * M, M)
    await disk.write(9 * M, b"stays")
    await disk.layers[0].deallocate(0, 9 * M)
    await disk.close()
    assert [number for number, entry in enumerate(Anatomy(path).data[Anatomy(path).l1 :: 8][:32]) if entry] == [4]
    assert_clean(path)
    assert await (await open_disk(str(path))).read(9 * M, 5) == b"stays"


async def test_the_file_is_cut_off_when_writing_has_gone_quiet(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    storage = MemoryStorage("image")
    await qcow2.create(storage, 64 * M, None, {"cluster_size": "64k"})
    disk = Disk([Layer(await qcow2.open_image(storage))], flush_interval=1)
    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        await fill(disk, 0, 16 * M, M)
        await disk.flush()
        size = storage.length
        await disk.layers[0].write_zeroes(8 * M, 8 * M)
        await disk.write(0, b"so that the next flush has something to do")
        await trio.sleep(10)
        assert storage.length <= size - 8 * M + 64 * K
        nursery.cancel_scope.cancel()
    await disk.close()
    (path := tmp_path / "image").write_bytes(storage.content)
    assert_clean(path)


async def test_an_image_in_which_nothing_changed_is_not_cut_off(tmp_path: Path) -> None:
    path = create(tmp_path / "image", "64M")
    with path.open("ab") as file:
        file.truncate(48 * M)
    disk = await opened(path)
    await disk.close()
    assert path.stat().st_size == 48 * M


async def test_who_allocates_while_the_file_is_cut_off_waits(tmp_path: Path) -> None:
    storage = MemoryStorage("image")
    await qcow2.create(storage, 64 * M, None, {"cluster_size": "4k"})
    disk = Disk([Layer(await qcow2.open_image(storage))])
    await fill(disk, 0, 4 * M, M)
    await disk.layers[0].deallocate(M, 3 * M)
    gate = storage.gates["truncate"] = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.layers[0].image.settle)
        await gate.arrived.wait()
        nursery.start_soon(disk.write, 8 * M, b"new" * K)
        await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert await disk.read(8 * M, 3 * K) == b"new" * K
    await disk.close()
    (path := tmp_path / "image").write_bytes(storage.content)
    assert_clean(path)


# -- order


async def test_sequential_writes_lie_in_sequence_beside_holes(tmp_path: Path) -> None:
    disk = await opened(create(tmp_path / "image", "256M"))
    await fill(disk, 0, 16 * M, M)
    # holes of one cluster, a 32nd of the file
    for offset in range(0, 16 * M, 128 * K):
        await disk.layers[0].deallocate(offset, 4 * K)
    await disk.flush()
    await fill(disk, 64 * M, 72 * M, 4 * K)
    # L2 tables and refcount blocks lie between
    assert await pieces(disk, 64 * M, 8 * M) <= 10
    await disk.close()


async def test_two_sequential_writers_keep_their_runs(tmp_path: Path) -> None:
    disk = await opened(path := create(tmp_path / "image", "256M"))
    await fill(disk, 0, 32 * M, M)
    # two long holes: each writer finds one, and goes on in it
    await disk.layers[0].deallocate(4 * M, 3 * M)
    await disk.layers[0].deallocate(16 * M, 3 * M)
    await disk.write(64 * M, b"a" * 4 * K)
    await disk.flush()
    size = path.stat().st_size
    for offset in range(4 * K, 2 * M, 4 * K):
        await disk.write(64 * M + offset, b"a" * 4 * K)
        if offset % (256 * K) == 0:
            await disk.write(128 * M + offset, b"b" * 4 * K)
    assert await pieces(disk, 64 * M, 2 * M) <= 20
    assert path.stat().st_size <= size
    await disk.close()
    assert_clean(path)


async def test_small_writes_fill_small_holes(tmp_path: Path) -> None:
    disk = await opened(path := create(tmp_path / "image", "256M"))
    await fill(disk, 0, 16 * M, M)
    hole = (await disk.layers[0].map(9 * M, 4 * K))[0].host_offset
    for offset in range(0, 16 * M, 128 * K):
        await disk.layers[0].deallocate(offset, 4 * K)
    await disk.layers[0].deallocate(9 * M, M)
    await disk.flush()
    size = path.stat().st_size
    for number in range(100):
        # nothing lies before any of them
        offset = 64 * M + number * 16 * K
        await disk.write(offset, b"x" * 4 * K)
        host = (await disk.layers[0].map(offset, 4 * K))[0].host_offset
        assert not hole <= host < hole + M
    assert path.stat().st_size <= size
    await disk.close()
    assert_clean(path)


# -- churn


@pytest.mark.parametrize(("cluster", "seed"), [(4 * K, 1), (64 * K, 2), (512, 3)])
async def test_the_file_never_outgrows_the_disk(tmp_path: Path, cluster: int, seed: int) -> None:
    size = 32 * M
    path = create(tmp_path / "image", str(size), f"cluster_size={cluster}")
    # every cluster has 8 bytes of L2 and 2 of counts; some for L1, refcount table, their growth
    limit = (size + size // cluster * 10) * 1.1 + 64 * cluster
    rnd = random.Random(seed)
    model = bytearray(size)
    disk = await opened(path)
    for number in range(3000):
        offset = rnd.randrange(size // cluster) * cluster
        length = min(rnd.choice([cluster, 4 * cluster, 256 * K, M]), size - offset)
        kind = rnd.random()
        if kind < 0.6:
            data = rnd.randbytes(256) * (length // 256)
            await disk.write(offset, data)
            model[offset : offset + length] = data
        else:
            layer = disk.layers[0]
            await (layer.deallocate if kind < 0.8 else layer.write_zeroes)(offset, length)
            model[offset : offset + length] = bytes(length)
        if kind < 0.02:
            await disk.flush()
        if number % 500 == 499:
            await disk.close()
            assert_clean(path)
            disk = await opened(path)
        assert path.stat().st_size <= limit
    assert await disk.read(0, size) == model
    await disk.close()
    assert_clean(path)


async def test_a_discard_of_everything_waits_in_bounded_memory(tmp_path: Path) -> None:
    path = create(tmp_path / "image", "64M", "cluster_size=512,preallocation=metadata")
    disk = await opened(path)
    image = disk.layers[0].image
    assert isinstance(image, Qcow2Image)
    for start in range(0, 64 * M, 32 * M):
        await disk.layers[0].deallocate(start, 32 * M)
        assert len(image._dropped) < 70_000
    await disk.close()
    assert_clean(path)
    # refcount blocks lie all over the file
    assert path.stat().st_blocks * 512 < 4 * M


async def test_a_power_cut_never_gives_a_cluster_to_two(tmp_path: Path) -> None:
    path = create(tmp_path / "image", "4M")
    storage = RecordingStorage("image", path.read_bytes())
    disk = Disk([Layer(await qcow2.open_image(storage))])
    rnd = random.Random(5)
    for _ in range(60):
        offset = rnd.randrange(1024) * 4 * K
        length = min(rnd.choice([4 * K, 32 * K, 128 * K]), 4 * M - offset)
        if rnd.random() < 0.6:
            await disk.write(offset, rnd.randbytes(512) * (length // 512))
        else:
            await disk.layers[0].deallocate(offset, length)
        if rnd.random() < 0.3:
            await disk.flush()
    await disk.layers[0].deallocate(0, 4 * M)
    await disk.layers[0].image.settle()
    await disk.write(3 * M, b"after the file was cut off")
    await disk.close()
    assert any(isinstance(step, int) for step in storage.steps)
    for content in [*storage.cuts(random.Random(1), 1), *list(storage.prefixes())[::7]]:
        image = await qcow2.open_image(MemoryStorage("image", content, read_only=True))
        assert not (await image.check()).corruptions
    path.write_bytes(storage.content)
    assert_clean(path)
