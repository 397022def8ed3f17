"""Changing all metadata of an image at once, by one write of the header's first sector.

The copied flags of a whole image depend on its reference counts, and neither may be wrong at any moment. So what
changes both in many places (internal snapshots, shrinking) writes everything that changes anew, to clusters that
are free: L2 tables, L1, snapshot table, refcount blocks and table. While that goes on, nothing refers to it. When
it is durable the header switches over, and the old metadata, already counted as free by the new, is given back.
A power cut leaves the old or the new state, whole, and not even leaks.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

import trio

from cowfs.block.freespace import FreeRuns
from cowfs.errors import CorruptImage, Unsupported
from cowfs.formats.qcow2 import compressed
from cowfs.formats.qcow2.blocks import pack_counts
from cowfs.formats.qcow2.counts import Clusters, CountChanges
from cowfs.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    OFFSET_MASK,
    SECTOR,
    Header,
    parse_header,
)
from cowfs.formats.qcow2.snapshots import Snapshot, read_snapshots
from cowfs.storage.base import Storage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cowfs.formats.qcow2.image import Qcow2Image
else:
    from cowfs.lazy import np

Entries: TypeAlias = "npt.NDArray[np.uint64]"


async def overhaul(image: Qcow2Image, work: Callable[[Overhaul], Awaitable[None]]) -> None:
    """Let ``work`` change the metadata of an image, then switch over to what it made of it.

    The caller keeps everybody else from changing the image; readers may go on. If anything is raised, nothing has
    changed, except where the storage fails after the switch: then `Image.unwritable` says so.
    Raises `Unsupported` for images whose data is in another file.
    """
    if image.header.incompatible & INCOMPATIBLE_DATA_FILE:
        raise Unsupported("images with an external data file have no internal snapshots, and can only grow")
    await image.begin_writing()
    async with image.still():
        await _overhaul(image, work)


async def _overhaul(image: Qcow2Image, work: Callable[[Overhaul], Awaitable[None]]) -> None:
    change = await Overhaul.begin(image.storage)
    try:
        await work(change)
        await change.switch()
    except BaseException:
        with trio.CancelScope(shield=True):
            await change.abandon()
        raise
    with trio.CancelScope(shield=True):
        try:
            await image.adopt(change.new_header)
            # whoever looked something up before may still be reading where it was
            await image.readers.gone()
            await change.give_back()
            await image.adopt(change.new_header)
        except BaseException:
            # what is in memory is not what is on disk, which is whole
            image.unwritable = "was changed, and has to be opened anew before it can be written"
            raise


class Overhaul:
    """The metadata of an image in memory, to be changed, and its new state on the way to the disk.

    ``l1``, ``snapshots`` and ``disk_size`` (bytes) may be replaced; references that come and go are counted by
    `count_tree` and `counts`.
    """

    def __init__(self, storage: Storage, header: Header, sector: bytes) -> None:
        self.storage = storage
        self.header = header
        self.bits = header.cluster_bits
        self.size = header.cluster_size
        #: 64-bit words of an L2 entry
        self.words = 2 if header.incompatible & INCOMPATIBLE_EXTENDED_L2 else 1
        #: bytes of the disk that one L2 table maps
        self.span = self.size // 8 // self.words * self.size
        self.disk_size = header.size
        self.new_header = header
        self.l1: Entries
        self.snapshots: list[Snapshot]
        self.counts: CountChanges
        self._old_l1: Entries
        self._old_snapshots: list[Snapshot]
        self._snapshot_bytes: int
        self._refcount_table: Entries
        self._sector = sector
        self._length = storage.length
        self._switching = False

    @classmethod
    async def begin(cls, storage: Storage) -> Overhaul:
        """Read everything but L2 tables. Raises `CorruptImage` if that makes no sense."""
        sector = await storage.read_bytes(0, SECTOR)
        size = 1 << int.from_bytes(sector[20:24], "big")
        header = parse_header(await storage.read_bytes(0, min(size, storage.length)), storage.length)
        change = cls(storage, header, sector)
        change._old_l1 = await change.read_words(header.l1_offset, header.l1_entries * 8)
        change.l1 = change._old_l1.copy()
        change._old_snapshots, change._snapshot_bytes = await read_snapshots(storage, header)
        change.snapshots = list(change._old_snapshots)
        table_bytes = header.refcount_table_clusters << header.cluster_bits
        change._refcount_table = (await change.read_words(header.refcount_table_offset, table_bytes)).copy()
        change.counts = await CountChanges.read(storage, header, change._refcount_table)
        change.counts.add(np.zeros(1, np.int64), 0)
        return change

    # -- reading

    async def read_words(self, offset: int, length: int) -> Entries:
        """Read a table of 64-bit entries; bytes."""
        if length and (offset % self.size or offset + length > self.storage.length):
            raise CorruptImage(f"a table at offset {offset:#x} is in no place for one; check the image")
        return np.frombuffer(await self.storage.read_bytes(offset, length), ">u8").astype(np.uint64)

    @staticmethod
    def tables(l1: Entries) -> list[tuple[int, int]]:
        """L2 tables that an L1 table refers to: index in L1, host offset."""
        return [(index, int(l1[index]) & OFFSET_MASK) for index in np.flatnonzero(l1 & np.uint64(OFFSET_MASK)).tolist()]

    async def read_table(self, offset: int) -> Entries:
        """Entries of an L2 table."""
        # a large image is walked for long, mostly from the page cache
        await trio.lowlevel.checkpoint()
        return await self.read_words(offset, self.size)

    def clusters_of(self, table: Entries) -> Clusters:
        """Host clusters that the entries of an L2 table refer to, one as often as it is referred to."""
        entries = table[:: self.words]
        packed = entries & np.uint64(COMPRESSED) != 0
        hosts = np.where(packed, np.uint64(0), entries & np.uint64(OFFSET_MASK))
        if (hosts & np.uint64(self.size - 1)).any():
            raise CorruptImage("data is not aligned to a cluster; check the image")
        parts = [(hosts[hosts != 0] >> np.uint64(self.bits)).astype(np.int64)]
        for entry in entries[packed].tolist():
            place = compressed.locate(entry, self.bits)
            parts.append(np.arange(place.offset >> self.bits, -(-(place.offset + place.length) >> self.bits)))
        return np.concatenate(parts)

    # -- changing

    async def count_tree(self, l1: Entries, by: int) -> None:
        """Add to the counts of all that an L1 table leads to, but not of its own clusters."""
        for _, offset in self.tables(l1):
            table = await self.read_table(offset)
            self.counts.add_area(offset, self.size, self.bits, by)
            self.counts.add(self.clusters_of(table), by)

    async def set_copied(self, references: int = 1) -> None:
        """Make the copied flags of the active tables what the counts say; tables that change move.

        ``references`` is how many L1 tables will refer to the tables that the active one refers to.
        """
        for index, offset in self.tables(self.l1):
            table = await self.read_table(offset)
            wanted = self._flagged(table)
            if not np.array_equal(wanted, table):
                self.counts.add_area(offset, self.size, self.bits, -references)
                self.l1[index] = await self.write_table(wanted, references)
        used = np.flatnonzero(self.l1 & np.uint64(OFFSET_MASK))
        hosts = self.l1[used] & np.uint64(OFFSET_MASK)
        single = self.counts.of((hosts >> np.uint64(self.bits)).astype(np.int64)) == 1
        self.l1[used] = hosts | np.where(single, np.uint64(COPIED), np.uint64(0))

    def _flagged(self, table: Entries) -> Entries:
        wanted = table.copy()
        entries = wanted[:: self.words]
        places = np.flatnonzero((entries & np.uint64(OFFSET_MASK) != 0) & (entries & np.uint64(COMPRESSED) == 0))
        clusters = ((entries[places] & np.uint64(OFFSET_MASK)) >> np.uint64(self.bits)).astype(np.int64)
        single = self.counts.of(clusters) == 1
        entries[places] = entries[places] & ~np.uint64(COPIED) | np.where(single, np.uint64(COPIED), np.uint64(0))
        return wanted

    async def write_table(self, table: Entries, references: int = 1) -> int:
        """Write a table to free clusters; returns its host offset, 0 for an empty one."""
        return await self.write_area(table.astype(">u8").tobytes(), references)

    async def write_area(self, data: bytes, references: int = 1) -> int:
        """Write whole clusters, padded with zeros, to free ones; returns the host offset, 0 for nothing."""
        if not data:
            return 0
        clusters = -(-len(data) >> self.bits)
        offset = self.counts.take(clusters, references) << self.bits
        await self.storage.write(offset, [data.ljust(clusters << self.bits, b"\0")])
        return offset

    # -- switching over

    async def switch(self) -> None:
        """Write what is left to write, durably, then the header's first sector."""
        header = self.header
        if len(self.l1) * 8 > MAX_L1_BYTES:
            raise Unsupported(f"a disk of {self.disk_size} bytes is too large for clusters of {self.size} bytes")
        l1_offset = header.l1_offset
        if not np.array_equal(self.l1, self._old_l1):
            self.counts.add_area(l1_offset, header.l1_entries * 8, self.bits, -1)
            l1_offset = await self.write_table(self.l1)
        snapshots_offset = header.snapshots_offset
        if self.snapshots != self._old_snapshots:
            self.counts.add_area(snapshots_offset, self._snapshot_bytes, self.bits, -1)
            snapshots_offset = await self.write_area(b"".join(snapshot.pack() for snapshot in self.snapshots))
        table_offset, table_clusters = await self._write_counts()
        sector = bytearray(self._sector)
        struct.pack_into(">Q", sector, 24, self.disk_size)
        struct.pack_into(">IQQI", sector, 36, len(self.l1), l1_offset, table_offset, table_clusters)
        struct.pack_into(">IQ", sector, 60, len(self.snapshots), snapshots_offset)
        await self.storage.flush()
        self._switching = True
        await self.storage.write(0, [bytes(sector)])
        await self.storage.flush()
        head = await self.storage.read_bytes(0, min(self.size, self.storage.length))
        self.new_header = parse_header(head, self.storage.length)

    async def _write_counts(self) -> tuple[int, int]:
        """Write all refcount blocks that change, and a table that refers to them; its host offset and clusters."""
        header, table = self.header, self._refcount_table
        per_block = 8 * self.size >> header.refcount_order
        self.counts.add_area(header.refcount_table_offset, table.nbytes, self.bits, -1)
        clusters = header.refcount_table_clusters
        moved: dict[int, int] = {}
        while True:
            place = self.counts.take(clusters)
            # moving a block changes counts, perhaps in one more block
            while todo := set(np.unique(self.counts.changed() // per_block).tolist()) - moved.keys():
                for index in sorted(todo):
                    if index < len(table) and table[index]:
                        self.counts.add_area(int(table[index]), self.size, self.bits, -1)
                    moved[index] = self.counts.take()
            needed = -(-(max(moved) + 1) * 8 >> self.bits)
            if needed <= clusters:
                break
            self.counts.add(np.arange(place, place + clusters), -1)
            clusters = -(-needed * 3 // 2)
            if clusters << self.bits > MAX_REFCOUNT_TABLE_BYTES:
                raise Unsupported("the image would become larger than the format allows")
        self.counts.verify()
        new_table = np.zeros(clusters * self.size // 8, np.uint64)
        new_table[: len(table)] = table
        for index, cluster in moved.items():
            new_table[index] = cluster << self.bits
            counts = self.counts.area(index * per_block, per_block).astype(np.uint64)
            await self.storage.write(cluster << self.bits, [pack_counts(counts, header.refcount_order)])
        await self.storage.write(place << self.bits, [new_table.astype(">u8").tobytes()])
        return place << self.bits, clusters

    async def abandon(self) -> None:
        """Forget it all: what was written is referred to by nothing."""
        if self._switching:
            await self.storage.write(0, [self._sector])
        elif self.storage.length > self._length:
            await self.storage.truncate(self._length)

    async def give_back(self) -> None:
        """Hand what is no longer in use back to the host; the new state is durable, and nobody reads the old one."""
        runs = FreeRuns()
        for cluster in self.counts.freed().tolist():
            runs.add(cluster, 1)
        for start, count in runs:
            await self.storage.discard(start << self.bits, count << self.bits)
        end = self.counts.end << self.bits
        if end < self.storage.length:
            await self.storage.truncate(end)
