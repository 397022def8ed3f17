"""Internal snapshots of qcow2: QEMU and cowfs on the same images, in turns; and power cuts."""

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
    qemu_snapshots,
)
from recording import RecordingStorage
from storages import Gate
from trio.testing import wait_all_tasks_blocked

from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.errors import CorruptImage, CowfsError, NotFound, ReadOnly, StorageError, Unsupported, UsageError
from cowfs.formats import qcow2
from cowfs.formats.chain import open_disk, open_image
from cowfs.formats.qcow2.image import Qcow2Image
from cowfs.formats.qcow2.layout import parse_header
from cowfs.formats.qcow2.snapshots import Snapshot, read_snapshots

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

SIZE = 2_000_384

LAYOUTS: dict[str, dict[str, object]] = {
    "512": {"cluster_size": 512},
    "4k": {"cluster_size": 4096},
    "64k": {},
    "v2": {"cluster_size": 1024, "compat": "0.10"},
    **{f"{bits} bits": {"cluster_size": 4096, "refcount_bits": bits} for bits in (2, 4, 8, 32, 64)},
}


async def content(path: Path, snapshot: str | None = None) -> bytes:
    disk = await open_disk(str(path), snapshot=snapshot)
    try:
        return bytes(await disk.read(0, disk.size))
    finally:
        await disk.close()


class Pair:
    """An image, and what it and its snapshots ought to hold."""

    def __init__(self, path: Path, layout: dict[str, object], seed: int) -> None:
        self.path = path
        self.rnd = random.Random(seed)
        qemu_create(path, SIZE, **layout)
        self.kept: dict[str, bytes] = {}
        self.zeroes = layout.get("compat") != "0.10"
        self.most = 2 if layout.get("refcount_bits") == 2 else 4

    async def write(self) -> None:
        if self.rnd.random() < 0.5:
            qemu_fill(self.path, SIZE, self.rnd.randrange(1000), zeroes=self.zeroes)
        else:
            async with disk_at(self.path) as disk:
                await fill(disk, self.rnd.randrange(1000))

    async def create(self) -> None:
        if len(self.kept) == self.most:
            return
        name = f"snapshot {self.rnd.randrange(1_000_000)}"
        self.kept[name] = qemu_content(self.path)
        if self.rnd.random() < 0.5:
            ok(qemu_img("snapshot", "-c", name, self.path))
        else:
            async with image_at(self.path) as image:
                await image.create_snapshot(name, DATE)

    async def apply(self) -> None:
        if self.kept:
            name = self.rnd.choice(list(self.kept))
            if self.rnd.random() < 0.5:
                ok(qemu_img("snapshot", "-a", name, self.path))
            else:
                async with image_at(self.path) as image:
                    await image.apply_snapshot(name)
            assert qemu_content(self.path) == self.kept[name]

    async def delete(self) -> None:
        if self.kept:
            name = self.rnd.choice(list(self.kept))
            del self.kept[name]
            if self.rnd.random() < 0.5:
                ok(qemu_img("snapshot", "-d", name, self.path))
            else:
                async with image_at(self.path) as image:
                    await image.delete_snapshot(name)

    async def verify(self) -> None:
        assert_clean(self.path)
        image = await open_image(str(self.path))
        found = await image.check()
        assert (found.corruptions, found.leaks) == (0, 0), found.messages
        assert [snapshot.name for snapshot in await image.snapshots()] == list(self.kept)
        await image.close()
        assert await content(self.path) == qemu_content(self.path)
        for name, data in self.kept.items():
            assert await content(self.path, name) == data


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_qemu_and_cowfs_take_turns(tmp_path: Path, layout: str) -> None:
    pair = Pair(tmp_path / "image", LAYOUTS[layout], zlib.crc32(layout.encode()))
    await pair.write()
    steps = [pair.create, pair.create, pair.apply, pair.delete]
    for number in range(12):
        before = qemu_content(pair.path)
        step = pair.rnd.choice(steps) if number else pair.create
        await step()
        if step != pair.apply:
            assert qemu_content(pair.path) == before
        await pair.verify()
        await pair.write()
        assert_clean(pair.path)
    for name in list(pair.kept):
        async with image_at(pair.path) as image:
            await image.delete_snapshot(name)
        del pair.kept[name]
    await pair.verify()


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
    """Whether or not such images can be opened for reading and writing, their metadata is understood here."""
    path = tmp_path / "image"
    qemu_create(path, SIZE, extended_l2="on", cluster_size="16k")
    qemu_fill(path, SIZE, 3)
    try:
        await (await open_image(str(path))).close()
    except Unsupported:
        pytest.skip("extended L2 entries are not supported")
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


