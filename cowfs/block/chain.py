"""A chain of layers as a structure: what lies where, reading through it, copy-on-write into any one layer.

No guests, no locks: whoever writes holds the clusters that it writes to. All offsets and lengths are bytes.
"""

from collections.abc import Sequence
from functools import partial
from itertools import groupby

import trio

from cowfs.block.alignment import align_down, align_up, split
from cowfs.block.extent import BELOW, NO_OFFSET, Extent, Kind
from cowfs.block.layer import Layer
from cowfs.block.moves import Source
from cowfs.block.owners import WORTHWHILE, Owners, Piece
from cowfs.block.quiescence import Readers
from cowfs.block.twolevel import TwoLevelImage
from cowfs.errors import CowfsError

#: bytes of zeros written at once where a format has no better way
_ZERO_STEP = 1 << 20


class Chain:
    """Layers, active layer first; what one does not hold is looked for in the next.

    ``layers`` is replaced as a whole when the chain changes, so whoever keeps it sees one state.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers: tuple[Layer, ...] = tuple(layers)
        self.readers = Readers()
        self._owners = Owners((), lambda offset, length: None)
        for layer in self.layers:
            self._adopt(layer)

    def _adopt(self, layer: Layer) -> None:
        """Have a layer wait for the readers of this chain before it lets its space be used again."""
        if isinstance(layer.image, TwoLevelImage):
            layer.image.readers = self.readers

    @property
    def size(self) -> int:
        """Bytes of the disk as the guest sees it."""
        return self.layers[0].image.size

    @property
    def cluster_size(self) -> int:
        """Bytes; unit of allocation of the active layer."""
        return self.layers[0].cluster_size

    @property
    def unit(self) -> int:
        """Bytes; what a write into the active layer copies the rest of."""
        return self.layers[0].unit

    # -- where things are

    def resolve_now(self, layers: tuple[Layer, ...], depth: int, offset: int, length: int) -> list[Piece] | None:
        """`resolve`, from memory and without holes; None if metadata is missing."""
        extents = layers[depth].map_now(offset, length)
        if extents is None:
            return None
        if depth + 1 == len(layers):
            return [Piece(depth, extent) for extent in extents]
        pieces: list[Piece] = []
        for extent in extents:
            if extent.kind is Kind.UNALLOCATED:
                below = self._below_now(layers, depth + 1, extent.offset, extent.length)
                if below is None:
                    return None
                pieces += below
            else:
                pieces.append(Piece(depth, extent))
        return pieces

    def _below_now(self, layers: tuple[Layer, ...], depth: int, offset: int, length: int) -> list[Piece] | None:
        """`resolve_now` below the active layer, where what was found once need not be looked for again."""
        if depth != 1 or len(layers) < WORTHWHILE:
            return self.resolve_now(layers, depth, offset, length)
        owners = self._owners_of(layers)
        return owners.find(offset, length) if owners.is_usable else self.resolve_now(layers, 1, offset, length)

    def _owners_of(self, layers: tuple[Layer, ...]) -> Owners:
        if self._owners.layers is not layers:
            self._owners = Owners(layers, partial(self.resolve_now, layers, 1))
        return self._owners

    def place_now(self, layers: tuple[Layer, ...], offset: int, length: int) -> tuple[int, int] | None:
        """Depth and host offset of a range that is data in one piece, if that is quickly told.

        None where only `resolve_now` can tell. The range lies within the disk.
        """
        top = layers[0]
        place = top.image.place(offset, length)
        if place >= 0:
            return 0, place
        if place != BELOW or top.has_parts or len(layers) == 1:
            return None
        if len(layers) >= WORTHWHILE:
            return self._owners_of(layers).place(offset, length)
        below = layers[1].image
        place = below.place(offset, length) if offset + length <= below.size else NO_OFFSET
        return (1, place) if place >= 0 else None

    def forget_owners(self) -> None:
        """Look anew at the layers below the active one: one of them is about to change, or has."""
        self._owners = Owners((), lambda offset, length: None)

    async def resolve(self, offset: int, length: int, depth: int = 0, *, holes: bool = False) -> list[Piece]:
        """Which layer holds each part of a range, as seen from layer ``depth``.

        Only the deepest layer's pieces can be unallocated. ``holes`` asks the storages for their holes too.
        """
        # a layer that leaves the chain meanwhile stays open until it has answered
        with self.readers.inside():
            return await self._resolve(self.layers, depth, offset, length, holes)

    async def held_above(self, depth: int, offset: int, length: int) -> list[Extent]:
        """Extents of a range that are held by any layer above ``depth``, which is not asked."""
        pieces = await self._resolve(self.layers[:depth], 0, offset, length, holes=False)
        return [extent for _, extent in pieces if extent.kind is not Kind.UNALLOCATED]

    async def _resolve(
        self, layers: tuple[Layer, ...], depth: int, offset: int, length: int, holes: bool
    ) -> list[Piece]:
        layer = layers[depth]
        extents = await (layer.block_status if holes else layer.map)(offset, length)
        pieces: list[Piece] = []
        for extent in extents:
            if extent.kind is Kind.UNALLOCATED and depth + 1 < len(layers):
                pieces += await self._resolve(layers, depth + 1, extent.offset, extent.length, holes)
            else:
                pieces.append(Piece(depth, extent))
        return pieces

    def sources_now(self, offset: int, length: int, depth: int) -> list[Source] | None:
        """Where the content of a range lies as seen from layer ``depth``, from memory.

        None if metadata is missing, or if it takes more than copying bytes.
        """
        layers = self.layers
        if depth >= len(layers):
            return [Source(offset, length, None, 0)]
        pieces = self._below_now(layers, depth, offset, length)
        if pieces is None or any(piece.extent.kind is Kind.COMPRESSED for piece in pieces):
            return None
        return [
            Source(
                extent.offset,
                extent.length,
                layers[found].data_storage if extent.kind <= Kind.SHARED else None,
                extent.host_offset,
            )
            for found, extent in pieces
        ]

    # -- reading

    async def read(self, offset: int, length: int, depth: int = 0) -> bytearray:
        """Content of a range as seen from layer ``depth``; zeros beyond that layer's end. Not copied up."""
        buffer = bytearray(length)
        await self.read_pieces(depth, offset, memoryview(buffer))
        return buffer

    async def read_pieces(self, depth: int, offset: int, view: memoryview) -> list[Piece]:
        """Fill ``view`` with what layer ``depth`` and those below hold; returns where it came from."""
        with self.readers.inside():
            layers = self.layers
            pieces = await self._resolve(layers, depth, offset, len(view), holes=False)
            if len(pieces) > 1 and any(map(partial(_takes_long, layers), pieces)):
                await self._read_side_by_side(layers, pieces, offset, view)
                return pieces
            for found, extent in pieces:
                start = extent.offset - offset
                await layers[found].read(extent, view[start : start + extent.length])
        return pieces

    @staticmethod
    async def _read_side_by_side(
        layers: tuple[Layer, ...], pieces: Sequence[Piece], offset: int, view: memoryview
    ) -> None:
        """Read pieces at a time, as each may take as long as all; raises the first error after all have ended."""
        errors: list[CowfsError] = []

        async def read(found: int, extent: Extent) -> None:
            start = extent.offset - offset
            try:
                await layers[found].read(extent, view[start : start + extent.length])
            except CowfsError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for found, extent in pieces:
                nursery.start_soon(read, found, extent)
        if errors:
            raise errors[0]

    # -- writing into one layer

    async def write_layer(self, depth: int, offset: int, data: memoryview) -> None:
        """Write into one layer of the chain. The caller holds the clusters."""
        layer = self.layers[depth]
        await layer.begin()
        await layer.complete(offset, offset + len(data))
        if offset < layer.image.vetted:
            await self._vet(depth, offset, data)
        for in_place, extents in by_treatment(await layer.map(offset, len(data))):
            start, end = extents[0].offset, extents[-1].end
            if not in_place:
                await self._allocate(depth, start, data[start - offset : end - offset])
                continue
            for extent in extents:
                await layer.write_in_place(extent.host_offset, (data[extent.offset - offset : extent.end - offset],))

    async def _vet(self, depth: int, offset: int, data: memoryview) -> None:
        """Show the image what the start of its disk is about to become."""
        image = self.layers[depth].image
        head = await self.read(0, min(image.vetted, image.size), depth)
        written = data[: len(head) - offset]
        head[offset : offset + len(written)] = written
        image.vet_head(bytes(head))

    async def _allocate(self, depth: int, offset: int, data: memoryview) -> None:
        """Write where the layer has no space of its own yet: copy-on-write of what the data leaves of its units."""
        layer = self.layers[depth]
        start, end, head, tail = split(offset, len(data), layer.unit)
        buffers: list[bytes | bytearray | memoryview] = [data]
        if head:
            buffers.insert(0, await self.read(start, head, depth))
        if tail:
            buffers.append(await self.read(end - tail, tail, depth))
        await layer.write_clusters(start, buffers)

    async def zero_layer(self, depth: int, offset: int, length: int) -> None:
        """Make a range of one layer read as zeros. The caller holds the clusters."""
        layer = self.layers[depth]
        first = min(align_up(offset, layer.unit), offset + length)
        last = max(first, align_down(offset + length, layer.unit))
        if offset + length == layer.size:
            last = offset + length
        if first < last and not await layer.write_zeroes(first, align_up(last, layer.unit) - first):
            last = first
        await self.fill_layer(depth, offset, first)
        await self.fill_layer(depth, last, offset + length)

    async def fill_layer(self, depth: int, start: int, end: int) -> None:
        """Write zeros into one layer, as data. The caller holds the clusters."""
        for position in range(start, end, _ZERO_STEP):
            await self.write_layer(depth, position, memoryview(bytes(min(_ZERO_STEP, end - position))))


def _takes_long(layers: tuple[Layer, ...], piece: Piece) -> bool:
    """Whether reading a piece is work, or waiting, that others could be done beside: unpacking is done in threads."""
    return piece.extent.kind is Kind.COMPRESSED or layers[piece.depth].data_storage.is_remote


def by_treatment(extents: list[Extent]) -> list[tuple[bool, list[Extent]]]:
    """Group neighbours by how they are written: in place, or by allocating."""
    return [(in_place, list(group)) for in_place, group in groupby(extents, lambda e: e.kind is Kind.DATA)]
