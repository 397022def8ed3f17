"""Repair of a qcow2 image; what is wrong is found by `cowfs.formats.qcow2.check`.

What can be read keeps its content. A crash at any moment leaves an image that can be repaired as before:

1. the dirty mark is set, in version 3, so that nobody trusts the counts meanwhile;
2. entries that make no sense are mended. What they need anew is written behind the end of the file, and made
   durable before anything points to it;
3. reference counts that are too low are raised; if refcount table or blocks cannot be used, new ones are made
   behind the end of the file, and one write of the header switches over to them;
4. counts that are too high are lowered: all that referred to the clusters is gone from the disk by now;
5. the copied flags are set to what the counts say;
6. the marks are taken off, if a second check finds nothing wrong.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from cowfs.block.check import CheckResult, Repair
from cowfs.block.metacache import Level, Table
from cowfs.errors import Unsupported
from cowfs.formats.qcow2.blocks import Counts, pack_counts, unpack_counts
from cowfs.formats.qcow2.check import (
    Clusters,
    Entries,
    Flags,
    Survey,
    check,
    survey,
)
from cowfs.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
    COMPRESSED,
    COPIED,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    MAX_REFCOUNT_TABLE_BYTES,
    OFFSET_MASK,
    REFCOUNT_BLOCK_MASK,
    REFCOUNT_TABLE_RESERVED,
)
from cowfs.formats.qcow2.mending import Mending, packed

if TYPE_CHECKING:
    import numpy as np

    from cowfs.formats.qcow2.image import Qcow2Image
else:
    from cowfs.lazy import np

_ALL_BITS = (1 << 64) - 1
#: places of header fields
_REFCOUNT_TABLE_AT = 48
_INCOMPATIBLE_AT = 72
_AUTOCLEAR_AT = 88


async def check_and_repair(image: Qcow2Image, how: Repair) -> CheckResult:
    """Put right what ``how`` says, and check again; nothing else is under way on the image.

    Raises `CorruptImage` where the image is too damaged to be walked, or the storage's error.
    """
    await image.flush()
    marks = image.header.incompatible & (INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT)
    work = _Repair(image, how)
    try:
        await work.run()
    finally:
        await image.reload()
    found = await check(image.storage, image.header, image.tables, image.l1, image.refcounts.table)
    found.after(work.result)
    await work.set_marks(marks if found.corruptions else 0)
    image.update_marks()
    return found


class _Repair:
    def __init__(self, image: Qcow2Image, how: Repair) -> None:
        self.image = image
        self.storage = image.storage
        self.header = image.header
        self.how = how
        self.bits = image.cluster_bits
        self.size = image.cluster_size
        self.l1 = image.l1
        self.refcount_table = image.refcounts.table
        self.result = CheckResult()

    async def run(self) -> None:
        """All steps but the last."""
        image = self.image
        image.tables.clear()
        found = await self._survey()
        if self.how is Repair.LEAKS:
            await self._repair_leaks(found)
        elif found.result.corruptions or found.result.leaks:
            await self._repair_all(found)

    async def _survey(self, *, count_refcounts: bool = True) -> Survey:
        return await survey(
            self.storage,
            self.header,
            self.image.tables,
            self.l1,
            self.refcount_table,
            count_refcounts=count_refcounts,
        )

    async def _repair_leaks(self, found: Survey) -> None:
        """Lower counts. Flags follow where nothing else is wrong, so that the counts can be trusted."""
        errors = found.result.corruptions - found.wrong_flags
        freed = (found.stored > 0) & (found.counted == 0)
        await self._lower(found)
        if not errors:
            await self._correct_flags(found)
            # with other damage about, what seems to be of no use may be all that is left of something
            await self._punch(freed)

    async def _repair_all(self, found: Survey) -> None:
        rebuild = found.broken_refcounts
        if found.result.corruptions:
            await self.set_marks(self.header.incompatible & INCOMPATIBLE_CORRUPT | INCOMPATIBLE_DIRTY)
        if found.broken_bitmaps:
            await self._drop_bitmaps()
        if found.broken or found.broken_bitmaps or bool(found.crossed.any() or self._overflows(found).any()):
            await Mending(self.image, found, self.result).run()
            found = await self._survey()
        if rebuild or found.broken_refcounts or self._lacks_blocks(found):
            found = await self._rebuild(found)
        else:
            await self._raise(found)
        await self._lower(found)
        await self._correct_flags(found)

    def _overflows(self, found: Survey) -> Flags:
        over: Flags = found.counted > found.max_count
        return over

    # -- header

    async def _write_field(self, position: int, value: bytes) -> None:
        """Change fields of the header, all at once, durably."""
        await self.storage.write(position, [value])
        await self.storage.flush()

    async def set_marks(self, marks: int) -> None:
        """Have the dirty and corrupt bits say ``marks``; version 2 has none."""
        header = self.header
        wanted = header.incompatible & ~(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT) | marks
        if header.version >= 3 and wanted != header.incompatible:
            await self._write_field(_INCOMPATIBLE_AT, wanted.to_bytes(8, "big"))
            header.incompatible = wanted

    async def _drop_bitmaps(self) -> None:
        """Let the bitmaps count for nothing; their clusters are leaks from then on."""
        autoclear = self.header.autoclear & ~AUTOCLEAR_BITMAPS
        await self._write_field(_AUTOCLEAR_AT, autoclear.to_bytes(8, "big"))
        self.header.autoclear = autoclear
        self.result.fixed("bitmap directory: bitmaps given up", corruptions=1)

    # -- counts

    async def _raise(self, found: Survey) -> None:
        counted = np.minimum(found.counted, found.max_count)
        low = np.flatnonzero(found.stored < counted)
        self._note_counts(low, found.stored, counted)
        self.result.corruptions_fixed += len(low)
        await self._store(found, np.maximum(found.stored, counted))

    async def _lower(self, found: Survey) -> None:
        before = found.stored.copy()
        await self._store(found, np.minimum(found.stored, found.counted))
        high = np.flatnonzero(found.stored < before)
        self._note_counts(high, before, found.stored)
        self.result.leaks_fixed += len(high)

    def _note_counts(self, clusters: Clusters, before: Counts, after: Counts) -> None:
        pairs = zip(clusters, before[clusters], after[clusters], strict=True)
        self.result.note(
            (f"Repairing cluster {c} refcount={old} reference={new}" for c, old, new in pairs), len(clusters)
        )

    async def _store(self, found: Survey, target: Counts) -> None:
        """Write counts into the blocks that belong to nothing else; those they are in ``found`` too."""
        order = self.header.refcount_order
        per_block = 8 * self.size >> order
        for index, entry in enumerate(self.refcount_table.entries):
            part = slice(index * per_block, (index + 1) * per_block)
            wanted = target[part]
            if not len(wanted):
                break
            if not self._is_sound(found, entry) or bool((found.stored[part] == wanted).all()):
                continue
            offset = entry & REFCOUNT_BLOCK_MASK
            counts = unpack_counts(await self.storage.read_bytes(offset, self.size), order).copy()
            counts[: len(wanted)] = wanted
            await self.storage.write(offset, [pack_counts(counts, order)])
            found.stored[part] = wanted
        await self.storage.flush()

    def _is_sound(self, found: Survey, entry: int) -> bool:
        offset = entry & REFCOUNT_BLOCK_MASK
        if entry & REFCOUNT_TABLE_RESERVED or not found.is_block(offset):
            return False
        return int(found.counted[offset >> self.bits]) == 1

    def _lacks_blocks(self, found: Survey) -> bool:
        """Whether there are references to clusters that no block counts."""
        per_block = 8 * self.size >> self.header.refcount_order
        entries = self.refcount_table.entries
        for index, start in enumerate(range(0, found.clusters, per_block)):
            missing = index >= len(entries) or not entries[index]
            if missing and found.counted[start : start + per_block].any():
                return True
        return False

    async def _rebuild(self, found: Survey) -> Survey:
        """Make a new refcount table and blocks behind the end of the file, and switch over to them."""
        self.result.fixed(
            "refcount structure: made anew",
            leaks=found.result.leaks,
            corruptions=found.result.corruptions - found.wrong_flags,
        )
        bare = await self._survey(count_refcounts=False)
        counts = np.minimum(bare.counted, bare.max_count)
        per_block = 8 * self.size >> self.header.refcount_order
        blocks, table_clusters = self._plan(counts, per_block)
        first = len(counts)
        end = first + table_clusters + len(blocks)
        table = array("Q", bytes(table_clusters << self.bits))
        for number, index in enumerate(blocks):
            block = np.zeros(per_block, counts.dtype)
            known = counts[index * per_block : (index + 1) * per_block]
            block[: len(known)] = known
            start = index * per_block
            block[max(first - start, 0) : max(end - start, 0)] = 1
            table[index] = first + table_clusters + number << self.bits
            await self.storage.write(table[index], [pack_counts(block, self.header.refcount_order)])
        await self.storage.write(first << self.bits, [packed(table)])
        await self.storage.flush()
        place = (first << self.bits).to_bytes(8, "big") + table_clusters.to_bytes(4, "big")
        await self._write_field(_REFCOUNT_TABLE_AT, place)
        self.header.refcount_table_offset, self.header.refcount_table_clusters = first << self.bits, table_clusters
        self.refcount_table = Table(first << self.bits, table, Level.COUNTS_LINK, fresh=False)
        return await self._survey()

    def _plan(self, counts: Counts, per_block: int) -> tuple[list[int], int]:
        """Blocks that are needed, those for themselves and the table among them; clusters of the table."""
        used = [i for i in range(-(-len(counts) // per_block)) if counts[i * per_block : (i + 1) * per_block].any()]
        blocks, table_clusters = used, 1
        while True:
            end = len(counts) + table_clusters + len(blocks)
            wanted = sorted({*used, *range(len(counts) // per_block, -(-end // per_block))})
            clusters = -(-(wanted[-1] + 1) * 8 >> self.bits)
            if clusters << self.bits > MAX_REFCOUNT_TABLE_BYTES:
                raise Unsupported("has references so far out that no refcount table can count them")
            if len(wanted) == len(blocks) and clusters <= table_clusters:
                return wanted, table_clusters
            blocks, table_clusters = wanted, max(clusters, table_clusters)

    async def _punch(self, freed: Flags) -> None:
        """Give the space of leaked clusters back to the host."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], freed, [False])).astype(np.int8)))
        for start, end in edges.reshape(-1, 2).tolist():
            await self.storage.discard(start << self.bits, end - start << self.bits)

    # -- copied flags

    async def _correct_flags(self, found: Survey) -> None:
        """Bit 63 of what the active L1 leads to: whether the reference count is exactly one."""
        entries = np.frombuffer(self.l1.entries, np.uint64)
        wanted = self._with_flags(entries, found.stored)
        for entry in wanted[wanted & np.uint64(OFFSET_MASK) != 0].tolist():
            table = entry & OFFSET_MASK
            if table % self.size or table + self.size > self.storage.length:
                continue
            old = np.frombuffer(await self.image.tables.read(table, self.size, "Q", "L2 table"), np.uint64)
            new = old.copy()
            descriptors = slice(None, None, self.header.entry_words)
            if found.external_data:
                # every place in a data file belongs to one guest cluster alone
                placed = old[descriptors] & np.uint64(OFFSET_MASK) != 0
                new[descriptors] |= np.where(placed, np.uint64(COPIED), np.uint64(0))
            else:
                new[descriptors] = self._with_flags(old[descriptors], found.stored)
            if wrong := int(np.count_nonzero(old != new)):
                self.result.fixed(f"OFLAG_COPIED of {wrong} entries of the L2 table at {table:#x}", corruptions=wrong)
                await self.storage.write(table, [packed(new)])
        if wrong := int(np.count_nonzero(entries != wanted)):
            self.result.fixed(f"OFLAG_COPIED of {wrong} L1 entries", corruptions=wrong)
            self.l1.entries[:] = array("Q", wanted.tobytes())
            await self.storage.write(self.l1.offset, [packed(wanted)])
        await self.storage.flush()

    def _with_flags(self, entries: Entries, stored: Counts) -> Entries:
        clusters = ((entries & np.uint64(OFFSET_MASK)) >> np.uint64(self.bits)).astype(np.int64)
        counted = (clusters > 0) & (entries & np.uint64(COMPRESSED) == 0)
        known = counted & (clusters < len(stored))
        alone = known & (stored[np.where(known, clusters, 0)] == 1)
        flagged = np.where(alone, entries | np.uint64(COPIED), entries & np.uint64(~COPIED & _ALL_BITS))
        return np.where(counted, flagged, entries)
