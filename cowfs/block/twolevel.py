"""Formats that map clusters through two levels of tables: an L1 table that points to L2 tables.

Everything that such formats have in common is here: walking, loading, allocating in runs, linking, freeing.
A format supplies what its entries mean and where its clusters come from.

Host space that a change lets go of is handed back only when the change is durable and no reader is left that
might have looked the old place up before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import trio

from cowfs.block.alignment import align_up
from cowfs.block.extent import BELOW, NO_OFFSET, Extent, Kind, continues, merge
from cowfs.block.image import Image, Reservation, Run
from cowfs.block.metacache import MetadataCache, Table
from cowfs.block.quiescence import Mark, Readers
from cowfs.errors import CorruptImage, CowfsError, Unsupported

if TYPE_CHECKING:
    import numpy as np
else:
    from cowfs.lazy import np

#: references that were given up in memory and wait for a flush
MAX_DROPPED = 1 << 16
#: entries of L1 that are searched at once
LINKS = 1 << 16


class _Dropped(NamedTuple):
    """A reference that was given up: an L2 entry as it stood, or the host offset of an L2 table."""

    value: int
    is_table: bool


class Span(NamedTuple):
    """The part of a range that one L2 table maps: its L1 index, and the entries from ``first`` up to ``end``.

    ``offset`` and ``length`` are the part itself, in bytes of the guest's disk; it may begin or end inside of a
    cluster.
    """

    l1_index: int
    first: int
    end: int
    offset: int
    length: int


class TwoLevelImage(Image):
    """An image mapped by an L1 table, always in memory, and L2 tables, cached.

    Set up by the format: ``cluster_bits``, ``table_bits`` (log2 of the entries of an L2 table), ``l1``,
    ``tables``.
    """

    cluster_bits: int
    table_bits: int
    l1: Table
    tables: MetadataCache

    def __init__(self) -> None:
        self.readers = Readers()
        # given up in memory, oldest first, and how many were before them
        self._dropped: deque[_Dropped] = deque()
        self._given_up = 0
        # given up on disk too, or never referred to there, with the readers who may still be in there
        self._freeing: list[tuple[_Dropped, Mark]] = []
        # how many are in the middle of freeing some, and what tells when nobody is
        self._releasing = 0
        self._released = trio.Event()

    # -- what a format says of its entries

    @abstractmethod
    def table_offset(self, l1_entry: int) -> int:
        """Host offset of the L2 table that an L1 entry points to; 0 for none."""

    @abstractmethod
    def owns_table(self, l1_entry: int) -> bool:
        """Whether that L2 table may be changed where it is."""

    @abstractmethod
    def decode(self, entry: int) -> tuple[Kind, int]:
        """Kind and host offset that an L2 entry stands for; `CorruptImage` if it makes no sense."""

    @abstractmethod
    def encode(self, host_offset: int) -> int:
        """Return the L2 entry for data at a host offset that belongs to this entry alone."""

    @abstractmethod
    def zero_entry(self) -> int | None:
        """Return the L2 entry of a cluster that reads as zeros; None if the format has none."""

    @abstractmethod
    def table_entry(self, host_offset: int) -> int:
        """Return the L1 entry for an L2 table that belongs to this entry alone."""

    # -- what a format says of its space

    @abstractmethod
    async def prepare(self) -> None:
        """Do whatever must be durable before the first change to the metadata."""

    @abstractmethod
    async def allocate(self, count: int) -> tuple[int, int]:
        """Take up to ``count`` adjacent clusters: (host offset, how many). Reserved on return, in one breath."""

    async def allocate_data(self, offset: int, count: int) -> tuple[int, int]:
        """`allocate` clusters for the guest's data from a guest offset on."""
        return await self.allocate(count)

    @abstractmethod
    async def load_table(self, host_offset: int) -> Table:
        """Return the L2 table at a host offset, from the cache or the storage."""

    @abstractmethod
    async def allocate_table(self) -> int:
        """Take the adjacent clusters of one L2 table and return their host offset, in one breath."""

    @abstractmethod
    def make_table(self, host_offset: int, source: Table | None) -> Table:
        """Put an L2 table into the cache, empty or with another's entries, as the fresh content of its place."""

    @abstractmethod
    async def free_entry(self, entry: int) -> None:
        """Drop one reference to what an L2 entry pointed to; nothing on disk refers to it any more.

        Unless `CorruptImage` is raised, a failure has changed nothing.
        """

    @abstractmethod
    async def free_table(self, host_offset: int) -> None:
        """Drop one reference to an L2 table; see `free_entry`."""

    @abstractmethod
    async def grow_l1(self, size: int) -> None:
        """Make L1 large enough for a disk of ``size`` bytes; `Unsupported` if the format cannot."""

    @abstractmethod
    async def record_size(self, size: int) -> None:
        """Write the disk's size into the header, durably; everything else is durable already."""

    @abstractmethod
    async def reclaim(self) -> None:
        """Let what was freed be used again, in as few steps as that takes."""

    # -- mapping

    def spans(self, offset: int, length: int) -> Iterator[Span]:
        """Cut a byte range at the borders of L2 tables."""
        width = self.cluster_bits + self.table_bits
        end = offset + length
        while offset < end:
            l1_index = offset >> width
            stop = min(end, (l1_index + 1) << width)
            start = l1_index << width
            last = (stop - start + self.cluster_size - 1) >> self.cluster_bits
            yield Span(l1_index, (offset - start) >> self.cluster_bits, last, offset, stop - offset)
            offset = stop

    def place(self, offset: int, length: int) -> int:
        """Look at the one entry of a range within a cluster."""
        within = offset & (self.cluster_size - 1)
        if within + length > self.cluster_size:
            return NO_OFFSET
        index = offset >> self.cluster_bits
        table_offset = self.table_offset(self.l1.entries[index >> self.table_bits])
        if not table_offset:
            return BELOW
        table = self.tables.get(table_offset)
        if table is None:
            return NO_OFFSET
        kind, host = self.decode(table.entries[index & ((1 << self.table_bits) - 1)])
        if kind is Kind.DATA:
            return host + within
        return BELOW if kind is Kind.UNALLOCATED else NO_OFFSET

    def lookup(self, offset: int, length: int) -> list[Extent] | None:
        """Walk the tables that are in memory."""
        index = offset >> self.cluster_bits
        entries = 1 << self.table_bits
        if (index & (entries - 1)) + ((offset & (self.cluster_size - 1)) + length >> self.cluster_bits) < entries:
            return self._lookup_span(offset, length)
        extents: list[Extent] = []
        width = self.cluster_bits + self.table_bits
        end = offset + length
        while offset < end:
            part = min(end, ((offset >> width) + 1) << width)
            found = self._lookup_span(offset, part - offset)
            if found is None:
                return None
            extents += found
            offset = part
        return merge(extents)

    def _lookup_span(self, offset: int, length: int) -> list[Extent] | None:
        """`lookup` within one L2 table."""
        bits = self.cluster_bits
        table_offset = self.table_offset(self.l1.entries[offset >> bits >> self.table_bits])
        if not table_offset:
            return [Extent(Kind.UNALLOCATED, offset, length, NO_OFFSET)]
        table = self.tables.get(table_offset)
        if table is None:
            return None
        entries = table.entries
        index = (offset >> bits) & ((1 << self.table_bits) - 1)
        size = self.cluster_size
        within = offset & (size - 1)
        kind, host = self.decode(entry := entries[index])
        if within + length <= size:
            if host != NO_OFFSET and kind is not Kind.COMPRESSED:
                host += within
            return [Extent(kind, offset, length, host)]
        extents = []
        end = offset + length
        start = offset
        while True:
            # one run: entries that go on where the one before stopped
            step = 0 if host == NO_OFFSET else size
            position = (start & -size) + size
            index += 1
            if kind is not Kind.COMPRESSED:
                host += within if step else 0
                while position < end and entries[index] == entry + step:
                    entry += step
                    index += 1
                    position += size
            position = min(position, end)
            extents.append(Extent(kind, start, position - start, host))
            if position == end:
                return merge(extents) if len(extents) > 1 else extents
            start = position
            within = 0
            kind, host = self.decode(entry := entries[index])

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Look up table by table, so that a range larger than the cache is walked all the same."""
        extents: list[Extent] = []
        width = self.cluster_bits + self.table_bits
        end = offset + length
        while offset < end:
            part = min(end, ((offset >> width) + 1) << width)
            while (found := self._lookup_span(offset, part - offset)) is None:
                await self.load_table(self.table_offset(self.l1.entries[offset >> width]))
            if extents and continues(extents[-1], found[0]):
                found = merge([extents.pop(), *found])
            extents += found
            offset = part
        return extents

    def held_from(self, offset: int) -> int:
        """The first cluster that has an L2 table; the end of the disk if none follows."""
        width = self.cluster_bits + self.table_bits
        index = offset >> width
        links = np.frombuffer(self.l1.entries, np.uint64)
        while index < len(links):
            part = links[index : index + LINKS]
            if part.any():
                return max(offset, index + int((part != 0).argmax()) << width)
            index += LINKS
        return max(offset, self.size)

    # -- changing

    async def _writable_table(self, l1_index: int) -> Table:
        """Return the L2 table of an L1 entry, pinned; made, or copied if something shares it, where needed."""
        while True:
            entry = self.l1.entries[l1_index]
            offset = self.table_offset(entry)
            old = await self.load_table(offset) if offset else None
            if self.l1.entries[l1_index] != entry:
                continue
            if old is not None and self.owns_table(entry):
                self.tables.secure(old)
                old.pins += 1
                return old
            host = await self.allocate_table()
            if self.l1.entries[l1_index] != entry:
                # somebody made it meanwhile
                self._return([_Dropped(host, is_table=True)])
                continue
            try:
                table = self.make_table(host, old)
            except CowfsError:
                self._return([_Dropped(host, is_table=True)])
                raise
            table.pins += 1
            self.l1.set(l1_index, self.table_entry(host))
            if offset:
                self.drop_table(offset)
            return table

    async def reserve(self, offset: int, length: int) -> Reservation:
        """Take clusters in runs as long as the space allows; runs of requests side by side do not wait."""
        await self.prepare()
        await self._relieve()
        reservation = Reservation()
        try:
            for span in self.spans(offset, length):
                table = await self._writable_table(span.l1_index)
                reservation.tables.append(table)
                await self._reserve_span(reservation, span, table)
        except BaseException:
            self.release(reservation)
            raise
        return reservation

    async def prepare_link(self, runs: list[Run]) -> Reservation:
        """Have the tables in memory that the clusters will be entered in."""
        await self.prepare()
        await self._relieve()
        reservation = Reservation(runs)
        try:
            for run in runs:
                for span in self.spans(run.offset, run.length):
                    reservation.tables.append(await self._writable_table(span.l1_index))
        except BaseException:
            self._unpin(reservation)
            raise
        return reservation

    async def _relieve(self) -> None:
        """Bound what waits in memory for a flush; called before more comes to it."""
        await self.tables.relieve()
        if len(self._dropped) > MAX_DROPPED:
            await self.flush()

    async def _reserve_span(self, reservation: Reservation, span: Span, table: Table) -> None:
        runs = reservation.runs
        position = (span.l1_index << self.table_bits) + span.first << self.cluster_bits
        index, end = span.first, span.end
        while index < end:
            kept = self._kept_space(table.entries[index])
            if kept != NO_OFFSET:
                runs.append(Run(position, self.cluster_size, kept, fresh=False))
                taken = 1
            else:
                wanted = 1
                while index + wanted < end and self._kept_space(table.entries[index + wanted]) == NO_OFFSET:
                    wanted += 1
                host, taken = await self.allocate_data(position, wanted)
                runs.append(Run(position, taken << self.cluster_bits, host, fresh=True))
            index += taken
            position += taken << self.cluster_bits

    def _kept_space(self, entry: int) -> int:
        """Host offset of space that a zero cluster keeps and nothing else uses."""
        kind, host = self.decode(entry)
        if kind is Kind.ZERO and host != NO_OFFSET and self.encode(host) | (self.zero_entry() or 0) == entry:
            return host
        return NO_OFFSET

    def link(self, reservation: Reservation) -> None:
        """Point the entries to the reserved clusters; what they pointed to before is dropped."""
        for run in reservation.runs:
            host = run.host_offset
            for span in self.spans(run.offset, run.length):
                table = self.tables.get(self.table_offset(self.l1.entries[span.l1_index]))
                assert table is not None, "pinned by reserve"
                for index in range(span.first, span.end):
                    if run.fresh:
                        self._drop(table.entries[index])
                    table.set(index, self.encode(host))
                    host += self.cluster_size
        self._unpin(reservation)

    def release(self, reservation: Reservation) -> None:
        """Give the fresh clusters back; they were never referenced, so that no flush has to come before."""
        self._unpin(reservation)
        for run in reservation.runs:
            if run.fresh:
                first = run.host_offset & -self.cluster_size
                hosts = range(first, run.host_offset + run.length, self.cluster_size)
                self._return([_Dropped(self.encode(host), is_table=False) for host in hosts])
        reservation.runs.clear()

    def _return(self, unused: Sequence[_Dropped]) -> None:
        """Give back what nothing on disk has ever referred to; who knew of it in memory may still be reading there."""
        mark = self.readers.mark()
        self._freeing += [(reference, mark) for reference in unused]

    def return_entry(self, entry: int) -> None:
        """Give back what an entry leads to that was never in a table."""
        self._return([_Dropped(entry, is_table=False)])

    def _unpin(self, reservation: Reservation) -> None:
        for table in reservation.tables:
            table.pins -= 1
        reservation.tables.clear()

    async def write_zeroes(self, offset: int, length: int) -> bool:
        """Enter zero clusters, and let the space go."""
        entry = self.zero_entry()
        if entry is None:
            return False
        await self._set_all(offset, length, entry)
        return True

    async def deallocate(self, offset: int, length: int) -> None:
        """Enter that nothing is allocated."""
        await self._set_all(offset, length, 0)

    async def _set_all(self, offset: int, length: int, value: int) -> None:
        await self.prepare()
        for span in self.spans(offset, length):
            await self._relieve()
            if not value and not self.table_offset(self.l1.entries[span.l1_index]):
                continue
            table = await self._writable_table(span.l1_index)
            try:
                for index in range(span.first, span.end):
                    self._set_entry(table, index, value)
            finally:
                table.pins -= 1
            if not value:
                self._drop_if_empty(span.l1_index, table)

    def _drop_if_empty(self, l1_index: int, table: Table) -> None:
        """Let go of an L2 table that maps nothing, unless somebody is about to enter something."""
        if not table.pins and not np.frombuffer(table.entries, np.uint64).any():
            self.l1.set(l1_index, 0)
            self.drop_table(table.offset)

    def _set_entry(self, table: Table, index: int, value: int) -> None:
        if table.entries[index] != value:
            self._drop(table.entries[index])
            table.set(index, value)

    def secure(self) -> None:
        """L1 and what else stays in memory."""
        self.tables.secure_kept()

    def fingerprint(self) -> bytes:
        """The L1 table."""
        return np.frombuffer(self.l1.entries, np.uint64).astype("<u8").tobytes()

    async def grow(self, size: int, zeroed_until: int) -> None:
        """Make room in L1, hide what is below behind zero clusters, and record the new size last."""
        await self.prepare()
        await self.grow_l1(size)
        start = align_up(self.size, self.unit)
        end = align_up(zeroed_until, self.unit)
        if start < end and not await self.write_zeroes(start, end - start):
            raise Unsupported(f"this version of {self.format} cannot hide a longer backing file when it grows")
        await self.flush()
        await self.record_size(size)
        self.size = size

    # -- giving back

    def _drop(self, entry: int) -> None:
        """Remember that an entry no longer refers to its space."""
        kind, host = self.decode(entry)
        if kind is not Kind.UNALLOCATED and host != NO_OFFSET:
            self._dropped.append(_Dropped(entry, is_table=False))

    def drop_table(self, host_offset: int) -> None:
        """Remember that nothing refers to a table any more."""
        self._dropped.append(_Dropped(host_offset, is_table=True))

    async def flush(self) -> None:
        """Flush, then hand back the space that was let go of before, once no reader can be in it."""
        end = self.let_go
        mark = self.readers.mark()
        await self.tables.flush()
        # another flush may have taken some of them, or all
        while self._given_up < end:
            self._freeing.append((self._dropped.popleft(), mark))
            self._given_up += 1
        await self._free_ready()

    @property
    def owes_space(self) -> bool:
        """What waits for a flush, or for the readers that may still be in it."""
        return bool(self._dropped or self._freeing or self._releasing)

    @property
    def let_go(self) -> int:
        """References that were given up."""
        return self._given_up + len(self._dropped)

    async def regain(self) -> None:
        """A flush, and the readers' leave."""
        await self.flush()
        if self._freeing:
            await self.readers.gone()
            await self._free_ready()
        await self._all_released()

    async def _all_released(self) -> None:
        """Wait until nobody is in the middle of freeing anything."""
        while self._releasing:
            await self._released.wait()

    async def settle(self) -> None:
        """Bring to disk what flushes have freed."""
        await self._write_out()

    async def _write_out(self) -> None:
        """Flush until nothing is left to write, and nothing is on its way."""
        while not self._is_settled:
            await self._all_released()
            await self.flush()

    @property
    def _is_settled(self) -> bool:
        return not self._dropped and not self._releasing and self.tables.is_clean

    def rest(self) -> int:
        """Keep few tables."""
        return self.tables.rest()

    async def quiesce(self) -> None:
        """Bring everything to disk, and free all that was let go of; the caller keeps others from changing it."""
        await self._write_out()
        while self._freeing:
            await self.readers.gone()
            await self.flush()
            await self._write_out()

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """Everything is on disk, nothing is left to be freed, and no flush begins, while the context lasts.

        For who changes the image's metadata by other means than its tables. The caller keeps others from changing it;
        they may go on to ask for flushes, which come later.
        """
        while True:
            await self.quiesce()
            async with self.tables.not_flushing():
                # a flush may have come in between, and have freed something
                if self._is_settled and not self._freeing:
                    yield
                    return

    async def _free_ready(self) -> None:
        waiting = [item for item in self._freeing if not item[1].passed]
        ready = [item for item in self._freeing if item[1].passed]
        self._freeing = waiting
        self._releasing += 1
        try:
            while ready:
                await self.tables.relieve()
                await self._free(ready[-1][0])
                ready.pop()
            await self.reclaim()
        except CorruptImage:
            # that would fail for ever
            ready = ready[:-1]
            raise
        finally:
            self._freeing += ready
            self._releasing -= 1
            if not self._releasing:
                self._released.set()
                self._released = trio.Event()

    async def _free(self, reference: _Dropped) -> None:
        if reference.is_table:
            await self.free_table(reference.value)
        else:
            await self.free_entry(reference.value)