# -- refusals


async def test_counts_of_one_bit_hold_no_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE, refcount_bits=1)
    before = path.read_bytes()
    async with image_at(path) as image:
        with pytest.raises(Unsupported, match="reference counts of 1 bit cannot count what snapshots share"):
            await image.create_snapshot("one", DATE)
    assert path.read_bytes() == before


async def test_counts_that_are_full_refuse_one_more(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE, refcount_bits=2)
    qemu_io(path, "qcow2", "write 0 64k")
    async with image_at(path) as image:
        await image.create_snapshot("one", DATE)
        await image.create_snapshot("two", DATE)
    before = path.read_bytes()
    async with image_at(path) as image:
        with pytest.raises(Unsupported, match="reference counts of 2 bits are too narrow for one more snapshot"):
            await image.create_snapshot("three", DATE)
    assert path.read_bytes() == before
    assert_clean(path)


async def test_images_with_a_data_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE, data_file=tmp_path / "data")
    async with image_at(path) as image:
        for change in (image.create_snapshot("one", DATE), image.shrink(512)):
            with pytest.raises(Unsupported, match="external data file have no internal snapshots, and can only"):
                await change


async def test_names_that_are_too_long(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE)
    async with image_at(path) as image:
        with pytest.raises(UsageError, match="at most 255 bytes"):
            await image.create_snapshot("n" * 256, DATE)
        await image.create_snapshot("n" * 255, DATE)
    assert qemu_snapshots(path)[0]["name"] == "n" * 255


@pytest.mark.parametrize("format", ["raw", "qed"])
async def test_formats_without_snapshots(tmp_path: Path, format: str) -> None:
    path = tmp_path / "image"
    ok(qemu_img("create", "-q", "-f", format, path, "1M"))
    image = await open_image(str(path), format, writable=True)
    assert await image.snapshots() == []
    for change in (image.create_snapshot("a", DATE), image.apply_snapshot("a"), image.delete_snapshot("a")):
        with pytest.raises(Unsupported, match=f"{format} images have no internal snapshots"):
            await change
    await image.close()


@pytest.mark.parametrize("seed", range(25))
async def test_damaged_images_are_refused_or_left_no_worse(tmp_path: Path, seed: int) -> None:
    """Whatever is wrong with metadata: an error or success, no crash, and snapshots that can be told apart."""
    rnd = random.Random(seed)
    path = tmp_path / "image"
    qemu_create(path, SIZE, cluster_size=512)
    qemu_fill(path, SIZE, seed, 4)
    ok(qemu_img("snapshot", "-c", "one", path))
    qemu_fill(path, SIZE, seed + 1, 4)
    content = bytearray(path.read_bytes())
    header = parse_header(bytes(content[:512]), len(content))
    starts = [header.l1_offset, header.refcount_table_offset, header.snapshots_offset]
    starts += [int.from_bytes(content[place + 2 : place + 8], "big") & ~511 for place in starts[:2]]
    for _ in range(rnd.randrange(1, 4)):
        place = rnd.choice(starts) + rnd.randrange(48)
        content[place] = rnd.choice([0, 1, 2, 0x80, 0xFF, content[place] ^ 0x10])
    for change in ("create", "apply", "delete"):
        storage = RecordingStorage(bytes(content))
        try:
            image = await qcow2.open_image(storage)
            if change == "create":
                await image.create_snapshot("two", DATE)
            elif change == "apply":
                await image.apply_snapshot("one")
            else:
                await image.delete_snapshot("one")
        except CowfsError:
            assert bytes(storage.content[:512]) == bytes(content[:512])


async def test_a_count_that_is_too_low_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, SIZE)
    qemu_io(path, "qcow2", "write 0 64k")
    data = bytearray(path.read_bytes())
    header = parse_header(bytes(data[:65536]), len(data))
    block = int.from_bytes(data[header.refcount_table_offset :][:8], "big")
    table = int.from_bytes(data[header.l1_offset + 2 :][:6], "big")
    struct.pack_into(">H", data, block + (table >> 16) * 2, 0)
    image = await in_memory(bytes(data))
    with pytest.raises(CorruptImage, match="its reference count is 0"):
        await image.create_snapshot("one", DATE)


