"""Where data and holes begin: SEEK_DATA and SEEK_HOLE on a whole chain. All offsets are bytes."""

import trio

from cowfs.block.chain import Chain
from cowfs.block.extent import Kind

#: bytes that are looked at first: little, since where a disk is in pieces the answer is near
WINDOW = 1 << 20
#: times that by which each window is larger than the one before
GROWTH = 4
#: bytes looked at in one step, and clusters: so many extents are made at once, while everything else waits
MAX_WINDOW = 8 << 30
MAX_CLUSTERS = 1 << 16


async def next_data(chain: Chain, offset: int, depth: int = 0) -> int | None:
    """First offset, not before the given one, that is not in a hole; None if only holes follow.

    As seen from layer ``depth``. Holes are what no layer holds, zero clusters, and holes of the storages.
    """
    return await _find(chain, offset, depth, holes=False)


async def next_hole(chain: Chain, offset: int, depth: int = 0) -> int:
    """First offset, not before the given one, that is in a hole, or the end of the disk."""
    found = await _find(chain, offset, depth, holes=True)
    return max(offset, chain.layers[depth].size) if found is None else found


async def _find(chain: Chain, offset: int, depth: int, *, holes: bool) -> int | None:
    window = WINDOW
    while True:
        layers = chain.layers[depth:]
        if not holes:
            offset = max(offset, min(layer.held_from(offset) for layer in layers))
        if offset >= layers[0].size:
            return None
        cluster = min((layer.cluster_size for layer in layers if layer.cluster_size > 1), default=MAX_WINDOW)
        length = min(window, MAX_WINDOW, MAX_CLUSTERS * cluster, layers[0].size - offset)
        for _, extent in await chain.resolve(offset, length, depth, holes=True):
            if (extent.kind in (Kind.ZERO, Kind.UNALLOCATED)) == holes:
                return extent.offset
        offset += length
        window *= GROWTH
        await trio.lowlevel.checkpoint()
