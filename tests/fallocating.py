"""fallocate(2), of which Python's library has only the part without modes, and what there is of a file on the host."""

import ctypes
import os
from pathlib import Path

#: modes; holes and zeros here never change the size
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02 | KEEP_SIZE
COLLAPSE_RANGE = 0x08
ZERO_RANGE = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """Raises OSError."""
    if _libc.fallocate(descriptor, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def allocated(path: Path) -> int:
    """Bytes of the host's space."""
    return path.stat().st_blocks * 512


def data_ranges(path: Path) -> list[tuple[int, int]]:
    """What SEEK_DATA and SEEK_HOLE say: (start, end)."""
    found = []
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        position = 0
        while position < end:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, position))
    return found
