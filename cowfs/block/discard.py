"""Zeros without data: what guests discard, or say that it is zeros, on a disk in use.

Whole clusters are given up: with nothing to hide below them they become unallocated, else zero clusters, so that
what a backing file holds there never shines through. Of a cluster that a request covers in part, the part reads
as zeros, and its space is given back all the same, as a hole in the storage. A cluster that holds nothing but
zeros then is given up as a whole: guests discard file by file, and files end inside of clusters.

All offsets and lengths are bytes.
"""

from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

import trio

from cowfs.block.alignment import align_down, align_up, common
from cowfs.block.extent import NO_OFFSET, Extent, Kind
from cowfs.block.layer import Layer
from cowfs.block.owners import Piece
from cowfs.block.stack import Stack
from cowfs.block.zeros import is_zero

#: clusters given up in one step; in between everything else gets its turn
STEP_CLUSTERS = 4096
#: bytes of one step where there are no clusters
STEP_BYTES = 1 << 32
#: bytes from which on a hole is punched; less is no page of the host, and zeros are as good
HOLE = 4096
#: bytes read at once to see whether a cluster is all zeros by now
LOOK = 64 << 10

_EMPTY = (Kind.ZERO, Kind.UNALLOCATED)


class _Run(NamedTuple):
    """Whole clusters that are treated alike; ``bare``: nothing below has to be hidden."""

    start: int
    end: int
    bare: bool


