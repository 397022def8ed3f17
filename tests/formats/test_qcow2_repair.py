"""Repair of qcow2 images: QEMU judges before and after, and nothing that could be read may change."""

import random
from pathlib import Path

import pytest
import qcow2damage
from commandline import ok, qemu_img, qemu_io
from imagetools import check_image, qemu_check, readable_clusters
from powercut import RecordingStorage
from qcow2damage import COPIED, MASK, WRECKS, Anatomy
from storages import MemoryStorage

from cowfs.block.check import CheckResult, Repair
from cowfs.errors import CorruptImage, ReadOnly, StorageError
from cowfs.formats import qcow2
from cowfs.formats.chain import open_disk, open_image
from cowfs.formats.qcow2.blocks import pack_counts, unpack_counts


async def assert_repaired(path: Path, before: list[bytes | None]) -> None:
    """Both tools call it clean, and it reads as before, where it could be read."""
    result = await check_image(path, "qcow2")
    assert (result.corruptions, result.leaks) == (0, 0), result.messages
    found = qemu_check(path)
    assert not (found.get("corruptions") or found.get("leaks") or found["check-errors"]), found
    after = await readable_clusters(path, "qcow2")
    assert None not in after
    changed = [index for index, old in enumerate(before) if old is not None and old != after[index]]
    assert not changed


def make(tmp_path: Path, seed: int) -> tuple[Path, random.Random]:
    rnd = random.Random(seed + 1000)
    backing = None
    if rnd.random() < 0.4:
        backing = tmp_path / "backing"
        backing.write_bytes(random.Random(5).randbytes(3 << 20))
    path = tmp_path / "image"
    qcow2damage.make(path, seed, backing=backing)
    return path, rnd


def simple(path: Path, size: str = "4M", options: str = "cluster_size=64k") -> Anatomy:
    """Make an image of QEMU's with a megabyte of data in it."""
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, size))
    qemu_io(path, "qcow2", "write -P 1 0 512k", "write -P 2 512k 512k")
    return Anatomy(path)


# -- random damage


@pytest.mark.parametrize("seed", range(40))
async def test_damaged_tables_and_counts(tmp_path: Path, seed: int) -> None:
    path, rnd = make(tmp_path, seed)
    image = Anatomy(path)
    for _ in range(rnd.randrange(1, 5)):
        qcow2damage.damage_entries(image, rnd)
    image.write(path)
    found, theirs = await check_image(path, "qcow2"), qemu_check(path)
    assert (found.corruptions, found.leaks) == (theirs.get("corruptions", 0), theirs.get("leaks", 0)), found.messages
    before = await readable_clusters(path, "qcow2")
    result = await check_image(path, "qcow2", Repair.ALL)
    assert bool(result.corruptions_fixed + result.leaks_fixed) == bool(found.corruptions + found.leaks)
    await assert_repaired(path, before)


@pytest.mark.parametrize("wreck", WRECKS)
@pytest.mark.parametrize("seed", [1, 2])
async def test_destroyed_refcount_structures(tmp_path: Path, wreck: str, seed: int) -> None:
    path, rnd = make(tmp_path, seed)
    before = await readable_clusters(path, "qcow2")
    image = Anatomy(path)
    qcow2damage.wreck_refcounts(image, wreck, rnd)
    image.write(path)
    result = await check_image(path, "qcow2", Repair.ALL)
    assert result.corruptions_fixed + result.leaks_fixed
    await assert_repaired(path, before)
    # and it can be written
    disk = await open_disk(str(path), writable=True)
    await disk.write(0, b"again")
    await disk.close()
    assert not qemu_check(path).get("corruptions")


@pytest.mark.parametrize("seed", range(6))
async def test_leaks_are_repaired_as_qemu_repairs_them(tmp_path: Path, seed: int) -> None:
    image = simple(path := tmp_path / "image", options="cluster_size=4k")
    before = await readable_clusters(path, "qcow2")
    rnd = random.Random(seed)
    block = image.get(image.blocks()[0]) & MASK
    for cluster in rnd.sample(range(len(image.data) >> image.bits), 10):
        image.data[block + 2 * cluster + 1] += rnd.randrange(1, 3)
    image.write(path)
    (copy := tmp_path / "copy").write_bytes(image.data)
    theirs = qemu_check(copy, "-r", "leaks")
    result = await check_image(path, "qcow2", Repair.LEAKS)
    assert result.leaks_fixed == theirs["leaks-fixed"] == 10
    assert result.corruptions_fixed == theirs.get("corruptions-fixed", 0)
    await assert_repaired(path, before)


# -- particular damage


