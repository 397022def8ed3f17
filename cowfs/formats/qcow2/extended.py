"""qcow2 with extended L2 entries (incompatible bit 4): clusters of 32 subclusters, each with a state of its own.

Section "Extended L2 Entries" of the specification. An entry is two words: a cluster descriptor without zero flag,
and a bitmap. Bits 0 to 31 of the bitmap say that a subcluster is allocated, bits 32 to 63 that it reads as zeros;
the descriptor says where the cluster is, if it has a place at all. Compressed clusters have no bits set.

Space is allocated in clusters and written in subclusters: what a request leaves of a cluster is not copied. Both
words of an entry lie in one sector, and change together.
"""

from cowfs.block.alignment import align_down, align_up
from cowfs.block.extent import NO_OFFSET, Extent, Kind, merge
from cowfs.block.image import Reservation, Run
from cowfs.block.metacache import Table
from cowfs.block.twolevel import Span
from cowfs.errors import CorruptImage
from cowfs.formats.qcow2.image import Qcow2Image
from cowfs.formats.qcow2.layout import SUBCLUSTERS, ZERO

#: bitmap of a cluster whose subclusters are all allocated; the same, moved up, if all read as zeros
ALLOCATED = (1 << SUBCLUSTERS) - 1
ZEROS = ALLOCATED << SUBCLUSTERS


