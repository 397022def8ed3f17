"""Check of a qcow2 image: every reference is counted and compared with the counts on disk.

The rules and the counting are those of ``qemu-img check``; whole tables are handled at once with numpy. What is
remembered of each host cluster (its count on disk, the references to it, what refers to it) is all that grows
with the image.
"""

from __future__ import annotations

from array import array
from enum import IntFlag
from typing import TYPE_CHECKING, TypeAlias

import trio

from cowfs.block.check import CheckResult
from cowfs.block.metacache import MetadataCache, Table
from cowfs.errors import CorruptImage, Unsupported
from cowfs.formats.qcow2 import bitmaps
from cowfs.formats.qcow2.blocks import Counts, unpack_counts
from cowfs.formats.qcow2.compressed import SECTOR
from cowfs.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    REFCOUNT_BLOCK_MASK,
    REFCOUNT_TABLE_RESERVED,
    SUBCLUSTERS,
    ZERO,
    Header,
)
from cowfs.formats.qcow2.snapshots import read_snapshots
from cowfs.storage.base import Storage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    from cowfs.lazy import np

Entries: TypeAlias = "npt.NDArray[np.uint64]"
Clusters: TypeAlias = "npt.NDArray[np.int64]"
Flags: TypeAlias = "npt.NDArray[np.bool_]"

#: host clusters; more cannot be counted in reasonable memory
MAX_CLUSTERS = 1 << 30
#: host clusters that are compared in one step
_WINDOW = 1 << 20
#: bytes that hold a reference count, by the log2 of its bits
_COUNT_SIZES = (1, 1, 1, 1, 2, 4, 8)


class Use(IntFlag):
    """What refers to a host cluster."""

    #: metadata whose place is fixed by something other than an L1 entry
    FIXED = 1
    L2_TABLE = 2
    DATA = 4


async def check(
    storage: Storage, header: Header, tables: MetadataCache, l1: Table, refcount_table: Table
) -> CheckResult:
    """Look for everything that ``qemu-img check`` looks for; changes nothing."""
    return (await survey(storage, header, tables, l1, refcount_table)).result


async def survey(
    storage: Storage,
    header: Header,
    tables: MetadataCache,
    l1: Table,
    refcount_table: Table,
    *,
    count_refcounts: bool = True,
) -> Survey:
    """Like `check`, with all that was learned. ``count_refcounts`` False leaves refcount table and blocks out."""
    found = Survey(storage, header, tables, l1, refcount_table)
    await found.run(count_refcounts=count_refcounts)
    return found


