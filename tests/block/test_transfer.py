"""Copies between layers: in the host's kernel or through this process, with the same result."""

import errno
import os
import random
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from chains import view
from commandline import ok, qemu_img
from trio.testing import MockClock

from cowfs.block.disk import Disk
from cowfs.block.transfer import copy_range
from cowfs.errors import StorageError
from cowfs.formats.chain import open_disk
from cowfs.jobs.commit import Commit
from cowfs.jobs.job import State
from cowfs.jobs.stream import Stream
from cowfs.storage.file import FileStorage

K = 1 << 10
M = 1 << 20
SIZE = 12 * M + 3 * 512
#: of the base: it ends before the overlay does, or goes on after its end
SIZES = (SIZE - 5 * M - 512, SIZE, SIZE + 3 * M)
BASES = ("raw", "qcow2", "qcow2-compressed", "qed")
TOPS = {
    "qcow2": "",
    "qcow2-512": "cluster_size=512",
    "qcow2-2m": "cluster_size=2M",
    "qcow2-extended": "extended_l2=on",
    "qed": "",
}


def content(size: int, seed: int = 1) -> bytes:
    """Data with zeros and odd borders: stretches of all lengths."""
    rnd = random.Random(seed)
    data = b""
    while len(data) < size:
        length = rnd.choice([512, 1536, 4 * K, 64 * K, 500 * K, 2 * M])
        data += bytes(length) if rnd.random() < 0.4 else rnd.randbytes(length)
    return data[:size]


def make_base(path: Path, kind: str, data: bytes) -> str:
    """An image with that content, sparse where it is zeros; its format."""
    raw = path.with_suffix(".content")
    raw.write_bytes(data)
    format, _, packed = kind.partition("-")
    ok(qemu_img("convert", *(["-c"] if packed else []), "-f", "raw", "-O", format, "-S", "4k", raw, path))
    return format


def make_top(path: Path, kind: str, base: Path, base_format: str, size: int = SIZE) -> None:
    options = ["-o", TOPS[kind]] if TOPS[kind] else []
    format = kind.split("-")[0]
    ok(qemu_img("create", "-q", "-f", format, *options, "-b", base, "-F", base_format, path, str(size)))


def assert_holds(path: Path, format: str, expected: bytes | bytearray) -> None:
    """QEMU finds the image sound, and that content in it."""
    if format != "raw":
        ok(qemu_img("check", "-q", "-f", format, path))
    assert view(path, format)[: len(expected)] == expected


class Kernel:
    """Counts what the kernel copies; ``error`` keeps it from that."""

    def __init__(self, error: int | None = None, most: int = 1 << 40) -> None:
        self.error = error
        self.most = most
        self.copied = 0
        self._call = os.copy_file_range

    def copy_file_range(self, source: int, target: int, count: int, *offsets: int) -> int:
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        done = self._call(source, target, min(count, self.most), *offsets)
        self.copied += done
        return done


WAYS: dict[str, Callable[[], Kernel]] = {
    "kernel": lambda: Kernel(most=700_001),
    "other-file-system": lambda: Kernel(errno.EXDEV),
}


