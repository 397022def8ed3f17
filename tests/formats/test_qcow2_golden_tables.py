"""What is wrong inside of a qcow2 image: said where it shows, in one sentence, nothing changed, in little memory."""

import logging
from pathlib import Path

import pytest
from commandline import ok, qemu_img
from goldenqcow2 import (
    BLOCK,
    CLUSTER,
    COMPRESSED,
    CONTENT,
    COPIED,
    DATA,
    END,
    L1,
    L2,
    PACKED,
    SIZE,
    SNAPSHOT_L1,
    SNAPSHOTS,
    TABLE,
    UNKNOWN,
    ZERO,
    Golden,
    in_little_memory,
    open_golden,
)  # fmt: skip
from imagetools import DATE, disk_at, disk_content, image_at
from storages import MemoryStorage

from cowfs.block.check import Repair
from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.errors import CowfsError
from cowfs.formats import qcow2
from cowfs.formats.qcow2.image import Qcow2Image

# -- what shows only where it is read

MASK = (1 << 64) - 1
READ: dict[str, tuple[Golden, str]] = {
    "L2 misaligned": (
        Golden().put(L1, L2 | 512 | COPIED),
        "L2 table at offset 0x4200 is not aligned to a cluster",
    ),
    "L2 beyond the file": (
        Golden().put(L1, END | COPIED),
        "L2 table at offset 0x9000 lies beyond the end of the file",
    ),
    "L2 far away": (
        Golden().put(L1, 0x00FF_FFFF_FFFF_F000),
        "L2 table at offset 0xfffffffffff000 lies beyond the end of the file",
    ),
    "L2 cut off": (
        Golden().put(L1, (END - CLUSTER) | COPIED).cut(END - 8),
        "L2 table at offset 0x8000 lies beyond the end of the file",
    ),
    "data misaligned": (
        Golden().put(L2, DATA | 512 | COPIED),
        "data at offset 0x5200 is not aligned to a cluster",
    ),
    "compressed data of garbage": (
        Golden().put(PACKED, MASK),
        "a compressed cluster cannot be unpacked: its bytes are no deflate data",
    ),
    "compressed data beyond the file": (
        Golden().put(L2 + 8, COMPRESSED | 1 << 40),
        "a compressed cluster reaches beyond the end of the file, which has been cut short",
    ),
    "compressed data in zeros": (
        Golden().put(L2 + 8, COMPRESSED | SNAPSHOTS),
        "a compressed cluster cannot be unpacked: its bytes are no deflate data",
    ),
    "compressed data that is zstd": (
        Golden().set(incompatible=8, compression_type=1),
        "a compressed cluster cannot be unpacked: ",
    ),
    "zero flag in version 2": (
        Golden().set(version=2).put(L2, ZERO),
        "a version 2 image has a cluster with the zero flag",
    ),
}


@pytest.mark.parametrize("case", READ)
async def test_refused_when_read(case: str) -> None:
    golden, sentence = READ[case]
    image, storage = await open_golden(golden)
    disk = Disk([Layer(image)], copy_on_read=False)

    async def attempt() -> None:
        with pytest.raises(CowfsError) as caught:
            await disk.read(0, SIZE)
        assert str(caught.value).startswith(f"image: {sentence}")

    await in_little_memory(attempt)
    await disk.close()
    assert storage.content == golden.data
    assert (await (await open_golden(golden))[0].check()).corruptions or "compressed data" in case


READS_ALL_THE_SAME: dict[str, tuple[Golden, bytes]] = {
    "corrupt bit": (Golden().set(incompatible=2), CONTENT),
    "unknown autoclear bits": (Golden().set(autoclear=MASK & ~3), CONTENT),
    "unknown compatible bits": (Golden().set(compatible=MASK), CONTENT),
    "unknown extension": (Golden().extend(UNKNOWN, b"abc"), CONTENT),
    "reserved bits in L1": (Golden().put(L1, L2 | COPIED | 0x1FF), CONTENT),
    "reserved bits in L2": (Golden().put(L2, DATA | COPIED | 0x3F00_0000_0000_01FE), CONTENT),
    "data beyond the file": (Golden().put(L2, 1 << 40 | COPIED), bytes(CLUSTER) + CONTENT[CLUSTER:]),
    "refcount block far away": (Golden().put(TABLE, 1 << 50), CONTENT),
    "no refcount block": (Golden().put(TABLE, 0), CONTENT),
    "reserved bits in the refcount table": (Golden().put(TABLE, BLOCK | 0x1FF), CONTENT),
    "backing file name of no bytes": (Golden().set(backing_offset=1024), CONTENT),
}


