"""Internal snapshots of qcow2: what is refused, damaged images, failures, power cuts, readers meanwhile."""

import random
import struct
from pathlib import Path

import pytest
import trio
from commandline import ok, qemu_img, qemu_io
from imagetools import (
    DATE,
    assert_clean,
    disk_content,
    image_at,
    in_memory,
    qemu_create,
    qemu_fill,
    qemu_snapshots,
)
from powercut import RecordingStorage
from storages import Gate
from trio.testing import wait_all_tasks_blocked

from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.errors import CorruptImage, CowfsError, StorageError, Unsupported, UsageError
from cowfs.formats import qcow2
from cowfs.formats.chain import open_image
from cowfs.formats.qcow2.layout import parse_header

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

SIZE = 2_000_384


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
        storage = RecordingStorage("image", bytes(content))
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
    storage = RecordingStorage("image", await recorded(tmp_path, cluster_size))
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
        storage = RecordingStorage("image", start)
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
    storage = RecordingStorage("image", await recorded(tmp_path, 4096))
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
