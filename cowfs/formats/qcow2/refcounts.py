"""qcow2 reference counts ("Host cluster management"): who is in use, who is next, where counts are kept.

A refcount table, always in memory, points to refcount blocks, cached; each block counts the references to a
stretch of host clusters. Counts on disk may be too high after a crash (leaks), never too low: a flush writes
them before what refers to the clusters, and a count goes down only after the reference is gone on disk.
"""

import errno
from array import array
from collections.abc import Callable

from cowfs.block.freespace import FreeRuns
from cowfs.block.metacache import Level, MetadataCache, Table
from cowfs.errors import CorruptImage, StorageError
from cowfs.formats.qcow2.layout import MAX_REFCOUNT_TABLE_BYTES, OFFSET_MASK, Header
from cowfs.storage.base import Storage

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
    ) -> None:
        """``sector`` is the header's; ``on_outgrown`` is told (offset, bytes) of a refcount table left behind."""
        self._tables = tables
        self._on_outgrown = on_outgrown
        self._storage = storage
        self._sector = sector
        self.table = table
        self._cluster_bits = header.cluster_bits
        self._order = header.refcount_order
        self._block_bits = header.cluster_bits + 3 - header.refcount_order
        self._typecode = _TYPECODES.get(header.refcount_order, "B")
        self._free = FreeRuns()
        self._returned: list[int] = []
        self._next = -(-storage.length >> header.cluster_bits)

    @property
    def end(self) -> int:
        """First cluster that was never allocated."""
        return self._next

    # -- counts

    def _block_offset(self, cluster: int) -> int:
        """Host offset of the refcount block of a cluster; 0 if there is none."""
        index = cluster >> self._block_bits
        if index >= len(self.table.entries):
            return 0
        offset = self.table.entries[index] & OFFSET_MASK
        if offset & ((1 << self._cluster_bits) - 1):
            raise CorruptImage(f"refcount block at offset {offset:#x} is not aligned to a cluster")
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
            raise CorruptImage(f"host cluster {cluster} is in use but has no reference count")
        block = await self._load(offset)
        count = self._get(block, cluster)
        if not count:
            raise CorruptImage(f"host cluster {cluster} is in use but its reference count is 0")
        self._set(block, cluster, count - 1)
        if count == 1:
            stale = self._tables.get(cluster << self._cluster_bits)
            if stale is not None:
                self._tables.forget(stale)
            self._returned.append(cluster)

    async def give_back(self) -> None:
        """Punch holes where clusters became free, and only then let them be allocated again."""
        returned, self._returned = sorted(self._returned), []
        runs = FreeRuns()
        for cluster in returned:
            runs.add(cluster, 1)
        for start, count in runs:
            await self._storage.punch(start << self._cluster_bits, count << self._cluster_bits)
            self._free.add(start, count)

    # -- allocating

    async def allocate(self, count: int) -> tuple[int, int]:
        """Take up to ``count`` adjacent clusters: (first, how many), their count set to 1 in one breath."""
        while True:
            first, wanted = self._free.peek(count) or (self._next, count)
            reused = first < self._next
            offset = self._block_offset(first)
            if not offset:
                await self._extend(0)
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

    async def allocate_adjacent(self, count: int) -> int:
        """Take exactly ``count`` adjacent clusters at the end of the file, for a table; returns the first."""
        return await self._extend(count)

    def _claim(self, block: Table, first: int, wanted: int) -> int:
        """Count clusters from ``first`` as used, as far as they are free and in this block."""
        end = min(first + wanted, (first >> self._block_bits) + 1 << self._block_bits)
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
            if await self._is_usable(first, end, blocks):
                break
        if table_clusters:
            self._move_table(first + len(blocks), table_clusters)
        for number, index in enumerate(blocks):
            self._new_block(index, first + number)
        for cluster in range(first, end):
            block = self._tables.get(self._block_offset(cluster))
            assert block is not None, "made just now, or found in memory by _is_usable"
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
