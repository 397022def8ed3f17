"""Mending of qcow2 tables: entries that make no sense, and clusters with two uses that exclude each other.

Nothing that can be read changes. What an entry needs anew (a copy of a cluster that something else has to keep, a
table that is not the tables' alone) is written behind the end of the file, and is durable before any table in the
file is written that leads to it.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING

from cowfs.block.check import CheckResult
from cowfs.errors import CorruptImage
from cowfs.formats.qcow2 import compressed
from cowfs.formats.qcow2.check import Clusters, Entries, Flags, Survey, Use, compressed_places
from cowfs.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    SUBCLUSTERS,
    ZERO,
)
from cowfs.formats.qcow2.snapshots import read_snapshots

if TYPE_CHECKING:
    import numpy as np

    from cowfs.formats.qcow2.image import Qcow2Image
else:
    from cowfs.lazy import np

#: bytes of mended tables that wait for a flush before they are written
_BATCH = 16 << 20
_ALL_BITS = (1 << 64) - 1
_ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1


def packed(entries: array[int] | Entries) -> bytes:
    """Return a table of 64-bit entries as it stands on disk."""
    table = array("Q", entries.tobytes())
    if sys.byteorder != "big":
        table.byteswap()
    return table.tobytes()


class Mending:
    """One walk over all tables; ``found`` says what refers to each cluster, ``result`` is told what is fixed."""

    def __init__(self, image: Qcow2Image, found: Survey, result: CheckResult) -> None:
        self.storage = image.storage
        self.header = image.header
        self.tables = image.tables
        self.l1 = image.l1
        self.result = result
        self.bits, self.size = image.cluster_bits, image.cluster_size
        self.end = found.clusters
        #: bytes; where entries may point
        self.length = found.clusters << self.bits
        #: references that are left, while entries are turned elsewhere
        self.counted = found.counted
        self.max_count = found.max_count
        self.crossed = found.crossed
        self.external_data = found.external_data
        self.words = self.header.entry_words
        self.uses = found.uses
        #: what must not be written before a flush: (offset, content)
        self.later: list[tuple[int, bytes]] = []

    async def run(self) -> None:
        """Mend the active L1 and those of snapshots, with all L2 tables."""
        # QEMU takes what lies behind the end of the file for zeros; so does this, by making it so
        if self.storage.length < self.length:
            await self.storage.truncate(self.length)
        await self._mend_l1(self.l1.offset, self.l1.entries)
        if self.header.snapshots:
            for snapshot in (await read_snapshots(self.storage, self.header))[0]:
                offset, size = snapshot.l1_offset, snapshot.l1_entries * 8
                if not offset % self.size and offset + size <= self.length:
                    await self._mend_l1(offset, await self.tables.read(offset, size, "Q", "L1 table of a snapshot"))
        await self._write_later()

    async def _write_later(self) -> None:
        await self.storage.flush()
        for offset, data in self.later:
            await self.storage.write(offset, [data])
        self.later.clear()
        await self.storage.flush()

    async def _append(self, data: bytes) -> int:
        """Write one cluster behind the end of the file; its host offset."""
        offset = self.end << self.bits
        await self.storage.write(offset, [data.ljust(self.size, b"\0")])
        self.end += 1
        return offset

    # -- L1

    async def _mend_l1(self, offset: int, entries: array[int]) -> None:
        changed = False
        for index in np.flatnonzero(np.frombuffer(entries, np.uint64)).tolist():
            entry = entries[index]
            new = entry & ~L1_RESERVED
            table = new & OFFSET_MASK
            if table % self.size or table >= self.length:
                # no table was ever read from there: what it maps is not allocated
                new = 0
            elif table:
                new = await self._mend_table(new)
            if new != entry:
                if not new or entry & L1_RESERVED:
                    self.result.fixed(f"L1 entry {entry:x}", corruptions=1)
                entries[index] = new
                changed = True
            if sum(len(data) for _, data in self.later) > _BATCH:
                await self._write_later()
        if changed:
            self.later.append((offset, packed(entries)))

    async def _mend_table(self, l1_entry: int) -> int:
        """Mend an L2 table, in a copy if others use its place; the L1 entry for it."""
        offset = l1_entry & OFFSET_MASK
        cluster = offset >> self.bits
        old = np.frombuffer(await self.tables.read(offset, self.size, "Q", "L2 table"), np.uint64)
        new = await self._mend_entries(old)
        wrong = int(np.count_nonzero(old != new))
        if wrong:
            self.result.fixed(f"{wrong} entries of the L2 table at {offset:#x}", corruptions=wrong)
        count = int(self.counted[cluster])
        if count > 1 and (wrong or self.crossed[cluster] or count > self.max_count):
            self.counted[cluster] -= 1
            return await self._append(packed(new)) | COPIED
        if wrong:
            self.later.append((offset, packed(new)))
        return l1_entry

    # -- L2

    async def _mend_entries(self, old: Entries) -> Entries:
        """Return the words of an L2 table, mended."""
        new = old.copy()
        entries = new[:: self.words]
        is_compressed = entries & np.uint64(COMPRESSED) != 0
        entries[is_compressed] &= np.uint64(~COPIED & _ALL_BITS)
        reserved = L2_RESERVED if self.header.version >= 3 and self.words == 1 else L2_RESERVED | ZERO
        entries[~is_compressed] &= np.uint64(~reserved & _ALL_BITS)
        hosts = np.where(is_compressed, np.uint64(0), entries & np.uint64(OFFSET_MASK))
        lost = hosts & np.uint64(self.size - 1) != 0
        lost |= is_compressed if self.external_data else hosts >= np.uint64(self.length)
        for index in np.flatnonzero(lost).tolist():
            await self._make_hole(new, index)
        if not self.external_data:
            clusters = np.where(lost, np.uint64(0), hosts >> np.uint64(self.bits)).astype(np.int64)
            for index in np.flatnonzero((clusters > 0) & self._contested(clusters)).tolist():
                entries[index] = await self._move_data(int(entries[index]), int(clusters[index]))
            for index in np.flatnonzero(is_compressed).tolist():
                await self._mend_compressed(new, index)
        if self.words == 2:
            self._mend_bitmaps(entries, new[1::2])
        return new

    def _mend_bitmaps(self, entries: Entries, bitmaps: Entries) -> None:
        """Have subclusters read as zeros that are said to be in a place that does not exist, or zeros as well."""
        allocated, zeros = bitmaps & np.uint64(_ALL_SUBCLUSTERS), bitmaps >> np.uint64(SUBCLUSTERS)
        placed = entries & np.uint64(OFFSET_MASK) != 0
        if self.external_data:
            placed |= entries & np.uint64(COPIED) != 0
        zeros |= np.where(placed, np.uint64(0), allocated)
        bitmaps[:] = zeros << np.uint64(SUBCLUSTERS) | allocated & ~zeros
        bitmaps[entries & np.uint64(COMPRESSED) != 0] = 0

    def _contested(self, clusters: Clusters) -> Flags:
        """Which clusters have more references than fit, or hold metadata that has to stay where it is."""
        fixed = self.uses[clusters] & np.uint8(Use.FIXED) != 0
        contested: Flags = (self.counted[clusters] > 1) & (fixed | (self.counted[clusters] > self.max_count))
        return contested

    async def _make_hole(self, words: Entries, index: int) -> None:
        """Let an entry of an L2 table stand for a cluster that reads as zeros, but for unallocated subclusters."""
        if self.words == 2:
            entry, bitmap = int(words[2 * index]), int(words[2 * index + 1])
            known = _ALL_SUBCLUSTERS if entry & COMPRESSED else (bitmap | bitmap >> SUBCLUSTERS) & _ALL_SUBCLUSTERS
            words[2 * index : 2 * index + 2] = 0, known << SUBCLUSTERS
        elif self.header.version >= 3:
            words[index] = ZERO
        else:
            # version 2 has no zero clusters; unallocated, it would show the backing file
            words[index] = await self._append(b"") | COPIED if self.header.backing is not None else 0

    async def _move_data(self, entry: int, cluster: int) -> int:
        """Return an entry for a copy of a data cluster, if it is still contested."""
        if not self._contested(np.array([cluster])).any():
            return entry
        self.counted[cluster] -= 1
        if entry & ZERO:
            return ZERO
        return await self._append(await self.storage.read_bytes(cluster << self.bits, self.size)) | COPIED

    async def _mend_compressed(self, words: Entries, index: int) -> None:
        """Unpack what cannot stay where it is; leave a hole if it cannot be unpacked."""
        entry = words[self.words * index]
        starts, ends = compressed_places(np.array([entry], np.uint64), self.bits)
        start, end = int(starts[0]), int(ends[0])
        beyond = end - self.length >= self.size
        clusters = np.arange(start >> self.bits, min(end, self.length) + self.size - 1 >> self.bits)
        if not beyond and not self._contested(clusters).any():
            return
        if not beyond:
            self.counted[clusters] -= 1
        place = compressed.locate(int(entry), self.bits)
        packed = await self.storage.read_bytes(place.offset, place.length)
        try:
            data = compressed.unpack(packed, self.header.compression_type, self.size)
        except CorruptImage:
            await self._make_hole(words, index)
            return
        words[self.words * index] = await self._append(data) | COPIED
        if self.words == 2:
            words[2 * index + 1] = _ALL_SUBCLUSTERS
