"""Disks that become smaller, and larger again: qcow2 against QEMU, raw, and power cuts."""

import random
import struct
import zlib
from pathlib import Path

import pytest
import trio
from commandline import ok, qemu_img, qemu_io
from imagetools import (
    DATE,
    assert_clean,
    disk_at,
    disk_content,
    fill,
    image_at,
    in_memory,
    qemu_content,
    qemu_create,
    qemu_fill,
)
from powercut import RecordingStorage
from storages import Gate
from trio.testing import wait_all_tasks_blocked

from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.errors import OutOfRange, ReadOnly, Unsupported, UsageError
from cowfs.formats import qcow2
from cowfs.formats.chain import open_disk
from cowfs.units import parse_new_size

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

SIZE = 3_000_320
LAYOUTS: dict[str, dict[str, object]] = {
    "512": {"cluster_size": 512},
    "512, 1 bit": {"cluster_size": 512, "refcount_bits": 1},
    "4k": {"cluster_size": 4096, "refcount_bits": 64},
    "64k": {},
    "v2": {"cluster_size": 1024, "compat": "0.10"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_qemu_and_cowfs_take_turns(tmp_path: Path, layout: str) -> None:
    """Down and up again in steps of all kinds; what is cut off comes back as zeros."""
    path = tmp_path / "image"
    zeroes = layout != "v2"
    qemu_create(path, SIZE, **LAYOUTS[layout])
    qemu_fill(path, SIZE, 1, 30, zeroes=zeroes)
    model = bytearray(qemu_content(path))
    rnd = random.Random(zlib.crc32(layout.encode()))
    for turn in range(14):
        size = rnd.choice([0, 512, 1 << 19, rnd.randrange(SIZE // 512) * 512, rnd.randrange(SIZE // 512) * 512, SIZE])
        if rnd.random() < 0.4 and size:
            ok(qemu_img("resize", "-q", "-f", "qcow2", "--shrink", path, str(size)))
        else:
            async with disk_at(path) as disk:
                await (disk.shrink if size < disk.size else disk.grow)(size)
                assert disk.size == size
        model = bytearray(model[:size].ljust(size, b"\0"))
        assert qemu_content(path) == model
        assert_clean(path)
        async with disk_at(path) as disk:
            assert await disk.read(0, size) == model
            if size:
                await fill(disk, turn, 3)
            model[:] = await disk.read(0, size)
        assert_clean(path)


async def test_space_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, 64 << 20)
    qemu_io(path, "qcow2", "write 0 64M")
    async with disk_at(path) as disk:
        await disk.shrink(1 << 20)
    assert path.stat().st_blocks * 512 < 3 << 20
    assert_clean(path)


async def test_l1_entries_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE, cluster_size=512)
    async with disk_at(path) as disk:
        await disk.shrink(40_000 // 512 * 512)
    assert struct.unpack(">I", path.read_bytes()[36:40])[0] == 2
    assert_clean(path)


async def test_internal_snapshots_keep_what_they_have(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE, cluster_size=4096)
    qemu_fill(path, SIZE, 5, 30)
    before = qemu_content(path)
    ok(qemu_img("snapshot", "-c", "whole", path))
    qemu_fill(path, SIZE, 6, 5)
    async with disk_at(path) as disk:
        await disk.shrink(1_000_448)
        await fill(disk, 1)
    assert_clean(path)
    shown = await open_disk(str(path), snapshot="whole")
    assert await shown.read(0, shown.size) == before
    await shown.close()
    async with image_at(path) as image:
        await image.create_snapshot("short", DATE)
        await image.apply_snapshot("whole")
    assert qemu_content(path) == before
    ok(qemu_img("snapshot", "-a", "short", path))
    assert len(qemu_content(path)) == 1_000_448
    assert_clean(path)


async def test_a_compressed_cluster_is_cut(tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(b"".join(bytes([n % 251]) * 700 for n in range(3000))[:2_000_384])
    for compression in ("zlib", "zstd"):
        options = f"cluster_size=64k,compression_type={compression}"
        ok(qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path))
        async with disk_at(path) as disk:
            await disk.shrink(1_000_448)
            await disk.grow(2_000_384)
        assert_clean(path)
        assert qemu_content(path) == raw.read_bytes()[:1_000_448].ljust(2_000_384, b"\0")


async def test_a_backing_file_does_not_shine_through_again(tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "top"
    base.write_bytes(random.Random(1).randbytes(SIZE))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", path))
    async with disk_at(path) as disk:
        await disk.write(1_000_000, b"here")
        await disk.shrink(1_234_432)
        await disk.grow(SIZE)
        model = bytes(await disk.read(0, SIZE))
    expected = bytearray(base.read_bytes()[:1_234_432].ljust(SIZE, b"\0"))
    expected[1_000_000:1_000_004] = b"here"
    assert model == expected
    assert qemu_content(path) == expected
    assert_clean(path)


async def test_extended_l2_entries(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE, extended_l2="on", cluster_size="64k")
    qemu_fill(path, SIZE, 3, 30)
    model = qemu_content(path)
    for size in (2_500_096, 1_000_448, 65_536, 512):
        async with disk_at(path) as disk:
            await disk.shrink(size)
        assert_clean(path)
        assert qemu_content(path) == model[:size]
    ok(qemu_img("resize", "-q", path, str(SIZE)))
    assert qemu_content(path) == model[:512].ljust(SIZE, b"\0")


async def test_what_lies_behind_the_disk_does_not_become_part_of_it(tmp_path: Path) -> None:
    """QEMU keeps the state of a machine behind the disk; applying a snapshot leaves it there."""
    path = tmp_path / "image"
    qemu_create(path, 9 << 20, cluster_size=4096)
    qemu_io(path, "qcow2", "write -P 1 0 1M", "write -P 9 4M 3M")
    data = bytearray(path.read_bytes())
    data[24:32] = (4 << 20).to_bytes(8, "big")
    path.write_bytes(data)
    assert_clean(path)
    async with disk_at(path) as disk:
        await disk.grow(8 << 20)
        assert await disk.read(4 << 20, 4 << 20) == bytes(4 << 20)
    assert_clean(path)
    assert qemu_content(path) == (b"\1" * (1 << 20)).ljust(8 << 20, b"\0")


async def test_raw(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 100_000)
    async with disk_at(path) as disk:
        await disk.shrink(70_001)
        with pytest.raises(OutOfRange):
            await disk.write(70_000, b"ab")
        await disk.grow(80_000)
        assert await disk.read(0, 80_000) == b"x" * 70_001 + bytes(9_999)
    assert path.stat().st_size == 80_000


async def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "image"
    ok(qemu_img("create", "-q", "-f", "qed", path, "1M"))
    async with disk_at(path) as disk:
        with pytest.raises(Unsupported, match="qed images cannot be made smaller") as caught:
            await disk.shrink(1 << 19)
        assert caught.value.file == str(path)
    qemu_create(path, SIZE)
    async with disk_at(path) as disk:
        with pytest.raises(UsageError, match="no multiple of 512"):
            await disk.shrink(1000)
        with pytest.raises(UsageError, match="more than the disk has"):
            await disk.shrink(SIZE + 512)
        await disk.shrink(SIZE)
    disk = await open_disk(str(path))
    with pytest.raises(ReadOnly):
        await disk.shrink(512)
    await disk.close()
    qemu_create(path, SIZE, compat="0.10")
    ok(qemu_img("snapshot", "-c", "one", path))
    before = path.read_bytes()
    async with disk_at(path) as disk:
        for change in (disk.shrink(512), disk.grow(2 * SIZE)):
            with pytest.raises(Unsupported, match="version 2 image that has snapshots cannot be resized"):
                await change
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "size"), [("10", 10), ("1k", 1024), ("+1k", 2024), ("-1", 999), (" +0 ", 1000), ("-0.5k", 488)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_new_size(text, 1000) == size


@pytest.mark.parametrize("text", ["", "+", "-", "0", "-1000", "-1k", "++1", "x", "+8E", "9E", "--shrink"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_new_size(text, 1000)


# -- power cuts, and readers


@pytest.mark.parametrize("with_snapshot", [False, True])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
async def test_power_cuts(tmp_path: Path, cluster_size: int, with_snapshot: bool) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE, cluster_size=cluster_size)
    qemu_fill(path, SIZE, 1, 30)
    if with_snapshot:
        ok(qemu_img("snapshot", "-c", "one", path))
        qemu_fill(path, SIZE, 2, 5)
    model = qemu_content(path)
    storage = RecordingStorage("image", path.read_bytes())
    image = await qcow2.open_image(storage)
    await image.shrink(1_234_432)
    await image.close()
    sizes = []
    for content in dict.fromkeys([*storage.prefixes(), *storage.cuts(random.Random(1), 3)]):
        cut = await in_memory(content)
        found = await cut.check()
        assert (found.corruptions, found.leaks) == (0, 0), found.messages
        assert await disk_content(cut) == model[: cut.size]
        sizes.append(cut.size)
    assert set(sizes) == {SIZE, 1_234_432}
    path.write_bytes(storage.content)
    assert_clean(path)


async def test_a_reader_in_the_middle_reads_what_was_there() -> None:
    storage = RecordingStorage("image", b"")
    await qcow2.create(storage, SIZE, None, {"cluster_size": "4k"})
    disk = Disk([Layer(await qcow2.open_image(storage))], copy_on_read=False)
    await disk.write(0, b"x" * SIZE)
    await disk.flush()
    storage.cold = True
    gate = storage.gates["read"] = Gate()
    seen = []

    async def read() -> None:
        seen.append(bytes(await disk.read(SIZE - 100_000, 100_000)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await gate.arrived.wait()
        del storage.gates["read"]
        nursery.start_soon(disk.shrink, 512)
        await wait_all_tasks_blocked()
        assert disk.size == 512
        gate.open()
    assert seen == [b"x" * 100_000]
    assert sum(length for kind, _, length in storage.log if kind == "punch") > SIZE * 9 // 10
    await disk.grow(SIZE)
    assert await disk.read(0, SIZE) == b"x" * 512 + bytes(SIZE - 512)


async def test_a_disk_grows_by_whole_sectors_only(tmp_path: Path) -> None:
    path = tmp_path / "image"
    ok(qemu_img("create", "-q", "-f", "qcow2", path, "1M"))
    disk = await open_disk(str(path), writable=True)
    with pytest.raises(UsageError, match="1500001 bytes is no multiple of 512"):
        await disk.grow(1_500_001)
    assert disk.size == 1 << 20
    await disk.close()
