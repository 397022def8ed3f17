"""Draining that comes to an end: what the active layer has no space for is written to the layer below it.

While a commit empties the active layer, guests go on writing. Were that written to the active layer as ever, a guest
that writes faster than the commit copies would keep it from ending. So from when the draining begins, only what the
active layer holds already is written there; everything else goes where it would be copied to in the end. The active
layer only loses, each of its clusters is copied down a bounded number of times, and what guests read is the same all
along, whatever is on its way.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from cowfs.block.chain import Chain
from cowfs.block.extent import Extent, Kind
from cowfs.errors import CowfsError

log = logging.getLogger(__name__)


class Sink:
    """Where writes of guests go while the active layer is drained into the one below, which is open for writing.

    Whoever writes holds whole clusters of both layers.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        #: whether anything went to the active layer after all: the layer below failed, or is too small
        self.strayed = False
        # writes below that were answered, and those of them that are durable
        self._written = 0
        self._durable = 0
        self._is_failing = False

    def write_now(self, offset: int, data: bytes | bytearray | memoryview, extents: Sequence[Extent]) -> bool:
        """Overwrite what the layer below has allocated, without suspending; False if that is not all it takes.

        ``extents`` is what the active layer says of the range.
        """
        below = self._chain.layers[1]
        if any(extent.kind is not Kind.UNALLOCATED for extent in extents) or offset + len(data) > below.size:
            return False
        places = below.map_now(offset, len(data))
        if places is None or not below.begun or offset < below.image.vetted:
            return False
        if any(place.kind is not Kind.DATA for place in places):
            return False
        view = memoryview(data)
        try:
            done = all(
                below.data_storage.write_now(place.host_offset, (view[place.offset - offset :][: place.length],))
                for place in places
            )
        except CowfsError:
            # it is tried again, and the active layer takes it if need be
            return False
        self._written += done
        return done

    async def write(self, offset: int, data: memoryview) -> None:
        """Write each part to the layer that has it, or else below; above, if the layer below cannot take it."""
        chain = self._chain
        for extent in await chain.layers[0].map(offset, len(data)):
            part = data[extent.offset - offset : extent.end - offset]
            if not await self._is_done_below(extent, partial(chain.write_layer, 1, extent.offset, part)):
                await chain.write_layer(0, extent.offset, part)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Make a range read as zeros, part by part like `write`."""
        chain = self._chain
        for extent in await chain.layers[0].map(offset, length):
            if not await self._is_done_below(extent, partial(chain.zero_layer, 1, extent.offset, extent.length)):
                await chain.zero_layer(0, extent.offset, extent.length)

    async def _is_done_below(self, extent: Extent, change: Callable[[], Awaitable[None]]) -> bool:
        """Make a change in the layer below, if the active one holds nothing of it; False if it is for that one."""
        if extent.kind is not Kind.UNALLOCATED:
            return False
        if extent.end <= self._chain.layers[1].size:
            try:
                await change()
            except CowfsError as error:
                if not self._is_failing:
                    log.warning("commit: %s; meanwhile the active layer takes what guests write", error)
                self._is_failing = True
            else:
                self._is_failing = False
                # counted when it is there, not before: a flush may have begun and ended meanwhile
                self._written += 1
                return True
        self.strayed = True
        return False

    async def flush(self) -> None:
        """Make durable what was written below, and answered, before this call.

        Who comes while a flush is under way waits for one of his own, or for that to have covered what he means.
        """
        written = self._written
        if self._durable < written:
            await self._chain.layers[1].flush()
            self._durable = max(self._durable, written)
