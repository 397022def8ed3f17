"""Extents: the answer to "where is this range". Mapping yields them, I/O consumes them."""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

#: ``host_offset`` of an extent that has no place in the storage
NO_OFFSET = -1
#: what `Image.place` says of a range that the image holds nothing of
BELOW = -2


class Kind(IntEnum):
    """What a layer holds for a range."""

    #: bytes in the storage, which may be overwritten where they are
    DATA = 0
    #: bytes in the storage that something else uses too (an internal snapshot): written by copying
    SHARED = 1
    #: reads as zeros; a host offset is space that is kept for it
    ZERO = 2
    #: the layer says nothing; what is below shines through; a host offset is space that is kept for it
    UNALLOCATED = 3
    #: packed bytes; ``host_offset`` is the format's own description of where they are
    COMPRESSED = 4


class Extent(NamedTuple):
    """A range of the guest's disk that one layer treats alike; offsets and length in bytes."""

    kind: Kind
    offset: int
    length: int
    host_offset: int

    @property
    def end(self) -> int:
        """Guest offset of the first byte after it."""
        return self.offset + self.length


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """Join neighbours that continue each other, on the guest's side and on the host's."""
    merged: list[Extent] = []
    for extent in extents:
        if merged and continues(merged[-1], extent):
            last = merged.pop()
            extent = Extent(last.kind, last.offset, last.length + extent.length, last.host_offset)
        merged.append(extent)
    return merged


def continues(first: Extent, second: Extent) -> bool:
    """Whether ``second``, which follows on the guest's side, is the same extent going on.

    Compressed extents never are: each is unpacked for itself.
    """
    if first.kind != second.kind or first.kind == Kind.COMPRESSED:
        return False
    if first.host_offset == NO_OFFSET:
        return second.host_offset == NO_OFFSET
    return first.host_offset + first.length == second.host_offset


def patched(extents: Sequence[Extent], patches: Sequence[Extent]) -> list[Extent]:
    """Put others in place of what a list of extents says of some ranges; both in order, patches within the list."""
    found: list[Extent] = []
    waiting = iter(patches)
    patch = next(waiting, None)
    for extent in extents:
        start = extent.offset
        while patch is not None and patch.offset < extent.end:
            if start < patch.offset:
                found.append(part_of(extent, start, patch.offset))
            start = max(start, min(patch.end, extent.end))
            if patch.end > extent.end:
                break
            found.append(patch)
            patch = next(waiting, None)
        if start < extent.end:
            found.append(part_of(extent, start, extent.end))
    return merge(found)


def part_of(extent: Extent, start: int, end: int) -> Extent:
    """Cut an extent: bytes ``start`` to ``end`` of the guest's disk, which lie within it."""
    host = extent.host_offset
    if host != NO_OFFSET and extent.kind is not Kind.COMPRESSED:
        host += start - extent.offset
    return Extent(extent.kind, start, end - start, host)
