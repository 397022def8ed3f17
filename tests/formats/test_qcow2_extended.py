"""qcow2 with extended L2 entries: beside QEMU on the same images, subcluster by subcluster."""

import random
from pathlib import Path

import pytest
import trio
from qcow2twin import MASK, Twin, assert_same_check, damage, qemu, qemu_check
from storages import Gate, MemoryStorage
from trio.testing import wait_all_tasks_blocked

from cowfs.block.disk import Disk
from cowfs.block.extent import Kind
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.errors import CorruptImage, CowfsError, UsageError
from cowfs.formats import qcow2
from cowfs.formats.chain import open_disk
from cowfs.formats.create import create_image
from cowfs.formats.raw import RawImage
from cowfs.jobs.commit import Commit
from cowfs.jobs.stream import Stream

SIZE = 3_000_832
CLUSTER = 65_536
UNIT = 2048


async def test_a_write_copies_a_subcluster_and_no_more(tmp_path: Path) -> None:
    twin = await Twin(tmp_path, SIZE, base_size=SIZE).create(extended_l2="on")
    disk = await open_disk(str(twin.path), writable=True)
    await disk.write(CLUSTER + 3 * UNIT + 5, b"x")
    await disk.write(CLUSTER + 7 * UNIT, b"y" * UNIT * 2)
    await disk.zero_layer(0, CLUSTER + 20 * UNIT, UNIT)
    extents = await disk.layers[0].map(CLUSTER, CLUSTER)
    host = extents[1].host_offset - 3 * UNIT
    assert [(kind, (offset - CLUSTER) // UNIT, length // UNIT, place) for kind, offset, length, place in extents] == [
        (Kind.UNALLOCATED, 0, 3, host),
        (Kind.DATA, 3, 1, host + 3 * UNIT),
        (Kind.UNALLOCATED, 4, 3, host + 4 * UNIT),
        (Kind.DATA, 7, 2, host + 7 * UNIT),
        (Kind.UNALLOCATED, 9, 11, host + 9 * UNIT),
        (Kind.ZERO, 20, 1, host + 20 * UNIT),
        (Kind.UNALLOCATED, 21, 11, host + 21 * UNIT),
    ]
    twin.model[CLUSTER + 3 * UNIT + 5] = ord("x")
    twin.model[CLUSTER + 7 * UNIT : CLUSTER + 9 * UNIT] = b"y" * UNIT * 2
    twin.model[CLUSTER + 20 * UNIT : CLUSTER + 21 * UNIT] = bytes(UNIT)
    # one read of the last 4 KiB of a cluster copies these up, not the cluster
    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        await disk.readinto(3 * CLUSTER - 4096, memoryview(bytearray(4096)))
        await disk.populated()
        nursery.cancel_scope.cancel()
    assert [(e.kind, e.length) for e in await disk.layers[0].map(2 * CLUSTER, CLUSTER)] == [
        (Kind.UNALLOCATED, CLUSTER - 4096),
        (Kind.DATA, 4096),
    ]
    await disk.close()
    await twin.verify()
    assert qemu_check(twin.path)["allocated-clusters"] == 2


async def test_a_cluster_of_which_nothing_is_left_gives_its_place_back(tmp_path: Path) -> None:
    twin = await Twin(tmp_path, SIZE).create(extended_l2="on")
    disk = await open_disk(str(twin.path), writable=True)
    await disk.write(0, b"x" * 2 * UNIT)
    await disk.zero_layer(0, 0, UNIT)
    await disk.zero_layer(0, UNIT, UNIT)
    await disk.close()
    await twin.verify()
    assert "allocated-clusters" not in qemu_check(twin.path)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
async def test_compressed_clusters_are_unpacked_when_a_part_is_written(tmp_path: Path, compression: str) -> None:
    twin = Twin(tmp_path, SIZE)
    twin.model[:] = b"".join(bytes([twin.rnd.randrange(256)]) * 4096 for _ in range(SIZE // 4096 + 1))[:SIZE]
    (tmp_path / "flat").write_bytes(twin.model)
    options = f"extended_l2=on,compression_type={compression}"
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "flat", "top", cwd=tmp_path)
    await twin.verify()
    disk = await open_disk(str(twin.path), writable=True)
    await disk.write(5 * CLUSTER + 3 * UNIT, b"part")
    twin.model[5 * CLUSTER + 3 * UNIT : 5 * CLUSTER + 3 * UNIT + 4] = b"part"
    await disk.zero_layer(0, 7 * CLUSTER + 5 * UNIT, UNIT)
    twin.model[7 * CLUSTER + 5 * UNIT : 7 * CLUSTER + 6 * UNIT] = bytes(UNIT)
    await disk.layers[0].deallocate(9 * CLUSTER, CLUSTER)
    twin.model[9 * CLUSTER : 10 * CLUSTER] = bytes(CLUSTER)
    await disk.close()
    await twin.verify()
    await twin.use()
    await twin.verify()


async def test_clusters_shared_with_snapshots_are_copied_with_what_a_write_leaves_of_them(tmp_path: Path) -> None:
    twin = await Twin(tmp_path, SIZE, base_size=SIZE).create(extended_l2="on", cluster_size="16k")
    await twin.use()
    qemu("qemu-img", "snapshot", "-c", "one", "top", cwd=tmp_path)
    before = bytes(twin.model)
    await twin.use()
    await twin.verify()
    twin.use_with_qemu()
    await twin.use()
    await twin.verify()
    qemu("qemu-img", "snapshot", "-a", "one", "top", cwd=tmp_path)
    twin.model[:] = before
    await twin.verify()
    qemu("qemu-img", "snapshot", "-d", "one", "top", cwd=tmp_path)
    await twin.use()
    await twin.verify()


async def test_space_that_qemu_has_set_aside_is_written_in_place(tmp_path: Path) -> None:
    twin = Twin(tmp_path, SIZE, base_size=SIZE).create_with_qemu(extended_l2="on", preallocation="metadata")
    used = qemu_check(twin.path)["image-end-offset"]
    disk = await open_disk(str(twin.path), writable=True)
    for _ in range(30):
        offset = twin.rnd.randrange(SIZE - 9000)
        data = twin.rnd.randbytes(twin.rnd.randrange(9000))
        await disk.write(offset, data)
        twin.model[offset : offset + len(data)] = data
    await disk.close()
    await twin.verify()
    assert qemu_check(twin.path)["image-end-offset"] == used


@pytest.mark.parametrize("preallocation", ["metadata", "falloc"])
async def test_preallocation(tmp_path: Path, preallocation: str) -> None:
    twin = await Twin(tmp_path, SIZE).create(extended_l2="on", preallocation=preallocation)
    await twin.verify()
    await twin.use()
    await twin.verify()


@pytest.mark.parametrize("base_size", [None, SIZE * 2])
async def test_growing(tmp_path: Path, base_size: int | None) -> None:
    twin = await Twin(tmp_path, SIZE, base_size=base_size).create(extended_l2="on")
    await twin.use(10)
    # QEMU leaves what it cuts off in the rest of the last cluster
    qemu("qemu-img", "resize", "-q", "--shrink", "top", SIZE - 10_240, cwd=tmp_path)
    disk = await open_disk(str(twin.path), writable=True)
    await disk.grow(SIZE + 1_000_448)
    await disk.close()
    twin.size = SIZE + 1_000_448
    twin.model[SIZE - 10_240 :] = bytes(10_240 + 1_000_448)
    await twin.verify()
    await twin.use()
    await twin.verify()


@pytest.mark.parametrize("job", [Commit, Stream])
async def test_jobs(tmp_path: Path, job: type[Commit | Stream]) -> None:
    twin = await Twin(tmp_path, SIZE, base_size=SIZE).create(extended_l2="on")
    await twin.use()
    disk = await open_disk(str(twin.path), writable=True)
    work = job(disk)
    await work.run()
    assert work.state.value == "completed", work.error
    await disk.close()
    if job is Commit:
        assert (tmp_path / "base").read_bytes() == twin.model
        assert "allocated-clusters" not in qemu_check(twin.path)
    else:
        (tmp_path / "base").unlink()
    await twin.verify()


async def test_commit_into_an_image_with_subclusters(tmp_path: Path) -> None:
    twin = await Twin(tmp_path, SIZE, base_size=SIZE).create(extended_l2="on")
    await twin.use()
    await create_image(str(tmp_path / "upper"), "qcow2", SIZE, Backing("top", "qcow2"), {"cluster_size": "4k"})
    disk = await open_disk(str(tmp_path / "upper"), writable=True)
    for _ in range(20):
        offset = twin.rnd.randrange(SIZE - 9000)
        data = twin.rnd.randbytes(twin.rnd.randrange(9000))
        await disk.write(offset, data)
        twin.model[offset : offset + len(data)] = data
    work = Commit(disk)
    await work.run()
    assert work.state.value == "completed", work.error
    await disk.close()
    await twin.verify()


@pytest.mark.parametrize("seed", range(40))
async def test_check_counts_what_qemu_counts_on_damaged_images(tmp_path: Path, seed: int) -> None:
    twin = Twin(tmp_path, SIZE, seed)
    options = {"data_file": "data"} if seed % 4 == 0 else {}
    twin.create_with_qemu(extended_l2="on", cluster_size=twin.rnd.choice(["16k", "64k"]), **options)
    twin.use_with_qemu()
    damage(twin.path, twin.rnd, 16)
    await assert_same_check(twin.path)


# -- races


async def in_memory(tmp_path: Path) -> tuple[MemoryStorage, Disk, bytearray]:
    """Make an empty overlay in memory over a raw base."""
    base = bytearray(random.Random(2).randbytes(SIZE))
    await create_image(str(tmp_path / "top"), "qcow2", SIZE, None, {"extended_l2": "on"})
    storage = MemoryStorage("top", (tmp_path / "top").read_bytes(), cold=True)
    image = await qcow2.open_image(storage)
    below = MemoryStorage("base", bytes(base), read_only=True)
    return storage, Disk([Layer(image), Layer(RawImage(below))]), base


async def test_first_writes_to_two_subclusters_of_a_cluster_do_not_lose_each_other(tmp_path: Path) -> None:
    top, disk, model = await in_memory(tmp_path)
    await disk.write(0, b"begin")
    top.gates["write"] = gate = Gate()
    async with trio.open_nursery() as nursery:
        for number in (5, 17, 6, 31):
            data = bytes([number]) * 100
            model[number * UNIT + 50 : number * UNIT + 150] = data
            nursery.start_soon(disk.write, number * UNIT + 50, data)
        await gate.arrived.wait()
        await wait_all_tasks_blocked()
        gate.open()
    model[:5] = b"begin"
    assert await disk.read(0, SIZE) == model
    image = disk.layers[0].image
    await image.flush()
    assert not (await image.check()).messages


async def test_a_failed_first_write_leaves_the_cluster_as_it_was(tmp_path: Path) -> None:
    top, disk, model = await in_memory(tmp_path)
    await disk.write(0, b"begin")
    model[:5] = b"begin"
    for offset in (10 * UNIT, CLUSTER + UNIT):
        top.failures["write"] = [CowfsError("no more")]
        with pytest.raises(CowfsError, match="no more"):
            await disk.write(offset, b"x" * 5000)
        assert await disk.read(0, SIZE) == model
    await disk.layers[0].image.flush()
    await disk.layers[0].image.settle()
    assert not (await disk.layers[0].image.check()).messages


# -- bad input


@pytest.mark.parametrize(
    ("descriptor", "bitmap", "sentence"),
    [
        (None, 1 << 32 | 1, "a subcluster is both allocated and zeros"),
        (0, 1, "a subcluster is allocated in a cluster that has no place"),
        (1 << 62, 1, "a compressed cluster has subclusters"),
        (1, 0, "an extended L2 entry has the zero flag of a standard one"),
        (1 << 63 | 0x10200, 0, "data at offset 0x10200 is not aligned to a cluster"),
    ],
)
async def test_entries_that_make_no_sense_are_errors(
    tmp_path: Path, descriptor: int | None, bitmap: int, sentence: str
) -> None:
    twin = await Twin(tmp_path, SIZE).create(extended_l2="on", preallocation="metadata")
    content = bytearray(twin.path.read_bytes())
    l1 = int.from_bytes(content[40:48], "big")
    table = int.from_bytes(content[l1 : l1 + 8], "big") & MASK
    if descriptor is not None:
        content[table : table + 8] = descriptor.to_bytes(8, "big")
    content[table + 8 : table + 16] = bitmap.to_bytes(8, "big")
    twin.path.write_bytes(content)
    disk = await open_disk(str(twin.path), writable=True)
    for use in (disk.read(0, 512), disk.write(0, b"x"), disk.zero_layer(0, 0, UNIT)):
        with pytest.raises(CorruptImage) as caught:
            await use
        assert str(caught.value) == f"{twin.path}: {sentence}"
    await disk.close()
    assert twin.path.read_bytes() == content


@pytest.mark.parametrize("options", [{"cluster_size": "8k"}, {"compat": "0.10"}])
async def test_create_refuses_what_qemu_refuses(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"extended_l2 needs compat=1\.1 and clusters of 16k or more"):
        await create_image(str(tmp_path / "top"), "qcow2", SIZE, None, {"extended_l2": "on", **options})
