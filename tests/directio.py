"""Flat files past the kernel's cache, which could say what the server does not."""

import errno
import mmap
import os
from pathlib import Path
from typing import Self

from commandline import qemu_img, qemu_io

CLUSTER = 64 << 10


def require_whole(done: int, length: int) -> None:
    """Raise EIO for a call that came short, as it does if the server dies in the middle."""
    if done < length:
        raise OSError(errno.EIO, f"{done} bytes in place of {length}")


class Direct:
    """A flat file that is open with ``O_DIRECT``; for whole sectors, up to a cluster at a time."""

    def __init__(self, flat: Path) -> None:
        self.descriptor = os.open(flat, os.O_RDWR | os.O_DIRECT)
        # of whole pages, as it has to be
        self._buffer = memoryview(mmap.mmap(-1, CLUSTER))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, offset: int, data: bytes) -> None:
        part = self._buffer[: len(data)]
        part[:] = data
        require_whole(os.pwritev(self.descriptor, [part], offset), len(data))

    def read(self, offset: int, length: int = CLUSTER) -> bytes:
        part = self._buffer[:length]
        require_whole(os.preadv(self.descriptor, [part], offset), length)
        return bytes(part)

    def sync(self) -> None:
        os.fsync(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)


class Blocks:
    """Clusters of a disk, each of one byte again and again, and what they should be."""

    def __init__(self) -> None:
        #: offset: byte
        self.model: dict[int, int] = {}

    def write(self, disk: Direct, offset: int, value: int) -> None:
        disk.write(offset, bytes([value]) * CLUSTER)
        self.model[offset] = value

    def shown_by(self, disk: Direct) -> dict[int, int | bytes]:
        """What a mount shows, by offset: a byte where all of a cluster is that one."""
        found = {offset: disk.read(offset) for offset in self.model}
        return {offset: data[0] if data == data[:1] * CLUSTER else data for offset, data in found.items()}

    def judge(self, image: Path, format: str) -> None:
        """QEMU finds the image sound, and all of it there."""
        checked = qemu_img("check", "-f", format, image)
        assert checked.returncode == 0, (checked.stdout + checked.stderr)[:1000]
        qemu_io(image, format, *(f"read -P {value} {offset} {CLUSTER}" for offset, value in self.model.items()))
