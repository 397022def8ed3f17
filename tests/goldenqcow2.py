"""A small qcow2 image put together byte by byte, and ways to get single things in it wrong.

Clusters of 4 KiB: header, refcount table, refcount block, L1, L2, data, compressed data, snapshot table, L1 of the
snapshot (whose L2 is that of the disk, and shared).
"""

import struct
import tracemalloc
import zlib
from collections.abc import Awaitable, Callable

from storages import MemoryStorage

from cowfs.formats import qcow2
from cowfs.formats.qcow2.image import Qcow2Image

#: bytes that may be taken beside the image itself, whatever it claims; caches and buffers among them
ENOUGH = 3 << 20

CLUSTER = 4096
SIZE = 64 * CLUSTER
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
TABLE, BLOCK, L1, L2, DATA, PACKED, SNAPSHOTS, SNAPSHOT_L1, END = (number * CLUSTER for number in range(1, 10))
#: what the disk holds in its first clusters; the others were never written
CONTENT = b"D" * CLUSTER + b"packed! " * (CLUSTER // 8) + bytes(SIZE - 2 * CLUSTER)

#: place and bytes of header fields
FIELDS = {
    "magic": (0, 4), "version": (4, 4), "backing_offset": (8, 8), "backing_length": (16, 4), "cluster_bits": (20, 4),
    "size": (24, 8), "crypt_method": (32, 4), "l1_entries": (36, 4), "l1_offset": (40, 8), "table_offset": (48, 8),
    "table_clusters": (56, 4), "snapshots": (60, 4), "snapshots_offset": (64, 8), "incompatible": (72, 8),
    "compatible": (80, 8), "autoclear": (88, 8), "refcount_order": (96, 4), "header_length": (100, 4),
    "compression_type": (104, 1),
}  # fmt: skip

#: kinds of header extensions
BACKING_FORMAT, FEATURE_NAMES, DATA_FILE, UNKNOWN = 0xE279_2ACA, 0x6803_F857, 0x4441_5441, 0x1234_5678


class Golden:
    """The image in ``data``; methods change it and return the same, to be chained."""

    def __init__(self) -> None:
        self.data = bytearray(END)
        values = {
            "magic": 0x5146_49FB, "version": 3, "cluster_bits": 12, "size": SIZE, "l1_entries": 1, "l1_offset": L1,
            "table_offset": TABLE, "table_clusters": 1, "refcount_order": 4, "header_length": 112,
        }  # fmt: skip
        self.set(**values)
        self.put(TABLE, BLOCK)
        self.counts = [1] * (END // CLUSTER)
        self.counts[SNAPSHOTS // CLUSTER] = self.counts[SNAPSHOT_L1 // CLUSTER] = 0
        self.put(L1, L2 | COPIED).put(L2, DATA | COPIED)
        deflate = zlib.compressobj(9, zlib.DEFLATED, -12)
        packed = deflate.compress(CONTENT[CLUSTER : 2 * CLUSTER]) + deflate.flush()
        # offset below bit 58, then how many sectors follow the first
        self.put(L2 + 8, COMPRESSED | PACKED)
        self.data[DATA : DATA + CLUSTER] = CONTENT[:CLUSTER]
        self.data[PACKED : PACKED + len(packed)] = packed
        self._count()

    def _count(self) -> None:
        self.data[BLOCK : BLOCK + 2 * len(self.counts)] = struct.pack(f">{len(self.counts)}H", *self.counts)

    def put(self, offset: int, value: int, size: int = 8) -> "Golden":
        self.data[offset : offset + size] = value.to_bytes(size, "big")
        return self

    def set(self, **fields: int) -> "Golden":
        """Set fields of the header."""
        for name, value in fields.items():
            self.put(FIELDS[name][0], value, FIELDS[name][1])
        return self

    def extend(self, kind: int, data: bytes, *, length: int | None = None) -> "Golden":
        """Make this the header's only extension; ``length`` is what it claims."""
        packed = struct.pack(">II", kind, len(data) if length is None else length) + data
        self.data[112 : 112 + len(packed)] = packed
        return self

    def name(self, name: bytes, offset: int = 1024) -> "Golden":
        """Name a backing file."""
        self.data[offset : offset + len(name)] = name
        return self.set(backing_offset=offset, backing_length=len(name))

    def snapshot(self, *, name: bytes = b"one", extra: bytes = bytes(8) + SIZE.to_bytes(8, "big")) -> "Golden":
        """Have an internal snapshot of the disk as it is."""
        entry = struct.pack(">QIHHIIQII", SNAPSHOT_L1, 1, 1, len(name), 1, 2, 3, 0, len(extra)) + extra + b"1" + name
        self.data[SNAPSHOTS : SNAPSHOTS + len(entry)] = entry
        self.set(snapshots=1, snapshots_offset=SNAPSHOTS)
        self.put(SNAPSHOT_L1, L2).put(L1, L2).put(L2, DATA)
        self.counts = [1, 1, 1, 1, 2, 2, 2, 1, 1]
        self._count()
        return self

    def count(self, cluster: int, count: int) -> "Golden":
        """Say how often a host cluster is referred to."""
        self.counts[cluster] = count
        self._count()
        return self

    def cut(self, length: int) -> "Golden":
        """End the file there."""
        del self.data[length:]
        return self


def feature_names(*names: tuple[int, int, bytes]) -> bytes:
    """Return a feature name table: kind, bit, name."""
    return b"".join(bytes([kind, bit]) + name.ljust(46, b"\0") for kind, bit, name in names)


async def open_golden(golden: Golden) -> tuple[Qcow2Image, MemoryStorage]:
    """Open an image for writing, in memory."""
    storage = MemoryStorage("image", bytes(golden.data))
    return await qcow2.open_image(storage), storage


async def in_little_memory(work: Callable[[], Awaitable[None]]) -> None:
    """Do some work; it must not take more memory than is `ENOUGH`."""
    tracemalloc.start()
    try:
        await work()
        assert tracemalloc.get_traced_memory()[1] < ENOUGH
    finally:
        tracemalloc.stop()
