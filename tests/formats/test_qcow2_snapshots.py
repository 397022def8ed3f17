"""Internal snapshots of qcow2: QEMU and cowfs on the same images, in turns; and power cuts."""

import random
import struct
from pathlib import Path

import pytest
from commandline import ok, qemu_img, qemu_io
from imagetools import (
    DATE,
    assert_clean,
    disk_at,
    fill,
    image_at,
    qemu_content,
    qemu_create,
    qemu_fill,
    qemu_snapshots,
)

from cowfs.errors import NotFound, ReadOnly
from cowfs.formats.chain import open_disk, open_image
from cowfs.formats.qcow2.image import Qcow2Image
from cowfs.formats.qcow2.snapshots import Snapshot, read_snapshots

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

SIZE = 2_000_384


async def content(path: Path, snapshot: str | None = None) -> bytes:
    disk = await open_disk(str(path), snapshot=snapshot)
    try:
        return bytes(await disk.read(0, disk.size))
    finally:
        await disk.close()


async def test_what_is_there_afterwards_is_what_qemu_makes(tmp_path: Path) -> None:
    """Names, ids and table entries, byte by byte but for the date and where L1 lies."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    qemu_create(theirs, SIZE)
    qemu_fill(theirs, SIZE, 1)
    mine.write_bytes(theirs.read_bytes())
    for name in ("one", "2", "größe", "one", ""):
        ok(qemu_img("snapshot", "-c", name, theirs))
        async with image_at(mine) as image:
            await image.create_snapshot(name, DATE)
    for name in ("2", "one"):
        ok(qemu_img("snapshot", "-d", name, theirs))
        async with image_at(mine) as image:
            await image.delete_snapshot(name)
    ok(qemu_img("snapshot", "-c", "last", theirs))
    async with image_at(mine) as image:
        await image.create_snapshot("last", DATE)
        found = await image.snapshots()
    assert [(s.id, s.name) for s in found] == [("3", "größe"), ("4", "one"), ("5", ""), ("6", "last")]
    tables = []
    for path in (mine, theirs):
        other = await open_image(str(path))
        assert isinstance(other, Qcow2Image)
        snapshots, _ = await read_snapshots(other.storage, other.header)
        tables.append([(s.id, s.name, s.l1_entries, s.vm_clock, s.vm_state_size, s.extra) for s in snapshots])
        await other.close()
    assert tables[0] == tables[1]
    facts = qemu_snapshots(mine)
    assert [(fact["date-sec"], fact["date-nsec"]) for fact in facts] == [DATE] * 4


async def test_ids_count_before_names_where_a_snapshot_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE)
    async with image_at(path) as image:
        await image.create_snapshot("2", DATE)
    qemu_io(path, "qcow2", "write -P 7 0 64k")
    async with image_at(path) as image:
        await image.create_snapshot("named", DATE)
        await image.apply_snapshot("2")
    assert (await content(path))[:4] == b"\7\7\7\7"
    assert (await content(path, "2"))[:4] == b"\7\7\7\7"
    async with image_at(path) as image:
        with pytest.raises(NotFound, match="there is no snapshot '1'"):
            await image.delete_snapshot("1")
        await image.delete_snapshot("2")
        assert [snapshot.id for snapshot in await image.snapshots()] == ["2"]


async def test_a_snapshot_of_another_size_brings_its_size_back(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE, cluster_size=512)
    qemu_fill(path, SIZE, 1)
    small = qemu_content(path)
    async with image_at(path) as image:
        await image.create_snapshot("small", DATE)
    async with disk_at(path) as disk:
        await disk.grow(9 << 20)
        await disk.write((9 << 20) - 5, b"large")
    large = qemu_content(path)
    ok(qemu_img("snapshot", "-c", "large", path))
    for name, data in (("small", small), ("large", large), ("small", small)):
        async with image_at(path) as image:
            await image.apply_snapshot(name)
            assert image.size == len(data)
        assert qemu_content(path) == data
        assert_clean(path)
    assert await content(path, "large") == large
    ok(qemu_img("snapshot", "-a", "large", path))
    assert await content(path) == large
    assert await content(path, "small") == small


async def test_compressed_clusters_are_shared(tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(b"".join(bytes([n % 251]) * 700 for n in range(3000)).ljust(2_100_224, b"\0"))
    ok(qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, path))
    async with image_at(path) as image:
        await image.create_snapshot("packed", DATE)
    assert_clean(path)
    async with disk_at(path) as disk:
        await fill(disk, 4)
        changed = bytes(await disk.read(0, disk.size))
    assert_clean(path)
    assert await content(path, "packed") == raw.read_bytes()
    async with image_at(path) as image:
        await image.create_snapshot("changed", DATE)
        await image.apply_snapshot("packed")
        await image.delete_snapshot("packed")
    assert_clean(path)
    assert qemu_content(path) == raw.read_bytes()
    ok(qemu_img("snapshot", "-a", "changed", path))
    assert qemu_content(path) == changed


async def test_extended_l2_entries(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE, extended_l2="on", cluster_size="16k")
    qemu_fill(path, SIZE, 3)
    before = qemu_content(path)
    async with image_at(path) as image:
        await image.create_snapshot("one", DATE)
    assert_clean(path)
    qemu_fill(path, SIZE, 4)
    async with image_at(path) as image:
        await image.apply_snapshot("one")
        await image.delete_snapshot("one")
    assert_clean(path)
    assert qemu_content(path) == before


async def test_space_is_given_back_and_used_again(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, 64 << 20, cluster_size=512)
    qemu_io(path, "qcow2", "write -P 1 0 8M")
    length = path.stat().st_size
    for turn in range(6):
        async with image_at(path) as image:
            await image.create_snapshot("one", DATE)
        async with disk_at(path) as disk:
            await disk.write(1 << 20, bytes([turn + 2]) * (1 << 20))
        async with image_at(path) as image:
            await image.apply_snapshot("one")
            await image.delete_snapshot("one")
        assert path.stat().st_size <= length + (2 << 20)
        assert path.stat().st_blocks * 512 <= length + (1 << 20)
    assert_clean(path)


def _l1_of(data: bytearray, entry: int) -> tuple[int, int]:
    offset, entries = struct.unpack_from(">QI", data, entry)
    return offset, entries


async def test_extra_data_that_is_unknown_stays(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE)
    async with image_at(path) as image:
        await image.create_snapshot("old", DATE)
    data = bytearray(path.read_bytes())
    offset = int.from_bytes(data[64:72], "big")
    entry = Snapshot(
        *_l1_of(data, offset),
        b"1",
        b"old",
        DATE,
        77,
        5,
        struct.pack(">QQQ", 5, SIZE, 99) + b"from the future!",
    )
    data[offset : offset + len(entry.pack())] = entry.pack()
    path.write_bytes(data)
    async with image_at(path) as image:
        await image.create_snapshot("new", DATE)
        snapshots = await image.snapshots()
        assert (snapshots[0].icount, snapshots[0].vm_clock, snapshots[0].vm_state_size) == (99, 77, 5)
        assert isinstance(image, Qcow2Image)
        (found, _), kept = await read_snapshots(image.storage, image.header), entry
        assert found[0] == kept
        await image.apply_snapshot("old")
        await image.delete_snapshot("new")
        (found, _) = await read_snapshots(image.storage, image.header)
        assert found == [kept]
    assert_clean(path)


async def test_version_2_entries_without_extra_data(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE, compat="0.10")
    qemu_fill(path, SIZE, 2, zeroes=False)
    before = qemu_content(path)
    async with image_at(path) as image:
        await image.create_snapshot("bare", DATE)
    data = bytearray(path.read_bytes())
    offset = int.from_bytes(data[64:72], "big")
    bare = Snapshot(*_l1_of(data, offset), b"1", b"bare", DATE, 0, 0, b"").pack()
    data[offset : offset + 80] = bare.ljust(80, b"\0")
    path.write_bytes(data)
    async with disk_at(path) as disk:
        await fill(disk, 3)
    assert await content(path, "bare") == before
    async with image_at(path) as image:
        assert (await image.snapshots())[0].disk_size == SIZE
        await image.apply_snapshot("bare")
    assert qemu_content(path) == before
    assert_clean(path)


async def test_a_disk_without_anything(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, 0)
    async with image_at(path) as image:
        await image.create_snapshot("nothing", DATE)
    assert_clean(path)
    ok(qemu_img("snapshot", "-a", "nothing", path))
    ok(qemu_img("snapshot", "-c", "more of it", path))
    async with image_at(path) as image:
        await image.apply_snapshot("more of it")
        await image.delete_snapshot("nothing")
        await image.delete_snapshot("more of it")
    assert_clean(path)


async def test_under_a_backing_file_and_over_one(tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "top"
    base.write_bytes(random.Random(1).randbytes(SIZE))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", path))
    async with image_at(path) as image:
        await image.create_snapshot("only the base", DATE)
    async with disk_at(path) as disk:
        await fill(disk, 1)
    assert await content(path, "only the base") == base.read_bytes()
    async with image_at(path) as image:
        await image.apply_snapshot("only the base")
    assert qemu_content(path) == base.read_bytes()
    assert_clean(path)


async def test_a_shown_snapshot_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE)
    async with image_at(path) as image:
        await image.create_snapshot("one", DATE)
    before = path.read_bytes()
    with pytest.raises(ReadOnly, match="shows the internal snapshot 'one', which can only be read"):
        await open_disk(str(path), writable=True, snapshot="one")
    disk = await open_disk(str(path), snapshot="1")
    with pytest.raises(ReadOnly, match="shows the internal snapshot '1'"):
        await disk.write(0, b"x")
    await disk.close()
    with pytest.raises(NotFound, match="there is no snapshot 'two'") as caught:
        await open_disk(str(path), snapshot="two")
    assert caught.value.file == str(path)
    assert path.read_bytes() == before


async def test_writers_go_on_after_a_change(tmp_path: Path) -> None:
    """The image that made the snapshot is the one that is written to: nothing stale is left in memory."""
    path = tmp_path / "image"
    qemu_create(path, SIZE, cluster_size=4096)
    async with disk_at(path) as disk:
        image = disk.layers[0].image
        await fill(disk, 1)
        states = []
        for turn in range(4):
            states.append(bytes(await disk.read(0, SIZE)))
            await image.create_snapshot(f"turn {turn}", DATE)
            await fill(disk, turn + 2)
        await image.delete_snapshot("turn 1")
        await fill(disk, 50)
        await image.apply_snapshot("turn 2")
        assert await disk.read(0, SIZE) == states[2]
        await fill(disk, 51)
        last = bytes(await disk.read(0, SIZE))
    assert_clean(path)
    assert qemu_content(path) == last
    for turn in (0, 2, 3):
        assert await content(path, f"turn {turn}") == states[turn]
        ok(qemu_img("snapshot", "-a", f"turn {turn}", path))
        assert qemu_content(path) == states[turn]
