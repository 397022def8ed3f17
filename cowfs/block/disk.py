"""A disk: a chain of layers, active layer first, read and written as one flat array of bytes.

`Chain` knows the layers; here is what goes on in them: guests' reads and writes, copy-on-read, range locks,
what jobs copy from layer to layer.

Reads and writes come in two forms. ``…_now`` answers without suspending, from cached metadata and the page
cache, or declines; the awaitable form does whatever is needed. All offsets and lengths are bytes.

Lock order: range lock, then the flush lock of a layer's metadata cache. No lock is held by readers.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass

import trio

from cowfs.block.alignment import align_down, align_up, split
from cowfs.block.chain import Chain, Piece
from cowfs.block.copyonread import Populator
from cowfs.block.extent import Extent, Kind
from cowfs.block.identity import forget, remember
from cowfs.block.layer import Layer
from cowfs.block.partial import SECTOR, Below, PartialClusters
from cowfs.block.rangelock import RangeLock
from cowfs.block.upkeep import complete_clusters, flush_periodically
from cowfs.block.writetracker import WriteTracker
from cowfs.errors import Busy, CowfsError, OutOfRange, ReadOnly, Unsupported, UsageError

#: seconds between the flushes that bound what a crash can lose where no fsync comes
FLUSH_INTERVAL = 5.0
#: end of the range that covers a whole disk, however large it grows
EVERYWHERE = 1 << 63


@dataclass
class Stats:
    """Counters of one disk, since it was opened."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    write_bytes: int = 0
    flushes: int = 0
    copied_up_bytes: int = 0
    copy_on_read_errors: int = 0


