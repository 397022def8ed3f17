"""Persistent bitmaps of qcow2: whatever cowfs does with an image, QEMU never takes an outdated one for true."""

import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io
from imagetools import DATE, assert_clean, disk_at, image_at, qemu_content
from powercut import Flushed, RecordingStorage
from qcow2damage import Anatomy

from cowfs.block.check import Repair
from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.formats import qcow2
from cowfs.formats.chain import open_disk, open_image
from cowfs.jobs.commit import Commit

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

SIZE = 4 << 20
GRANULARITIES = {"first": "4k", "second": "64k", "a third one, disabled": "1M"}


def qemu_bitmaps(path: Path) -> dict[str, set[str]]:
    """Names and flags, as QEMU has them, which opens the image without a word."""
    facts = json.loads(ok(qemu_img("info", "-U", "--output=json", path)))
    found: list[dict[str, Any]] = facts["format-specific"]["data"].get("bitmaps", [])
    return {bitmap["name"]: set(bitmap["flags"]) for bitmap in found}


@pytest.fixture(params=["512", "64k"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An overlay with three bitmaps that QEMU has kept up to date, one of them with something in it."""
    path = tmp_path / "image"
    (tmp_path / "base").write_bytes(bytes(range(256)) * (SIZE // 256))
    options = f"cluster_size={request.param}"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", tmp_path / "base", "-F", "raw", path))
    for name, granularity in GRANULARITIES.items():
        ok(qemu_img("bitmap", "--add", "-g", granularity, path, name))
    ok(qemu_img("bitmap", "--disable", path, list(GRANULARITIES)[-1]))
    qemu_io(path, "qcow2", "write -P 9 0 300k", "write -P 8 2M 64k")
    return path


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def expected(*, in_use: bool) -> dict[str, set[str]]:
    more = {"in-use"} if in_use else set()
    return {name: ({"auto"} if not name.endswith("disabled") else set()) | more for name in GRANULARITIES}


async def write_in_place(path: Path) -> None:
    async with disk_at(path) as disk:
        assert not disk.write_now(0, b"in place"), "the bitmaps are seen to first"
        await disk.write(0, b"in place")
        # now they are as they will be, whatever happens
        assert qemu_bitmaps(path) == expected(in_use=True)


async def write_elsewhere(path: Path) -> None:
    async with disk_at(path) as disk:
        await disk.write(3 << 20, b"unknown to the bitmaps" * 10_000)


async def zero(path: Path) -> None:
    async with disk_at(path) as disk:
        await disk.zero_layer(0, 0, SIZE // 2)


async def discard(path: Path) -> None:
    async with image_at(path) as image:
        await Layer(image).deallocate(0, SIZE)


async def grow(path: Path) -> None:
    async with disk_at(path) as disk:
        await disk.grow(3 * SIZE)


async def shrink(path: Path) -> None:
    async with disk_at(path) as disk:
        await disk.shrink(SIZE // 2)


async def snapshot(path: Path) -> None:
    async with image_at(path) as image:
        await image.create_snapshot("one", DATE)
    await write_elsewhere(path)
    async with image_at(path) as image:
        await image.apply_snapshot("one")
        await image.delete_snapshot("one")


async def rebase(path: Path) -> None:
    ok(cowfs("rebase", "-b", "", path))


async def commit(path: Path) -> None:
    """The bitmaps are those of the image that something is committed to."""
    top = path.with_name("top")
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", top))
    qemu_io(top, "qcow2", "write -P 7 1M 100k")
    disk = await open_disk(str(top), writable=True)
    job = Commit(disk)
    await job.run()
    assert job.state.value == "completed", job.error
    await disk.close()


async def commit_from(path: Path) -> None:
    """The bitmaps are those of the overlay, which is emptied."""
    disk = await open_disk(str(path), writable=True)
    job = Commit(disk)
    await job.run()
    assert job.state.value == "completed", job.error
    await disk.close()


CHANGES: list[Callable[[Path], Awaitable[None]]] = [
    write_in_place, write_elsewhere, zero, discard, grow, shrink, snapshot, rebase, commit, commit_from,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_whatever_changes_the_image_marks_its_bitmaps(
    image: Path, change: Callable[[Path], Awaitable[None]]
) -> None:
    assert qemu_bitmaps(image) == expected(in_use=False)
    await change(image)
    assert qemu_bitmaps(image) == expected(in_use=True)
    # nothing leaks, and QEMU goes on with the image, and with bitmaps
    assert_clean(image)
    content = qemu_content(image)
    async with image_at(image) as opened:
        found = await opened.check()
    assert (found.corruptions, found.leaks) == (0, 0), found.messages
    qemu_io(image, "qcow2", "read 0 64k")
    for name in GRANULARITIES:
        ok(qemu_img("bitmap", "--remove", image, name))
    ok(qemu_img("bitmap", "--add", image, "first"))
    assert qemu_bitmaps(image) == {"first": {"auto"}}
    assert_clean(image)
    assert qemu_content(image) == content


async def test_reading_and_repair_leave_bitmaps_true(image: Path) -> None:
    before = content_of(image)
    disk = await open_disk(str(image))
    await disk.read(0, SIZE)
    await disk.close()
    await (await open_image(str(image), writable=True)).close()
    assert content_of(image) == before
    ok(cowfs("check", image))
    anatomy = Anatomy(image)
    anatomy.put(anatomy.l2_places()[0], 0)
    anatomy.write(image)
    async with image_at(image) as opened:
        assert (await opened.check(Repair.ALL)).leaks_fixed == 1
    assert qemu_bitmaps(image) == expected(in_use=False)
    assert_clean(image)


async def test_marks_are_durable_before_anything_changes(image: Path) -> None:
    storage = RecordingStorage("image", content_of(image))
    disk = Disk([Layer(await qcow2.open_image(storage))], copy_on_read=False)
    await disk.write(5, b"overwrites what is there")
    await disk.flush()
    cut = image.with_name("cut")
    steps = [step for step in storage.steps if not isinstance(step, Flushed)]
    assert len(steps) == len(GRANULARITIES) + 1
    assert isinstance(storage.steps[len(GRANULARITIES)], Flushed), "a flush comes before the data"
    # marked in part, or all, bitmaps are no obstacle
    for number, content in enumerate(dict.fromkeys(storage.prefixes())):
        cut.write_bytes(content)
        marked = sum("in-use" in flags for flags in qemu_bitmaps(cut).values())
        assert marked == min(number, len(GRANULARITIES))
    await disk.close()


async def test_bitmaps_that_make_no_sense_are_given_up(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    anatomy = Anatomy(image)
    extension = anatomy.data.index((0x23852875).to_bytes(4, "big")) + 8
    anatomy.put(extension + 16, 1 << 40)
    anatomy.write(image)
    with caplog.at_level(logging.WARNING):
        await write_elsewhere(image)
    assert caplog.messages == [
        f"{image}: bitmaps are given up: bitmap directory at 0x10000000000 lies beyond the end of the file"
    ]
    assert content_of(image)[95] == 0
    async with image_at(image) as opened:
        assert not (await opened.check(Repair.LEAKS)).corruptions
    # QEMU warns; the image is sound
    assert qemu_img("check", image).returncode == 0


@pytest.mark.parametrize(
    ("place", "size", "value", "sentence"),
    [
        (0, 4, 0xFFFF_FFFF, "bitmap directory claims 4294967295 bitmaps, which is too many"),
        (0, 4, 60_000, "bitmap directory is cut off"),
        (8, 8, 1 << 62, "bitmap directory at {offset:#x} lies beyond the end of the file"),
        (16, 8, 1 << 62, "bitmap directory at 0x4000000000000000 lies beyond the end of the file"),
    ],
)
async def test_check_says_what_is_wrong_with_a_directory(
    image: Path, place: int, size: int, value: int, sentence: str
) -> None:
    anatomy = Anatomy(image)
    extension = anatomy.data.index((0x23852875).to_bytes(4, "big")) + 8
    offset = anatomy.get(extension + 16)
    anatomy.put(extension + place, value, size)
    anatomy.write(image)
    opened = await open_image(str(image))
    found = await opened.check()
    await opened.close()
    assert found.corruptions == 1
    assert found.messages[0] == f"ERROR {sentence.format(offset=offset)}"


@pytest.mark.parametrize(("place", "size", "value"), [(0, 8, 7), (0, 8, 1 << 50), (8, 4, 0xFFFF_FFFF)])
async def test_check_finds_bitmap_tables_where_none_can_be(image: Path, place: int, size: int, value: int) -> None:
    anatomy = Anatomy(image)
    directory = anatomy.get(anatomy.data.index((0x23852875).to_bytes(4, "big")) + 8 + 16)
    anatomy.put(directory + place, value, size)
    anatomy.write(image)
    opened = await open_image(str(image))
    found = await opened.check()
    await opened.close()
    assert found.corruptions
    assert "bitmap table" in found.messages[0] or "beyond the end" in found.messages[0]