# -- power cuts


async def recorded(tmp_path: Path, cluster_size: int) -> bytes:
    """An image with two snapshots, one of which shares much with the disk."""
    path = tmp_path / "image"
    qemu_create(path, SIZE, cluster_size=cluster_size)
    qemu_fill(path, SIZE, 1)
    ok(qemu_img("snapshot", "-c", "first", path))
    qemu_fill(path, SIZE, 2)
    ok(qemu_img("snapshot", "-c", "second", path))
    qemu_fill(path, SIZE, 3, 3)
    return path.read_bytes()


async def state_of(content: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """What the disk and each snapshot hold, from an image that must be clean or have leaks at most."""
    image = await in_memory(content)
    found = await image.check()
    assert not found.corruptions, found.messages
    assert not found.leaks, found.messages
    kept = []
    for snapshot in await image.snapshots():
        other = await in_memory(content)
        await other.show_snapshot(snapshot.id)
        kept.append((snapshot.name, await disk_content(other)))
    return await disk_content(image), kept


@pytest.mark.parametrize("change", ["create", "apply", "delete"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
async def test_power_cuts(tmp_path: Path, cluster_size: int, change: str) -> None:
    storage = RecordingStorage(await recorded(tmp_path, cluster_size))
    image = await qcow2.open_image(storage)
    if change == "create":
        await image.create_snapshot("third", DATE)
    elif change == "apply":
        await image.apply_snapshot("first")
    else:
        await image.delete_snapshot("second")
    await image.close()
    old, new = await state_of(storage.start), await state_of(bytes(storage.content))
    assert old != new
    contents = list(dict.fromkeys([*storage.prefixes(), *storage.cuts(random.Random(2), 3)]))
    # each is looked at whole where it is new, and by its header where nothing but unused space differs
    heads: dict[bytes, int] = {}
    for number, content in enumerate(contents):
        head = content[:512]
        heads[head] = heads.get(head, 0) + 1
        if number % 7 == 0 or heads[head] < 3 or number > len(contents) - 3:
            assert await state_of(content) == (new if head == bytes(storage.content[:512]) else old)
        else:
            found = await (await in_memory(content)).check()
            assert (found.corruptions, found.leaks) == (0, 0), found.messages
    assert len(heads) == 2
    path = tmp_path / "cut"
    for content in (contents[len(contents) // 2], contents[-1]):
        path.write_bytes(content)
        assert_clean(path)


@pytest.mark.parametrize("operation", ["write", "flush", "read"])
async def test_every_failure_leaves_the_old_state(tmp_path: Path, operation: str) -> None:
    start = await recorded(tmp_path, 4096)
    old = await state_of(start)
    for number in range(0, 400, 1 if operation == "flush" else 9):
        storage = RecordingStorage(start)
        image = await qcow2.open_image(storage)
        storage.cold = operation == "read"
        storage.failures[operation] = [None] * number + [StorageError("no", errno=5)]
        try:
            await image.delete_snapshot("first")
        except StorageError:
            storage.failures.clear()
            if image.unwritable is None:
                assert await state_of(bytes(storage.content)) == old
                await image.close()
                assert await state_of(bytes(storage.content)) == old
            else:
                # it failed to look at what it had made
                assert len((await state_of(bytes(storage.content)))[1]) == 1
            continue
        storage.failures.clear()
        assert number
        return
    raise AssertionError("every operation fails once")


async def test_readers_go_on_meanwhile(tmp_path: Path) -> None:
    """A reader that has looked something up reads it although the snapshot that keeps it is deleted meanwhile."""
    storage = RecordingStorage(await recorded(tmp_path, 4096))
    image = await qcow2.open_image(storage)
    disk = Disk([Layer(image)], copy_on_read=False)
    expected = bytes(await disk.read(0, SIZE))
    storage.cold = True
    gate = storage.gates["read"] = Gate()
    seen: list[bytes] = []

    async def read() -> None:
        seen.append(bytes(await disk.read(0, SIZE)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await gate.arrived.wait()
        del storage.gates["read"]
        nursery.start_soon(image.apply_snapshot, "first")
        await wait_all_tasks_blocked()
        assert not any(kind == "punch" for kind, _, _ in storage.log)
        gate.open()
    assert seen == [expected]
    assert any(kind == "punch" for kind, _, _ in storage.log)