@pytest.mark.parametrize("case", READS_ALL_THE_SAME)
async def test_read_all_the_same(tmp_path: Path, case: str) -> None:
    """As QEMU does; what is wrong is the check's to say."""
    golden, expected = READS_ALL_THE_SAME[case]
    image, storage = await open_golden(golden)
    assert await disk_content(image) == expected
    assert storage.content == golden.data
    path = tmp_path / "image"
    path.write_bytes(golden.data)
    ok(qemu_img("convert", "-O", "raw", path, tmp_path / "flat"))
    assert (tmp_path / "flat").read_bytes() == expected


# -- what shows only where it is written

WRITTEN: dict[str, tuple[Golden, str]] = {
    "corrupt bit": (
        Golden().set(incompatible=2),
        "is marked corrupt and can only be read; repair it with 'cowfs check -r all'",
    ),
    "refcount block misaligned": (
        Golden().put(TABLE, BLOCK | 512),
        "refcount block at offset 0x2200 is not aligned to a cluster",
    ),
    "refcount block beyond the file": (
        Golden().put(TABLE, END),
        "refcount block at offset 0x9000 lies beyond the end of the file",
    ),
    "refcount block far away": (
        Golden().put(TABLE, 1 << 50),
        "refcount block at offset 0x4000000000000 lies beyond the end of the file",
    ),
    "L2 that counts as free": (
        Golden().count(4, 0),
        "has a table in host cluster 4, which counts as free; repair it with 'cowfs check -r all'",
    ),
    "refcount block that counts as free": (
        Golden().count(2, 0),
        "has a table in host cluster 2, which counts as free; repair it with 'cowfs check -r all'",
    ),
    "header that counts as free": (
        Golden().count(0, 0),
        "has a table in host cluster 0, which counts as free; repair it with 'cowfs check -r all'",
    ),
    "L2 misaligned": (
        Golden().put(L1, L2 | 512 | COPIED),
        "L2 table at offset 0x4200 is not aligned to a cluster",
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
async def test_refused_when_written(case: str) -> None:
    golden, sentence = WRITTEN[case]
    image, storage = await open_golden(golden)
    disk = Disk([Layer(image)], copy_on_read=False)

    async def attempt() -> None:
        with pytest.raises(CowfsError) as caught:
            await disk.write(20 * CLUSTER, b"something new")
        assert str(caught.value) == f"image: {sentence}"

    await in_little_memory(attempt)
    await image.close_storages()
    assert storage.content == golden.data
    # the one way to go on is open: what is not beyond repair is repaired
    assert (await (await open_golden(golden))[0].check()).corruptions or case == "corrupt bit"


# -- what has two uses

OVERLAPS = {"refcount table": TABLE, "refcount block": BLOCK, "L1": L1, "L2": L2}


@pytest.mark.parametrize("what", OVERLAPS)
async def test_data_in_the_place_of_metadata_is_read_but_not_written(tmp_path: Path, what: str) -> None:
    cluster = OVERLAPS[what] // CLUSTER
    golden = Golden().put(L2 + 8 * 40, OVERLAPS[what] | COPIED)
    sentence = f"has data in host cluster {cluster}, which holds metadata; repair it with 'cowfs check -r all'"
    image, storage = await open_golden(golden)
    disk = Disk([Layer(image)], copy_on_read=False)
    # anywhere near: in place, onto the metadata, and where something has to be allocated
    for place in (0, 40, 20):
        with pytest.raises(CowfsError) as caught:
            await disk.write(place * CLUSTER, b"something new")
        assert str(caught.value) == f"image: {sentence}"
    assert storage.content == golden.data
    # as with QEMU, there is no harm in reading
    alone = await qcow2.open_image(MemoryStorage("image", bytes(golden.data), read_only=True))
    disk = Disk([Layer(alone)], copy_on_read=False)
    found = await disk.read(0, SIZE)
    assert found[40 * CLUSTER : 41 * CLUSTER] == golden.data[OVERLAPS[what] :][:CLUSTER]
    assert found[: 40 * CLUSTER] == CONTENT[: 40 * CLUSTER]
    # what was found out while it was read holds when it shall be written
    with pytest.raises(CowfsError) as caught:
        await disk.layers[0].set_writable(True)
    assert str(caught.value) == f"image: {sentence}"
    # a repair moves the data out
    path = tmp_path / "image"
    path.write_bytes(golden.data)
    async with image_at(path) as opened:
        assert not (await opened.check(Repair.ALL)).corruptions
    ok(qemu_img("check", "-q", path))
    async with disk_at(path) as disk:
        await disk.write(20 * CLUSTER, b"something new")
        assert await disk.read(0, 20 * CLUSTER) == CONTENT[: 20 * CLUSTER]
    ok(qemu_img("check", "-q", path))


# -- the table of internal snapshots

#: the image, what is said when its snapshots are listed, and when one is shown (None: they are, and it is not)
SNAPSHOT_FAULTS: dict[str, tuple[Golden, str | None, str]] = {
    "extra data of 4 GiB": (
        Golden().snapshot().put(SNAPSHOTS + 36, 0xFFFF_FFFF, 4),
        "an entry in the table of internal snapshots is too large",
        "an entry in the table of internal snapshots is too large",
    ),
    "L1 of 2^32 - 1": (
        Golden().snapshot().put(SNAPSHOTS + 8, 0xFFFF_FFFF, 4),
        "an entry in the table of internal snapshots is too large",
        "an entry in the table of internal snapshots is too large",
    ),
    "name beyond the file": (
        Golden().snapshot().put(SNAPSHOTS + 14, 0xFFFF, 2),
        "the table of internal snapshots lies beyond the end of the file",
        "the table of internal snapshots lies beyond the end of the file",
    ),
    "entry beyond the file": (
        Golden().snapshot(name=b"n" * 200).put(SNAPSHOTS + 14, 2 * CLUSTER - 73, 2).set(snapshots=2),
        "the table of internal snapshots lies beyond the end of the file",
        "the table of internal snapshots lies beyond the end of the file",
    ),
    "L1 misaligned": (
        Golden().snapshot().put(SNAPSHOTS, SNAPSHOT_L1 + 512),
        None,
        "the L1 table of the snapshot '1' is not aligned to a cluster",
    ),
    "L1 beyond the file": (
        Golden().snapshot().put(SNAPSHOTS, 1 << 50),
        None,
        "L1 table of a snapshot at offset 0x4000000000000 lies beyond the end of the file",
    ),
    "no L1": (
        Golden().snapshot().put(SNAPSHOTS + 8, 0, 4),
        None,
        "the L1 table of the snapshot '1' is too small for its disk",
    ),
    "disk of 2^64 - 1": (
        Golden().snapshot(extra=bytes(8) + b"\xff" * 8),
        None,
        "the L1 table of the snapshot '1' is too small for its disk",
    ),
}


@pytest.mark.parametrize("case", SNAPSHOT_FAULTS)
async def test_refused_when_snapshots_are_looked_at(case: str) -> None:
    golden, listing, showing = SNAPSHOT_FAULTS[case]
    image, storage = await open_golden(golden)

    async def attempt() -> None:
        if listing is None:
            assert len(await image.snapshots()) == 1
        else:
            with pytest.raises(CowfsError) as caught:
                await image.snapshots()
            assert caught.value.message == listing
        with pytest.raises(CowfsError) as caught:
            await image.show_snapshot("1")
        assert caught.value.message == showing

    await in_little_memory(attempt)
    assert await disk_content(image) == CONTENT
    assert storage.content == golden.data


@pytest.mark.parametrize("case", SNAPSHOT_FAULTS)
async def test_nothing_changes_where_snapshots_make_no_sense(case: str) -> None:
    golden, _, _ = SNAPSHOT_FAULTS[case]
    for work in ("apply", "delete", "create"):
        image, storage = await open_golden(golden)
        disk = Disk([Layer(image)], copy_on_read=False)

        async def attempt(image: Qcow2Image = image, work: str = work) -> None:
            if work == "create":
                await image.create_snapshot("two", DATE)
            else:
                await (image.apply_snapshot("1") if work == "apply" else image.delete_snapshot("one"))

        try:
            await in_little_memory(attempt)
        except CowfsError:
            assert storage.content == golden.data
        else:
            # what that did not have to touch is as it was
            assert await disk.read(0, SIZE) == CONTENT
        await image.close_storages()


async def test_an_unknown_autoclear_bit_goes_with_the_first_write(caplog: pytest.LogCaptureFixture) -> None:
    image, storage = await open_golden(Golden().set(autoclear=MASK & ~3))
    disk = Disk([Layer(image)], copy_on_read=False)
    with caplog.at_level(logging.WARNING):
        await disk.write(0, b"in place")
    assert storage.content[88:96] == bytes(8)
    assert not caplog.messages
    await disk.close()
