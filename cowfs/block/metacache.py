"""The metadata cache: tables of an image in memory, written back in an order that survives a power cut.

Every table belongs to a level. A flush writes level after level, with a flush of the storage between them,
so nothing reaches the disk before what it refers to:

====================  ====================================================================================
``BODY``              what nothing on disk points to yet (fresh tables), and counts that may safely be too
                      high; ordered together with the guest's data
``COUNTS_LINK``       the way to the reference counts: refcount table entries, the header
``LINK``              the way to guest data: entries of tables that can be reached on disk
====================  ====================================================================================

A flush that finds only data and ``BODY`` costs one flush of the storage; with ``LINK`` it costs two, with
``COUNTS_LINK`` besides (rare: a refcount block was added) three.

The state that a flush writes is taken in one breath at its start. What changes while it is under way is
dirty again, for the next one. A table's life, by its pages::

             set                  a flush begins                   the flush succeeds
    clean ─────────────▶ dirty ──────────────────▶ being written ────────────────────▶ clean
      ▲                  ▲   ▲                       │        │ set
      │ load             │   └───────────────────────┘        ▼
      │                  │        the flush fails       being written, and dirty
    on disk only ◀─┐     └────────────────────────────────────┘
      ▲            │             the flush ends, either way
      └── evict ───┘ (clean and not pinned, nothing else)

What the file says of a page is the truth only while the page is clean. So whoever wants to read tables in the file, to
let go of them, or to take their place, wants them clean: neither dirty nor being written.
"""

import sys
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import IntEnum
from typing import Literal

import trio

from cowfs.errors import CorruptImage
from cowfs.storage.base import Storage

#: bytes; the grain in which dirt is tracked and written
PAGE = 4096
#: bytes of tables that one image keeps, by default
DEFAULT_BOUND = 32 << 20
#: bytes of them that an image keeps which nobody uses
RESTING_BOUND = 128 << 10
#: tables that fit in at the least, however large they are
MIN_TABLES = 8

ByteOrder = Literal["little", "big"]


class Level(IntEnum):
    """When a table is written; see the module's text."""

    BODY = 0
    COUNTS_LINK = 1
    LINK = 2


