"""A chain of layers in use: what jobs and copy-on-read do to it while guests go on.

Guests' writes and all that happens here take the same range lock. A chain is changed (a layer put on top, taken out,
left behind) with all guests held off, for as long as it takes to write one header. All offsets and lengths are bytes.
"""

import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import trio

from cowfs.block.alignment import Area, align_down, align_up, joined, split, without
from cowfs.block.chain import Chain
from cowfs.block.extent import Extent, Kind
from cowfs.block.identity import forget, remember
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.block.rangelock import RangeLock
from cowfs.block.sink import Sink
from cowfs.block.transfer import copy_range
from cowfs.block.writetracker import WriteTracker
from cowfs.errors import Busy, CowfsError, Unsupported

log = logging.getLogger(__name__)

#: end of the range that covers a whole disk, however large it grows
EVERYWHERE = 1 << 63
#: bytes of the disk whose mapping is looked up at once
LOOK = 1 << 32


@dataclass
class Stats:
    """Counters of one disk, since it was opened."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    write_bytes: int = 0
    flushes: int = 0
    discards: int = 0
    discarded_bytes: int = 0
    copied_up_bytes: int = 0
    copy_on_read_errors: int = 0


class Span(NamedTuple):
    """Layers, by their depth, that are merged into one below: from ``top`` down to above ``base``.

    ``viewer`` is the layer as seen from which they are: ``top`` itself, or one above it that will be put on ``base``.
    """

    viewer: int
    top: int
    base: int


class Stack(Chain):
    """Layers that can be copied into each other and rearranged. Belongs to one trio thread."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.lock = RangeLock()
        self.stats = Stats()
        #: whether there may be something that the next periodic flush has to write
        self.changed = False
        self._trackers: list[WriteTracker] = []
        #: seconds; the longest that guests have been held off all of the disk since somebody set this to 0
        self.longest_pause = 0.0
        #: there while the active layer is drained
        self.sink: Sink | None = None
        #: layers that show no disk that ever was, since a commit is changing them, or what lies below them
        self.spoiled: frozenset[Layer] = frozenset()

    @asynccontextmanager
    async def _holding(self, start: int, end: int) -> AsyncIterator[tuple[int, int]]:
        """Hold the clusters in a range of whatever layer is active when that is granted; yields their range."""
        while True:
            top, grain = self.layers[0], self._grain
            first, last = align_down(start, grain), align_up(end, grain)
            async with self.lock.hold(first, last):
                if self.layers[0] is top and self._grain == grain:
                    yield first, last
                    return

    @property
    def _grain(self) -> int:
        """Bytes; what a write holds whole ones of."""
        return self.cluster_size if self.sink is None else max(layer.cluster_size for layer in self.layers[:2])

    @asynccontextmanager
    async def _all_held(self) -> AsyncIterator[None]:
        """Hold all of the disk, and count how long guests had to wait for that."""
        asked = trio.current_time()
        try:
            async with self.lock.hold(0, EVERYWHERE):
                yield
        finally:
            self.longest_pause = max(self.longest_pause, trio.current_time() - asked)

    def _about_to_write(self, offset: int, length: int) -> None:
        self.changed = True
        for tracker in self._trackers:
            tracker.mark(offset, length)

    # -- copying between layers, for copy-on-read and jobs

    async def copy_up(self, offset: int, length: int, base: int | None = None) -> int:
        """Copy into the active layer what it takes from below in a range; returns the bytes that were copied.

        Takes the same lock as a write, and looks at the state under it: what the guest has written meanwhile
        stays. Clusters that read as zeros are left alone. With ``base``, only what the layers above that one hold is
        copied, zeros too.
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
                    copied += await self._copy_extent_up(extent, base or len(self.layers))
        self.stats.copied_up_bytes += copied
        return copied

    async def _copy_extent_up(self, extent: Extent, base: int) -> int:
        """Copy up an extent of which the active layer holds nothing; the bytes of it that were data."""
        pieces = await self.resolve(extent.offset, extent.length, 1, holes=True)
        held = [piece.extent for piece in pieces if piece.depth < base and piece.extent.kind is not Kind.UNALLOCATED]
        data = [(found.offset, found.end) for found in held if found.kind is not Kind.ZERO]
        zeros: list[Area] = []
        if base < len(self.layers):
            found = joined([(found.offset, found.end) for found in held if found.kind is Kind.ZERO])
            zeros, ragged = self._whole_units(found)
            data = sorted([*data, *ragged])
        units = joined([(align_down(start, self.unit), align_up(end, self.unit)) for start, end in data])
        for start, end in zeros:
            for first, last in without(start, end, units):
                await self._hide(0, first, last, base)
        copied = 0
        for start, end in units:
            end = min(end, self.size)
            self.changed = True
            await copy_range(self, 1, 0, start, end)
            copied += end - start
        return copied

    def _whole_units(self, areas: Sequence[Area]) -> tuple[list[Area], list[Area]]:
        """Cut areas into those of whole units of the active layer, and the rests of units."""
        whole: list[Area] = []
        rests: list[Area] = []
        for start, end in areas:
            first, last = align_up(start, self.unit), end if end == self.size else align_down(end, self.unit)
            if first >= last:
                rests.append((start, end))
                continue
            whole.append((first, last))
            rests += [area for area in ((start, first), (last, end)) if area[0] < area[1]]
        return whole, rests

    async def hide(self, above: int, start: int, end: int, base: int) -> None:
        """Have a layer hold zeros where it has nothing itself and would show more of layer ``base`` than it should."""
        async with self.lock.hold(align_down(start, self.layers[above].unit), align_up(end, self.layers[above].unit)):
            for extent in await self.layers[above].map(start, end - start):
                if extent.kind is Kind.UNALLOCATED:
                    await self._hide(above, extent.offset, extent.end, base)

    async def _hide(self, above: int, start: int, end: int, base: int) -> None:
        below = await self.resolve(start, end - start, base, holes=True)
        if any(piece.extent.kind not in (Kind.ZERO, Kind.UNALLOCATED) for piece in below):
            self.changed = True
            await self.zero_layer(above, start, end - start)

    def _units(self, extents: Sequence[Extent]) -> list[Area]:
        """Whole units of the active layer that extents lie in, cut at the disk's end."""
        areas: list[Area] = []
        for extent in extents:
            start, end, _, _ = split(extent.offset, extent.length, self.unit)
            if areas and start <= areas[-1][1]:
                start = areas.pop()[0]
            areas.append((start, min(end, self.size)))
        return areas

    async def taken(self, span: Span, offset: int, length: int) -> list[Extent]:
        """Extents of a range in which the viewer of a span takes anything from it."""
        pieces = await self._resolve(self.layers[: span.base], span.viewer, offset, length, holes=False)
        return [
            piece.extent for piece in pieces if piece.depth >= span.top and piece.extent.kind is not Kind.UNALLOCATED
        ]

    async def copy_down(self, offset: int, length: int, span: Span) -> int:
        """Copy into a span's base what its viewer takes from it in a range; returns the bytes that were copied.

        ``offset`` and ``length`` are multiples of the cluster sizes, but for the end of the disk.
        """
        async with self.lock.hold(offset, offset + length):
            return await self._copy_down(offset, length, span)

    async def _copy_down(self, offset: int, length: int, span: Span) -> int:
        copied = 0
        base = self.layers[span.base]
        length = min(length, self.layers[span.viewer].size - offset)
        for depth, extent in await self.resolve(offset, length, span.viewer, holes=True):
            # what ends before the viewer does is seen with zeros after that, and so is the base
            size = min(extent.length, base.size - extent.offset)
            if not span.top <= depth < span.base or size <= 0:
                continue
            if extent.kind is Kind.ZERO:
                await self.zero_layer(span.base, extent.offset, size)
            else:
                await copy_range(self, span.viewer, span.base, extent.offset, extent.offset + size)
                copied += size
        return copied

    async def drop(self, offset: int, length: int, unless: WriteTracker) -> bool:
        """Forget in the active layer what the layer below holds durably; False if ``unless`` saw writes there.

        Where it did, the clusters stay. ``offset`` and ``length`` are multiples of the cluster size, but for the end
        of the disk.
        """
        end = align_up(offset + length, self.cluster_size)
        async with self.lock.hold(offset, end):
            touched = unless.touched(offset, end, self.cluster_size)
            for first, last in without(offset, end, touched):
                await self._drop(first, last)
        return not touched

    async def push_down(self, offset: int, length: int) -> int:
        """Copy a range of the active layer down, make it durable there, and drop it, with guests held off it."""
        end = align_up(offset + length, self.cluster_size)
        async with self.lock.hold(offset, end):
            copied = await self._copy_down(offset, end - offset, Span(0, 0, 1))
            await self.layers[1].flush()
            await self._drop(offset, end)
        return copied

    async def _drop(self, start: int, end: int) -> None:
        below = self.layers[1].size if len(self.layers) > 1 else self.size
        if below < self.size:
            # the disk has grown meanwhile, and what it has there has no copy
            end = min(end, align_down(below, self.cluster_size))
        if start < end:
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

    async def sync(self) -> None:
        """Make durable every write that was answered before this call."""
        if self.sink is not None:
            await self.sink.flush()
        await self.layers[0].flush()

    def _activate(self, top: Layer) -> None:
        """Let a layer be the active one of a disk that is in use."""

    async def grow_layer(self, depth: int, size: int) -> None:
        """Make any layer larger that is open for writing."""
        async with self._all_held():
            # only now: another one may have become the active layer
            layer = self.layers[depth]
            if size < layer.size:
                raise Unsupported("disks can only grow, not shrink", file=layer.name)
            self.changed = True
            if self.sink is not None:
                self.sink.strayed = True
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
                await layer.write_in_place(last.host_offset + last.length, [bytes(layer.unit - partial)])
        elif last.kind in (Kind.SHARED, Kind.COMPRESSED) or (last.kind is Kind.UNALLOCATED and shows_below):
            # written anew, it gets zeros there
            await self.write_layer(depth, start, memoryview(await self.read(start, partial, depth)))

    async def set_layer_writable(self, depth: int, writable: bool) -> None:
        """Open a backing layer for writing, or make it read-only again, flushed.

        The layer above remembers nothing of it while it is open for writing, and afterwards only if it is the active
        one: others no longer hold what they did. If it cannot be opened for writing, all is remembered that was.
        """
        known = self.remembering(depth)
        try:
            if writable:
                await self._forget_below(depth - 1)
            elif depth == 1:
                await self.close_sink()
            self.forget_owners()
            await self.layers[depth].set_writable(writable)
        except BaseException:
            if writable:
                with trio.CancelScope(shield=True):
                    await self.remember_below(depth, known)
            raise
        finally:
            self.forget_owners()
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

    def remembering(self, depth: int) -> frozenset[Layer]:
        """Layers above one that remember what is below them."""
        return frozenset(layer for layer in self.layers[:depth] if layer.image.stamp is not None)

    async def remember_below(self, depth: int, wanted: frozenset[Layer] | None = None) -> None:
        """Have each layer above one remember anew what is below it, from there up, where it can be done harmlessly.

        Only those that are ``wanted``, if that is said. A failure is logged: it takes nothing from anybody.
        """
        for above in range(depth - 1, -1, -1):
            layer = self.layers[above]
            if wanted is not None and layer not in wanted:
                continue
            if above and (layer.image.spoiled_by_writing or layer.image.unwritable is not None):
                continue
            try:
                if above:
                    await layer.set_writable(True)
                try:
                    await remember(layer, self.layers[above + 1])
                finally:
                    if above:
                        with trio.CancelScope(shield=True):
                            await layer.set_writable(False)
            except CowfsError as error:
                log.warning("%s: cannot remember its backing file: %s", layer.name, error)
        self.forget_owners()

    async def cut_out(self, above: int, below: int | None, backing: Backing | None, size: int) -> list[Layer] | None:
        """Take the layers between two out of the chain, or all that are below one; returns them, still open.

        None, and nothing has changed, if the layer above does not have ``size`` bytes any more: what it has beyond
        them takes zeros from layers that end there, and nobody has looked what the one below would give.

        ``backing`` is what the header of the layer above says from then on. It is open for writing, and the caller has
        seen to it that it takes nothing from those layers that the one below would not give, durably. Everything
        of the active layer is durable before the header changes, and the header changes at once.
        """
        await self.close_sink()
        await self.sync()
        end = len(self.layers) if below is None else below
        async with self._all_held():
            if self.layers[above].size != size:
                return None
            # from here on there is no way back: memory and disk must agree on what the chain is
            with trio.CancelScope(shield=True):
                await self.layers[above].set_backing(backing)
                removed = list(self.layers[above + 1 : end])
                self.layers = self.layers[: above + 1] + self.layers[end:]
                self.spoiled -= set(removed)
        with trio.CancelScope(shield=True):
            await self.readers.gone()
        return removed

    async def drop_backing(self) -> None:
        """Make the active layer the whole chain. The caller has seen to it that nothing is taken from below."""
        removed = None
        while removed is None:
            removed = await self.cut_out(0, None, None, self.size)
        with trio.CancelScope(shield=True):
            for layer in removed:
                await layer.close()

    async def open_sink(self) -> None:
        """From now on, let guests write to the layer below what the active layer has no space for."""
        await self.layers[0].complete(0, self.size)
        async with self._all_held():
            await self.layers[0].end_partial()
            self.sink = self.sink or Sink(self)

    async def close_sink(self) -> None:
        """Let guests write to the active layer again, what was written below being durable.

        If that cannot be had, the error is raised and all goes on as before, so that no flush claims more than is.
        """
        if self.sink is None:
            return
        await self.sink.flush()
        async with self._all_held():
            with trio.CancelScope(shield=True):
                await self.sink.flush()
                self.sink = None
                self._activate(self.layers[0])

    async def leave_top(self) -> Layer | None:
        """Make the layer below the active one, which holds nothing, the active one; returns the old one, still open.

        None, and nothing has changed, if it does hold something: writes have strayed into it.
        """
        assert self.sink is not None
        # what was dropped must never be seen again, also if somebody opens the old layer after a crash
        await self.sync()
        async with self._all_held():
            if self.sink.strayed or self.layers[1].size != self.size or await self._holds_anything():
                return None
            top, self.layers = self.layers[0], self.layers[1:]
            self.sink = None
            self.changed = True
            self._activate(self.layers[0])
        with trio.CancelScope(shield=True):
            await self.readers.gone()
        return top

    async def _holds_anything(self) -> bool:
        """Whether the active layer does; one that is empty has no tables, so that looking costs next to nothing."""
        for start in range(0, self.size, LOOK):
            found = await self.layers[0].map(start, min(LOOK, self.size - start))
            if any(extent.kind is not Kind.UNALLOCATED for extent in found):
                return True
        return False

    async def push(self, layer: Layer) -> None:
        """Put an empty overlay of the disk's size on top, at once; the layer below is durable and read-only then.

        Raises `Busy` if the disk has another size by now.
        """
        # a job may have left it open that could not make durable what lies there
        await self.close_sink()
        # most of what there is to write, while guests go on
        await self.sync()
        async with self._all_held():
            old = self.layers[0]
            if layer.size != self.size:
                raise Busy(f"has {self.size} bytes, and its overlay {layer.size}", file=old.name)
            try:
                await old.set_writable(False)
                with trio.CancelScope(shield=True):
                    await remember(layer, old)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await old.set_writable(True)
                raise
            with trio.CancelScope(shield=True):
                await old.end_partial()
                self._adopt(layer)
                self._activate(layer)
                self.layers = (layer, *self.layers)
