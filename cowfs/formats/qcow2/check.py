"""Check of a qcow2 image: every reference is counted and compared with the counts on disk.

The rules and the counting are those of ``qemu-img check``; whole tables are handled at once with numpy.
"""

import struct
from array import array

import numpy as np
import numpy.typing as npt

from cowfs.block.check import CheckResult
from cowfs.block.metacache import MetadataCache, Table
from cowfs.errors import CorruptImage, Unsupported
from cowfs.formats.qcow2.compressed import SECTOR
from cowfs.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
    COMPRESSED,
    COPIED,
    EXTENSION_BITMAPS,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    ZERO,
    Header,
)
from cowfs.formats.qcow2.snapshots import read_snapshots
from cowfs.storage.base import Storage

Entries = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.unsignedinteger]

#: host clusters; more cannot be counted in reasonable memory
MAX_CLUSTERS = 1 << 30

_BITMAP_ENTRY = struct.Struct(">QIIBBHI")


async def check(
    storage: Storage, header: Header, tables: MetadataCache, l1: Table, refcount_table: Table
) -> CheckResult:
    """Look for everything that ``qemu-img check`` looks for; changes nothing."""
    return await _Check(storage, header, tables, l1, refcount_table).run()


class _Check:
    def __init__(
        self, storage: Storage, header: Header, tables: MetadataCache, l1: Table, refcount_table: Table
    ) -> None:
        self.storage = storage
        self.header = header
        self.tables = tables
        self.l1 = l1
        self.refcount_table = refcount_table
        self.bits = header.cluster_bits
        self.size = header.cluster_size
        self.clusters = -(-storage.length >> self.bits)
        if self.clusters > MAX_CLUSTERS:
            raise Unsupported(f"has {self.clusters} clusters, too many to check", file=storage.name)
        self.result = CheckResult(total_clusters=-(-header.size // self.size))
        self.counted = np.zeros(self.clusters, np.uint32)
        self.stored: Counts = np.zeros(self.clusters, np.uint64 if header.refcount_order == 6 else np.uint32)

    async def run(self) -> CheckResult:
        header = self.header
        await self._load_counts()
        self._count_area(0, self.size)
        await self._count_l1(self.l1.offset, self.l1.entries, active=True)
        if header.snapshots:
            snapshots, table_bytes = await read_snapshots(self.storage, header)
            self._count_area(header.snapshots_offset, table_bytes)
            for snapshot in snapshots:
                await self._count_snapshot(snapshot.l1_offset, snapshot.l1_entries)
        await self._count_bitmaps()
        self._count_area(header.refcount_table_offset, header.refcount_table_clusters << self.bits)
        self._count_blocks()
        self._compare()
        return self.result

    # -- counts on disk

    async def _load_counts(self) -> None:
        per_block = 8 * self.size >> self.header.refcount_order
        for index, entry in enumerate(self.refcount_table.entries):
            start = index * per_block
            offset = entry & OFFSET_MASK
            if start >= self.clusters or not self._is_block(offset):
                continue
            counts = self._unpack(await self.storage.read_bytes(offset, self.size))
            self.stored[start : start + per_block] = counts[: self.clusters - start]

    def _unpack(self, block: bytes) -> npt.NDArray[np.unsignedinteger]:
        order = self.header.refcount_order
        if order >= 3:
            return np.frombuffer(block, f">u{1 << order - 3}")
        width = 1 << order
        packed = np.frombuffer(block, np.uint8)
        return np.stack([packed >> shift & (1 << width) - 1 for shift in range(0, 8, width)], axis=1).reshape(-1)

    def _is_block(self, offset: int) -> bool:
        return bool(offset) and not offset % self.size and offset >> self.bits < self.clusters

    def _count_blocks(self) -> None:
        for index, entry in enumerate(self.refcount_table.entries):
            offset = entry & OFFSET_MASK
            if entry & REFCOUNT_TABLE_RESERVED:
                self.result.corrupt(f"refcount table entry {index} has reserved bits set")
            if not offset:
                continue
            if offset % self.size:
                self.result.corrupt(f"refcount block {index} is not cluster aligned; refcount table entry corrupted")
            elif not self._is_block(offset):
                self.result.corrupt(f"refcount block {index} is outside image")
            else:
                self._count_area(offset, self.size)
                if (count := int(self.counted[offset >> self.bits])) != 1:
                    self.result.corrupt(f"refcount block {index} refcount={count}")

    # -- references

    def _count_area(self, offset: int, length: int) -> None:
        """Count one reference to each cluster that an area touches."""
        if not length:
            return
        if offset + length - self.storage.length >= self.size:
            self._beyond(offset, length)
            return
        self.counted[offset >> self.bits : offset + length - 1 + self.size >> self.bits] += 1

    def _beyond(self, offset: int, length: int) -> None:
        self.result.corrupt(f"reference to {length} bytes at {offset:#x}, beyond the end of the file")

    def _count_hosts(self, hosts: Entries) -> None:
        """Count one reference to each of many clusters, by host offset."""
        beyond = hosts >> self.bits >= self.clusters
        for host in hosts[beyond]:
            self._beyond(int(host), self.size)
        np.add.at(self.counted, (hosts[~beyond] >> self.bits).astype(np.int64), 1)

    async def _count_snapshot(self, offset: int, entries: int) -> None:
        if offset % self.size or offset + entries * 8 > self.storage.length:
            self.result.corrupt(f"L1 table of a snapshot at {offset:#x} is no place for one")
            return
        table = await self.tables.read(offset, entries * 8, "Q", "L1 table of a snapshot")
        await self._count_l1(offset, table, active=False)

    async def _count_l1(self, offset: int, entries: "array[int]", *, active: bool) -> None:
        self._count_area(offset, len(entries) * 8)
        for index, entry in enumerate(entries):
            table = entry & OFFSET_MASK
            if entry & L1_RESERVED:
                self.result.corrupt(f"found L1 entry with reserved bits set: {entry:x}")
            if not table:
                continue
            if table % self.size:
                self.result.corrupt(f"l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted")
                continue
            self._count_area(table, self.size)
            if active:
                self._check_copied_table(index, entry)
            if table >= self.storage.length:
                continue
            if table + self.size > self.storage.length:
                self.result.corrupt(f"L2 table at {table:#x} is cut off by the end of the file")
                continue
            cached = self.tables.get(table)
            found = cached.entries if cached else await self.tables.read(table, self.size, "Q", "L2 table")
            self._count_l2(np.frombuffer(found, np.uint64), active=active)

    def _check_copied_table(self, index: int, entry: int) -> None:
        cluster = (entry & OFFSET_MASK) >> self.bits
        count = int(self.stored[cluster]) if cluster < self.clusters else 0
        if (count == 1) != bool(entry & COPIED):
            self.result.corrupt(f"OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={count}")

    def _count_l2(self, entries: Entries, *, active: bool) -> None:
        is_compressed = entries & COMPRESSED != 0
        self._count_compressed(entries[is_compressed], active=active)
        hosts = np.where(is_compressed, 0, entries & OFFSET_MASK)
        normal = hosts != 0
        for entry in entries[~is_compressed & (entries & np.uint64(L2_RESERVED) != 0)]:
            self.result.corrupt(f"found l2 entry with reserved bits set: {int(entry):x}")
        if self.header.version < 3:
            for entry in entries[~is_compressed & (entries & ZERO != 0)]:
                self.result.corrupt(f"l2_entry={int(entry):x}: zero flag in a version 2 image")
        unaligned = hosts & np.uint64(self.size - 1) != 0
        for host in hosts[unaligned]:
            self.result.corrupt(f"offset={int(host):x}: Cluster is not properly aligned; L2 entry corrupted.")
        places = hosts[normal & ~unaligned]
        self._count_hosts(places)
        if active:
            self._count_fragments(hosts[normal])
            self._check_copied_data(entries[normal & ~unaligned], places)

    def _count_fragments(self, hosts: Entries) -> None:
        self.result.allocated_clusters += len(hosts)
        jumps = hosts[1:] != hosts[:-1] + np.uint64(self.size)
        self.result.fragmented_clusters += int(np.count_nonzero(jumps))

    def _check_copied_data(self, entries: Entries, hosts: Entries) -> None:
        clusters = (hosts >> self.bits).astype(np.int64)
        inside = clusters < self.clusters
        counts = np.zeros(len(clusters), np.uint64)
        counts[inside] = self.stored[clusters[inside]]
        wrong = (counts == 1) != (entries & np.uint64(COPIED) != 0)
        for entry, count in zip(entries[wrong], counts[wrong], strict=True):
            self.result.corrupt(f"OFLAG_COPIED data cluster: l2_entry={int(entry):x} refcount={int(count)}")

    def _count_compressed(self, entries: Entries, *, active: bool) -> None:
        if not len(entries):
            return
        for entry in entries[entries & np.uint64(COPIED) != 0]:
            self.result.corrupt(f"l2_entry={int(entry):x}: copied flag must never be set for compressed clusters")
        bits = 62 - (self.bits - 8)
        starts = entries & np.uint64((1 << bits) - 1)
        sectors = ((entries & np.uint64(COMPRESSED - 1)) >> bits) + 1
        last: Entries = ((starts // SECTOR + sectors) * SECTOR - 1 >> self.bits).astype(np.uint64)
        clusters: Entries = (starts >> self.bits).astype(np.uint64)
        while len(clusters):
            self._count_hosts((clusters << self.bits).astype(np.uint64))
            ahead = clusters < last
            clusters, last = clusters[ahead] + np.uint64(1), last[ahead]
        if active:
            self.result.allocated_clusters += len(entries)
            self.result.compressed_clusters += len(entries)
            self.result.fragmented_clusters += len(entries)

    async def _count_bitmaps(self) -> None:
        """Section "Bitmaps extension"; without its autoclear bit the extension says nothing."""
        header = self.header
        data = next((data for kind, data in header.extensions if kind == EXTENSION_BITMAPS), b"")
        if not header.autoclear & AUTOCLEAR_BITMAPS or len(data) < 24:
            return
        count, _, size, offset = struct.unpack_from(">IIQQ", data)
        if size > self.storage.length or offset + size > self.storage.length:
            self.result.corrupt(f"bitmap directory at {offset:#x} lies beyond the end of the file")
            return
        self._count_area(offset, size)
        directory = await self.storage.read_bytes(offset, size)
        position = 0
        for _ in range(count):
            if position + _BITMAP_ENTRY.size > size:
                self.result.corrupt("bitmap directory is cut off")
                return
            table, entries, _, _, _, name, extra = _BITMAP_ENTRY.unpack_from(directory, position)
            position += -(-(_BITMAP_ENTRY.size + name + extra) // 8) * 8
            await self._count_bitmap_table(table, entries)

    async def _count_bitmap_table(self, offset: int, entries: int) -> None:
        self._count_area(offset, entries * 8)
        try:
            table = await self.tables.read(offset, entries * 8, "Q", "bitmap table")
        except CorruptImage as error:
            self.result.corrupt(error.message)
            return
        hosts = np.frombuffer(table, np.uint64) & np.uint64(OFFSET_MASK)
        self._count_hosts(hosts[hosts != 0])

    # -- the verdict

    def _compare(self) -> None:
        stored, counted, result = self.stored, self.counted, self.result
        for cluster in np.nonzero(stored != counted)[0]:
            sentence = f"cluster {cluster} refcount={int(stored[cluster])} reference={int(counted[cluster])}"
            if stored[cluster] > counted[cluster]:
                result.leak(sentence)
            else:
                result.corrupt(sentence)
        used = np.nonzero((stored > 0) | (counted > 0))[0]
        result.image_end_offset = (int(used[-1]) + 1) * self.size if len(used) else 0