async def test_leaks_are_repaired_and_damage_left_alone(tmp_path: Path) -> None:
    image = simple(path := tmp_path / "image")
    first, second, third = image.l2_places()[:3]
    image.put(first, 0)
    image.put(second, image.get(second) & ~COPIED)
    image.put(third, COPIED | 1 << 50)
    image.write(path)
    found = await check_image(path, "qcow2", Repair.LEAKS)
    assert (found.leaks_fixed, found.leaks, found.corruptions_fixed) == (2, 0, 0)
    assert found.corruptions == qemu_check(path)["corruptions"] == 3
    assert (Anatomy(path).get(second), Anatomy(path).get(third)) == (image.get(second), COPIED | 1 << 50)


async def test_leaked_space_goes_back_to_the_host(tmp_path: Path) -> None:
    image = simple(path := tmp_path / "image")
    for place in image.l2_places()[:8]:
        image.put(place, 0)
    image.write(path)
    before = path.stat().st_blocks
    assert (await check_image(path, "qcow2", Repair.LEAKS)).leaks_fixed == 8
    assert path.stat().st_blocks <= before - 8 * 128
    assert not qemu_check(path).get("leaks")


async def test_data_that_a_wrong_l1_entry_takes_for_a_table_is_kept(tmp_path: Path) -> None:
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path := tmp_path / "image", "16M"))
    noise = random.Random(1).randbytes(64 << 10)
    (tmp_path / "noise").write_bytes(noise)
    qemu_io(path, "qcow2", f"write -s {tmp_path / 'noise'} 0 64k", "write -P 3 4M 64k")
    image = Anatomy(path)
    data = image.get(image.l2_places()[5])
    image.put(image.l1_places()[1], data)
    image.write(path)
    await check_image(path, "qcow2", Repair.ALL)
    disk = await open_disk(str(path), writable=True)
    assert await disk.read(0, 64 << 10) == noise
    # the table is one of its own now
    await disk.write(4 << 20, b"x" * 8192)
    assert await disk.read(0, 64 << 10) == noise
    await disk.close()
    assert not qemu_check(path).get("corruptions")


async def test_data_in_the_place_of_metadata_moves_out(tmp_path: Path) -> None:
    image = simple(path := tmp_path / "image")
    image.put(image.l2_places()[3], COPIED | image.l1)
    image.write(path)
    old = await readable_clusters(path, "qcow2")
    await check_image(path, "qcow2", Repair.ALL)
    await assert_repaired(path, old)
    disk = await open_disk(str(path), writable=True)
    await disk.write(3 << 16, b"not the L1 table")
    await disk.close()
    assert (await readable_clusters(path, "qcow2"))[4:] == old[4:]


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("backed", [False, True])
async def test_what_lies_beyond_the_file_goes_on_reading_as_zeros(tmp_path: Path, compat: str, backed: bool) -> None:
    (tmp_path / "base").write_bytes(b"b" * (4 << 20))
    chain = ["-b", "base", "-F", "raw"] if backed else []
    path = tmp_path / "image"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", *chain, path, "4M"))
    qemu_io(path, "qcow2", "write -P 1 0 1M")
    image = Anatomy(path)
    image.put(image.l2_places()[2], COPIED | 1 << 40)
    image.write(path)
    before = await readable_clusters(path, "qcow2")
    assert before[2] == bytes(65536)
    await check_image(path, "qcow2", Repair.ALL)
    await assert_repaired(path, before)


async def test_a_cut_off_table_is_filled_with_what_qemu_reads_there(tmp_path: Path) -> None:
    image = simple(path := tmp_path / "image")
    table = image.get(image.l1) & MASK
    # the last cluster of the file, cut off behind its first two entries
    image.put(image.l1, COPIED | len(image.data))
    image.data += image.data[table : table + 16]
    image.write(path)
    flat = tmp_path / "flat"
    ok(qemu_img("convert", "-O", "raw", path, flat))
    await check_image(path, "qcow2", Repair.ALL)
    await assert_repaired(path, [])
    disk = await open_disk(str(path))
    assert await disk.read(0, disk.size) == flat.read_bytes()
    await disk.close()


async def test_the_corrupt_mark_goes_when_nothing_is_wrong(tmp_path: Path) -> None:
    image = simple(path := tmp_path / "image")
    image.data[79] |= 2
    image.write(path)
    with pytest.raises(ReadOnly, match="marked corrupt and can only be read; repair it with 'cowfs check -r all'"):
        await open_disk(str(path), writable=True)
    await check_image(path, "qcow2", Repair.LEAKS)
    assert path.read_bytes()[79] == 0
    disk = await open_disk(str(path), writable=True)
    await disk.close()


