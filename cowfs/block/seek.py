"""Where data and holes begin: SEEK_DATA and SEEK_HOLE on a whole chain. All offsets are bytes."""

from collections.abc import AsyncIterator

import trio

from cowfs.block.chain import Chain
from cowfs.block.extent import Extent, Kind

#: bytes that are looked at first
WINDOW = 16 << 20
#: times that by which each window is larger than the one before
GROWTH = 4
#: bytes looked at in one step, and clusters: so many extents are made at once, while everything else waits
MAX_WINDOW = 8 << 30
MAX_CLUSTERS = 1 << 16


async def next_data(chain: Chain, offset: int, depth: int = 0) -> int | None:
    """First offset, not before the given one, that is not in a hole; None if only holes follow.

    As seen from layer ``depth``. Holes are what no layer holds, zero clusters, and holes of the storages.
    """
    async for extent in _extents(chain, offset, depth, skip=True):
        if extent.kind not in (Kind.ZERO, Kind.UNALLOCATED):
            return extent.offset
    return None


async def next_hole(chain: Chain, offset: int, depth: int = 0) -> int:
    """First offset, not before the given one, that is in a hole, or the end of the disk."""
    async for extent in _extents(chain, offset, depth, skip=False):
        if extent.kind in (Kind.ZERO, Kind.UNALLOCATED):
            return extent.offset
    return max(offset, chain.layers[depth].size)


async def _extents(chain: Chain, offset: int, depth: int, *, skip: bool) -> AsyncIterator[Extent]:
    """Extents from an offset on; with ``skip`` without what no layer holds, as far as that is easy to tell."""
    window = WINDOW
    while True:
        layers = chain.layers[depth:]
        if skip:
            offset = max(offset, min(layer.held_from(offset) for layer in layers))
        if offset >= layers[0].size:
            return
        cluster = min((layer.cluster_size for layer in layers if layer.cluster_size > 1), default=MAX_WINDOW)
        length = min(window, MAX_WINDOW, MAX_CLUSTERS * cluster, layers[0].size - offset)
        for _, extent in await chain.resolve(offset, length, depth, holes=True):
            yield extent
        offset += length
        window *= GROWTH
        await trio.lowlevel.checkpoint()
