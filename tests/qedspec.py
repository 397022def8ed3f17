"""QED by the letter of its specification, and by nothing of cowfs: images made byte by byte, and read again.

For what QEMU refuses, and so cannot judge. Files are sparse; only what is referred to is read or written.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

_HEADER = struct.Struct("<4sIIIQQQQQII")
NEED_CHECK = 2


@dataclass
class Spec:
    """A header, field by field, and what its clusters hold beside it."""

    cluster_size: int = 4096
    table_size: int = 4
    header_size: int = 1
    features: int = 0
    compat: int = 0
    autoclear: int = 0
    size: int = 1 << 20
    backing: bytes = b""
    #: offset of the name, and bytes from 64 on: whatever else the header clusters hold
    backing_offset: int = 0
    extra: bytes = b""
    #: whether L1 lies behind everything else, where nothing can take it away
    l1_last: bool = False
    #: guest cluster: its bytes, or None for a zero cluster
    clusters: dict[int, bytes | None] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        return self.table_size * self.cluster_size // 8

    @property
    def span(self) -> int:
        """Bytes of the disk that one L2 table maps."""
        return self.entries * self.cluster_size

    def write(self, path: Path) -> None:
        """Make the file: tables behind the data, all in the wrong order, as the specification allows."""
        next_free = self.header_size + (0 if self.l1_last else self.table_size)
        l1: dict[int, int] = {}
        l2: dict[int, dict[int, int]] = {}
        with path.open("wb") as file:
            for number, data in sorted(self.clusters.items(), reverse=True):
                entry = 1
                if data is not None:
                    entry = next_free * self.cluster_size
                    next_free += 1
                    file.seek(entry)
                    file.write(data)
                l2.setdefault(number // self.entries, {})[number % self.entries] = entry
            for number, table in sorted(l2.items(), reverse=True):
                l1[number] = next_free * self.cluster_size
                next_free += self.table_size
                _write_entries(file, l1[number], table)
            l1_offset = (next_free if self.l1_last else self.header_size) * self.cluster_size
            next_free += self.table_size if self.l1_last else 0
            _write_entries(file, l1_offset, l1)
            file.seek(0)
            file.write(self._header(l1_offset) + self.extra)
            if self.backing:
                file.seek(self.backing_offset)
                file.write(self.backing)
            file.truncate(next_free * self.cluster_size)

    def _header(self, l1_offset: int) -> bytes:
        sizes = self.cluster_size, self.table_size, self.header_size
        bits = self.features | bool(self.backing), self.compat, self.autoclear
        return _HEADER.pack(b"QED\0", *sizes, *bits, l1_offset, self.size, self.backing_offset, len(self.backing))


def _write_entries(file: BinaryIO, offset: int, entries: dict[int, int]) -> None:
    for index, entry in entries.items():
        file.seek(offset + index * 8)
        file.write(struct.pack("<Q", entry))


class Read:
    """An image as the specification reads it. Raises `AssertionError` where it breaks a rule.

    ``clusters`` are those of the guest's disk, None for zero clusters; ``leaks`` counts the file's without a use.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as self._file:
            self._length = path.stat().st_size
            magic, *fields = _HEADER.unpack(self._file.read(64))
            assert magic == b"QED\0"
            self.cluster_size, self.table_size, self.header_size = fields[:3]
            self.features, self.compat, self.autoclear, l1_offset, self.size = fields[3:8]
            self.backing = self._at(fields[8], fields[9]) if self.features & 1 else b""
            assert self._length % self.cluster_size == 0
            self.header = self._at(0, self.header_size * self.cluster_size)
            self._used = set(range(self.header_size))
            self.clusters: dict[int, bytes | None] = {}
            for index, offset in self._table(l1_offset):
                for number, entry in self._table(offset):
                    guest = index * (self.table_size * self.cluster_size // 8) + number
                    assert guest * self.cluster_size < self.size
                    self.clusters[guest] = None if entry == 1 else self._at(self._use(entry, 1), self.cluster_size)
            self.leaks = self._length // self.cluster_size - len(self._used)

    def _use(self, offset: int, count: int) -> int:
        first, odd = divmod(offset, self.cluster_size)
        clusters = set(range(first, first + count))
        assert not odd, "aligned"
        assert not clusters & self._used, "used once"
        assert offset + count * self.cluster_size <= self._length, "inside the file"
        self._used |= clusters
        return offset

    def _at(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(length)

    def _table(self, offset: int) -> list[tuple[int, int]]:
        """Entries of a table that are not 0, with their indices; holes of the file are stepped over."""
        self._use(offset, self.table_size)
        found = []
        step = min(1 << 20, self.cluster_size)
        for start in range(0, self.table_size * self.cluster_size, step):
            data = self._at(offset + start, step)
            if data.count(0) < step:
                values = struct.unpack(f"<{step // 8}Q", data)
                found += [(start // 8 + index, value) for index, value in enumerate(values) if value]
        return found

    def content(self, offset: int, length: int) -> bytes:
        """Bytes of the disk inside of one cluster, zeros where nothing is allocated."""
        number, within = divmod(offset, self.cluster_size)
        data = self.clusters.get(number)
        return bytes(length) if data is None else data[within : within + length]