class ExtendedImage(Qcow2Image):
    """A qcow2 image with extended L2 entries."""

    # entry ``index`` of a table is its words 2 * index (descriptor) and 2 * index + 1 (bitmap)

    @property
    def unit(self) -> int:
        """Bytes of a subcluster."""
        return self.cluster_size // SUBCLUSTERS

    # -- mapping

    def place(self, offset: int, length: int) -> int:
        """Entries are of two words, and tell of parts."""
        return NO_OFFSET

    def _lookup_span(self, offset: int, length: int) -> list[Extent] | None:
        """Cluster by cluster, each by its subclusters."""
        bits = self.cluster_bits
        table_offset = self.table_offset(self.l1.entries[offset >> bits >> self.table_bits])
        if not table_offset:
            return [Extent(Kind.UNALLOCATED, offset, length, NO_OFFSET)]
        table = self.tables.get(table_offset)
        if table is None:
            return None
        extents: list[Extent] = []
        end = offset + length
        index = (offset >> bits) & ((1 << self.table_bits) - 1)
        while offset < end:
            stop = min(end, ((offset >> bits) + 1) << bits)
            self._map_cluster(extents, table, index, offset, stop)
            offset = stop
            index += 1
        return merge(extents) if len(extents) > 1 else extents

    def _map_cluster(self, extents: list[Extent], table: Table, index: int, offset: int, end: int) -> None:
        """Add the extents of ``offset`` to ``end``, which lie in one cluster."""
        kind, host, bitmap = self._read(table, index)
        if kind is Kind.COMPRESSED:
            extents.append(Extent(kind, offset, end - offset, host))
            return
        unit = self.unit
        within = offset & (self.cluster_size - 1)
        while offset < end:
            number = within // unit
            pair = bitmap >> number & (1 | 1 << SUBCLUSTERS)
            # subclusters that differ from this one show as ones
            differ = (bitmap & ALLOCATED ^ (ALLOCATED if pair & 1 else 0)) | (
                bitmap >> SUBCLUSTERS ^ (ALLOCATED if pair >> SUBCLUSTERS else 0)
            )
            differ = differ >> number
            same = (differ & -differ).bit_length() - 1 if differ else SUBCLUSTERS - number
            stop = min(end, offset - within + (number + same) * unit)
            place = host + within if host != NO_OFFSET else NO_OFFSET
            found = kind if pair & 1 else Kind.ZERO if pair else Kind.UNALLOCATED
            extents.append(Extent(found, offset, stop - offset, place))
            within += stop - offset
            offset = stop

    def _read(self, table: Table, index: int) -> tuple[Kind, int, int]:
        """Kind and host offset that the descriptor stands for, and the bitmap; `CorruptImage` if they make no sense.

        The kind is that of allocated subclusters: DATA or SHARED, or COMPRESSED, or UNALLOCATED without a place.
        """
        descriptor, bitmap = table.entries[2 * index], table.entries[2 * index + 1]
        kind, host = self.decode(descriptor)
        if kind is Kind.ZERO:
            raise CorruptImage("an extended L2 entry has the zero flag of a standard one", file=self.storage.name)
        if kind is Kind.COMPRESSED and bitmap:
            raise CorruptImage("a compressed cluster has subclusters", file=self.storage.name)
        if bitmap & bitmap >> SUBCLUSTERS:
            raise CorruptImage("a subcluster is both allocated and zeros", file=self.storage.name)
        if kind is Kind.UNALLOCATED and bitmap & ALLOCATED:
            raise CorruptImage("a subcluster is allocated in a cluster that has no place", file=self.storage.name)
        return kind, host, bitmap

    def _write(self, table: Table, index: int, descriptor: int, bitmap: int) -> None:
        """Change an entry; a cluster of which nothing is allocated any more gives up its place."""
        old = table.entries[2 * index]
        if descriptor == old and not bitmap & ALLOCATED and self.decode(old)[0] in (Kind.DATA, Kind.SHARED):
            descriptor = 0
        if descriptor != old:
            self._drop(old)
        table.set(2 * index, descriptor)
        table.set(2 * index + 1, bitmap)

    def _mask(self, start: int, end: int, index: int, span: Span) -> int:
        """Bits of the subclusters between two guest offsets that lie in a cluster of a span's table."""
        cluster = (span.l1_index << self.table_bits) + index << self.cluster_bits
        first = max(start - cluster, 0) // self.unit
        last = min(end - cluster, self.cluster_size) // self.unit
        return (1 << last) - (1 << first)

    # -- allocating

    def take_now(self, offset: int) -> int:
        """What a write leaves of a subcluster is little, and the others are not copied anyway."""
        return NO_OFFSET

    async def reserve(self, offset: int, length: int) -> Reservation:
        """Take clusters for those that have none to themselves, with what the request leaves of their content."""
        reservation = await super().reserve(offset, length)
        try:
            for run in reservation.runs:
                if run.fresh:
                    await self._carry_over(run)
        except BaseException:
            self.release(reservation)
            raise
        return reservation

    async def _reserve_span(self, reservation: Reservation, span: Span, table: Table) -> None:
        index, position = span.first, span.offset
        end = span.offset + span.length
        while index < span.end:
            kind, host, _ = self._read(table, index)
            taken = 1
            if kind is not Kind.DATA:
                wanted = 1
                while index + wanted < span.end and self._read(table, index + wanted)[0] is not Kind.DATA:
                    wanted += 1
                host, taken = await self.allocate_data(align_down(position, self.cluster_size), wanted)
            stop = min(end, align_down(position, self.cluster_size) + taken * self.cluster_size)
            place = host + position % self.cluster_size
            reservation.runs.append(Run(position, stop - position, place, fresh=kind is not Kind.DATA))
            position = stop
            index += taken

    async def _carry_over(self, run: Run) -> None:
        """Copy, where a run leaves parts of a cluster, what others keep using or what is compressed."""
        size = self.cluster_size
        end = run.offset + run.length
        for cluster in sorted({align_down(run.offset, size), align_down(end - 1, size)}):
            if run.offset <= cluster and cluster + size <= end:
                continue
            found = await self.map(cluster, size)
            content = bytearray(size)
            for extent in found:
                view = memoryview(content)[extent.offset - cluster : extent.end - cluster]
                if extent.kind is Kind.COMPRESSED:
                    view[:] = await self.read_compressed(extent)
                elif extent.kind is Kind.SHARED:
                    await self.data_storage.read(extent.host_offset, [view])
            if any(extent.kind in (Kind.COMPRESSED, Kind.SHARED) for extent in found):
                await self.data_storage.write(run.host_offset + cluster - run.offset, [content])

    def link(self, reservation: Reservation) -> None:
        """Set the bits of what has been written, with those of what has been carried over."""
        for run in reservation.runs:
            end = run.offset + run.length
            host = align_down(run.host_offset, self.cluster_size)
            for span in self.spans(run.offset, run.length):
                table = self.tables.get(self.table_offset(self.l1.entries[span.l1_index]))
                assert table is not None, "pinned by reserve"
                for index in range(span.first, span.end):
                    kind, _, bitmap = self._read(table, index)
                    written = self._mask(run.offset, end, index, span)
                    bitmap = ALLOCATED if kind is Kind.COMPRESSED else bitmap & ~(written << SUBCLUSTERS) | written
                    descriptor = self.encode(host) if run.fresh else table.entries[2 * index]
                    self._write(table, index, descriptor, bitmap)
                    host += self.cluster_size
        self._unpin(reservation)

    # -- zeros, and nothing

    def _set_entry(self, table: Table, index: int, value: int) -> None:
        """Enter a descriptor; the zero flag of standard entries stands for zeros in all subclusters."""
        descriptor, bitmap = (0, ZEROS) if value == ZERO else (value, 0)
        if (descriptor, bitmap) != (table.entries[2 * index], table.entries[2 * index + 1]):
            self._write(table, index, descriptor, bitmap)

    async def write_zeroes(self, offset: int, length: int) -> bool:
        """Enter zeros in whole subclusters."""
        end = offset + length
        first = min(align_up(offset, self.cluster_size), end)
        last = max(first, align_down(end, self.cluster_size))
        await super().write_zeroes(first, last - first)
        for start, stop in ((offset, first), (last, end)):
            if start < stop:
                await self._zero_part(start, stop)
        return True

    async def _zero_part(self, start: int, end: int) -> None:
        """Set zero bits in one cluster; the rest of a compressed one is unpacked."""
        if (await self.map(start, end - start))[0].kind is Kind.COMPRESSED:
            self.link(await self.reserve(start, end - start))
        await self.prepare()
        await self.tables.relieve()
        for span in self.spans(start, end - start):
            table = await self._writable_table(span.l1_index)
            try:
                _, _, bitmap = self._read(table, span.first)
                zeros = self._mask(start, end, span.first, span)
                bitmap = bitmap & ~zeros | zeros << SUBCLUSTERS
                self._write(table, span.first, table.entries[2 * span.first], bitmap)
            finally:
                table.pins -= 1

    async def grow(self, size: int, zeroed_until: int) -> None:
        """Subclusters that the last cluster has beyond the end may hold what was there before the disk was cut off."""
        start = align_up(self.size, self.unit)
        end = min(align_up(self.size, self.cluster_size), align_up(size, self.unit))
        if start < end and any(extent.kind is not Kind.UNALLOCATED for extent in await self.map(start, end - start)):
            await self.write_zeroes(start, end - start)
        await super().grow(size, zeroed_until)