async def test_marks_stay_where_damage_stays(tmp_path: Path) -> None:
    image = simple(path := tmp_path / "image")
    ok(qemu_img("snapshot", "-c", "one", path))
    image = Anatomy(path)
    snapshots = image.get(64)
    image.put(snapshots, 1 << 40)
    image.data[79] |= 2
    image.write(path)
    result = await check_image(path, "qcow2", Repair.ALL)
    assert result.corruptions
    assert path.read_bytes()[79] == 2


async def test_an_image_that_is_open_for_repair_cannot_be_written(tmp_path: Path) -> None:
    simple(path := tmp_path / "image")
    image = await open_image(str(path), writable=True, for_repair=True)
    assert image.unwritable == "is open to be repaired, not to be written"
    await image.close()


# -- lazy reference counts


def make_dirty(path: Path, *, wrong: bool = True) -> None:
    """Leave an image as a crash of QEMU with lazy reference counts does."""
    image = simple(path, options="lazy_refcounts=on")
    image.data[79] |= 1
    if wrong:
        block = image.get(image.blocks()[0]) & MASK
        image.data[block + 2 * 8 : block + 2 * 20] = bytes(24)
    image.write(path)


@pytest.mark.parametrize("wrong", [True, False])
async def test_a_dirty_image_is_repaired_when_it_is_opened_for_writing(tmp_path: Path, wrong: bool) -> None:
    make_dirty(path := tmp_path / "image", wrong=wrong)
    before = path.read_bytes()
    content = await readable_clusters(path, "qcow2")
    assert path.read_bytes() == before, "reading changes nothing"
    disk = await open_disk(str(path), writable=True)
    assert not disk.layers[0].image.dirty
    await disk.write(100, b"written")
    await disk.close()
    assert path.read_bytes()[79] == 0
    assert path.read_bytes()[87] == 1, "lazy reference counts are still allowed"
    content[0] = None
    await assert_repaired(path, content)


async def test_a_dirty_base_is_repaired_when_something_is_committed_to_it(tmp_path: Path) -> None:
    make_dirty(base := tmp_path / "base")
    top = tmp_path / "top"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", top))
    disk = await open_disk(str(top), writable=True)
    assert base.read_bytes()[79] == 1
    await disk.set_layer_writable(1, True)
    await disk.write_layer(1, 2 << 20, memoryview(b"down"))
    await disk.set_layer_writable(1, False)
    await disk.close()
    await assert_repaired(base, [])


async def test_a_dirty_image_with_damage_that_stays_is_refused(tmp_path: Path) -> None:
    image = simple(path := tmp_path / "image", options="lazy_refcounts=on")
    ok(qemu_img("snapshot", "-c", "one", path))
    image = Anatomy(path)
    image.put(image.get(64), 1 << 40)
    image.data[79] |= 1
    image.write(path)
    with pytest.raises(CorruptImage, match="was not closed cleanly, and 1 errors are left after a repair"):
        await open_disk(str(path), writable=True)


@pytest.mark.parametrize("options", ["extended_l2=on", "data_file=data", "data_file=data,data_file_raw=on"])
async def test_damage_of_less_common_images(tmp_path: Path, options: str) -> None:
    simple(path := tmp_path / "image", options=f"lazy_refcounts=on,{options.replace('=data', f'={tmp_path}/data')}")
    if "data_file" not in options:
        qemu_io(path, "qcow2", "write -P 3 2M 6k", "write -z 2112k 2k")
    before = await readable_clusters(path, "qcow2")
    image = Anatomy(path)
    words = 2 if "extended" in options else 1
    table = image.get(image.l1) & MASK
    damaged = [2, 4, 5]
    image.put(table + 8 * words * 2, image.get(table + 8 * words * 2) | 512)
    image.put(table + 8 * words * 3, image.get(table + 8 * words * 3) & ~COPIED)
    if words == 2:
        # both allocated and zeros; allocated nowhere
        image.put(table + 16 * 4 + 8, (1 << 64) - 1)
        image.put(table + 16 * 5, 0)
    else:
        image.put(table + 8 * 4, image.get(table + 8 * 4) | 1 << 57)
        image.put(table + 8 * 5, image.get(table + 8 * 5) | 256)
    block = image.get(image.blocks()[0]) & MASK
    image.data[block + 2 : block + 6] = bytes(4)
    image.data[79] |= 1
    image.write(path)
    assert qemu_check(path)["corruptions"] >= 4
    disk = await open_disk(str(path), writable=True)
    await disk.write((4 << 20) - 10, b"after that")
    await disk.close()
    await assert_repaired(path, [None if i in damaged else old for i, old in enumerate(before[:-1])])


# -- bitmaps