class Discarding(Stack):
    """The part of a disk that makes zeros."""

    #: what the active layer will lie on when a job has taken out all that is between; None if none is to
    _heir: Layer | None = None

    @asynccontextmanager
    async def about_to_lie_on(self, base: Layer | None) -> AsyncIterator[None]:
        """While the context lasts, what guests discard hides not only what is below, but what ``base`` has there, too.

        For a job that takes out all between the two: it sees to what the active layer does not hold, once, and not to
        what that ceases to hold afterwards. Waits for requests that began before.
        """
        self._heir = base
        try:
            if base is not None:
                async with self._all_held():
                    pass
            yield
        finally:
            self._heir = None

    @abstractmethod
    def _check_write(self, offset: int, length: int) -> None:
        """Raise unless a range can be written."""

    async def discard(self, offset: int, length: int) -> None:
        """Make a range read as zeros and give its space back, durably so after the next flush.

        Raises `OutOfRange`, `ReadOnly`, or the storage's error; a range that failed holds old content or zeros.
        """
        await self.write_zeroes(offset, length)
        self.stats.discards += 1
        self.stats.discarded_bytes += length

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Make a range read as zeros; without ``unmap`` what has space in the active layer keeps it."""
        self._check_write(offset, length)
        end = offset + length
        while offset < end:
            size = self.cluster_size
            step = size * STEP_CLUSTERS if size > 1 else STEP_BYTES
            stop = min(end, align_down(offset, step) + step)
            async with self._holding(offset, stop):
                # it may have become shorter
                if offset < (last := min(stop, self.size)):
                    await self._write_zeroes(offset, last, unmap=unmap)
            offset = stop
            await trio.lowlevel.checkpoint()

    async def _write_zeroes(self, start: int, end: int, *, unmap: bool) -> None:
        """`write_zeroes`, with the clusters held."""
        top = self.layers[0]
        if start < top.image.vetted:
            await self._vet(0, start, memoryview(bytes(min(top.image.vetted, end) - start)))
        if unmap:
            start, end = await self._widened(start, end)
        self._about_to_write(start, end - start)
        if self.sink is not None:
            await self.sink.write_zeroes(start, end - start)
        elif unmap:
            await self._give_up(start, end)
        else:
            await self._zero_in_place(start, end)

    async def _zero_in_place(self, start: int, end: int) -> None:
        """Zeros over what has space in the active layer; the rest is given up."""
        top = self.layers[0]
        position = start
        for extent in await top.map(start, end - start):
            if extent.kind is Kind.DATA:
                await self._give_up(position, extent.offset)
                await self._zero_data(extent, punch=False)
                position = extent.end
        await self._give_up(position, end)

    # -- whole clusters

    async def _give_up(self, start: int, end: int) -> None:
        top = self.layers[0]
        first, last = _inside(start, end, top.cluster_size, self.size)
        for run in await self._runs(first, last):
            for begin, stop in _occupied(await top.map(run.start, run.end - run.start), run, top.cluster_size):
                length = align_up(stop, top.cluster_size) - begin
                if not await top.discard(begin, length, bare=run.bare):
                    await self._zero_parts(begin, min(stop, self.size))
        await self._zero_parts(start, first)
        await self._zero_parts(last, end)

    async def _runs(self, start: int, end: int) -> list[_Run]:
        """Tell clusters for which the layers below hold something from those for which they do not."""
        if start >= end:
            return []
        if len(self.layers) == 1:
            return [_Run(start, end, bare=True)]
        bare = list(_stretches(await self.resolve(start, end - start, 1)))
        if self._heir is not None:
            later = await self.resolve(start, end - start, self.layers.index(self._heir))
            bare = common(bare, list(_stretches(later)))
        runs: list[_Run] = []
        position = start
        size = self.cluster_size
        for first, last in bare:
            first, last = _inside(first, last, size, self.size)
            if first < last:
                if position < first:
                    runs.append(_Run(position, first, bare=False))
                runs.append(_Run(first, last, bare=True))
                position = last
        if position < end:
            runs.append(_Run(position, end, bare=False))
        return runs

    # -- parts of clusters

    async def _zero_parts(self, start: int, end: int) -> None:
        """Zero what does not read as zeros yet of a range that cannot be given up in clusters."""
        top = self.layers[0]
        if start >= end:
            return
        if top.unit < top.cluster_size:
            first, last = _inside(start, end, top.unit, self.size)
            if first < last and any(not _reads_zero(piece) for piece in await self.resolve(first, last - first)):
                await top.write_zeroes(first, align_up(last, top.unit) - first)
        for piece in await self.resolve(start, end - start):
            if _reads_zero(piece):
                continue
            if piece.depth == 0 and piece.extent.kind is Kind.DATA:
                await self._zero_data(piece.extent, punch=True)
            else:
                await self.zero_layer(0, piece.extent.offset, piece.extent.length)

    async def _zero_data(self, extent: Extent, *, punch: bool) -> None:
        """Overwrite what the active layer holds with zeros, or with a hole."""
        top = self.layers[0]
        await top.begin()
        if punch and extent.length >= HOLE:
            await top.change_in_place(partial(top.data_storage.punch, extent.host_offset, extent.length))
        else:
            await self.fill_layer(0, extent.offset, extent.end)

    # -- clusters of which zeros are left

    async def _widened(self, start: int, end: int) -> tuple[int, int]:
        """Round a range out to clusters, on each side where the rest of the cluster is zeros of the active layer."""
        size = self.cluster_size
        first, last = align_down(start, size), min(align_up(end, size), self.size)
        if first + size >= last and not (await self._is_zero(first, start) and await self._is_zero(end, last)):
            # in one cluster: there is nothing to win by half of it
            return start, end
        return (
            first if await self._is_zero(first, start) else start,
            last if await self._is_zero(end, last) else end,
        )

    async def _is_zero(self, start: int, end: int) -> bool:
        """Whether a part of a cluster reads as zeros; not known where it would have to be fetched from below."""
        if start >= end:
            return True
        for depth, extent in await self.resolve(start, end - start):
            if extent.kind in _EMPTY:
                continue
            if depth or extent.kind is not Kind.DATA:
                return False
            for position in range(extent.offset, extent.end, LOOK):
                if not is_zero(await self.read(position, min(LOOK, extent.end - position))):
                    return False
        return True


def _reads_zero(piece: Piece) -> bool:
    return piece.extent.kind in _EMPTY


def _inside(start: int, end: int, unit: int, size: int) -> tuple[int, int]:
    """Whole units within a range, of which the last may be cut short by the end of the disk."""
    first = min(align_up(start, unit), end)
    return first, end if end == size else max(first, align_down(end, unit))


def _stretches(pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    """Join neighbours that read as zeros: (start, end)."""
    start = end = -1
    for piece in pieces:
        if not _reads_zero(piece):
            continue
        if piece.extent.offset != end:
            if start < end:
                yield start, end
            start = piece.extent.offset
        end = piece.extent.end
    if start < end:
        yield start, end


def _occupied(extents: Sequence[Extent], run: _Run, size: int) -> Iterator[tuple[int, int]]:
    """Clusters of a run that the layer has to change, joined: (start, end)."""
    start = end = run.start
    for extent in extents:
        nothing = extent.kind is Kind.ZERO or (run.bare and extent.kind is Kind.UNALLOCATED)
        if nothing and extent.host_offset == NO_OFFSET:
            continue
        first, last = align_down(extent.offset, size), min(align_up(extent.end, size), run.end)
        if first > end:
            if start < end:
                yield start, end
            start = first
        end = max(end, last)
    if start < end:
        yield start, end
