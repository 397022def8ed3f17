"""qcow2 reference counts ("Host cluster management"): who is in use, who is next, where counts are kept.

A refcount table, always in memory, points to refcount blocks, cached; each block counts the references to a
stretch of host clusters. Counts on disk may be too high after a crash (leaks), never too low: a flush writes
them before what refers to the clusters, and a count goes down only after the reference is gone on disk.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from cowfs.block.freespace import FreeRuns
from cowfs.block.metacache import Level, MetadataCache, Table
from cowfs.block.spaceretry import lacks_space
from cowfs.errors import CorruptImage, CowfsError, StorageError
from cowfs.formats.qcow2.blocks import Counts, unpack_counts
from cowfs.formats.qcow2.layout import MAX_REFCOUNT_TABLE_BYTES, OFFSET_MASK, Header, full_size
from cowfs.storage.base import Storage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    from cowfs.lazy import np

#: clusters that are searched for free ones before the file grows
SEARCH_CLUSTERS = 1 << 15
#: runs of free clusters that are remembered; the others are found again in the blocks
MAX_RUNS = 1 << 16
#: clusters that a run must have to be taken for what goes on from something
LONG_RUN = 16
#: the file grows rather than that data is scattered, unless more than this part of it is free
MAX_WASTE = 16

_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}


class Refcounts:
    """The reference counts of one image, and the allocator that reads them. Clusters are host cluster numbers."""

    def __init__(
        self,
        header: Header,
        storage: Storage,
        tables: MetadataCache,
        table: Table,
        sector: Table,
        on_outgrown: Callable[[int, int], None],
        tables_in_use: Callable[[], npt.NDArray[np.int64]],
    ) -> None:
        """``sector`` is the header's; ``on_outgrown`` is told (offset, bytes) of a refcount table left behind.

        ``tables_in_use`` names the clusters of L1 and L2 tables.
        """
        self._tables_in_use = tables_in_use
        self._tables = tables
        self._on_outgrown = on_outgrown
        self._storage = storage
        self._sector = sector
        self.table = table
        self._cluster_bits = header.cluster_bits
        self._order = header.refcount_order
        self._block_bits = header.cluster_bits + 3 - header.refcount_order
        self._typecode = _TYPECODES.get(header.refcount_order, "B")
        #: clusters that the storage can hold
        self._limit = storage.limit >> header.cluster_bits if storage.limit is not None else None
        #: the cluster from which on the file grows only if nothing else is free
        self.ample = full_size(header) >> header.cluster_bits
        self._next = -(-storage.length >> header.cluster_bits)
        if self._limit is not None:
            # of a device, what no block counts was never in use
            self._next = min(self._next, self._counted_end() << self._block_bits)
        #: free clusters below the end that are known of; the blocks from ``_unseen`` on were not looked at yet
        self._free = FreeRuns()
        self._unseen = 0
        #: clusters whose count is 0 and that may not be handed out yet, and those of them that wait for `give_back`
        self._held: set[int] = set()
        self._returned: list[int] = []
        self._known_metadata: npt.NDArray[np.int64] | None = None
        #: whether anything became free that might lie at the end
        self._freed = False
        #: set while the file is being cut off
        self._trimming: trio.Event | None = None

    @property
    def end(self) -> int:
        """First cluster that was never allocated."""
        return self._next

    # -- counts

    def _counted_end(self) -> int:
        """Index after the last block of counts."""
        used = np.flatnonzero(np.frombuffer(self.table.entries, np.uint64) & np.uint64(OFFSET_MASK))
        return int(used[-1]) + 1 if len(used) else 0

    def _block_offset(self, cluster: int) -> int:
        """Host offset of the refcount block of a cluster; 0 if there is none."""
        index = cluster >> self._block_bits
        if index >= len(self.table.entries):
            return 0
        offset = self.table.entries[index] & OFFSET_MASK
        if offset & ((1 << self._cluster_bits) - 1):
            message = f"refcount block at offset {offset:#x} is not aligned to a cluster"
            raise CorruptImage(message, file=self._storage.name)
        return offset

    async def _load(self, offset: int) -> Table:
        return await self._tables.load(offset, 1 << self._cluster_bits, self._typecode, Level.BODY, "refcount block")

    def _get(self, block: Table, cluster: int) -> int:
        index = cluster & ((1 << self._block_bits) - 1)
        if self._order >= 3:
            return block.entries[index]
        width = 1 << self._order
        per_byte = 8 >> self._order
        return block.entries[index // per_byte] >> index % per_byte * width & (1 << width) - 1

    def _set(self, block: Table, cluster: int, count: int) -> None:
        index = cluster & ((1 << self._block_bits) - 1)
        if self._order >= 3:
            block.set(index, count)
            return
        width = 1 << self._order
        per_byte = 8 >> self._order
        shift = index % per_byte * width
        old = block.entries[index // per_byte]
        block.set(index // per_byte, old & ~((1 << width) - 1 << shift) | count << shift)

    async def release(self, cluster: int) -> None:
        """Drop one reference that is gone on disk too; at none the cluster is free, once `give_back` has run."""
        offset = self._block_offset(cluster)
        if not offset:
            raise self._corrupt(cluster, "has no reference count")
        block = await self._load(offset)
        count = self._get(block, cluster)
        if not count:
            raise self._corrupt(cluster, "its reference count is 0")
        self._set(block, cluster, count - 1)
        if count == 1:
            self._known_metadata = None
            stale = self._tables.get(cluster << self._cluster_bits)
            if stale is not None:
                self._tables.forget(stale)
            self._held.add(cluster)
            self._returned.append(cluster)

    def _corrupt(self, cluster: int, what: str) -> CorruptImage:
        return CorruptImage(f"host cluster {cluster} is in use but {what}", file=self._storage.name)

    async def fetch(self, cluster: int) -> None:
        """Bring the count of a cluster into memory, if it has one."""
        offset = self._block_offset(cluster)
        if offset:
            await self._load(offset)

    async def exceed_space(self) -> bool:
        """Whether clearly more clusters are in use than the file takes space for, by the measure of QEMU.

        Where counts cannot be read, they do not: what can be read without them shall not depend on them.
        """
        space = self._storage.allocated >> self._cluster_bits
        many = max(space * 10 // 9, space + 2)
        end = -(-self._storage.length >> self._cluster_bits)
        try:
            return end >= many and await self._count_used(end, many) >= many
        except CorruptImage:
            return False

    async def _count_used(self, end: int, limit: int) -> int:
        """Count the clusters before ``end`` that are in use; the search ends where it has found ``limit`` or more."""
        used = 0
        for start in range(0, end, 1 << self._block_bits):
            offset = self._block_offset(start)
            if offset:
                used += int(np.count_nonzero(self._counts(await self._load(offset))[: end - start]))
            if used >= limit:
                break
        return used

    def share(self, cluster: int) -> bool:
        """Count one more reference to a cluster in use, at once; False if its count is as high as it goes.

        Also if the cluster is not in use, or its count not in memory.
        """
        offset = self._block_offset(cluster)
        block = self._tables.get(offset) if offset else None
        if block is None:
            return False
        count = self._get(block, cluster)
        if not 0 < count < (1 << (1 << self._order)) - 1:
            return False
        self._tables.secure(block)
        self._set(block, cluster, count + 1)
        return True

    async def give_back(self) -> None:
        """Punch holes where clusters became free, and only then let them be allocated again."""
        returned, self._returned = sorted(self._returned), []
        self._freed = self._freed or bool(returned)
        for start, count in _runs(np.array(returned, np.int64)):
            try:
                await self._storage.discard(start << self._cluster_bits, count << self._cluster_bits)
            except BaseException:
                # these stay out of use until the image is opened again; the others are tried by the next flush
                self._returned += [cluster for cluster in returned if cluster >= start + count]
                raise
            self._held.difference_update(range(start, start + count))
            if len(self._free) < MAX_RUNS:
                self._free.add(start, count)
            else:
                self._unseen = min(self._unseen, start >> self._block_bits)

    # -- allocating

    def choose(self, count: int, after: int | None = None) -> tuple[int, int]:
        """Say which clusters `allocate` would take next, from what is known: (first, how many).

        No cluster at all where nothing is free and the storage cannot grow.
        """
        run = self._free.around(after) if after is not None else None
        if run is not None and after is not None:
            return after, min(count, sum(run) - after)
        # what continues something shall find room to go on
        start = self._free.fitting(count if after is None else max(count, LONG_RUN))
        if start is not None:
            return start, count
        longest = self._free.longest()
        if longest is not None:
            least = self.ample if self._limit is None else min(self.ample, self._limit)
            if self._next >= least or self._free.total > self._next // MAX_WASTE:
                return longest[0], min(count, longest[1])
            count = min(count, least - self._next)
        if self._limit is not None:
            count = max(0, min(count, self._limit - self._next))
        return self._next, count

    def would_grow(self, count: int, after: int | None = None) -> bool:
        """Whether `allocate` would take new clusters at the end of the file, or find none."""
        return self.choose(count, after)[0] >= self._next

    async def allocate(self, count: int, after: int | None = None) -> tuple[int, int]:
        """Take up to ``count`` adjacent clusters: (first, how many), their count set to 1 in one breath.

        ``after`` is the cluster that would continue what lies before on the guest's disk. Before the file grows,
        a part of it that was not looked at is searched for free clusters.
        """
        searched = False
        while True:
            if self._trimming is not None:
                await self._trimming.wait()
                continue
            first, wanted = self.choose(count, after)
            reused = first < self._next
            if not reused and (not searched or (not wanted and self._is_unseen)):
                searched = True
                await self._search()
                continue
            if not wanted:
                raise self._no_space()
            offset = self._block_offset(first)
            if not offset:
                await self._grow_counts(first)
                continue
            block = self._tables.get(offset)
            if block is None:
                await self._load(offset)
                continue
            taken = self._claim(block, first, wanted)
            if reused:
                self._free.take(first, max(taken, 1))
            else:
                self._next = first + max(taken, 1)
            if taken:
                return first, taken

    async def _grow_counts(self, first: int) -> None:
        """Make a block for clusters at the end of the file; if there is no space for that, have what is free used."""
        try:
            await self._extend(0)
        except CowfsError as error:
            if not lacks_space(error) or not len(self._free) or self.ample <= first:
                raise
            self.ample = first

    @property
    def _is_unseen(self) -> bool:
        """Whether there are blocks left that were not looked at since the image was opened."""
        return self._unseen << self._block_bits < self._next and len(self._free) < MAX_RUNS

    def _no_space(self) -> StorageError:
        return StorageError("is full", errno=errno.ENOSPC, file=self._storage.name)

    def take_now(self, after: int | None = None) -> int | None:
        """`allocate` one cluster; None if that takes more than what is in memory."""
        if self._trimming is not None:
            return None
        first, wanted = self.choose(1, after)
        reused = first < self._next
        if not wanted or (not reused and self._is_unseen):
            return None
        offset = self._block_offset(first)
        block = self._tables.get(offset) if offset else None
        if block is None or not self._claim(block, first, 1):
            return None
        if reused:
            self._free.take(first, 1)
        else:
            self._next = first + 1
        return first

    async def _search(self) -> None:
        """Look for free clusters in the next blocks that were not looked at since the image was opened."""
        for _ in range(max(1, SEARCH_CLUSTERS >> self._block_bits)):
            index = self._unseen
            if index << self._block_bits >= self._next or len(self._free) >= MAX_RUNS:
                return
            offset = self._block_offset(index << self._block_bits)
            block = await self._load(offset) if offset else None
            # no await from here: what is found must be true when it is entered
            if self._unseen == index:
                if block is not None:
                    self._learn(index, block)
                self._unseen += 1

    def _learn(self, index: int, block: Table) -> None:
        start = index << self._block_bits
        free = np.flatnonzero(self._counts(block)[: max(0, self._next - start)] == 0) + start
        if self._held:
            free = free[~np.isin(free, np.fromiter(self._held, np.int64))]
        wrong = free[np.isin(free, self.metadata())]
        if len(wrong):
            raise CorruptImage(
                f"has a table in host cluster {int(wrong[0])}, which counts as free;"
                " repair it with 'cowfs check -r all'",
                file=self._storage.name,
            )
        self._free.discard(start, start + (1 << self._block_bits))
        for first, count in _runs(free):
            self._free.add(first, count)

    def _counts(self, block: Table) -> Counts:
        if self._order >= 3:
            return np.frombuffer(block.entries, block.entries.typecode)
        return unpack_counts(block.entries.tobytes(), self._order)

    def metadata(self) -> npt.NDArray[np.int64]:
        """Clusters that hold metadata, whatever their counts say."""
        first = self.table.offset >> self._cluster_bits
        table = np.arange(first, first + (self.table.size >> self._cluster_bits))
        blocks = np.frombuffer(self.table.entries, np.uint64) & np.uint64(OFFSET_MASK)
        places = (blocks[blocks != 0] >> np.uint64(self._cluster_bits)).astype(np.int64)
        return np.concatenate([np.zeros(1, np.int64), table, places, self._tables_in_use()])

    def known_metadata(self) -> npt.NDArray[np.int64]:
        """`metadata` in ascending order, without some that was allocated since nothing was freed."""
        if self._known_metadata is None:
            self._known_metadata = np.sort(self.metadata())
        return self._known_metadata

    async def trim(self) -> None:
        """Cut free clusters off the end of the file; that they are free is on disk, and nobody writes meanwhile."""
        if not self._freed or self._trimming is not None:
            return
        self._trimming = trio.Event()
        try:
            end = await self._used_end()
            self._freed = False
            if end < self._next:
                self._free.discard(end, self._next)
                self._next = end
                if end << self._cluster_bits < self._storage.length:
                    await self._storage.truncate(end << self._cluster_bits)
        finally:
            self._trimming.set()
            self._trimming = None

    async def _used_end(self) -> int:
        """Return the first cluster behind all that are in use, or held."""
        end = self._next
        while end:
            start = end - 1 >> self._block_bits << self._block_bits
            offset = self._block_offset(start)
            if offset:
                used = np.flatnonzero(self._counts(await self._load(offset))[: end - start])
                last = start + int(used[-1]) if len(used) else -1
                last = max([last, *(cluster for cluster in self._held if cluster < end)])
                if last >= start:
                    return last + 1
            end = start
        return end

    async def allocate_adjacent(self, count: int) -> int:
        """Take exactly ``count`` adjacent clusters at the end of the file, for a table; returns the first."""
        while self._trimming is not None:
            await self._trimming.wait()
        return await self._extend(count)

    def _claim(self, block: Table, first: int, wanted: int) -> int:
        """Count clusters from ``first`` as used, as far as they are free and in this block."""
        end = min(first + wanted, (first >> self._block_bits) + 1 << self._block_bits)
        self._tables.secure(block)
        cluster = first
        while cluster < end and not self._get(block, cluster):
            self._set(block, cluster, 1)
            cluster += 1
        return cluster - first

    async def _extend(self, count: int) -> int:
        """Take ``count`` adjacent clusters at the end, with the refcount blocks that they and their successor need.

        New blocks, a larger refcount table if one is needed, and the caller's clusters follow each other; all
        are counted in blocks that exist or are made here. Returns the caller's first cluster.
        """
        while True:
            first = self._next
            blocks, table_clusters, end = self._plan(first, count)
            if self._limit is not None and end > self._limit:
                raise self._no_space()
            if await self._is_usable(first, end, blocks):
                break
        # before anything changes
        self._storage.take_space(first << self._cluster_bits, (end - first) << self._cluster_bits)
        if table_clusters:
            self._move_table(first + len(blocks), table_clusters)
        for number, index in enumerate(blocks):
            self._new_block(index, first + number)
        for cluster in range(first, end):
            block = self._tables.get(self._block_offset(cluster))
            assert block is not None, "made just now, or found in memory by _is_usable"
            self._tables.secure(block)
            self._set(block, cluster, 1)
        self._next = end
        return end - count

    def _plan(self, first: int, count: int) -> tuple[list[int], int, int]:
        """Blocks to make, clusters of a new refcount table (0 for none), and where all of it ends."""
        blocks: list[int] = []
        table_clusters = 0
        while True:
            end = first + len(blocks) + table_clusters + count
            last_block = max(end - 1, first) if count else end
            last_block >>= self._block_bits
            missing = [i for i in range(first >> self._block_bits, last_block + 1) if not self._entry(i)]
            needed = self._table_clusters(last_block) if last_block >= len(self.table.entries) else 0
            if len(missing) == len(blocks) and needed <= table_clusters:
                return blocks, table_clusters, end
            blocks, table_clusters = missing, max(needed, table_clusters)

    async def _is_usable(self, first: int, end: int, missing: list[int]) -> bool:
        """Whether clusters are free and their blocks, where they exist, in memory; if not, it is seen to."""
        for cluster in range(first, end):
            if cluster >> self._block_bits in missing:
                continue
            offset = self._block_offset(cluster)
            block = self._tables.get(offset)
            if block is None:
                await self._load(offset)
                return False
            if self._get(block, cluster):
                self._next = cluster + 1
                return False
        return True

    def _entry(self, index: int) -> int:
        return self.table.entries[index] & OFFSET_MASK if index < len(self.table.entries) else 0

    def _table_clusters(self, last_block: int) -> int:
        """Clusters of a refcount table with room for a block index, and for as much again."""
        per_cluster = 1 << self._cluster_bits - 3
        clusters = -(-(last_block + 1) * 3 // 2 // per_cluster)
        if clusters << self._cluster_bits > MAX_REFCOUNT_TABLE_BYTES:
            clusters = MAX_REFCOUNT_TABLE_BYTES >> self._cluster_bits
        if last_block >= clusters * per_cluster:
            raise StorageError("the image has reached the largest size that the format allows", errno=errno.EFBIG)
        return clusters

    def _new_block(self, index: int, cluster: int) -> None:
        offset = cluster << self._cluster_bits
        itemsize = array(self._typecode).itemsize
        entries = array(self._typecode, [0]) * ((1 << self._cluster_bits) // itemsize)
        self._tables.add(Table(offset, entries, Level.BODY, fresh=True))
        self.table.set(index, offset)

    def _move_table(self, first: int, clusters: int) -> None:
        """Continue with a larger copy of the refcount table; the header follows when the copy is durable."""
        old = self.table
        entries = array("Q", old.entries)
        entries.frombytes(bytes((clusters << self._cluster_bits) - old.size))
        self._tables.forget(old)
        self.table = self._tables.keep(Table(first << self._cluster_bits, entries, Level.COUNTS_LINK, fresh=True))
        packed = (first << self._cluster_bits).to_bytes(8, "big") + clusters.to_bytes(4, "big")
        for position, value in enumerate(packed, start=48):
            self._sector.set(position, value)
        self._on_outgrown(old.offset, old.size)


def _runs(clusters: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Join clusters in ascending order that follow each other: (first, count)."""
    if not len(clusters):
        return []
    edges = np.flatnonzero(np.diff(clusters) != 1) + 1
    starts = clusters[np.concatenate(([0], edges))]
    counts = np.diff(np.concatenate(([0], edges, [len(clusters)])))
    return list(zip(starts.tolist(), counts.tolist(), strict=True))
