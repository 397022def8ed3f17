"""A disk: a chain of layers, active layer first, read and written as one flat array of bytes.

`Chain` knows the layers, `Stack` what jobs do with them; here is what guests do: reads, writes and flushes.

Reads and writes come in two forms. ``…_now`` answers without suspending, from cached metadata and the page
cache, or declines; the awaitable form does whatever is needed. All offsets and lengths are bytes.

Lock order: range lock, then the flush lock of a layer's metadata cache. No lock is held by readers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import trio

from cowfs.block.copyonread import Populator
from cowfs.block.discard import Discarding
from cowfs.block.extent import Extent, Kind
from cowfs.block.layer import Layer
from cowfs.block.moves import SECTOR
from cowfs.block.owners import Piece
from cowfs.block.partial import Below, PartialClusters
from cowfs.block.spaceretry import lacks_space
from cowfs.block.upkeep import complete_clusters, flush_periodically, rest_when_idle
from cowfs.errors import CowfsError, OutOfRange, ReadOnly, StorageError, UsageError

#: seconds between the flushes that bound what a crash can lose where no fsync comes
FLUSH_INTERVAL = 5.0


class Disk(Discarding):
    """A chain in use. Belongs to one trio thread."""

    def __init__(
        self, layers: Sequence[Layer], *, copy_on_read: bool = True, flush_interval: float = FLUSH_INTERVAL
    ) -> None:
        super().__init__(layers)
        top = self.layers[0]
        self.read_only = top.storage.read_only or top.image.unwritable is not None
        #: what the user asked for; `copies_on_read` says what is in force
        self.copy_on_read = copy_on_read
        self._holds_copying = 0
        self._flush_interval = flush_interval
        self._populator: Populator | None = None
        self._nursery: trio.Nursery | None = None
        #: requests of guests that take more than a moment, and have not been answered yet
        self.waiting = 0

    @property
    def requests(self) -> int:
        """Requests of guests that have been answered so far."""
        return self.stats.reads + self.stats.writes + self.stats.flushes

    # -- reading

    @property
    def copies_on_read(self) -> bool:
        """Whether what a read fetches from below stays in the active layer."""
        return self.copy_on_read and not self._holds_copying and self._populator is not None

    def readinto_now(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` from ``offset`` without suspending; False if that is not possible, ``view`` undefined."""
        length = len(view)
        layers = self.layers
        if offset + length > layers[0].image.size:
            raise OutOfRange(f"read beyond the end of the disk at {self.size} bytes")
        populator = self._populator if len(layers) > 1 and self.copies_on_read else None
        place = self.place_now(layers, offset, length)
        if place is not None:
            depth, host = place
            from_below = populator is not None and depth > 0
            if from_below and populator is not None and not populator.has_room:
                return False
            if not layers[depth].data_storage.read_now(host, (view,)):
                return False
        else:
            pieces = self.resolve_now(layers, 0, offset, length)
            if pieces is None:
                return False
            from_below = populator is not None and any(map(_fetched, pieces))
            if from_below and populator is not None and not populator.has_room:
                return False
            for depth, extent in pieces:
                start = extent.offset - offset
                if not layers[depth].read_now(extent, view[start : start + extent.length]):
                    return False
        if from_below and populator is not None:
            populator.offer(offset, length)
        self._count_read(length)
        return True

    async def readinto(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``. Raises `OutOfRange` beyond the end of the disk."""
        length = len(view)
        if offset + length > self.size:
            raise OutOfRange(f"read beyond the end of the disk at {self.size} bytes")
        self.waiting += 1
        try:
            if self.copies_on_read and self._populator is not None and not self._populator.has_room:
                # who needs nothing from below does not wait for it
                fetches = any(map(_fetched, await self.resolve(offset, length)))
                if fetches and self._populator is not None:
                    await self._populator.room()
            pieces = await self.read_pieces(0, offset, view)
        finally:
            self.waiting -= 1
        if self.copies_on_read and self._populator is not None and any(map(_fetched, pieces)):
            self._populator.offer(offset, length)
        self._count_read(length)

    def _count_read(self, length: int) -> None:
        self.stats.reads += 1
        self.stats.read_bytes += length

    # -- writing

    def _check_write(self, offset: int, length: int) -> None:
        if self.read_only:
            top = self.layers[0]
            raise ReadOnly(top.image.unwritable or "is open read-only", file=top.name)
        if offset + length > self.size:
            raise OutOfRange(f"write beyond the end of the disk at {self.size} bytes")

    def write_now(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        """Overwrite allocated space without suspending; False if any of it needs more than that."""
        length = len(data)
        self._check_write(offset, length)
        if not self.lock.is_free(offset, offset + length):
            return False
        top = self.layers[0]
        if not top.begun or offset < top.image.vetted:
            return False
        try:
            place = top.image.place(offset, length)
            if place >= 0:
                self._about_to_write(offset, length)
                done = top.data_storage.write_now(place, (data,))
            else:
                extents = top.map_now(offset, length)
                if extents is None:
                    return False
                for extent in extents:
                    if extent.kind is not Kind.DATA:
                        return self._write_partial_now(offset, data, extents)
                self._about_to_write(offset, length)
                done = _write_pieces_now(top, offset, data, extents)
        except StorageError as error:
            if lacks_space(error):
                # what was written before is a hole on the host by now, and space may be owed
                return False
            raise
        if done:
            self._count_write(length)
        return done

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write, allocating in the active layer where needed.

        Raises `OutOfRange`, `ReadOnly`, or the storage's error; a range that failed holds old or new content.
        """
        length = len(data)
        self._check_write(offset, length)
        if not length:
            return
        self.waiting += 1
        try:
            await self._write(offset, data)
        finally:
            self.waiting -= 1

    async def _write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        length = len(data)
        async with self._holding(offset, offset + length) as (start, end):
            # it may have become shorter
            self._check_write(offset, length)
            top = self.layers[0]
            if top.partial is not None and end - start == self.cluster_size and offset >= top.image.vetted:
                await top.begin()
                if self._write_partial_now(offset, data, await top.map(offset, length)):
                    return
            self._about_to_write(offset, length)
            if top.partial is not None:
                await top.partial.relieve()
                top.partial.fill_now(offset, memoryview(data))
            if self.sink is not None:
                await self.sink.write(offset, memoryview(data))
            else:
                await self.write_layer(0, offset, memoryview(data))
        self._count_write(length)

    def _write_partial_now(self, offset: int, data: bytes | bytearray | memoryview, extents: Sequence[Extent]) -> bool:
        """Write where the active layer has nothing, or a part of a cluster; False if that takes more than this."""
        if self.sink is not None:
            self._about_to_write(offset, len(data))
            done = self.sink.write_now(offset, data, extents)
            if done:
                self._count_write(len(data))
            return done
        partial = self.layers[0].partial
        kinds = {extent.kind for extent in extents}
        if partial is None or Kind.UNALLOCATED not in kinds or not kinds <= {Kind.UNALLOCATED, Kind.DATA}:
            return False
        self._about_to_write(offset, len(data))
        done = partial.write_now(offset, data)
        if done:
            self._count_write(len(data))
        return done

    def _count_write(self, length: int) -> None:
        self.stats.writes += 1
        self.stats.write_bytes += length

    @contextmanager
    def copying_on_read_held(self) -> Iterator[None]:
        """No read is copied up while the context lasts: what a commit moves down must not come back up."""
        self._holds_copying += 1
        if self._populator is not None:
            self._populator.clear()
        try:
            yield
        finally:
            self._holds_copying -= 1

    # -- the disk as a whole

    async def flush(self) -> None:
        """Make durable every write that was answered before this call."""
        self.stats.flushes += 1
        self.waiting += 1
        try:
            await self.sync()
        finally:
            self.waiting -= 1

    async def grow(self, size: int) -> None:
        """Make the disk larger; the new part reads as zeros, whatever a longer backing file holds there."""
        self._check_write(0, 0)
        await self.grow_layer(0, size)

    async def shrink(self, size: int) -> None:
        """Cut the disk off after ``size`` bytes; what was there is lost, but for what internal snapshots keep."""
        self._check_write(0, 0)
        if size > self.size:
            raise UsageError(f"{size} bytes is more than the disk has")
        async with self._all_held():
            if size < self.size:
                await self.layers[0].shrink(size)

    async def settle(self) -> None:
        """Take marks of use off the active layer, if it has any; guests wait meanwhile."""
        async with self._all_held():
            await self.layers[0].settle()

    async def compact(self) -> None:
        """Give back host space of the active layer that holds nothing; guests wait meanwhile."""
        # most of it while guests go on
        await self.flush()
        async with self._all_held():
            await self.flush()
            await self.layers[0].compact()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve what goes on in the background, until cancelled: copy-on-read and the periodic flush."""
        if self.read_only:
            task_status.started()
            return
        self._populator = Populator(self.unit, self.copy_up, self._count_copy_on_read_error)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._activate(self.layers[0])
                nursery.start_soon(self._populator.run)
                nursery.start_soon(flush_periodically, self, self._flush_interval)
                nursery.start_soon(rest_when_idle, self.stats, lambda: self.layers)
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    # it takes nobody once it has no tasks left, and a job that is cancelled too may still be ending
                    self._nursery = None
        finally:
            self._populator = None

    def _activate(self, top: Layer) -> None:
        """Let clusters of the active layer be written in part, if it has clusters, as long as the disk is in use."""
        if self._nursery is None or top.cluster_size <= SECTOR:
            return
        # what is put off has to be read by the next flush: if a server were away then, every flush would fail
        if any(storage.is_remote for layer in (top, *self.layers) for storage in layer.storages):
            return
        below = Below(
            lambda offset, length: self.sources_now(offset, length, 1),
            lambda offset, length: self.read(offset, length, 1),
        )
        top.partial = partial = PartialClusters(top.image, below, self.readers)
        self._nursery.start_soon(complete_clusters, partial, self._flush_interval)

    def require_recordable(self) -> None:
        """Raise `UsageError` unless what reads fetch from below passes by where it can be recorded."""
        if self._populator is None or not self.copy_on_read:
            raise UsageError("only copy-on-read sees what is fetched from below, and it is off")

    @property
    def recorded_unit(self) -> int:
        """Bytes of a cluster as `record` tells of them."""
        return self._populator.unit if self._populator is not None else self.unit

    def record(self, note: Callable[[int, int], None] | None) -> None:
        """Tell ``note`` of the clusters, from and to, that reads fetch from below from now on; None ends that."""
        if self._populator is not None:
            self._populator.note = note

    def _count_copy_on_read_error(self) -> None:
        self.stats.copy_on_read_errors += 1

    async def populated(self) -> None:
        """Wait until what has been read so far is copied up."""
        if self._populator is not None:
            await self._populator.drained()

    async def close(self) -> None:
        """Flush and close all layers; the first error is raised after everything is closed."""
        failure: CowfsError | None = None
        for layer in self.layers:
            try:
                await layer.close()
            except CowfsError as error:
                failure = failure or error
        if failure is not None:
            raise failure


def _fetched(piece: Piece) -> bool:
    """Whether a piece is data that comes from below the active layer."""
    return piece.depth > 0 and piece.extent.kind in (Kind.DATA, Kind.SHARED, Kind.COMPRESSED)


def _write_pieces_now(
    layer: Layer, offset: int, data: bytes | bytearray | memoryview, extents: Sequence[Extent]
) -> bool:
    """Overwrite the extents that a range consists of; False if any of them would have to wait."""
    storage = layer.data_storage
    if len(extents) == 1:
        return storage.write_now(extents[0].host_offset, (data,))
    view = memoryview(data)
    return all(
        storage.write_now(extent.host_offset, (view[extent.offset - offset :][: extent.length],)) for extent in extents
    )
