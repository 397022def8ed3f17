"""The header of a QED image and its rules: section "Header" of the specification. All fields little-endian."""

import struct
from enum import IntFlag
from typing import NamedTuple

from cowfs.errors import CorruptImage, InvalidImage, Unsupported

MAGIC = b"QED\0"
#: bytes; the part of the header that changes in one atomic write
SECTOR = 512
#: bytes of a table entry
ENTRY_SIZE = 8
MIN_CLUSTER_SIZE = 1 << 12
MAX_CLUSTER_SIZE = 1 << 26
#: clusters
MAX_TABLE_SIZE = 16
#: bytes of a table; the largest clusters with the usual table size of 4. Tables are kept in memory whole
MAX_TABLE_BYTES = 1 << 28
#: bytes; not in the specification, but QEMU takes no longer ones
MAX_BACKING_NAME = 1023
#: entry of an L2 table for a cluster that reads as zeros
ZERO_CLUSTER = 1

_FIXED = struct.Struct("<4sIIIQQQQQII")
HEADER_LENGTH = _FIXED.size


class Feature(IntFlag):
    """Incompatible feature bits."""

    BACKING_FILE = 1
    NEED_CHECK = 2
    BACKING_IS_RAW = 4


#: every bit that is not in here keeps an image from being opened
KNOWN_FEATURES = int(Feature.BACKING_FILE | Feature.NEED_CHECK | Feature.BACKING_IS_RAW)


class Header(NamedTuple):
    """The fixed part of the header, as on disk: ``table_size`` and ``header_size`` in clusters, the rest in bytes."""

    cluster_size: int
    table_size: int
    header_size: int
    features: int
    compat_features: int
    autoclear_features: int
    l1_offset: int
    size: int
    backing_offset: int = 0
    backing_size: int = 0

    @property
    def table_bytes(self) -> int:
        """Bytes of the L1 table, and of each L2 table."""
        return self.table_size * self.cluster_size

    @property
    def table_reach(self) -> int:
        """Bytes of the disk that one L2 table maps."""
        return self.table_bytes // ENTRY_SIZE * self.cluster_size

    @property
    def header_bytes(self) -> int:
        """Bytes that the header and whatever is kept with it may take."""
        return self.header_size * self.cluster_size

    @property
    def max_size(self) -> int:
        """Bytes; the largest disk that the tables can map."""
        return max_size(self.cluster_size, self.table_size)

    def pack(self) -> bytes:
        """Return the bytes of the fixed part."""
        return _FIXED.pack(MAGIC, *self)


def max_size(cluster_size: int, table_size: int) -> int:
    """Bytes of the largest disk for clusters of so many bytes, and tables of so many clusters.

    Sizes and offsets are signed 64-bit numbers to the kernel, whatever the tables could map.
    """
    entries = table_size * cluster_size // ENTRY_SIZE
    return min(entries * entries * cluster_size, (1 << 63) - cluster_size)


def parse_header(data: bytes, file_length: int) -> Header:
    """Read the fixed part of a header and hold it against the rules, in a file of so many bytes.

    Raises `InvalidImage`, `CorruptImage` for an L1 table that cannot be where it is said to be, `Unsupported`.
    """
    if not data.startswith(MAGIC):
        raise InvalidImage("is not a qed image")
    if len(data) < HEADER_LENGTH:
        raise InvalidImage("is too short to be a qed image")
    header = Header(*_FIXED.unpack_from(data)[1:])
    unknown = header.features & ~KNOWN_FEATURES
    if unknown:
        bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
        raise Unsupported(f"needs qed features that cowfs does not have (incompatible feature bits {bits})")
    _check_sizes(header, file_length)
    _check_l1(header, file_length)
    if header.features & Feature.BACKING_FILE:
        _check_backing_name(header)
    return header


def _is_power_of_two(value: int, low: int, high: int) -> bool:
    return low <= value <= high and not value & (value - 1)


def _check_sizes(header: Header, file_length: int) -> None:
    cluster_size, table_size = header.cluster_size, header.table_size
    if not _is_power_of_two(cluster_size, MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE):
        raise InvalidImage(f"has a cluster size of {cluster_size} bytes, which is no power of two from 4K to 64M")
    if not _is_power_of_two(table_size, 1, MAX_TABLE_SIZE):
        raise InvalidImage(f"has a table size of {table_size} clusters, which is no power of two from 1 to 16")
    if header.table_bytes > MAX_TABLE_BYTES:
        raise Unsupported(f"has tables of {header.table_bytes} bytes; cowfs takes up to {MAX_TABLE_BYTES}")
    if not 0 < header.header_bytes <= file_length:
        raise InvalidImage(f"has a header of {header.header_size} clusters in a file of {file_length} bytes")
    if header.size % SECTOR:
        raise InvalidImage(f"has a disk of {header.size} bytes, which is no multiple of {SECTOR}")
    if header.size > header.max_size:
        raise InvalidImage(f"has a disk of {header.size} bytes; its tables can map {header.max_size}")


def _check_l1(header: Header, file_length: int) -> None:
    offset = header.l1_offset
    if offset % header.cluster_size:
        raise CorruptImage(f"has its L1 table at offset {offset:#x}, which is not aligned to clusters")
    if offset < header.header_bytes:
        raise CorruptImage(f"has its L1 table at offset {offset:#x}, inside the header")
    if offset + header.table_bytes > file_length:
        raise CorruptImage(f"has its L1 table at offset {offset:#x}, beyond the end of the file")


def _check_backing_name(header: Header) -> None:
    if header.backing_size > MAX_BACKING_NAME:
        raise InvalidImage(f"has a backing file name of {header.backing_size} bytes; {MAX_BACKING_NAME} are allowed")
    if header.backing_offset + header.backing_size > header.header_bytes:
        raise InvalidImage("has its backing file name outside of the header")
