"""Which layer below the active one holds what, resolved once: reading costs the same however long the chain is.

The layers below the active one do not change as long as they are open read-only. So where a range of the disk comes
from can be remembered, region by region, as one list instead of one look at every layer.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cowfs.block.extent import Extent, Kind, continues, part_of
from cowfs.block.layer import Layer

#: bytes of the disk that are resolved at once, at most
REGION = 2 << 20
#: clusters of any layer that are; no more than one table of any format that has clusters tells of
REGION_CLUSTERS = 64
#: pieces kept, some 300 bytes each, before the oldest region is forgotten
BOUND = 1 << 16
#: layers from which on it pays
WORTHWHILE = 3


class Piece(NamedTuple):
    """An extent, and the layer of the chain that it was found in (0 = active)."""

    depth: int
    extent: Extent


class _Region(NamedTuple):
    starts: list[int]
    pieces: list[Piece]


#: resolves a range of the disk from memory; None if metadata is missing
Walk = Callable[[int, int], list[Piece] | None]


class Owners:
    """What the layers of a chain from the second on show, as far as somebody has asked. Belongs to one trio thread."""

    def __init__(self, layers: Sequence[Layer], walk: Walk) -> None:
        self.layers = layers
        below = layers[1:]
        #: whether anything can be remembered
        self.is_usable = len(layers) >= WORTHWHILE and all(layer.storage.read_only for layer in below)
        sizes = [layer.cluster_size for layer in below if layer.cluster_size > 1]
        self._size = min([REGION, *(size * REGION_CLUSTERS for size in sizes)])
        self._walk = walk
        self._regions: dict[int, _Region] = {}
        self._kept = 0
        # regions that were asked for once; what never is again is not worth the work
        self._asked: dict[int, None] = {}

    def find(self, offset: int, length: int) -> list[Piece] | None:
        """Say where a range comes from, in order and without gaps; None if metadata is missing."""
        number = offset // self._size
        region = self._regions.get(number)
        end = offset + length
        if region is None or end > (number + 1) * self._size:
            return self._find(offset, end)
        index = bisect_right(region.starts, offset) - 1
        depth, extent = region.pieces[index]
        if end <= extent.offset + extent.length:
            return [Piece(depth, part_of(extent, offset, end))]
        return _cut(region, index, offset, end)

    def place(self, offset: int, length: int) -> tuple[int, int] | None:
        """Depth and host offset of a range that is data in one piece, where that is remembered; None otherwise."""
        region = self._regions.get(offset // self._size)
        if region is None:
            return None
        depth, extent = region.pieces[bisect_right(region.starts, offset) - 1]
        kind, start, size, host = extent
        if kind <= Kind.SHARED and offset + length <= start + size:
            return depth, host + offset - start
        return None

    def _find(self, offset: int, end: int) -> list[Piece] | None:
        found: list[Piece] = []
        while offset < end:
            number = offset // self._size
            stop = min(end, (number + 1) * self._size)
            region = self._regions.get(number) or self._resolve(number)
            if region is None:
                pieces = self._walk(offset, stop - offset)
                if pieces is None:
                    return None
            else:
                pieces = _cut(region, bisect_right(region.starts, offset) - 1, offset, stop)
            if found and found[-1].depth == pieces[0].depth and continues(found[-1].extent, pieces[0].extent):
                depth, last = found.pop()
                first = pieces[0].extent
                pieces[0] = Piece(depth, Extent(last.kind, last.offset, last.length + first.length, last.host_offset))
            found += pieces
            offset = stop
        return found

    def _resolve(self, number: int) -> _Region | None:
        """Remember a region that has been asked for before."""
        if number not in self._asked:
            self._asked[number] = None
            if len(self._asked) > BOUND:
                del self._asked[next(iter(self._asked))]
            return None
        pieces = self._walk(number * self._size, self._size)
        if pieces is None:
            return None
        region = self._regions[number] = _Region([piece.extent.offset for piece in pieces], pieces)
        self._kept += len(pieces)
        while self._kept > BOUND and len(self._regions) > 1:
            oldest = next(iter(self._regions))
            self._kept -= len(self._regions.pop(oldest).pieces)
            self._asked.pop(oldest, None)
        return region


def _cut(region: _Region, index: int, offset: int, end: int) -> list[Piece]:
    """Pieces of a range that begins in the piece at ``index``."""
    found: list[Piece] = []
    for depth, extent in region.pieces[index:]:
        if extent.offset >= end:
            break
        found.append(Piece(depth, part_of(extent, max(offset, extent.offset), min(end, extent.offset + extent.length))))
    return found
