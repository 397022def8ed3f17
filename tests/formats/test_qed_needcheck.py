"""QED: the need-check bit, from the first change to the last; crashes, and what is done about them at the next open."""

import os
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from errno import EIO
from pathlib import Path

import pytest
import trio
import trio.testing
from commandline import cowfs, ok
from powercut import RecordingStorage
from qedtools import (
    M,
    assert_clean,
    crash,
    disk_over,
    drop,
    features_on_disk,
    header_on_disk,
    image_of,
    make,
    opened,
    patch,
    pattern,
    qemu_check,
    qemu_content,
    qemu_create,
    qemu_io,
)
from storages import Gate, MemoryStorage

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.errors import CorruptImage, StorageError
from cowfs.formats import qed
from cowfs.formats.chain import open_disk
from cowfs.formats.qed.layout import Feature
from cowfs.formats.raw import RawImage
from cowfs.fuse.images import Mount, Source
from cowfs.fuse.options import Settings
from cowfs.storage.base import WriteBuffers

CLUSTER = 4096
OPTIONS = {"cluster_size": "4096", "table_size": "2"}

# -- while the image is open


async def test_need_check_is_on_disk_while_dirty(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", M)
    async with opened(path) as disk:
        assert not features_on_disk(path)
        await disk.write(0, b"x")
        assert features_on_disk(path) == Feature.NEED_CHECK
        assert image_of(disk).dirty
        await disk.flush()
        assert features_on_disk(path) == Feature.NEED_CHECK
        await image_of(disk).settle()
        assert not features_on_disk(path)
        assert disk.write_now(5, b"y")
        assert not features_on_disk(path)
        await disk.write(70_000, b"z")
        assert features_on_disk(path) == Feature.NEED_CHECK
    assert_clean(path)


async def test_preparing_is_shared() -> None:
    storage = MemoryStorage("disk", cold=True)
    await qed.create(storage, M, None, {})
    image = await qed.open_image(storage)
    gate = storage.gates["flush"] = Gate()
    storage.log.clear()
    done: list[int] = []

    async def prepare(number: int) -> None:
        await image.prepare()
        assert storage.content[16] & Feature.NEED_CHECK
        done.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(prepare, number)
        await trio.testing.wait_all_tasks_blocked()
        assert not done
        gate.open()
    assert len(done) == 5
    assert [entry[0] for entry in storage.log] == ["flush", "write", "flush"]


async def test_failed_preparing_fails_all_and_is_tried_again() -> None:
    storage = MemoryStorage("disk", cold=True)
    await qed.create(storage, M, None, {})
    image = await qed.open_image(storage)
    gate = storage.gates["flush"] = Gate()
    storage.failures["flush"] = [StorageError("cannot flush", errno=EIO)]
    failed: list[int] = []

    async def prepare(number: int) -> None:
        with pytest.raises(StorageError):
            await image.prepare()
        failed.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(prepare, number)
        await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert len(failed) == 3
    await image.prepare()
    assert storage.content[16] & Feature.NEED_CHECK


async def test_cancelled_preparing_is_taken_over() -> None:
    storage = MemoryStorage("disk", cold=True)
    await qed.create(storage, M, None, {})
    image = await qed.open_image(storage)
    gate = storage.gates["flush"] = Gate()
    async with trio.open_nursery() as outer:
        async with trio.open_nursery() as inner:
            inner.start_soon(image.prepare)
            await gate.arrived.wait()
            outer.start_soon(image.prepare)
            await trio.testing.wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
        gate.open()
    assert storage.content[16] & Feature.NEED_CHECK


# -- over time


class Timed(MemoryStorage):
    """Notes when the need-check bit is put on disk and taken off it, and that it is alone in doing so."""

    def __init__(self) -> None:
        super().__init__("disk", cold=True)
        self.changes: list[tuple[float, bool]] = []

    def is_marked(self) -> bool:
        return bool(self.content[16] & Feature.NEED_CHECK)

    async def write(self, offset: int, buffers: WriteBuffers) -> None:
        before = offset == 0 and self.is_marked()
        await super().write(offset, buffers)
        if offset == 0 and self.is_marked() != before:
            self.changes.append((trio.current_time(), self.is_marked()))

    def assert_alone(self) -> None:
        """Between the write of the header and the flushes before and after it, nothing is written."""
        steps = [(what, offset) for what, offset, _ in self.log if what != "read"]
        headers = [number for number, step in enumerate(steps) if step == ("write", 0)]
        assert headers
        for number in headers:
            assert steps[number - 1][0] == steps[number + 1][0] == "flush"


@asynccontextmanager
async def timed(flush_interval: float = 5) -> AsyncIterator[tuple[Timed, Disk]]:
    storage = Timed()
    await qed.create(storage, 64 * M, None, OPTIONS)
    disk = Disk([Layer(await qed.open_image(storage))], flush_interval=flush_interval)
    storage.log.clear()
    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        yield storage, disk
        nursery.cancel_scope.cancel()


async def test_it_comes_before_the_first_allocation_and_goes_when_all_is_quiet(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with timed() as (storage, disk):
        await trio.sleep(60)
        assert not storage.log, "an image that is only looked at is left alone"
        began = trio.current_time()
        for number in range(20):
            await disk.write(number * 2 * M, b"x" * CLUSTER)
            await trio.sleep(3)
        assert storage.changes == [(began, True)], "it stays while there are writes every few seconds"
        first_data = next(n for n, (what, offset, _) in enumerate(storage.log) if what == "write" and offset)
        assert [what for what, _, _ in storage.log[:first_data]] == ["flush", "write", "flush"]
        ended = trio.current_time() - 3
        await trio.sleep(60)
        (_, is_on), (when, is_still_on) = storage.changes
        assert (is_on, is_still_on) == (True, False)
        assert 5 <= when - ended <= 15
        storage.assert_alone()
        writes = len(storage.log)
        await trio.sleep(600)
        assert len(storage.log) == writes, "then nothing more is written"


async def test_it_stays_off_while_data_is_written_in_place(autojump_clock: trio.testing.MockClock) -> None:
    async with timed() as (storage, disk):
        await disk.write(0, b"x" * CLUSTER)
        await trio.sleep(20)
        storage.changes.clear()
        for _ in range(10):
            await disk.write(0, b"y" * CLUSTER)
            await trio.sleep(3)
        assert not storage.changes
        for what in (disk.write(M, b"z"), drop(disk, 0, CLUSTER), disk.grow(65 * M)):
            await what
            assert storage.is_marked()
            await trio.sleep(20)
            assert not storage.is_marked()
        storage.assert_alone()


@pytest.mark.parametrize("nth", range(3))
@pytest.mark.parametrize("operation", ["write", "flush"])
async def test_a_failure_at_the_quiet_moment_is_made_good(
    autojump_clock: trio.testing.MockClock, operation: str, nth: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with timed() as (storage, disk):
        await disk.write(0, b"x" * CLUSTER)
        storage.failures[operation] = [*[None] * nth, StorageError(f"cannot {operation}", errno=EIO)]
        await trio.sleep(60)
        assert not storage.failures[operation]
        assert "periodic flush: cannot" in caplog.text
        assert not storage.is_marked()
        again = disk_over(await qed.open_image(MemoryStorage("again", bytes(storage.content))))
        assert await again.read(0, CLUSTER + 1) == b"x" * CLUSTER + b"\0"
        await disk.write(M, b"y" * CLUSTER)
        assert storage.is_marked()
    result = await image_of(disk).check()
    assert (result.corruptions, result.leaks) == (0, 0)


async def test_closing_clears_it_behind_a_flush() -> None:
    async with timed() as (storage, disk):
        await disk.write(0, b"x" * CLUSTER)
        assert storage.is_marked()
    await disk.close()
    assert not storage.is_marked()
    storage.assert_alone()
    assert storage.log[-1][0] == "flush"


# -- after a crash


async def test_closing_leaves_no_leaks_whenever_it_breaks_off_what_settles() -> None:
    """As an unmount does that comes while a disk has gone quiet: whatever is under way is called off."""
    is_broken_off, moments = True, 0
    while is_broken_off:
        storage = MemoryStorage("top", cold=True)
        await qed.create(storage, M, None, OPTIONS)
        image = await qed.open_image(storage)
        disk = Disk([Layer(image)])
        for number in range(8):
            await disk.write(number * CLUSTER, bytes([number]) * CLUSTER)
        await image.deallocate(0, 3 * CLUSTER)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.settle)
            for _ in range(moments):
                await trio.lowlevel.checkpoint()
            is_broken_off = image.dirty
            nursery.cancel_scope.cancel()
        await disk.close()
        moments += 1
        again = await qed.open_image(MemoryStorage("top", bytes(storage.content)))
        found = await again.check()
        assert (again.dirty, found.leaks, found.corruptions) == (False, 0, 0), moments
        assert await Disk([Layer(again)]).read(3 * CLUSTER, 512) == bytes([3]) * 512
    assert moments > 10


async def test_crash_leaves_leaks_that_are_found_and_used(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", 8 * M, cluster_size="4096")
    disk = await open_disk(str(path), "qed", writable=True)
    await disk.write(0, b"a" * M)
    await disk.flush()
    await disk.write(M, b"b" * M)
    await crash(disk)
    found = qemu_check(path)
    assert found["leaks"] == 256
    assert "corruptions" not in found
    length = path.stat().st_size
    async with opened(path, writable=False) as reader:
        assert await reader.read(0, M) == b"a" * M
    assert features_on_disk(path) == Feature.NEED_CHECK
    async with opened(path) as disk:
        await disk.write(2 * M, b"c" * M)
        assert features_on_disk(path) == Feature.NEED_CHECK
    assert path.stat().st_size == length
    assert_clean(path)


async def test_leaks_of_a_crash_are_gone_after_opening_and_closing(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", 8 * M, cluster_size="4096")
    disk = await open_disk(str(path), "qed", writable=True)
    await disk.write(0, b"a" * M)
    await crash(disk)
    os.truncate(path, path.stat().st_size - 1000)
    async with opened(path):
        pass
    assert_clean(path)
    assert path.stat().st_size == 5 * 4096


async def test_damage_after_a_crash_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qed"
    qemu_create(path, 8 * M, "-o", "cluster_size=4096")
    qemu_io(path, "write 0 64k")
    l1 = header_on_disk(path).l1_offset
    l2 = struct.unpack("<Q", path.read_bytes()[l1 : l1 + 8])[0]
    patch(path, l2, struct.pack("<Q", l2))
    patch(path, 16, b"\x02")
    before = path.read_bytes()
    with pytest.raises(CorruptImage, match="cowfs check -r all"):
        await open_disk(str(path), "qed", writable=True)
    async with opened(path, writable=False) as disk:
        assert await disk.read(4096, 60_000) == b"\xcd" * 60_000
        with pytest.raises(CorruptImage, match="cowfs check -r all"):
            await disk.layers[0].set_writable(True)
        assert disk.layers[0].storage.read_only
    assert path.read_bytes() == before


async def test_autoclear_bits_are_cleared_before_a_write(tmp_path: Path) -> None:
    path = await make(tmp_path / "disk.qed", M)
    async with opened(path) as disk:
        await disk.write(0, b"x")
    patch(path, 24, struct.pack("<QQ", 1 << 63 | 5, 1 << 62))
    async with opened(path, writable=False) as disk:
        assert await disk.read(0, 1) == b"x"
    async with opened(path) as disk:
        assert not disk.write_now(0, b"y")
        await disk.write(0, b"y")
        assert header_on_disk(path).autoclear_features == 0
    assert header_on_disk(path).compat_features == 1 << 63 | 5
    assert_clean(path)


# -- what a crash of a file that grew leaves: entries that point beyond its end


async def crashed(folder: Path) -> tuple[Path, bytes]:
    """An image over a raw base, under the need-check bit, and its content: three entries lead beyond the end.

    One of data, one of data to which most is there, one of an L2 table.
    """
    below = pattern(24 * M, 1)
    (folder / "base.raw").write_bytes(below)
    path = await make(folder / "disk.qed", 24 * M, Backing("base.raw", "raw"), **OPTIONS)
    async with opened(path) as disk:
        await disk.write(0, b"a" * 2 * CLUSTER)
        await disk.write(10 * M, b"b" * CLUSTER)
        await disk.write(16 * M, b"c" * CLUSTER)
        await disk.write(4 * M, b"d" * CLUSTER)
        await disk.write(20 * M, b"e" * CLUSTER)
    l1 = header_on_disk(path).l1_offset
    l2 = int.from_bytes(path.read_bytes()[l1 + 8 * 4 : l1 + 8 * 5], "little")
    patch(path, l2 + 8, struct.pack("<Q", 1 << 40))
    patch(path, l1 + 8, struct.pack("<Q", 3 << 30))
    patch(path, 16, b"\x07")
    # the last cluster in the file is the data that was written last
    os.truncate(path, path.stat().st_size - 700)
    model = bytearray(below)
    model[: 2 * CLUSTER] = b"a" * 2 * CLUSTER
    model[10 * M : 10 * M + CLUSTER] = b"b" * CLUSTER
    model[16 * M : 16 * M + CLUSTER] = b"c" * CLUSTER
    return path, bytes(model)


async def test_entries_beyond_the_end_are_dropped_as_qemu_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, content = await crashed(tmp_path)
    twin = tmp_path / "twin.qed"
    twin.write_bytes(path.read_bytes())
    assert qemu_check(path)["corruptions"] == 3
    async with opened(path) as disk:
        assert "3 entries that point beyond the end of the file are dropped" in caplog.text
        assert await disk.read(0, len(content)) == content
        await disk.write(4 * M, b"again")
    assert_clean(path)
    assert qemu_content(path) == content[: 4 * M] + b"again" + content[4 * M + 5 :]
    qemu_io(twin, "read 0 512")
    assert qemu_content(twin) == content


async def test_a_crash_while_they_are_dropped_leaves_what_can_be_opened(tmp_path: Path) -> None:
    path, content = await crashed(tmp_path)
    storage = RecordingStorage("image", path.read_bytes())
    await (await qed.open_image(storage)).close()
    moments = [*storage.prefixes(), *storage.cuts(random.Random(1), 3)]
    assert len(moments) > 3
    base = RawImage(MemoryStorage("base", (tmp_path / "base.raw").read_bytes(), read_only=True))
    for moment in moments:
        image = await qed.open_image(MemoryStorage("cut", moment))
        disk = Disk([Layer(image), Layer(base)], copy_on_read=False)
        for offset in range(0, 24 * M, 2 * M):
            assert await disk.read(offset, 2 * CLUSTER) == content[offset : offset + 2 * CLUSTER]
        result = await image.check()
        assert not result.corruptions
        await disk.close()


async def test_other_damage_beside_them_is_refused_and_nothing_changed(tmp_path: Path) -> None:
    path, _ = await crashed(tmp_path)
    patch(path, header_on_disk(path).l1_offset + 8 * 3, struct.pack("<Q", 5000))
    before = path.read_bytes()
    with pytest.raises(CorruptImage, match="a check finds 4 errors; repair it"):
        await open_disk(str(path), "qed", writable=True)
    assert path.read_bytes() == before


async def test_without_the_bit_nothing_is_dropped(tmp_path: Path) -> None:
    path, _ = await crashed(tmp_path)
    patch(path, 16, b"\x05")
    before = path.read_bytes()
    with pytest.raises(CorruptImage, match="repair it"):
        await open_disk(str(path), "qed", writable=True)
    assert path.read_bytes() == before


async def test_a_read_only_open_leaves_everything_alone_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, content = await crashed(tmp_path)
    before = path.read_bytes()
    async with opened(path, writable=False) as disk:
        assert image_of(disk).dirty
        assert await disk.read(10 * M, 6 * M) == content[10 * M : 16 * M]
        with pytest.raises(CorruptImage):
            await disk.read(4 * M, 512)
    assert "cleanly shut down: no" in ok(cowfs("info", path))
    mount = Mount("/nowhere", Settings(read_only=True))
    await mount.add(Source(str(path)))
    assert f"{path}: was not closed cleanly, and is not repaired while it is open read-only" in caplog.text
    assert await mount.close()
    assert path.read_bytes() == before


async def test_a_marked_backing_file_is_left_alone_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, content = await crashed(tmp_path)
    before = path.read_bytes()
    top = await make(tmp_path / "top.qed", 24 * M, Backing("disk.qed", None))
    mount = Mount("/nowhere", Settings())
    await mount.add(Source(str(top)))
    disk = mount.images["top"].disk
    assert await disk.read(10 * M, CLUSTER) == content[10 * M : 10 * M + CLUSTER]
    await disk.write(10 * M + 5, b"x")
    assert await mount.close()
    assert caplog.text.count("is not repaired while") == 1
    assert path.read_bytes() == before
    assert_clean(top)
