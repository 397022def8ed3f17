"""Random file operations on two files, one of them in a mount, which must never differ.

By hand, many of them, see --help::

    scripts/fsx --operations 1000000 --seed 7 MOUNT/NAME

Whatever is found is found again by the same seed, on a file of the same content. The other file is a plain one.
"""

import argparse
import contextlib
import errno
import mmap
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fallocating import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate

PAGE = 4096
#: bytes of one operation at most, and now and then
LENGTH, LONG = 20_000, 300_000

#: operations, and how often they come; of resize only those that the disk allows
WEIGHTS = {
    "write": 20,
    "write_zeros": 2,
    "append": 1,
    "direct_write": 6,
    "mmap_write": 6,
    "private_mmap": 1,
    "read": 15,
    "direct_read": 5,
    "mmap_read": 5,
    "punch": 8,
    "zero_range": 6,
    "plain_fallocate": 1,
    "seek": 6,
    "fsync": 1,
    "forget_pages": 2,
    "reopen": 1,
    "resize": 1,
}


class Difference(AssertionError):
    """The two files are not the same any more."""


class Fsx:
    """``flat`` in a mount, and ``plain`` beside it, which becomes a copy of it."""

    def __init__(self, flat: Path, plain: Path, seed: int, *, shrink: bool = False, unit: int = 512) -> None:
        self.flat, self.plain = flat, plain
        self.chooser = random.Random(seed)
        self.size = flat.stat().st_size
        self.most = self.size + self.size // 4
        self._shrink, self._unit = shrink, unit
        self.done = 0
        self.what = ""
        with open(flat, "rb") as source, open(plain, "wb") as target:
            while part := source.read(1 << 20):
                target.write(part)
        self._open()

    def _open(self) -> None:
        self.files = [os.open(path, os.O_RDWR) for path in (self.flat, self.plain)]
        self.direct = os.open(self.flat, os.O_RDWR | os.O_DIRECT)

    def close(self) -> None:
        for descriptor in (*self.files, self.direct):
            os.close(descriptor)

    def run(self, operations: int) -> None:
        """Do so many; raises `Difference`, with what was done last."""
        names = list(WEIGHTS)
        for name in self.chooser.choices(names, [WEIGHTS[name] for name in names], k=operations):
            try:
                getattr(self, name)()
            except (Difference, OSError, ValueError) as error:
                raise Difference(f"operation {self.done}, {name}{self.what}: {error}") from error
            self.done += 1
        self.compare()

    def compare(self) -> None:
        """All of it."""
        if os.fstat(self.files[0]).st_size != self.size:
            raise Difference(f"{os.fstat(self.files[0]).st_size} bytes, not {self.size}")
        for offset in range(0, self.size, 1 << 20):
            self._same(os.pread(self.files[0], 1 << 20, offset), offset)

    def _same(self, found: bytes, offset: int) -> None:
        expected = os.pread(self.files[1], len(found), offset)
        if found != expected:
            first = next(at for at, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
            raise Difference(f"byte {offset + first} is {found[first]}, not {expected[first]}")

    def _range(self, unit: int = 1) -> tuple[int, int]:
        most = LONG if self.chooser.random() < 0.05 else LENGTH
        length = self.chooser.randrange(unit, max(unit + 1, min(most, self.size)))
        length -= length % unit
        offset = self.chooser.randrange(0, self.size - length + 1)
        offset -= offset % unit
        self.what = f" of {length} bytes at {offset}"
        return offset, length

    def _write(self, offset: int, data: bytes) -> None:
        for descriptor in self.files:
            if os.pwrite(descriptor, data, offset) != len(data):
                raise Difference("a short write")

    # -- operations

    def write(self) -> None:
        offset, length = self._range()
        self._write(offset, self.chooser.randbytes(length))

    def write_zeros(self) -> None:
        offset, length = self._range()
        self._write(offset, bytes(length))

    def append(self) -> None:
        """O_APPEND at the end of a disk has no room."""
        self.what = ""
        descriptor = os.open(self.flat, os.O_WRONLY | os.O_APPEND | os.O_DIRECT)
        try:
            with _page(b"a" * PAGE) as page:
                os.write(descriptor, page)
            raise Difference("it was taken")
        except OSError as error:
            if error.errno not in (errno.EFBIG, errno.ENOSPC, errno.EINVAL):
                raise
        finally:
            os.close(descriptor)

    def direct_write(self) -> None:
        offset, length = self._range(PAGE)
        data = self.chooser.randbytes(length)
        with _page(data) as page:
            os.pwrite(self.direct, page, offset)
        os.pwrite(self.files[1], data, offset)

    def mmap_write(self) -> None:
        offset, length = self._range()
        data = self.chooser.randbytes(length)
        with self._mapped(offset, length, mmap.MAP_SHARED) as (mapped, within):
            mapped[within : within + length] = data
            if self.chooser.random() < 0.3:
                mapped.flush()
        os.pwrite(self.files[1], data, offset)

    def private_mmap(self) -> None:
        """What is written to a private mapping goes nowhere."""
        offset, length = self._range()
        with self._mapped(offset, length, mmap.MAP_PRIVATE) as (mapped, within):
            self._same(mapped[within : within + length], offset)
            mapped[within : within + length] = bytes(length)

    @contextlib.contextmanager
    def _mapped(self, offset: int, length: int, flags: int):  # type: ignore[no-untyped-def]
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(self.files[0], offset + length - start, flags=flags, offset=start) as mapped:
            yield mapped, offset - start

    def read(self) -> None:
        offset, length = self._range()
        self._same(os.pread(self.files[0], length, offset), offset)

    def direct_read(self) -> None:
        offset, length = self._range(PAGE)
        with _page(bytes(length)) as page:
            if os.preadv(self.direct, [page], offset) != length:
                raise Difference("a short read")
            self._same(bytes(page), offset)

    def mmap_read(self) -> None:
        offset, length = self._range()
        with self._mapped(offset, length, mmap.MAP_SHARED) as (mapped, within):
            self._same(mapped[within : within + length], offset)

    def punch(self) -> None:
        offset, length = self._range()
        for descriptor in self.files:
            fallocate(descriptor, PUNCH_HOLE, offset, length)

    def zero_range(self) -> None:
        offset, length = self._range()
        mode = ZERO_RANGE | self.chooser.choice([0, KEEP_SIZE])
        fallocate(self.files[0], mode, offset, length)
        os.pwrite(self.files[1], bytes(length), offset)

    def plain_fallocate(self) -> None:
        offset, length = self._range()
        fallocate(self.files[0], self.chooser.choice([0, KEEP_SIZE]), offset, length)

    def seek(self) -> None:
        """Between a place and the next data, and from a hole on to its end, is nothing but zeros."""
        offset, _ = self._range()
        try:
            data = os.lseek(self.files[0], offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = self.size
        self._all_zeros(offset, data)
        hole = os.lseek(self.files[0], offset, os.SEEK_HOLE)
        if not offset <= hole <= self.size:
            raise Difference(f"SEEK_HOLE says {hole}")
        if offset == data and hole == offset:
            raise Difference("both data and a hole")

    def _all_zeros(self, start: int, end: int) -> None:
        for offset in range(start, end, 1 << 20):
            if any(os.pread(self.files[1], min(1 << 20, end - offset), offset)):
                raise Difference(f"SEEK_DATA leaves out data between {start} and {end}")

    def fsync(self) -> None:
        os.fsync(self.files[0])

    def forget_pages(self) -> None:
        """Have what is read next come from the server."""
        offset, length = self._range()
        os.fsync(self.files[0])
        os.posix_fadvise(self.files[0], offset, length, os.POSIX_FADV_DONTNEED)

    def reopen(self) -> None:
        self.close()
        self._open()

    def resize(self) -> None:
        least = self.most // 2 if self._shrink else self.size
        size = self.chooser.randrange(least, self.most + 1)
        size -= size % self._unit
        self.what = f" from {self.size} to {size}"
        if size < self.size and not self._shrink:
            return
        for descriptor in self.files:
            os.ftruncate(descriptor, size)
        self.size = size


@contextlib.contextmanager
def _page(data: bytes):  # type: ignore[no-untyped-def]
    """Memory that O_DIRECT takes."""
    with mmap.mmap(-1, len(data)) as page:
        page[:] = data
        with memoryview(page) as view:
            yield view


def main(words: Sequence[str]) -> int:
    """Work on a flat file until something differs."""
    parser = argparse.ArgumentParser(prog="scripts/fsx", description=__doc__.split("\n\n")[0])
    parser.add_argument("flat", type=Path, help="a flat file in a mount; its content is lost")
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shrink", action="store_true", help="for mounts with allow-shrink")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        fsx = Fsx(options.flat, Path(folder) / "plain", options.seed, shrink=options.shrink)
        try:
            while fsx.done < options.operations:
                fsx.run(min(10_000, options.operations - fsx.done))
                print(f"{fsx.done} operations", flush=True)  # noqa: T201
        except Difference as error:
            print(f"seed {options.seed}: {error}", file=sys.stderr)  # noqa: T201
            return 1
        finally:
            fsx.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