class Table:
    """One table (L1, L2, refcount table or block, header sector): its entries in native byte order.

    ``fresh`` says that nothing on disk leads to it yet. ``pins`` counts who keeps it from being evicted.
    ``shared`` says that tables of other images have the same entries, so that a change needs a copy first.
    ``dirty`` has the numbers of the pages that no flush has taken yet; ``being_written`` says that a flush has taken
    others, which are not durable yet, and perhaps not even in the file.
    """

    __slots__ = ("being_written", "dirty", "entries", "fresh", "level", "offset", "pins", "secured", "shared")

    def __init__(self, offset: int, entries: "array[int]", level: Level, *, fresh: bool) -> None:
        self.offset = offset
        self.entries = entries
        self.level = level
        self.fresh = fresh
        self.pins = 0
        #: whether the host's space for it is taken
        self.secured = False
        self.shared = False
        self.being_written = False
        self.dirty: set[int] = set(range(-(-self.size // PAGE))) if fresh else set()

    @property
    def is_clean(self) -> bool:
        """Whether the file says the same: nothing to write, and nothing on its way."""
        return not self.dirty and not self.being_written

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.entries) * self.entries.itemsize

    def set(self, index: int, value: int) -> None:
        """Change one entry and mark its page dirty."""
        if self.shared:
            self.entries = self.entries[:]
            self.shared = False
        self.entries[index] = value
        self.dirty.add(index * self.entries.itemsize // PAGE)

    def dirty_runs(self) -> list[range]:
        """Numbers of the dirty pages, those that follow each other together: each run is one write."""
        runs: list[range] = []
        for number in sorted(self.dirty):
            if runs and runs[-1].stop == number:
                runs[-1] = range(runs[-1].start, number + 1)
            else:
                runs.append(range(number, number + 1))
        return runs

    def pages(self, run: range, order: ByteOrder) -> bytes:
        """Return the bytes of adjacent pages as they stand on disk."""
        size = self.entries.itemsize
        part = self.entries[run.start * PAGE // size : run.stop * PAGE // size]
        if order != sys.byteorder:
            part.byteswap()
        return part.tobytes()


class _Snapshot:
    """What one flush writes: pages by level, the tables they are of, and those that it makes reachable."""

    def __init__(self) -> None:
        self.pages: dict[Level, list[tuple[Table, range, bytes]]] = {level: [] for level in Level}
        self.fresh: list[Table] = []
        #: in memory until the flush has ended, unless their place is given up
        self.tables: list[Table] = []

    def take(self, table: Table, order: ByteOrder) -> None:
        """Take the dirty pages of a table, as they are now."""
        if table.dirty:
            pages = self.pages[Level.BODY if table.fresh else table.level]
            pages += [(table, run, table.pages(run, order)) for run in table.dirty_runs()]
            table.dirty.clear()
            table.being_written = True
            self.tables.append(table)
        if table.fresh:
            self.fresh.append(table)

    def reached(self) -> None:
        """The first levels are durable: fresh tables are whole on disk, and what leads to them may follow."""
        for table in self.fresh:
            table.fresh = False
        self.fresh.clear()

    def end(self, *, failed: bool) -> None:
        """No page is on its way any more; if the flush has failed, all are dirty again."""
        for table in self.tables:
            table.being_written = False
        if failed:
            for pages in self.pages.values():
                for table, run, _ in pages:
                    table.dirty.update(run)


class MetadataCache:
    """The tables of one image, by host offset. Belongs to one trio thread."""

    def __init__(self, storage: Storage, order: ByteOrder, *, bound: int = DEFAULT_BOUND) -> None:
        self._storage = storage
        #: a second storage, for guest data that tables of this one point to: flushed before they are written
        self.data_storage: Storage | None = None
        self._order: ByteOrder = order
        #: bytes of tables that are kept, beside those that stay as long as the image is open
        self.bound = bound
        self._bytes = 0
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._kept: list[Table] = []
        self._loading: dict[int, trio.Event] = {}
        self._lock = trio.Lock()
        # what the flush under way writes; nothing where there is none
        self._under_way = _Snapshot()
        self._flushes_wanted = 0
        self._flushes_done = 0

    def get(self, offset: int) -> Table | None:
        """Return the table at a host offset, if it is in memory."""
        table = self._tables.get(offset)
        if table is not None:
            self._tables.move_to_end(offset)
        return table

    async def load(self, offset: int, size: int, typecode: str, level: Level, what: str) -> Table:
        """Return the table at ``offset``, reading ``size`` bytes at most once for all who ask.

        Images that are only read have it in memory once, however many chains they are part of.
        Raises `CorruptImage`, naming ``what``, where the file ends before the table does.
        """
        while (table := self.get(offset)) is None:
            if (under_way := self._loading.get(offset)) is not None:
                await under_way.wait()
                continue
            self._loading[offset] = trio.Event()
            try:
                key = (offset, size, typecode, self._order)
                common = self._storage.common
                entries = common.get(key) if common is not None else None
                if entries is None:
                    entries = await self.read(offset, size, typecode, what)
                if (made := self._tables.get(offset)) is not None:
                    # somebody has made one in this place meanwhile
                    return made
                assert not self._is_being_written(offset), "what is being written was read back"
                table = Table(offset, entries, level, fresh=False)
                if (common := self._storage.common) is not None:
                    table.entries = common.setdefault(key, entries)
                    table.shared = True
                self._insert(table)
            finally:
                self._loading.pop(offset).set()
        return table

    async def read(self, offset: int, size: int, typecode: str, what: str) -> "array[int]":
        """Read a table's entries without keeping them."""
        if offset + size > self._storage.length:
            message = f"{what} at offset {offset:#x} lies beyond the end of the file"
            raise CorruptImage(message, file=self._storage.name)
        entries = array(typecode, bytes(size))
        views = [memoryview(entries).cast("B")]
        if not self._storage.read_now(offset, views):
            await self._storage.read(offset, views)
        if self._order != sys.byteorder:
            entries.byteswap()
        return entries

    def add(self, table: Table) -> Table:
        """Take in a table that was made in memory. Raises `StorageError` if the host has no space for it."""
        known = table.offset in self._tables
        assert known or not self._is_being_written(table.offset), "a place was given away that is being written to"
        self.secure(table)
        self._insert(table)
        return table

    def secure(self, table: Table) -> None:
        """Take the host's space for a table that is about to change, so that no flush can fail for want of it."""
        if not table.secured:
            self._storage.take_space(table.offset, table.size)
            table.secured = True

    def secure_kept(self) -> None:
        """`secure` the tables that stay in memory."""
        for table in self._kept:
            self.secure(table)

    def keep(self, table: Table) -> Table:
        """Take in a table that stays in memory as long as the image is open (L1, refcount table, header)."""
        self._kept.append(table)
        return table

    def forget(self, table: Table) -> None:
        """Drop a table whose place in the file is given up; its dirt goes with it."""
        if self._tables.get(table.offset) is table:
            del self._tables[table.offset]
            self._bytes -= table.size
        elif table in self._kept:
            self._kept.remove(table)

    def clear(self) -> None:
        """Drop every table, kept ones too: the storage was changed by other means. All are clean, none is pinned."""
        assert self.is_clean, "what was to be written would be lost"
        self._kept.clear()
        self._tables.clear()
        self._bytes = 0

    def _insert(self, table: Table) -> None:
        if (replaced := self._tables.get(table.offset)) is not None:
            self.forget(replaced)
        self._tables[table.offset] = table
        self._bytes += table.size
        if self._bytes > self.bound:
            self._evict(self.bound)

    def _evict(self, goal: int) -> None:
        """Drop clean tables that nobody pins, least recently used first, until ``goal`` bytes are left."""
        newest = next(reversed(self._tables), None)
        for _ in range(len(self._tables)):
            if self._bytes <= goal:
                return
            offset, table = next(iter(self._tables.items()))
            if table.dirty or table.being_written or table.pins or offset == newest:
                # out of the way, so that the next search does not meet it again
                self._tables.move_to_end(offset)
            else:
                self._bytes -= self._tables.pop(offset).size

    def rest(self) -> int:
        """Nothing has been asked for a while, and many images may be open: keep few tables. Bytes that were let go."""
        before = self._bytes
        self._evict(RESTING_BOUND)
        return before - self._bytes

    async def relieve(self) -> None:
        """Leave a quarter of the bound free, flushing if need be; called before more tables are dirtied.

        So whoever then loads and dirties less than that stays within the bound.
        """
        goal = self.bound - self.bound // 4
        if self._bytes > goal:
            self._evict(goal)
            if self._bytes > goal and not self.is_clean:
                await self.flush()
                self._evict(goal)

    def _is_being_written(self, offset: int) -> bool:
        return any(table.offset == offset for table in self._under_way.tables)

    @property
    def resident(self) -> int:
        """Bytes of the tables in memory, without those that stay as long as the image is open."""
        return self._bytes

    @property
    def is_clean(self) -> bool:
        """Whether the file has every table as it is in memory: nothing to write, and nothing on its way."""
        return all(table.is_clean for table in (*self._kept, *self._tables.values())) and not self._under_way.tables

    async def flush(self) -> None:
        """Make durable all data and metadata as they are at some moment after this call.

        Calls that come while one is under way share the next one. A failure leaves everything dirty that may
        not have reached the disk.
        """
        self._flushes_wanted += 1
        mine = self._flushes_wanted
        async with self._lock:
            if self._flushes_done >= mine:
                return
            covered = self._flushes_wanted
            await self._flush_once()
            self._flushes_done = covered

    @asynccontextmanager
    async def not_flushing(self) -> AsyncIterator[None]:
        """No flush is under way while the context lasts; those that are asked for meanwhile wait."""
        async with self._lock:
            yield

    async def _flush_once(self) -> None:
        snapshot = self._under_way = _Snapshot()
        failed = True
        try:
            for table in (*self._kept, *self._tables.values()):
                snapshot.take(table, self._order)
            await self._write(snapshot)
            failed = False
        finally:
            snapshot.end(failed=failed)
            self._under_way = _Snapshot()

    async def _write(self, snapshot: _Snapshot) -> None:
        if self.data_storage is not None:
            await self.data_storage.flush()
        for level in Level:
            pages = snapshot.pages[level]
            if level > Level.BODY and pages:
                await self._storage.flush()
                snapshot.reached()
            for table, run, data in pages:
                await self._storage.write(table.offset + run.start * PAGE, [data])
        await self._storage.flush()
        snapshot.reached()