@pytest.fixture(params=WAYS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = WAYS[request.param]()
    monkeypatch.setattr(os, "copy_file_range", made.copy_file_range)
    return made


@asynccontextmanager
async def opened(path: Path, *, writable: bool = True) -> AsyncIterator[Disk]:
    disk = await open_disk(str(path), path.suffix[1:], writable=writable)
    try:
        yield disk
    finally:
        await disk.close()


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("top", TOPS)
async def test_a_stream_copies_what_is_below(
    tmp_path: Path, kernel: Kernel, top: str, kind: str, size: int, autojump_clock: MockClock
) -> None:
    if kind == "qed":
        size -= size % 512
    data = content(size)
    format = make_base(base := tmp_path / "base", kind, data)
    make_top(path := tmp_path / f"top.{top.split('-')[0]}", top, base, format)
    expected = bytearray(data[:SIZE].ljust(SIZE, b"\0"))
    async with opened(path) as disk:
        for offset, length in ((100 * K, 3000), (5 * M - 512, 70 * K), (SIZE - 512, 512)):
            expected[offset : offset + length] = b"w" * length
            await disk.write(offset, b"w" * length)
        job = Stream(disk)
        await job.run()
        assert (job.state, job.error) == (State.COMPLETED, "")
        assert await disk.read(0, SIZE) == expected
    base.unlink()
    assert_holds(path, path.suffix[1:], expected)
    # clusters of 512 bytes lie in pieces that are too small for it to be worth the while
    if kernel.error is None and kind in ("raw", "qcow2") and top != "qcow2-512":
        assert kernel.copied > M


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("top", TOPS)
async def test_a_commit_copies_what_is_above(
    tmp_path: Path, kernel: Kernel, top: str, kind: str, autojump_clock: MockClock
) -> None:
    data = content(SIZE)
    format = make_base(base := tmp_path / "base", kind, data)
    make_top(path := tmp_path / f"top.{top.split('-')[0]}", top, base, format)
    expected = bytearray(data)
    rnd = random.Random(2)
    async with opened(path) as disk:
        for length in (512, 3000, 64 * K, 700 * K, 3 * M):
            offset = rnd.randrange((SIZE - length) // 512) * 512
            expected[offset : offset + length] = piece = rnd.randbytes(length)
            await disk.write(offset, piece)
        job = Commit(disk)
        await job.run()
        assert (job.state, job.error) == (State.COMPLETED, "")
        assert await disk.read(0, SIZE) == expected
    assert_holds(base, format, expected)
    assert_holds(path, path.suffix[1:], expected)
    if kernel.error is None and top != "qcow2-512":
        # large steps, that is; what is small is copied by the loop itself
        assert kernel.copied > 512 * K


@pytest.mark.needs("qemu-img")
async def test_space_that_was_used_before_gets_its_zeros(tmp_path: Path, kernel: Kernel) -> None:
    """A cluster below that is zeros for the most part goes to a place that held other bytes."""
    data = bytearray(8 * M)
    data[4 * M : 8 * M : 64 * K] = b"x" * 64
    make_base(base := tmp_path / "base", "raw", bytes(data))
    make_top(path := tmp_path / "top.qcow2", "qcow2", base, "raw", 8 * M)
    async with opened(path) as disk:
        await disk.write(0, b"\xee" * (4 * M))
        await disk.flush()
        # what the range held is free now, and first in line
        await disk.layers[0].write_zeroes(0, 4 * M)
        await disk.layers[0].deallocate(0, 4 * M)
        await disk.flush()
        length = disk.layers[0].storage.length
        assert await disk.copy_up(4 * M, 4 * M) == 4 * M
        assert disk.layers[0].storage.length < length + M
        assert await disk.read(0, 8 * M) == data
    assert_holds(path, "qcow2", data)


@pytest.mark.needs("qemu-img")
async def test_an_external_data_file_ends_where_the_disk_does(tmp_path: Path, kernel: Kernel) -> None:
    data = content(SIZE)
    make_base(base := tmp_path / "base", "raw", data)
    path = tmp_path / "top.qcow2"
    options = f"data_file={tmp_path / 'data'}"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", path, str(SIZE)))
    async with opened(path) as disk:
        await disk.copy_up(0, SIZE)
        assert await disk.read(0, SIZE) == data
    assert_holds(path, "qcow2", data)


@pytest.mark.needs("qemu-img")
async def test_the_range_may_begin_and_end_inside_of_clusters(tmp_path: Path, kernel: Kernel) -> None:
    data = content(SIZE)
    format = make_base(base := tmp_path / "base", "qcow2", bytes(SIZE))
    make_top(middle := tmp_path / "middle.qcow2", "qcow2", base, format)
    make_top(path := tmp_path / "top.qcow2", "qcow2", middle, "qcow2")
    rnd = random.Random(3)
    expected = bytearray(SIZE)
    async with opened(path) as disk:
        await disk.set_layer_writable(2, True)
        await disk.write(0, data)
        for _ in range(40):
            start, end = sorted(rnd.sample(range(SIZE // 512), 2))
            end = min(end, start + 1000)
            await copy_range(disk, 0, 2, start * 512, end * 512)
            expected[start * 512 : end * 512] = data[start * 512 : end * 512]
            assert await disk.read(0, SIZE, 2) == expected
        await disk.set_layer_writable(2, False)
    assert_holds(base, format, expected)


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
async def test_a_copy_that_fails_takes_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    data = random.Random(1).randbytes(4 * M)
    make_base(base := tmp_path / "base", "raw", data)
    make_top(path := tmp_path / "top.qcow2", "qcow2", base, "raw", 4 * M)
    kernel = Kernel()
    monkeypatch.setattr(os, "copy_file_range", kernel.copy_file_range)
    write = FileStorage._write_rest

    def fail(storage: FileStorage, offset: int, rest: list[memoryview]) -> None:
        raise OSError(number, os.strerror(number))

    async with opened(path) as disk:
        kernel.most, kernel.error = 1 * M, None

        def copy_a_part(source: int, target: int, count: int, *offsets: int) -> int:
            if kernel.copied >= 2 * M:
                raise OSError(number, os.strerror(number))
            return kernel.copy_file_range(source, target, count, *offsets)

        monkeypatch.setattr(os, "copy_file_range", copy_a_part)
        monkeypatch.setattr(FileStorage, "_write_rest", fail)
        with pytest.raises(StorageError) as caught:
            await disk.copy_up(0, 4 * M)
        assert caught.value.errno == number
        # what is there of it already is no empty space
        assert disk.layers[0].storage.length == path.stat().st_size
        monkeypatch.setattr(FileStorage, "_write_rest", write)
        kernel.copied = -(1 << 40)
        assert await disk.copy_up(0, 4 * M) == 4 * M
    assert_holds(path, "qcow2", data)


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A file system whose files can share blocks."""
    image, point = tmp_path / "xfs.img", tmp_path / "xfs"
    with image.open("wb") as file:
        file.truncate(320 * M)
    point.mkdir()
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


def used(folder: Path) -> int:
    subprocess.run(["sync", "-f", folder], check=True)
    state = os.statvfs(folder)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


@pytest.mark.needs("qemu-img", "mkfs.xfs", "root", "loop")
@pytest.mark.parametrize("job", ["stream", "commit"])
async def test_a_file_system_that_can_shares_what_is_copied(xfs: Path, job: str) -> None:
    data = random.Random(1).randbytes(64 * M)
    make_base(base := xfs / "base", "raw", data)
    (xfs / "base.content").unlink()
    make_top(path := xfs / "top.qcow2", "qcow2", base, "raw", 64 * M)
    async with opened(path) as disk:
        if job == "commit":
            data = random.Random(2).randbytes(64 * M)
            await disk.write(0, data)
            await disk.flush()
        before = used(xfs)
        if job == "stream":
            assert await disk.copy_up(0, 64 * M) == 64 * M
        else:
            await disk.set_layer_writable(1, True)
            await copy_range(disk, 0, 1, 0, 64 * M)
        await disk.flush()
        assert used(xfs) - before < 8 * M
        assert await disk.read(0, 64 * M) == data
        # what is written now to one of them, the other does not see
        await disk.write(M, b"n" * M)
        data = data[:M] + b"n" * M + data[2 * M :]
        assert await disk.read(0, 64 * M) == data
    assert_holds(path, "qcow2", data)
