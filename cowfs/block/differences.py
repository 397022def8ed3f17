"""Finding where two chains may hold different content, without reading what both take from the same place."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cowfs.block.alignment import Area
from cowfs.block.chain import Chain
from cowfs.block.extent import NO_OFFSET, Kind
from cowfs.block.layer import Layer
from cowfs.block.owners import Piece

#: bytes that are read and compared at once
STEP = 2 << 20
#: bytes; smallest unit in which differences are told
SECTOR = 512


class View(NamedTuple):
    """The content of a chain as seen from layer ``depth``."""

    chain: Chain
    depth: int

    async def pieces(self, start: int, length: int) -> list[Piece]:
        """Tell where a range comes from, with the holes that the storages know of."""
        return await self.chain.resolve(start, length, self.depth, holes=True)

    async def read(self, start: int, length: int) -> bytearray:
        """Content of a range."""
        return await self.chain.read(start, length, self.depth)


class Stretch(NamedTuple):
    """Bytes ``start`` to ``end`` that may differ; whether the first view says that they are zeros there."""

    start: int
    end: int
    first_is_zero: bool


async def unlike(first: View, second: View | None, start: int, length: int) -> list[Stretch]:
    """Stretches of a range that are not known to be the same; no second view is one of zeros."""
    pieces = await first.pieces(start, length)
    if second is None:
        return [Stretch(extent.offset, extent.end, False) for _, extent in pieces if not _is_zero(extent.kind)]
    others = await second.pieces(start, length)
    return list(_unlike(pieces, first.chain.layers, others, second.chain.layers))


def _unlike(
    pieces: Sequence[Piece], layers: Sequence[Layer], others: Sequence[Piece], other_layers: Sequence[Layer]
) -> Iterator[Stretch]:
    i = j = 0
    while i < len(pieces) and j < len(others):
        one, two = pieces[i].extent, others[j].extent
        start, end = max(one.offset, two.offset), min(one.end, two.end)
        if not _is_zero(one.kind) or not _is_zero(two.kind):
            source = _source(layers, pieces[i], start)
            if source is None or source != _source(other_layers, others[j], start):
                yield Stretch(start, end, _is_zero(one.kind))
        i += one.end == end
        j += two.end == end


def _is_zero(kind: Kind) -> bool:
    return kind in (Kind.ZERO, Kind.UNALLOCATED)


def _source(layers: Sequence[Layer], piece: Piece, start: int) -> tuple[object, ...] | None:
    """Tell the place that a piece takes its byte at ``start`` from; None if it is no place of its own."""
    depth, extent = piece
    if _is_zero(extent.kind) or extent.host_offset == NO_OFFSET:
        return None
    layer = layers[depth]
    if extent.kind is Kind.COMPRESSED:
        return (layer.storage.identity, layer.format, extent.host_offset, start)
    return (layer.data_storage.identity, extent.host_offset + start - extent.offset)


async def differing(first: View | None, second: View | None, start: int, end: int) -> list[Area]:
    """Parts of a range where two views hold different bytes, in order; none is a view of zeros."""
    if first is None:
        first, second = second, None
    if first is None:
        return []
    found: list[Area] = []
    for stretch in await unlike(first, second, start, end - start):
        for position in range(stretch.start, stretch.end, STEP):
            length = min(STEP, stretch.end - position)
            content = await first.read(position, length)
            other = bytes(length) if second is None else await second.read(position, length)
            if content != other:
                found += [(position + at, position + to) for at, to in differing_runs(content, other, SECTOR)]
    return found


def differing_runs(first: bytearray, second: bytes | bytearray, unit: int) -> Iterator[tuple[int, int]]:
    """Cut out what differs of two buffers of one length, in runs of whole units but for the end."""
    begin: int | None = None
    for start in range(0, len(first), unit):
        if first[start : start + unit] != second[start : start + unit]:
            begin = start if begin is None else begin
        elif begin is not None:
            yield begin, start
            begin = None
    if begin is not None:
        yield begin, len(first)
