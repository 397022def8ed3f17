import errno
import filecmp
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from commandline import PATIENCE
from hypothesis import given
from hypothesis import strategies as st

from cowfs.errors import ReadOnly, StorageError
from cowfs.storage import file
from cowfs.storage.base import Move, Region, in_two
from cowfs.storage.file import FileStorage

CONTENT = random.Random(1).randbytes(300_000)


@pytest.fixture
async def storage(tmp_path: Path) -> FileStorage:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return FileStorage.open(str(path), writable=True)


def views(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(b"\xaa" * size)) for size in sizes]


async def test_reads_fill_every_buffer(storage: FileStorage) -> None:
    for sizes in ((1,), (4096,), (3, 5000, 1, 70_000)):
        for offset in (0, 1, 4095, 200_001):
            buffers = views(*sizes)
            await storage.read(offset, buffers)
            assert b"".join(buffers) == CONTENT[offset : offset + sum(sizes)]
            if storage.read_now(offset, buffers):
                assert b"".join(buffers) == CONTENT[offset : offset + sum(sizes)]
    await storage.close()


@pytest.mark.parametrize("offset", [299_990, 300_000, 10**9])
async def test_what_lies_past_the_end_reads_as_zeros(storage: FileStorage, offset: int) -> None:
    expected = CONTENT[offset : offset + 9000].ljust(9000, b"\0")
    buffers = views(4000, 5000)
    await storage.read(offset, buffers)
    assert b"".join(buffers) == expected
    buffers = views(4000, 5000)
    assert storage.read_now(offset, buffers)
    assert b"".join(buffers) == expected
    await storage.close()


async def test_writes_grow_the_file(storage: FileStorage) -> None:
    await storage.write(400_000, [b"one", b"", bytearray(b"two")])
    assert storage.length == 400_006
    assert (await storage.read_bytes(299_999, 100_008)) == CONTENT[-1:] + bytes(100_000) + b"onetwo" + b"\0"
    await storage.close()


def short(call: Callable[..., int], most: int) -> Callable[..., int]:
    """A system call that transfers a few bytes at a time, as it may."""

    def wrapped(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        first = memoryview(next(buffer for buffer in buffers if len(buffer)))[:most]
        return call(fd, [first], offset, *flags)

    return wrapped


async def test_short_transfers_are_continued(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", short(os.preadv, 1000))
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, memoryview(data)[:777], offset))
    monkeypatch.setattr(os, "pwritev", short(os.pwritev, 777))
    data = random.Random(2).randbytes(20_000)
    await storage.write(5, [data[:9000], data[9000:9001], data[9001:]])
    buffers = views(1, 12_000, 7999)
    assert not storage.read_now(5, buffers), "what comes short is left to the form that may wait"
    await storage.read(5, buffers)
    assert b"".join(buffers) == data
    await storage.write(123_456, [data])
    assert await storage.read_bytes(123_456, len(data)) == data
    await storage.close()


async def test_a_write_that_makes_no_progress_is_an_error(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    for buffers in ([b"x"], [b"x", b"y"]):
        with pytest.raises(StorageError):
            await storage.write(0, buffers)
    await storage.close()


async def test_more_buffers_than_one_call_takes(storage: FileStorage) -> None:
    parts = [bytes([number % 256]) * 3 for number in range(3000)]
    await storage.write(10, parts)
    assert await storage.read_bytes(10, 9000) == b"".join(parts)
    buffers = views(*[3] * 3000)
    await storage.read(10, buffers)
    assert b"".join(buffers) == b"".join(parts)
    await storage.close()


async def test_a_failed_flush_is_never_forgotten(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "gone")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(StorageError, match="cannot flush: Input/output error"):
            await storage.flush()
    with pytest.raises(StorageError):
        await storage.flush()
    await storage.close()


async def test_a_full_disk_says_so(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", fail)
    monkeypatch.setattr(os, "pwritev", fail)
    for buffers in ([b"x"], [b"x", b"y"]):
        with pytest.raises(StorageError) as caught:
            storage.write_now(0, buffers)
        assert caught.value.errno == errno.ENOSPC
        assert str(caught.value) == f"{storage.name}: cannot write: No space left on device"
    await storage.close()


async def test_holes_are_punched_and_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20))
    storage = FileStorage.open(str(path), writable=True)
    await storage.flush()
    before = storage.allocated
    await storage.punch(256 << 10, 512 << 10)
    await storage.punch((1 << 20) - 10, 4096)
    assert storage.length == 1 << 20
    assert storage.allocated < before
    content = path.read_bytes()
    assert content == b"x" * (256 << 10) + bytes(512 << 10) + b"x" * ((256 << 10) - 10) + bytes(10)
    regions = await storage.regions(100, (1 << 20) - 100)
    assert regions[:3] == [
        Region(100, (256 << 10) - 100, hole=False),
        Region(256 << 10, 512 << 10, hole=True),
        Region(768 << 10, 256 << 10, hole=False),
    ]
    await storage.close()


