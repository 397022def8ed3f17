"""QED: hostile files, and making new ones."""

import struct
from pathlib import Path

import pytest
from qedtools import (
    M,
    assert_clean,
    disk_over,
    drop,
    header_on_disk,
    image_of,
    make,
    opened,
    patch,
    qemu_create,
    qemu_io,
)
from storages import MemoryStorage

from cowfs.block.image import Backing
from cowfs.errors import CorruptImage, CowfsError, InvalidImage, Unsupported, UsageError
from cowfs.formats import qed
from cowfs.formats.qed.layout import Header, max_size

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
        assert await disk.layers[0].image.details() == {}
