"""An export that nobody changes: what comes in is kept for a while, and fetched ahead of who reads in order.

That is so of exports that are open for reading only, as layers below the active one are. Beside speed, it keeps what
is copied up after a read from being fetched twice.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import trio

from cowfs.errors import StorageError
from cowfs.storage.base import ReadBuffers, Region
from cowfs.storage.cache import BLOCK
from cowfs.storage.fetching import Fetcher
from cowfs.storage.nbd.address import Address
from cowfs.storage.nbd.handshake import Agreed
from cowfs.storage.nbd.storage import NbdStorage, clipped
from cowfs.storage.network import Network

#: as many times the bytes that are asked for are fetched, if need be
SPARSE = 4
#: bytes for which holes are asked at the least
LOOK = 256 << 20


class KeptNbdStorage(NbdStorage):
    """`NbdStorage` with a memory, as long as it is open for reading only."""

    def __init__(self, address: Address, network: Network, agreed: Agreed, *, read_only: bool) -> None:
        super().__init__(address, network, agreed, read_only=read_only)
        self._fetcher = self._new_fetcher() if read_only else None
        #: holes and data of one range, without gaps, from the last question
        self._regions: list[Region] = []
        self._starts: list[int] = []

    def _new_fetcher(self) -> Fetcher:
        return Fetcher(self.name, self.length, self._fetch, lambda: self.connections > 0)

    @property
    def fetched_bytes(self) -> int:
        """Bytes that have been fetched since it was opened, as it is now."""
        return 0 if self._fetcher is None else self._fetcher.fetched_bytes

    async def _fetch(self, start: int, end: int, is_ahead: bool) -> list[bytearray]:
        # where they are received is where they stay
        blocks = [bytearray(min(BLOCK, end - place)) for place in range(start, end, BLOCK)]
        begun = trio.current_time()
        before = self.fetched_bytes
        await super().read(start, [memoryview(block) for block in blocks])
        if self._fetcher is not None:
            # with all else that came in meanwhile
            self._fetcher.measured(self.fetched_bytes - before + end - start, trio.current_time() - begun)
        return blocks

    def read_now(self, offset: int, buffers: ReadBuffers) -> bool:
        """From what has come in lately."""
        return self._fetcher is not None and self._fetcher.read_now(offset, buffers)

    async def read(self, offset: int, buffers: ReadBuffers) -> None:
        """Whole blocks, kept; what cannot be read may lie beside what is asked for, which is then asked for alone."""
        if self._fetcher is not None:
            try:
                await self._fetcher.read(offset, buffers)
            except StorageError:
                # an error that concerns what is asked for comes again
                pass
            else:
                return
        await super().read(offset, buffers)

    async def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """All at once; small parts that lie far from each other are not worth their blocks."""
        wanted = sum(length for _, length in ranges)
        if self._fetcher is None or self._fetcher.missing(ranges) > SPARSE * wanted:
            return await super().read_each(ranges)
        try:
            await self._fetcher.prepare(ranges)
        except StorageError:
            # as in `read`
            return await super().read_each(ranges)
        return [await self.read_bytes(offset, length) for offset, length in ranges]

    async def regions(self, offset: int, length: int) -> list[Region]:
        """Asked for much at a time, since jobs ask for one step after the other, and each question is a way there."""
        end = offset + length
        if self._fetcher is None or end > self.length:
            return await super().regions(offset, length)
        if not self._regions or offset < self._starts[0] or end > _end(self._regions[-1]):
            fetcher = self._fetcher
            found = await super().regions(offset, min(max(length, LOOK), self.length - offset))
            if fetcher is not self._fetcher:
                return clipped(found, offset, end)
            self._regions, self._starts = found, [region.offset for region in found]
        first = bisect_right(self._starts, offset) - 1
        last = bisect_left(self._starts, end)
        return clipped(self._regions[first:last], offset, end)

    async def reopen(self, *, writable: bool) -> None:
        """Keep nothing while it can be written to, and nothing from before."""
        await super().reopen(writable=writable)
        await self._forget()
        self._fetcher = None if writable else self._new_fetcher()

    async def close(self) -> None:
        """End what is under way, too."""
        await self._forget()
        await super().close()

    async def _forget(self) -> None:
        fetcher, self._fetcher = self._fetcher, None
        self._regions, self._starts = [], []
        if fetcher is not None:
            await fetcher.close()


def _end(region: Region) -> int:
    return region.offset + region.length
