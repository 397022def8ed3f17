"""Writes of nothing but zeros that become zeros without data, for guests that wipe what they do not need."""

from enum import Enum

from cowfs.block.disk import Disk
from cowfs.block.zeros import is_zero

#: bytes; what is shorter costs less as data
SHORTEST = 512


class DetectZeroes(str, Enum):
    """What is done about writes of zeros, as QEMU has it."""

    #: they are written like everything else
    OFF = "off"
    #: they take no new space
    ON = "on"
    #: besides, what they overwrite is given back
    UNMAP = "unmap"


class ZeroDetector:
    """A disk whose guests' writes are searched for zeros; everything else goes past it."""

    def __init__(self, disk: Disk, *, unmap: bool) -> None:
        self._disk = disk
        self._unmap = unmap
        self.readinto_now = disk.readinto_now
        self.readinto = disk.readinto
        self.flush = disk.flush

    @property
    def size(self) -> int:
        """Bytes."""
        return self._disk.size

    def write_now(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        """`Disk.write_now`; zeros take more than that."""
        return not _is_zeros(data) and self._disk.write_now(offset, data)

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """`Disk.write`, or zeros."""
        if _is_zeros(data):
            await self._disk.write_zeroes(offset, len(data), unmap=self._unmap)
            self._disk.stats.writes += 1
            self._disk.stats.write_bytes += len(data)
        else:
            await self._disk.write(offset, data)


def _is_zeros(data: bytes | bytearray | memoryview) -> bool:
    # most data tells itself at one of its ends
    return len(data) >= SHORTEST and not data[0] and not data[-1] and is_zero(data)


def detecting(disk: Disk, mode: DetectZeroes) -> Disk | ZeroDetector:
    """Return what guests shall write to."""
    return disk if mode is DetectZeroes.OFF else ZeroDetector(disk, unmap=mode is DetectZeroes.UNMAP)
