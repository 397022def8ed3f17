"""A chain of layers in use: what jobs and copy-on-read do to it while guests go on.

Guests' writes and all that happens here take the same range lock. A chain is changed (a layer put on top, taken out,
left behind) with all guests held off, for as long as it takes to write one header. All offsets and lengths are bytes.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass

import trio

from cowfs.block.alignment import align_down, align_up, split
from cowfs.block.chain import Chain
from cowfs.block.extent import Extent, Kind
from cowfs.block.identity import forget, remember
from cowfs.block.layer import Layer
from cowfs.block.rangelock import RangeLock
from cowfs.block.writetracker import WriteTracker
from cowfs.errors import Busy, Unsupported

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


class Stack(Chain):
    """Layers that can be copied into each other and rearranged. Belongs to one trio thread."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.lock = RangeLock()
        self.stats = Stats()
        #: whether there may be something that the next periodic flush has to write
        self.changed = False
        self._trackers: list[WriteTracker] = []

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

    def _about_to_write(self, offset: int, length: int) -> None:
        self.changed = True
        for tracker in self._trackers:
            tracker.mark(offset, length)

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

    # -- changing the chain

    async def flush(self) -> None:
        """Make durable every write that was answered before this call."""
        await self.layers[0].flush()

    def _activate(self, top: Layer) -> None:
        """Let a layer be the active one of a disk that is in use."""

    async def grow_layer(self, depth: int, size: int) -> None:
        """Make any layer larger that is open for writing."""
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
                self._activate(layer)
                self.layers = (layer, *self.layers)