def with_bitmap(path: Path) -> Anatomy:
    simple(path)
    ok(qemu_img("bitmap", "--add", path, "dirty0"))
    qemu_io(path, "qcow2", "write -P 9 0 64k")
    image = Anatomy(path)
    assert image.data[95] == 1
    return image


async def test_bitmaps_that_nobody_vouches_for_are_leaks(tmp_path: Path) -> None:
    image = with_bitmap(path := tmp_path / "image")
    image.data[95] = 0
    image.write(path)
    leaks = qemu_check(path)["leaks"]
    before = await readable_clusters(path, "qcow2")
    assert (await check_image(path, "qcow2", Repair.LEAKS)).leaks_fixed == leaks
    await assert_repaired(path, before)
    # QEMU warns that the old one is no longer there
    assert qemu_img("bitmap", "--add", path, "dirty1").returncode == 0
    assert not qemu_check(path).get("corruptions")


async def test_broken_bitmaps_are_given_up_and_sound_ones_kept(tmp_path: Path) -> None:
    image = with_bitmap(path := tmp_path / "image")
    image.put(image.l2_places()[0], 0)
    image.write(path)
    assert (await check_image(path, "qcow2", Repair.ALL)).leaks_fixed == 1
    assert path.read_bytes()[95] == 1
    assert "dirty0" in qemu_img("info", path).stdout
    image = Anatomy(path)
    directory = image.data.index((0x23852875).to_bytes(4, "big")) + 8 + 16
    image.put(image.get(directory), 1 << 40)
    image.write(path)
    before = await readable_clusters(path, "qcow2")
    await check_image(path, "qcow2", Repair.ALL)
    assert path.read_bytes()[95] == 0
    await assert_repaired(path, before)


# -- crashes


def damaged(tmp_path: Path, kind: str) -> bytes:
    """Return an image with something to do for every step of a repair."""
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path := tmp_path / "image", "4M"))
    qemu_io(path, "qcow2", "write -P 1 0 256k", "write -P 2 3M 64k")
    ok(qemu_img("snapshot", "-c", "one", path))
    qemu_io(path, "qcow2", "write -P 3 64k 64k")
    image = Anatomy(path)
    rnd = random.Random(3)
    places = [place for place in image.l2_places() if image.get(place) & COPIED]
    image.put(places[0], 0)
    image.put(places[1], COPIED | 1 << 40)
    image.put(places[2], image.get(places[3]))
    image.put(places[4], image.get(places[4]) ^ COPIED)
    image.put(places[5], COPIED | image.l1)
    qcow2damage.damage_counts(image, rnd)
    if kind == "rebuild":
        qcow2damage.wreck_refcounts(image, "entry out of the file", rnd)
    return bytes(image.data)


async def repair(storage: MemoryStorage) -> CheckResult:
    image = await qcow2.open_image(storage, for_repair=True)
    return await image.check(Repair.ALL)


@pytest.mark.parametrize("kind", ["in place", "rebuild"])
async def test_a_repair_that_fails_at_any_step_can_be_made_again(tmp_path: Path, kind: str) -> None:
    start = damaged(tmp_path, kind)
    path = tmp_path / "image"
    path.write_bytes(start)
    before = await readable_clusters(path, "qcow2")
    for operation in ("write", "flush"):
        number = 0
        while True:
            # cold, so that every write goes where failures are looked up
            storage = MemoryStorage("image", start, cold=True)
            storage.failures[operation] = [None] * number + [StorageError("no space", errno=28)]
            try:
                await repair(storage)
                break
            except StorageError:
                path.write_bytes(storage.content)
                await check_image(path, "qcow2", Repair.ALL)
                await assert_repaired(path, before)
            number += 1
        assert number > 4


@pytest.mark.parametrize("kind", ["in place", "rebuild"])
async def test_a_power_cut_during_a_repair_leaves_what_can_be_repaired(tmp_path: Path, kind: str) -> None:
    start = damaged(tmp_path, kind)
    path = tmp_path / "image"
    path.write_bytes(start)
    before = await readable_clusters(path, "qcow2")
    storage = RecordingStorage("image", start)
    await repair(storage)
    states = [*storage.prefixes(), *storage.cuts(random.Random(1), 3)]
    assert len(states) > 20
    for content in states:
        path.write_bytes(content)
        await check_image(path, "qcow2", Repair.ALL)
        await assert_repaired(path, before)


def test_counts_of_every_width_are_packed_as_they_were() -> None:
    rnd = random.Random(1)
    for order in range(7):
        block = rnd.randbytes(512)
        counts = unpack_counts(block, order)
        assert len(counts) == 4096 >> order
        assert pack_counts(counts, order) == block