async def test_without_holes_zeros_are_written(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes here")

    monkeypatch.setattr("cowfs.storage.file._fallocate", refuse)
    await storage.punch(1000, 200_000)
    assert await storage.read_bytes(0, 300_000) == CONTENT[:1000] + bytes(200_000) + CONTENT[201_000:]
    await storage.close()


async def test_read_only_storages_refuse_changes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    storage = FileStorage.open(str(path), writable=False)
    for change in (storage.write(0, [b"x"]), storage.truncate(0), storage.punch(0, 1)):
        with pytest.raises(ReadOnly):
            await change
    await storage.close()
    assert path.read_bytes() == b"abc"


async def test_reopening_keeps_the_file_but_not_another_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    storage = FileStorage.open(str(path), writable=False)
    await storage.reopen(writable=True)
    await storage.write(0, [b"X"])
    await storage.reopen(writable=False)
    path.rename(tmp_path / "other")
    path.write_bytes(b"impostor")
    with pytest.raises(StorageError, match="was replaced by another file"):
        await storage.reopen(writable=True)
    assert await storage.read_bytes(0, 3) == b"Xbc"
    await storage.close()


def test_odd_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name, sentence in (
        ("missing", "cannot open: No such file or directory"),
        (".", "is a directory, not an image"),
        ("fifo", "is neither a regular file nor a block device"),
        ("loop", "cannot open: Too many levels of symbolic links"),
    ):
        with pytest.raises(StorageError) as caught:
            FileStorage.open(str(tmp_path / name), writable=False)
        assert caught.value.message == sentence


def test_two_names_of_one_file_have_one_identity(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to("a")
    (tmp_path / "d").write_bytes(b"")
    identities = {FileStorage.open(str(tmp_path / name), writable=False).identity for name in "abc"}
    assert len(identities) == 1
    assert FileStorage.open(str(tmp_path / "d"), writable=False).identity not in identities


async def test_the_search_for_holes_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(b"x" * (1 << 20))
    os.truncate(path, 3 << 20)
    storage = FileStorage.open(str(path), writable=True)
    sought: list[int] = []
    lseek = os.lseek

    def watch(fd: int, position: int, how: int) -> int:
        sought.append(how)
        return lseek(fd, position, how)

    monkeypatch.setattr(os, "lseek", watch)
    assert await storage.regions(0, 4096) == [Region(0, 4096, hole=False)]
    assert sought == [os.SEEK_DATA, os.SEEK_HOLE]
    assert await storage.regions(4096, (1 << 20) - 4096) == [Region(4096, (1 << 20) - 4096, hole=False)]
    assert len(sought) == 2
    assert [region.hole for region in await storage.regions(0, 2 << 20)] == [False, True]
    await storage.punch(8192, 8192)
    assert [region.hole for region in await storage.regions(8192, 16384)] == [True, False]
    await storage.truncate(16384)
    await storage.truncate(1 << 20)
    assert [region.hole for region in await storage.regions(0, 1 << 20)] == [False, True]
    await storage.close()


@pytest.mark.parametrize("error", [None, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ETXTBSY])
async def test_copies_are_the_same_whoever_makes_them(
    storage: FileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    """Large and small ones, zeros, and what goes on after the end of the source."""
    call, calls = os.copy_file_range, 0

    def copy_file_range(source: int, target: int, count: int, *offsets: int) -> int:
        nonlocal calls
        calls += 1
        if error is not None:
            raise OSError(error, os.strerror(error))
        return call(source, target, min(count, 70_000), *offsets)

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    monkeypatch.setattr(file, "COPY_APART", 1 << 40)
    target = FileStorage.create(str(tmp_path / "target"))
    await target.write(0, [b"old" * 500_000])
    moves = [
        Move(storage, 11, 1000, 280_000),
        Move(storage, 5, 400_001, 17),
        Move(None, 0, 500_000, 300_000),
        Move(storage, 290_000, 900_000, 400_000),
        Move(storage, 0, 1_600_000, 270_000),
    ]
    expected = bytearray(b"old" * 500_000).ljust(1_870_000, b"\0")
    for source, source_offset, offset, length in moves:
        content = bytes(length) if source is None else CONTENT[source_offset : source_offset + length]
        expected[offset : offset + length] = content.ljust(length, b"\0")
    await target.copy_in(moves)
    assert target.length == len(expected)
    assert await target.read_bytes(0, len(expected)) == expected
    # of three that are large enough; it is not asked again where it cannot
    assert calls == (10 if error is None else 3 if error == errno.ETXTBSY else 1)
    await target.close()
    await storage.close()


async def test_a_source_that_cannot_be_read_is_named(
    storage: FileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*words: Any) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "copy_file_range", fail)
    target = FileStorage.create(str(tmp_path / "target"))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match="cannot read") as caught:
        await target.copy_in([Move(storage, 0, 0, 280_000)])
    assert (caught.value.file, caught.value.errno) == (storage.name, errno.EIO)
    await target.close()
    await storage.close()


async def test_two_threads_copy_what_is_large_and_the_first_error_is_told_when_both_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(2).randbytes(3 << 20)
    (tmp_path / "source").write_bytes(content)
    source = FileStorage.open(str(tmp_path / "source"), writable=False)
    target = FileStorage.create(str(tmp_path / "target"))
    copy, together = FileStorage._copy, threading.Barrier(2)

    def meet(self: FileStorage, moves: Sequence[Move]) -> None:
        together.wait(timeout=PATIENCE)
        copy(self, moves)

    monkeypatch.setattr(FileStorage, "_copy", meet)
    moves = [Move(source, 5, 100, 2 << 20), Move(None, 0, 100 + (2 << 20), 300_000), Move(source, 0, 3 << 20, 300_000)]
    await target.copy_in(moves)
    expected = bytes(100) + content[5 : (2 << 20) + 5] + bytes(300_000)
    expected = expected.ljust(3 << 20, b"\0") + content[:300_000]
    assert filecmp.cmp(target.name, written(tmp_path / "expected", expected), shallow=False)
    ended: list[int] = []

    def fail(self: FileStorage, moves: Sequence[Move]) -> None:
        together.wait(timeout=PATIENCE)
        ended.append(moves[0].offset)
        raise OSError(errno.ENOSPC, "full") if moves[0].offset else ReadOnly("not this one", file="x")

    monkeypatch.setattr(FileStorage, "_copy", fail)
    with pytest.raises((StorageError, ReadOnly)):
        await target.copy_in([Move(source, 0, 0, 2 << 20)])
    assert sorted(ended) == [0, 1 << 20]
    await target.close()
    await source.close()


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 20)), min_size=1, max_size=6))
def test_moves_are_cut_in_two_without_loss(pieces: list[tuple[int, int]]) -> None:
    moves, position = [], 0
    for gap, length in pieces:
        moves.append(Move(None, position * 3, position + gap, length))
        position += gap + length
    first, second = in_two(moves)

    def every(moves: Sequence[Move]) -> list[tuple[int, int]]:
        """Where each stretch of bytes goes to, those that go on joined."""
        found: list[tuple[int, int]] = []
        for _, source, offset, length in moves:
            assert length > 0
            if found and (found[-1][1], source - offset) == (offset, joined[-1]):
                found[-1] = (found[-1][0], offset + length)
            else:
                found.append((offset, offset + length))
                joined.append(source - offset)
        return found

    joined: list[int] = []
    whole = every(moves)
    joined = []
    assert every([*first, *second]) == whole
    halves = [sum(move.length for move in part) for part in (first, second)]
    assert abs(halves[0] - halves[1]) <= 2 * (64 << 10) + 1
