"""Copying a range from the layers of a chain into one of them, in the host's kernel where that can be.

What lies plainly in files is copied by `Storage.copy_in`, which on file systems that can share blocks takes no space
and hardly any time. The rest (compressed clusters, tables that are not in memory, parts of clusters) is read and
written. The result is the same.
"""

from functools import partial

from cowfs.block.chain import Chain, by_treatment
from cowfs.block.layer import Layer, Place
from cowfs.block.moves import Source, moves_into


async def copy_range(chain: Chain, source: int, target: int, start: int, end: int) -> None:
    """Make layer ``target`` hold, from ``start`` up to ``end``, what can be seen there from layer ``source`` on.

    The caller holds the clusters of the range in the target. What the target has as its own data is written in place,
    and after an error may be old or new; for the rest space is allocated.
    """
    layer = chain.layers[target]
    await layer.begin()
    await layer.complete(start, end)
    if start < layer.image.vetted:
        # what the start of the disk becomes has to be seen
        await _copy_through(chain, source, target, start, end)
        return
    for in_place, extents in by_treatment(await layer.map(start, end - start)):
        first, last = extents[0].offset, extents[-1].end
        if in_place:
            places = [Place(extent.offset, extent.host_offset, extent.length) for extent in extents]
            await layer.change_in_place(partial(_fill, chain, source, layer, places))
        elif first % layer.unit or (last % layer.unit and last < layer.size):
            # what is left of the clusters comes from below the target
            await _copy_through(chain, source, target, first, last)
        else:
            await _allocate(chain, source, layer, first, last)


async def _copy_through(chain: Chain, source: int, target: int, start: int, end: int) -> None:
    await chain.write_layer(target, start, memoryview(await chain.read(start, end - start, source)))


async def _allocate(chain: Chain, source: int, layer: Layer, start: int, end: int) -> None:
    async def fill(places: list[Place]) -> None:
        await _fill(chain, source, layer, places, fresh=True)

    await layer.fill_clusters(start, end - start + -end % layer.unit, fill)


async def _fill(chain: Chain, source: int, layer: Layer, places: list[Place], *, fresh: bool = False) -> None:
    """Copy into places in a layer's storage; ``fresh`` ones may reach beyond the end of the disk, which gets zeros."""
    storage = layer.data_storage
    length = storage.length
    moves = []
    with chain.readers.inside():
        for offset, host, size in places:
            sources = _sources(chain, source, offset, min(offset + size, layer.size), offset + size)
            if sources is None:
                content = await chain.read(offset, min(size, layer.size - offset), source)
                buffers = [content, bytearray(size - len(content))]
                if not storage.write_now(host, buffers):
                    await storage.write(host, buffers)
            else:
                # fresh space beyond the end of the file was never written to
                blank = fresh and host >= length
                end = offset + size
                moves += moves_into(host, offset, end, [(offset, end)], sources, blank=blank)
        await storage.copy_in(moves)


def _sources(chain: Chain, depth: int, start: int, end: int, padded: int) -> list[Source] | None:
    """Say where a range is, with zeros from ``end`` up to ``padded``; None if it has to be read."""
    sources = chain.sources_now(start, end - start, depth)
    if sources is None or any(source.storage is not None and source.storage.is_remote for source in sources):
        # what is far away is better read side by side
        return None
    if end < padded:
        sources.append(Source(end, padded - end, None, 0))
    return sources