class Disk(Chain):
    """A chain in use. Belongs to one trio thread."""

    def __init__(
        self, layers: Sequence[Layer], *, copy_on_read: bool = True, flush_interval: float = FLUSH_INTERVAL
    ) -> None:
        super().__init__(layers)
        self.lock = RangeLock()
        self.stats = Stats()
        top = self.layers[0]
        self.read_only = top.storage.read_only or top.image.unwritable is not None
        #: what the user asked for; `copies_on_read` says what is in force
        self.copy_on_read = copy_on_read
        self._holds_copying = 0
        self._flush_interval = flush_interval
        self._trackers: list[WriteTracker] = []
        #: whether there may be something that the next periodic flush has to write
        self.changed = False
        self._populator: Populator | None = None
        self._nursery: trio.Nursery | None = None

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
        pieces = self.resolve_now(layers, 0, offset, length)
        if pieces is None:
            return False
        from_below = len(layers) > 1 and any(_fetched(piece) for piece in pieces) and self.copies_on_read
        if from_below and self._populator is not None and not self._populator.has_room:
            return False
        if len(pieces) == 1:
            if not layers[pieces[0].depth].read_now(pieces[0].extent, view):
                return False
        else:
            for depth, extent in pieces:
                start = extent.offset - offset
                if not layers[depth].read_now(extent, view[start : start + extent.length]):
                    return False
        if from_below and self._populator is not None:
            self._populator.offer(offset, length)
        self.stats.reads += 1
        self.stats.read_bytes += length
        return True

    async def readinto(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``. Raises `OutOfRange` beyond the end of the disk."""
        length = len(view)
        if offset + length > self.size:
            raise OutOfRange(f"read beyond the end of the disk at {self.size} bytes")
        if self.copies_on_read and self._populator is not None and len(self.layers) > 1:
            await self._populator.room()
        pieces = await self.read_pieces(0, offset, view)
        if self.copies_on_read and self._populator is not None and any(map(_fetched, pieces)):
            self._populator.offer(offset, length)
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
        extents = top.map_now(offset, length)
        if extents is None or not top.begun or offset < top.image.vetted:
            return False
        for extent in extents:
            if extent.kind is not Kind.DATA:
                return self._write_partial_now(offset, data, extents)
        self._about_to_write(offset, length)
        storage = top.data_storage
        if len(extents) == 1:
            done = storage.write_now(extents[0].host_offset, (data,))
        else:
            view = memoryview(data)
            done = all(
                storage.write_now(extent.host_offset, (view[extent.offset - offset :][: extent.length],))
                for extent in extents
            )
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
        async with self._holding(offset, offset + length) as (start, end):
            top = self.layers[0]
            if top.partial is not None and end - start == self.cluster_size and offset >= top.image.vetted:
                await top.begin()
                if self._write_partial_now(offset, data, await top.map(offset, length)):
                    return
            self._about_to_write(offset, length)
            if top.partial is not None:
                await top.partial.relieve()
                top.partial.fill_now(offset, memoryview(data))
            await self.write_layer(0, offset, memoryview(data))
        self._count_write(length)

    @asynccontextmanager
    async def _holding(self, start: int, end: int) -> AsyncIterator[tuple[int, int]]:
        """Hold the clusters in a range of whatever layer is active when that is granted; yields their range."""
        while True:
            top = self.layers[0]
            first, last = align_down(start, top.cluster_size), align_up(end, top.cluster_size)
            async with self.lock.hold(first, last):
                if self.layers[0] is top:
                    yield first, last
                    return

    def _write_partial_now(self, offset: int, data: bytes | bytearray | memoryview, extents: Sequence[Extent]) -> bool:
        """Write where the active layer has nothing, or a part of a cluster; False if that takes more than this."""
        partial = self.layers[0].partial
        kinds = {extent.kind for extent in extents}
        if partial is None or Kind.UNALLOCATED not in kinds or not kinds <= {Kind.UNALLOCATED, Kind.DATA}:
            return False
        self._about_to_write(offset, len(data))
        done = partial.write_now(offset, data)
        if done:
            self._count_write(len(data))
        return done

    def _about_to_write(self, offset: int, length: int) -> None:
        self.changed = True
        for tracker in self._trackers:
            tracker.mark(offset, length)

    def _count_write(self, length: int) -> None:
        self.stats.writes += 1
        self.stats.write_bytes += length

    # -- copying between layers, for copy-on-read and jobs

    async def copy_up(self, offset: int, length: int) -> int:
        """Copy into the active layer what it takes from below in a range; returns the bytes that were copied.

        Takes the same lock as a write, and looks at the state under it: what the guest has written meanwhile
        stays. Clusters that read as zeros are left alone.
        """
        if not length or len(self.layers) == 1:
            return 0
        copied = 0
        async with self._holding(offset, offset + length):
            start, end, _, _ = split(offset, length, self.unit)
            end = min(end, self.size)
            if start >= end or len(self.layers) == 1:
                return 0
            await self.layers[0].complete(start, end)
            for extent in await self.layers[0].map(start, end - start):
                if extent.kind is Kind.UNALLOCATED:
                    for first, last in await self._data_below(extent):
                        await self._copy_clusters_up(first, last)
                        copied += last - first
        self.stats.copied_up_bytes += copied
        return copied

    async def _data_below(self, extent: Extent) -> list[tuple[int, int]]:
        """Whole units in an extent for which any layer below holds data: [start, end), cut at the disk's end."""
        areas: list[tuple[int, int]] = []
        for piece in await self.resolve(extent.offset, extent.length, 1, holes=True):
            if piece.extent.kind in (Kind.ZERO, Kind.UNALLOCATED):
                continue
            start, end, _, _ = split(piece.extent.offset, piece.extent.length, self.unit)
            if areas and start <= areas[-1][1]:
                start = areas.pop()[0]
            areas.append((start, min(end, self.size)))
        return areas

    async def _copy_clusters_up(self, start: int, end: int) -> None:
        data = await self.read(start, end - start, 1)
        padding = -len(data) % self.unit
        self.changed = True
        await self.layers[0].write_clusters(start, [data, bytes(padding)] if padding else [data])

    async def copy_down(self, offset: int, length: int, base: int = 1) -> int:
        """Copy into layer ``base`` what the layers above it hold in a range; returns the bytes that were copied.

        ``offset`` and ``length`` are multiples of the cluster sizes, but for the end of the disk.
        """
        async with self.lock.hold(offset, offset + length):
            return await self._copy_down(offset, length, base)

    async def _copy_down(self, offset: int, length: int, base: int) -> int:
        copied = 0
        for depth, extent in await self.resolve(offset, length, holes=True):
            if depth >= base:
                continue
            if extent.kind is Kind.ZERO:
                await self.zero_layer(base, extent.offset, extent.length)
            else:
                data = await self.read(extent.offset, extent.length)
                await self.write_layer(base, extent.offset, memoryview(data))
                copied += extent.length
        return copied

    async def drop(self, offset: int, length: int, unless: WriteTracker) -> bool:
        """Forget in the active layer what the layer below holds durably; False if ``unless`` saw a write there.

        ``offset`` and ``length`` are multiples of the cluster size, but for the end of the disk.
        """
        end = align_up(offset + length, self.cluster_size)
        async with self.lock.hold(offset, end):
            if unless.touched(offset, length):
                return False
            await self._drop(offset, end)
        return True

    async def push_down(self, offset: int, length: int) -> int:
        """Copy a range down, make it durable there, and drop it, with guests held off that range meanwhile."""
        end = align_up(offset + length, self.cluster_size)
        async with self.lock.hold(offset, end):
            copied = await self._copy_down(offset, length, 1)
            await self.layers[1].flush()
            await self._drop(offset, end)
        return copied

    async def _drop(self, start: int, end: int) -> None:
        self.changed = True
        await self.layers[0].deallocate(start, end - start)

    def track_writes(self, chunk: int) -> AbstractContextManager[WriteTracker]:
        """Record which chunks of ``chunk`` bytes guests write, while the context lasts."""
        return self._tracking(WriteTracker(chunk))

    @contextmanager
    def _tracking(self, tracker: WriteTracker) -> Iterator[WriteTracker]:
        self._trackers.append(tracker)
        try:
            yield tracker
        finally:
            self._trackers.remove(tracker)

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
        await self.layers[0].flush()

    async def grow(self, size: int) -> None:
        """Make the disk larger; the new part reads as zeros, whatever a longer backing file holds there."""
        self._check_write(0, 0)
        await self.grow_layer(0, size)

    async def grow_layer(self, depth: int, size: int) -> None:
        """`grow`, for any layer that is open for writing."""
        layer = self.layers[depth]
        if size < layer.size:
            raise Unsupported("disks can only grow, not shrink", file=layer.name)
        async with self.lock.hold(0, EVERYWHERE):
            self.changed = True
            below = self.layers[depth + 1].size if depth + 1 < len(self.layers) else 0
            await self._zero_tail(depth, shows_below=below > layer.size)
            with trio.CancelScope(shield=True):
                await layer.grow(size, zeroed_until=min(size, below))

    async def _zero_tail(self, depth: int, *, shows_below: bool) -> None:
        """Zero what the last cluster has behind the end of the disk: growing makes it visible.

        Whoever wrote the image may have copied a longer backing file there, or have cut the disk off.
        """
        layer = self.layers[depth]
        partial = layer.size % layer.unit
        if not partial:
            return
        start = layer.size - partial
        last = (await layer.map(start, partial))[-1]
        if last.kind is Kind.DATA:
            # what never reaches beyond the end is made to be zeros there by the image itself as it grows
            if layer.image.writes_past_end:
                await layer.begin()
                await layer.data_storage.write(last.host_offset + last.length, [bytes(layer.unit - partial)])
        elif last.kind in (Kind.SHARED, Kind.COMPRESSED) or (last.kind is Kind.UNALLOCATED and shows_below):
            # written anew, it gets zeros there
            await self.write_layer(depth, start, memoryview(await self.read(start, partial, depth)))

    async def shrink(self, size: int) -> None:
        """Cut the disk off after ``size`` bytes; what was there is lost, but for what internal snapshots keep."""
        self._check_write(0, 0)
        if size > self.size:
            raise UsageError(f"{size} bytes is more than the disk has")
        async with self.lock.hold(0, EVERYWHERE):
            if size < self.size:
                await self.layers[0].shrink(size)

    async def set_layer_writable(self, depth: int, writable: bool) -> None:
        """Open a backing layer for writing, or make it read-only again, flushed.

        The layer above remembers nothing of it while it is open for writing, and afterwards only if it is the active
        one: others no longer hold what they did.
        """
        if writable:
            await self._forget_below(depth - 1)
        try:
            await self.layers[depth].set_writable(writable)
        finally:
            if depth == 1 and self.layers[1].storage.read_only:
                with trio.CancelScope(shield=True):
                    await remember(self.layers[0], self.layers[1])

    async def _forget_below(self, depth: int) -> None:
        """Have a layer remember nothing of the one below it, which is about to change."""
        layer = self.layers[depth]
        if layer.image.stamp is None or depth == 0:
            await forget(layer)
            return
        await self.set_layer_writable(depth, True)
        try:
            await forget(layer)
        finally:
            with trio.CancelScope(shield=True):
                await self.set_layer_writable(depth, False)

    async def drop_backing(self) -> None:
        """Make the active layer the whole chain. The caller has seen to it that nothing is taken from below.

        Everything is durable before the header changes, and the header changes at once.
        """
        await self.flush()
        async with self.lock.hold(0, EVERYWHERE):
            # from here on there is no way back: memory and disk must agree on what the chain is
            with trio.CancelScope(shield=True):
                await self.layers[0].set_backing(None)
                below, self.layers = self.layers[1:], self.layers[:1]
        with trio.CancelScope(shield=True):
            await self.readers.gone()
            for layer in below:
                await layer.close()

    async def push(self, layer: Layer) -> None:
        """Put an empty overlay of the disk's size on top, at once; the layer below is durable and read-only then.

        Raises `Busy` if the disk has another size by now.
        """
        # most of what there is to write, while guests go on
        await self.flush()
        async with self.lock.hold(0, EVERYWHERE):
            old = self.layers[0]
            if layer.size != self.size:
                raise Busy(f"has {self.size} bytes, and its overlay {layer.size}", file=old.name)
            await old.set_writable(False)
            with trio.CancelScope(shield=True):
                try:
                    await remember(layer, old)
                except BaseException:
                    await old.set_writable(True)
                    raise
                if old.partial is not None:
                    old.partial.close()
                self._adopt(layer)
                self._put_copies_off(layer)
                self.layers = (layer, *self.layers)

    async def settle(self) -> None:
        """Take marks of use off the active layer, if it has any; guests wait meanwhile."""
        async with self.lock.hold(0, EVERYWHERE):
            await self.layers[0].settle()

    async def compact(self) -> None:
        """Give back host space of the active layer that holds nothing; guests wait meanwhile."""
        async with self.lock.hold(0, EVERYWHERE):
            await self.flush()
            await self.layers[0].compact()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve what goes on in the background, until cancelled: copy-on-read and the periodic flush."""
        if self.read_only:
            task_status.started()
            return
        self._populator = Populator(self.unit, self.copy_up, self._count_copy_on_read_error)
        try:
            async with trio.open_nursery() as self._nursery:
                self._put_copies_off(self.layers[0])
                self._nursery.start_soon(self._populator.run)
                self._nursery.start_soon(flush_periodically, self, self._flush_interval)
                task_status.started()
        finally:
            self._populator = self._nursery = None

    def _put_copies_off(self, top: Layer) -> None:
        """Let clusters of the active layer be written in part, if it has clusters, as long as the disk is in use."""
        if self._nursery is None or top.cluster_size <= SECTOR:
            return
        below = Below(
            lambda offset, length: self.sources_now(offset, length, 1),
            lambda offset, length: self.read(offset, length, 1),
        )
        top.partial = partial = PartialClusters(top.image, below, self.readers)
        self._nursery.start_soon(complete_clusters, partial, self._flush_interval)

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
