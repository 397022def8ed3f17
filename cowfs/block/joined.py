"""Chains end to end, read as one disk."""

from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import groupby
from typing import NamedTuple

from cowfs.block.alignment import align_down, align_up
from cowfs.block.chain import Chain
from cowfs.block.extent import Extent, Kind
from cowfs.errors import blaming

#: bytes; every chain counts as a whole number of these, as with ``qemu-img``
SECTOR = 512


class Held(Enum):
    """How a stretch of a disk has to be copied."""

    DATA = "data"
    ZERO = "zero"
    #: the active layer says nothing, and what is below it is not asked
    BELOW = "below"


class Area(NamedTuple):
    """Bytes ``start`` to ``end`` of a disk, held alike."""

    start: int
    end: int
    held: Held


class _Part(NamedTuple):
    """Where a range of the joined disk lies in one of the chains."""

    chain: Chain
    offset: int
    start: int
    length: int


class Joined:
    """The disks of some chains, one after the other."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        self._starts: list[tuple[int, Chain]] = []
        self.size = 0
        for chain in chains:
            self._starts.append((self.size, chain))
            self.size += align_up(chain.size, SECTOR)

    def _parts(self, start: int, length: int) -> Iterator[_Part]:
        for base, chain in self._starts:
            first = max(start, base)
            last = min(start + length, base + align_up(chain.size, SECTOR))
            if first < last:
                yield _Part(chain, first - base, first, last - first)

    async def areas(self, start: int, length: int, *, top_only: bool) -> list[Area]:
        """Cut a range by how it is held. ``top_only`` does not look below the active layers."""
        areas: list[Area] = []
        for chain, offset, first, size in self._parts(start, length):
            with blaming(chain.layers[0].name):
                extents = await _extents(chain, offset, size, top_only=top_only)
            for extent in extents:
                begin = first + extent.offset - offset
                has_below = top_only and len(chain.layers) > 1
                areas.append(Area(begin, begin + extent.length, _held(extent.kind, has_below=has_below)))
        joined = (list(group) for _, group in groupby(areas, lambda area: area.held))
        return [Area(group[0].start, group[-1].end, group[0].held) for group in joined]

    async def readinto(self, start: int, view: memoryview) -> None:
        """Fill ``view`` from ``start``."""
        for chain, offset, first, size in self._parts(start, len(view)):
            with blaming(chain.layers[0].name):
                await chain.read_pieces(0, offset, view[first - start : first - start + size])


async def _extents(chain: Chain, offset: int, length: int, *, top_only: bool) -> list[Extent]:
    if top_only:
        return await chain.layers[0].block_status(offset, length)
    return [piece.extent for piece in await chain.resolve(offset, length, holes=True)]


def _held(kind: Kind, *, has_below: bool) -> Held:
    if kind is Kind.UNALLOCATED:
        return Held.BELOW if has_below else Held.ZERO
    return Held.ZERO if kind is Kind.ZERO else Held.DATA


def rounded(areas: Sequence[Area], unit: int) -> list[Area]:
    """Let data grow at the cost of its neighbours, until it begins and ends at multiples of ``unit`` bytes."""
    if not areas:
        return []
    end = areas[-1].end
    result: list[Area] = []
    for area in areas:
        start = result[-1].end if result else area.start
        last = area.end
        if area.held is Held.DATA:
            first = align_down(area.start, unit)
            while result and result[-1].held is not Held.DATA and result[-1].end > first:
                before = result.pop()
                if before.start < first:
                    result.append(before._replace(end=first))
            start = result[-1].end if result else min(first, start)
            last = min(align_up(area.end, unit), end)
        if start < last:
            result.append(Area(start, last, area.held))
    return result