class Survey:
    """One walk over everything that an image refers to."""

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
        #: counts in a refcount block
        self.per_block = 8 * self.size >> header.refcount_order
        self.clusters = -(-storage.length >> self.bits)
        if self.clusters > MAX_CLUSTERS:
            raise Unsupported(f"has {self.clusters} clusters, too many to check", file=storage.name)
        self.result = CheckResult(total_clusters=-(-header.size // self.size))
        #: references to each host cluster, counts on disk, and `Use`; what a count can hold (or 32 bits)
        self.counted = np.zeros(self.clusters, np.uint32)
        self._all_stored = self._room_for_counts()
        self.stored = self._all_stored[: self.clusters]
        self.uses = np.zeros(self.clusters, np.uint8)
        self.max_count = (1 << min(1 << header.refcount_order, 32)) - 1
        #: whether guest data lies in a file of its own, where nothing is counted
        self.external_data = header.data_file is not None
        # references to the one cluster behind the end that an area may reach into
        self._counted_past = 0
        #: entries of tables that are wrong by themselves, whatever is counted
        self.broken = 0
        #: copied flags that contradict the counts on disk
        self.wrong_flags = 0
        #: whether the bitmap directory makes no sense
        self.broken_bitmaps = False
        #: whether refcount table or blocks cannot be used as they are
        self.broken_refcounts = False

    async def run(self, *, count_refcounts: bool = True) -> None:
        """Fill in what there is to know."""
        header = self.header
        await self._load_counts()
        self._count_area(0, self.size, Use.FIXED)
        await self._count_l1(self.l1.offset, self.l1.entries, active=True)
        if header.snapshots:
            snapshots, table_bytes = await read_snapshots(self.storage, header)
            self._count_area(header.snapshots_offset, table_bytes, Use.FIXED)
            for snapshot in snapshots:
                await self._count_snapshot(snapshot.l1_offset, snapshot.l1_entries)
        await self._count_bitmaps()
        if count_refcounts:
            self._count_refcounts()
        self._compare()

    @property
    def crossed(self) -> Flags:
        """Clusters that cannot be written for one of their users without changing another's content."""
        return np.isin(self.uses, (Use.FIXED | Use.L2_TABLE, Use.FIXED | Use.DATA, Use.L2_TABLE | Use.DATA, 7))

    # -- counts on disk

    def _room_for_counts(self) -> Counts:
        """Zeros, without need for memory before they are changed; also for what is counted behind the end of the file.

        That has no cluster any more, where the file was cut off.
        """
        entries = np.frombuffer(self.refcount_table.entries, np.uint64)
        covered = (int(np.flatnonzero(entries)[-1]) + 1) * self.per_block if entries.any() else 0
        length = max(self.clusters + 1, min(covered, MAX_CLUSTERS))
        return np.zeros(length, np.dtype(f"u{_COUNT_SIZES[self.header.refcount_order]}"))

    async def _load_counts(self) -> None:
        for index in np.flatnonzero(np.frombuffer(self.refcount_table.entries, np.uint64)).tolist():
            room = self._all_stored[index * self.per_block : (index + 1) * self.per_block]
            offset = self.refcount_table.entries[index] & REFCOUNT_BLOCK_MASK
            if not len(room):
                break
            if self.is_block(offset):
                block = await self.storage.read_bytes(offset, self.size)
                counts = unpack_counts(block, self.header.refcount_order)[: len(room)]
                if counts.any():
                    room[:] = counts

    def is_block(self, offset: int) -> bool:
        """Whether a refcount block can be at a host offset."""
        return bool(offset) and not offset % self.size and offset >> self.bits < self.clusters

    def _count_refcounts(self) -> None:
        header, result = self.header, self.result
        errors = result.corruptions
        if not self.refcount_table.size:
            result.corrupt(f"refcount table at {header.refcount_table_offset:#x} is no place for one")
        else:
            self._count_area(header.refcount_table_offset, header.refcount_table_clusters << self.bits)
        for index, entry in enumerate(self.refcount_table.entries):
            offset = entry & REFCOUNT_BLOCK_MASK
            if entry & REFCOUNT_TABLE_RESERVED:
                result.corrupt(f"refcount table entry {index} has reserved bits set")
            elif not offset:
                continue
            elif offset % self.size:
                result.corrupt(f"refcount block {index} is not cluster aligned; refcount table entry corrupted")
            elif not self.is_block(offset):
                result.corrupt(f"refcount block {index} is outside image")
            else:
                self._count_block(index, offset)
        first = header.refcount_table_offset >> self.bits
        table = self.counted[first : first + header.refcount_table_clusters]
        self.broken_refcounts |= result.corruptions > errors or bool((table != 1).any())

    def _count_block(self, index: int, offset: int) -> None:
        self._count_area(offset, self.size)
        count = int(self.counted[offset >> self.bits])
        if min(count, self.max_count) != 1:
            self.result.corrupt(f"refcount block {index} refcount={count}")
        self.broken_refcounts |= count != 1

    # -- references

    def _count_area(self, offset: int, length: int, use: Use = Use(0)) -> None:  # noqa: B008
        """Count one reference to each cluster that an area touches."""
        if not length:
            return
        if offset + length - self.storage.length >= self.size:
            self.result.corrupt(_beyond(offset, length))
            return
        place = slice(offset >> self.bits, offset + length - 1 + self.size >> self.bits)
        self.counted[place] += 1
        self.uses[place] |= np.uint8(use)
        self._counted_past += place.stop > self.clusters

    def _count_hosts(self, hosts: Entries, use: Use) -> None:
        """Count one reference to each of many clusters, by host offset; ones that come twice get two."""
        clusters = (hosts >> np.uint64(self.bits)).astype(np.int64)
        beyond = clusters >= self.clusters
        if beyond.any():
            count = int(np.count_nonzero(beyond))
            self.broken += count
            self.result.corrupt_each(count, (_beyond(host, self.size) for host in hosts[beyond].tolist()))
            clusters = clusters[~beyond]
        if not len(clusters):
            return
        if (np.diff(clusters) == 1).all():
            # the usual case, and the fastest: data that lies as the guest sees it
            run = slice(int(clusters[0]), int(clusters[-1]) + 1)
            self.counted[run] += 1
            self.uses[run] |= np.uint8(use)
            return
        # one after the other, since some may come twice
        np.add.at(self.counted, clusters, np.uint32(1))
        self.uses[clusters] |= np.uint8(use)

    async def _count_snapshot(self, offset: int, entries: int) -> None:
        if offset % self.size or offset + entries * 8 > self.storage.length:
            self.result.corrupt(f"L1 table of a snapshot at {offset:#x} is no place for one")
            return
        table = await self.tables.read(offset, entries * 8, "Q", "L1 table of a snapshot")
        await self._count_l1(offset, table, active=False)

    async def _count_l1(self, offset: int, entries: array[int], *, active: bool) -> None:
        self._count_area(offset, len(entries) * 8, Use.FIXED)
        for index in np.flatnonzero(np.frombuffer(entries, np.uint64)).tolist():
            entry = entries[index]
            table = entry & OFFSET_MASK
            if entry & L1_RESERVED:
                self.broken += 1
                self.result.corrupt(f"found L1 entry with reserved bits set: {entry:x}")
            if not table:
                continue
            self._count_area(table, self.size, Use.L2_TABLE)
            if active:
                self._check_copied_table(index, entry)
            if table % self.size:
                self.broken += 1
                self.result.corrupt(f"l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted")
            if table >= self.storage.length:
                self.broken += 1
                continue
            if table + self.size > self.storage.length:
                self.broken += 1
                self.result.corrupt(f"L2 table at {table:#x} is cut off by the end of the file")
                continue
            cached = self.tables.get(table)
            found = cached.entries if cached else await self.tables.read(table, self.size, "Q", "L2 table")
            self._count_l2(np.frombuffer(found, np.uint64), active=active)
            # a large image is walked for long, mostly from the page cache
            await trio.lowlevel.checkpoint()

    def _check_copied_table(self, index: int, entry: int) -> None:
        cluster = (entry & OFFSET_MASK) >> self.bits
        count = int(self._all_stored[cluster]) if cluster < len(self._all_stored) else 0
        if (count == 1) != bool(entry & COPIED):
            self.wrong_flags += 1
            self.result.corrupt(f"OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={count}")

    def _count_l2(self, entries: Entries, *, active: bool) -> None:
        if self.header.entry_words == 2:
            entries = self._check_bitmaps(entries)
        is_compressed = entries & np.uint64(COMPRESSED) != 0
        if is_compressed.any():
            self._count_compressed(entries[is_compressed], active=active)
            entries = np.where(is_compressed, np.uint64(0), entries)
        self._find_reserved(entries)
        hosts = entries & np.uint64(OFFSET_MASK)
        normal = self._has_place(entries)
        entries, hosts = entries[normal], hosts[normal]
        unaligned = hosts & np.uint64(self.size - 1) != 0
        if unaligned.any():
            self._count_unaligned(hosts[unaligned])
        if not self.external_data:
            self._count_hosts(hosts[~unaligned] if unaligned.any() else hosts, Use.DATA)
        if active:
            self.result.allocated_clusters += len(hosts)
            jumps = hosts[1:] != hosts[:-1] + np.uint64(self.size)
            self.result.fragmented_clusters += int(np.count_nonzero(jumps))
            self._check_copied_data(entries, hosts)

    def _check_bitmaps(self, words: Entries) -> Entries:
        """Descriptors of extended L2 entries, without those that count for nothing; contradictions are recorded."""
        entries, bitmaps = words[::2], words[1::2]
        allocated = bitmaps & np.uint64((1 << SUBCLUSTERS) - 1)
        is_compressed = entries & np.uint64(COMPRESSED) != 0
        placed = ~is_compressed & self._has_place(entries)
        senseless = is_compressed & (bitmaps != 0) & (not self.external_data)
        for wrong, what in (
            (senseless, "compressed cluster with a subcluster bitmap"),
            (placed & (allocated & bitmaps >> np.uint64(SUBCLUSTERS) != 0), "subclusters both allocated and zeros"),
            (~is_compressed & ~placed & (allocated != 0), "subclusters allocated in a cluster without a place"),
        ):
            if wrong.any():
                self.broken += int(np.count_nonzero(wrong))
                pairs = zip(entries[wrong].tolist(), bitmaps[wrong].tolist(), strict=True)
                found = (f"{what}: l2_entry={entry:x} bitmap={bitmap:x}" for entry, bitmap in pairs)
                self.result.corrupt_each(int(np.count_nonzero(wrong)), found)
        self._find_copied_compressed(entries[senseless])
        return np.where(senseless, np.uint64(0), entries)

    def _has_place(self, entries: Entries) -> Flags:
        """Which uncompressed entries lead somewhere; offset 0 of a data file is a place, if the copied flag says so."""
        placed: Flags = entries & np.uint64(OFFSET_MASK) != 0
        if self.external_data:
            flag = np.uint64(ZERO if self.header.entry_words == 1 else 0)
            placed = placed | ((entries & np.uint64(COPIED) != 0) & (entries & flag == 0))
        return placed

    def _find_reserved(self, entries: Entries) -> None:
        wrong = entries[entries & np.uint64(L2_RESERVED) != 0]
        if len(wrong):
            self.broken += len(wrong)
            self.result.corrupt_each(
                len(wrong), (f"found l2 entry with reserved bits set: {e:x}" for e in wrong.tolist())
            )
        if self.header.version < 3:
            wrong = entries[entries & np.uint64(ZERO) != 0]
            self.broken += len(wrong)
            self.result.corrupt_each(
                len(wrong), (f"l2_entry={e:x}: zero flag in a version 2 image" for e in wrong.tolist())
            )

    def _count_unaligned(self, hosts: Entries) -> None:
        self.broken += len(hosts)
        for host in hosts.tolist():
            self.result.corrupt(f"offset={host:x}: Cluster is not properly aligned; L2 entry corrupted.")
            if not self.external_data:
                self._count_area(host, self.size)

    def _check_copied_data(self, entries: Entries, hosts: Entries) -> None:
        clusters = (hosts >> np.uint64(self.bits)).astype(np.int64)
        beyond = clusters >= len(self._all_stored)
        if self.external_data:
            counts = np.ones(len(clusters), self.stored.dtype)
        elif beyond.any():
            counts = np.where(beyond, 0, self._all_stored[np.where(beyond, 0, clusters)])
        else:
            counts = self._all_stored[clusters]
        wrong = (counts == 1) != (entries & np.uint64(COPIED) != 0)
        if wrong.any():
            self.wrong_flags += int(np.count_nonzero(wrong))
            pairs = zip(entries[wrong].tolist(), counts[wrong].tolist(), strict=True)
            self.result.corrupt_each(
                int(np.count_nonzero(wrong)),
                (f"OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={count}" for entry, count in pairs),
            )

    def _find_copied_compressed(self, entries: Entries) -> None:
        for entry in entries[entries & np.uint64(COPIED) != 0].tolist():
            self.broken += 1
            self.result.corrupt(f"l2_entry={entry:x}: copied flag must never be set for compressed clusters")

    def _count_compressed(self, entries: Entries, *, active: bool) -> None:
        self._find_copied_compressed(entries)
        if self.external_data:
            self.broken += len(entries)
            found = (f"compressed cluster with a data file, l2_entry={entry:x}" for entry in entries.tolist())
            self.result.corrupt_each(len(entries), found)
            return
        starts, ends = compressed_places(entries, self.bits)
        beyond = ends.astype(np.int64) - self.storage.length >= self.size
        for start, end in zip(starts[beyond].tolist(), ends[beyond].tolist(), strict=True):
            self.broken += 1
            self.result.corrupt(_beyond(start, end - start))
        clusters = starts[~beyond] >> np.uint64(self.bits)
        last = ends[~beyond] - np.uint64(1) >> np.uint64(self.bits)
        while len(clusters):
            self._count_hosts(clusters << np.uint64(self.bits), Use.DATA)
            ahead = clusters < last
            clusters, last = clusters[ahead] + np.uint64(1), last[ahead]
        if active:
            self.result.allocated_clusters += len(entries)
            self.result.compressed_clusters += len(entries)
            self.result.fragmented_clusters += len(entries)

    async def _count_bitmaps(self) -> None:
        """Section "Bitmaps extension"; without its autoclear bit the extension says nothing."""
        errors = self.result.corruptions
        await self._count_bitmap_directory()
        self.broken_bitmaps = self.result.corruptions > errors

    async def _count_bitmap_directory(self) -> None:
        directory = bitmaps.locate(self.header)
        if directory is None:
            return
        try:
            found = await bitmaps.read_bitmaps(self.storage, directory)
        except CorruptImage as error:
            self.result.corrupt(error.message)
            return
        self._count_area(directory.offset, directory.size, Use.FIXED)
        for bitmap in found:
            await self._count_bitmap_table(bitmap.table, bitmap.table_entries)

    async def _count_bitmap_table(self, offset: int, entries: int) -> None:
        if offset % self.size or entries << self.bits > bitmaps.MAX_BITMAP:
            self.result.corrupt(f"bitmap table of {entries} entries at {offset:#x} makes no sense")
            return
        self._count_area(offset, entries * 8, Use.FIXED)
        try:
            table = await self.tables.read(offset, entries * 8, "Q", "bitmap table")
        except CorruptImage as error:
            self.result.corrupt(error.message)
            return
        hosts = np.frombuffer(table, np.uint64) & np.uint64(OFFSET_MASK)
        self._count_hosts(hosts[hosts != 0], Use.FIXED)

    # -- the verdict

    def _compare(self) -> None:
        end = 0
        for start in range(0, self.clusters, _WINDOW):
            stored = self.stored[start : start + _WINDOW]
            counted = self.counted[start : start + _WINDOW]
            self._find_overflow(start, counted)
            counted = np.minimum(counted, self.max_count)
            self._find_mismatches(start, stored, counted)
            used = np.flatnonzero((stored > 0) | (counted > 0))
            end = start + int(used[-1]) + 1 if len(used) else end
        if self._counted_past:
            end = self.clusters + 1
            counted = np.array([min(self._counted_past, self.max_count)], np.uint32)
            self._find_mismatches(self.clusters, self._all_stored[self.clusters : end], counted)
        self.result.image_end_offset = end * self.size

    def _find_overflow(self, start: int, counted: Counts) -> None:
        over = np.flatnonzero(counted > self.max_count)
        if len(over):
            excess = int((counted[over] - np.uint64(self.max_count)).sum())
            self.result.corrupt(f"cluster {start + int(over[0])} and others have more references than fit", excess)

    def _find_mismatches(self, start: int, stored: Counts, counted: Counts) -> None:
        for different, record in (
            (stored > counted, self.result.leak_each),
            (stored < counted, self.result.corrupt_each),
        ):
            found = np.flatnonzero(different)
            record(
                len(found),
                (f"cluster {start + c} refcount={int(stored[c])} reference={int(counted[c])}" for c in found.tolist()),
            )


def _beyond(offset: int, length: int) -> str:
    return f"reference to {length} bytes at {offset:#x}, beyond the end of the file"


def compressed_places(entries: Entries, cluster_bits: int) -> tuple[Entries, Entries]:
    """Host offsets at which compressed clusters start, and end with their last sector."""
    bits = 62 - (cluster_bits - 8)
    starts = entries & np.uint64((1 << bits) - 1)
    sectors = ((entries & np.uint64(COMPRESSED - 1)) >> np.uint64(bits)) + np.uint64(1)
    ends = (starts // np.uint64(SECTOR) + sectors) * np.uint64(SECTOR)
    return starts, ends
