"""Clusters that guests have begun to write: copy-on-write that is put off until it is needed.

Who writes less than a cluster where the active layer holds nothing gets the cluster at once, and what was written
goes to its place there. Copying the rest of the cluster is left for later, because the guest often writes that
itself. Until then no table refers to the cluster: what has been written is known here, and everything else is
still read from below.

A flush completes all such clusters first: copies what is missing, then links them. So tables only ever lead to
whole clusters, and a crash leaves clusters that nothing refers to, as after any allocation that was not flushed.
Whoever else changes such a cluster completes it first, holding the range lock.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice
from typing import NamedTuple

import trio

from cowfs.block.extent import NO_OFFSET, Extent, Kind, patched
from cowfs.block.image import Image, Reservation, Run
from cowfs.block.moves import SECTOR, Source, moves_into
from cowfs.block.quiescence import Readers
from cowfs.block.spaceretry import SpaceRetry, lacks_space
from cowfs.errors import CowfsError
from cowfs.storage.base import Move

log = logging.getLogger(__name__)

#: bytes of clusters that may be partial; beyond that the rest is copied with the write
BOUND = 1 << 30
#: clusters that may be partial however large they are
MIN_CLUSTERS = 16
#: clusters that may begin between two looks at the host's free space
ALLOWANCE = 256
#: clusters completed in one step
BATCH = 64
#: seconds without such writes after which clusters are completed in the background
QUIET = 0.1


class Below(NamedTuple):
    """What lies below the layer whose clusters are partial."""

    #: sources of a range from memory, in order and without gaps; None if that takes more than a look
    sources_now: Callable[[int, int], list[Source] | None]
    #: content of a range
    read: Callable[[int, int], Awaitable[bytearray]]


class Partial:
    """One cluster: its place in the storage, and the sectors that have been written, bit 0 for the first.

    ``reads_zero`` says that the place had never been written to before; ``busy``, that it is being completed.
    """

    __slots__ = ("busy", "host_offset", "mask", "reads_zero")

    def __init__(self, host_offset: int, *, reads_zero: bool) -> None:
        self.host_offset = host_offset
        self.mask = 0
        self.reads_zero = reads_zero
        self.busy = False

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Cut sectors ``start`` to ``end`` into runs that are written, or not: (first, end, written)."""
        while start < end:
            rest = self.mask >> start
            written = bool(rest & 1)
            # the lowest bit that differs from the first
            change = (~rest & (rest + 1) if written else rest & -rest).bit_length() - 1
            stop = min(end, start + change) if change > 0 else end
            yield start, stop, written
            start = stop

    def extents(self, cluster: int, offset: int, end: int) -> list[Extent]:
        """Map a guest range within the cluster, which begins at guest offset ``cluster``."""
        found = []
        for first, last, written in self.runs((offset - cluster) // SECTOR, -((cluster - end) // SECTOR)):
            start = max(offset, cluster + first * SECTOR)
            length = min(end, cluster + last * SECTOR) - start
            host = self.host_offset + start - cluster if written else NO_OFFSET
            found.append(Extent(Kind.DATA if written else Kind.UNALLOCATED, start, length, host))
        return found


class PartialClusters:
    """The partial clusters of one layer. Belongs to one trio thread."""

    def __init__(self, image: Image, below: Below, readers: Readers) -> None:
        self._image = image
        self._space = SpaceRetry(image)
        self._below = below
        self._readers = readers
        self._size = image.cluster_size
        self._bits = image.cluster_size.bit_length() - 1
        self._most = max(MIN_CLUSTERS, BOUND >> self._bits)
        #: by the number of the guest's cluster, oldest first
        self.clusters: dict[int, Partial] = {}
        self._writes = 0
        self._is_starved = False
        # how many may begin before the host's free space is looked at again
        self._allowance = 0
        #: whether there will be no more of them
        self.is_closed = False
        self._progress = trio.Event()
        self._some = trio.Event()

    # -- writing

    def write_now(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        """Write whole sectors into one cluster, of which the layer holds nothing but what is known here.

        False if that takes more than this; nothing has changed then. The caller has seen that nobody holds the
        cluster, or holds it himself.
        """
        length = len(data)
        within = offset & (self._size - 1)
        if (within | length) & (SECTOR - 1) or within + length > self._size:
            return False
        number = offset >> self._bits
        cluster = self.clusters.get(number)
        if cluster is None:
            cluster = self._begin(number, length)
            if cluster is None:
                return False
            try:
                done = self._put(cluster, within, data)
            except CowfsError:
                self._give_back(number, cluster)
                raise
            if not done:
                self._give_back(number, cluster)
                return False
            self.clusters[number] = cluster
            self._some.set()
        elif cluster.busy or not self._put(cluster, within, data):
            return False
        self._writes += 1
        cluster.mask |= (1 << (length // SECTOR)) - 1 << within // SECTOR
        return True

    def _put(self, cluster: Partial, within: int, data: bytes | bytearray | memoryview) -> bool:
        """Write into a cluster's place; False also where the host has no space, which takes a second try."""
        try:
            return self._image.data_storage.write_now(cluster.host_offset + within, (data,))
        except CowfsError as error:
            if lacks_space(error):
                return False
            raise

    def fill_now(self, offset: int, data: memoryview) -> None:
        """Enter a write that goes on over several clusters into those of them that are partial and that it covers.

        Completing them then needs nothing from below. Where that takes more than this, they stay as they are.
        """
        for number in self.within(offset, offset + len(data)):
            start = number << self._bits
            if offset <= start and start + self._size <= offset + len(data):
                self.write_now(start, data[start - offset :][: self._size])

    def _begin(self, number: int, length: int) -> Partial | None:
        image = self._image
        if length == self._size or len(self.clusters) >= self._most or (number + 1) << self._bits > image.size:
            return None
        if not self._allowance and not self._allow():
            return None
        self._allowance -= 1
        # asked first: taking may not, but writing will, move the end of the file
        end = image.data_storage.length
        try:
            host = image.take_now(number << self._bits)
        except CowfsError as error:
            if lacks_space(error):
                return None
            raise
        return None if host == NO_OFFSET else Partial(host, reads_zero=host >= end)

    def _allow(self) -> bool:
        """Look whether the host has room for all that is put off, and for more; if not, writes pay at once and fail."""
        self._allowance = ALLOWANCE
        free = self._image.data_storage.free_space()
        if free is not None:
            # half of it: tables need space too, and others use the host
            self._allowance = max(0, min(ALLOWANCE, free // self._size // 2 - len(self.clusters)))
        self._is_starved = not self._allowance
        return not self._is_starved

    async def relieve(self) -> None:
        """If the host has become short of space, complete all clusters before anybody else takes what they need.

        What cannot be completed stays as it is; the next flush says so.
        """
        if self._is_starved and self.clusters:
            try:
                await self._complete(list(self.clusters.items()))
            except CowfsError as error:
                log.warning("copy-on-write: %s", error)

    def _give_back(self, number: int, cluster: Partial) -> None:
        self._image.release(Reservation([self._run(number, cluster)]))

    def _run(self, number: int, cluster: Partial) -> Run:
        return Run(number << self._bits, self._size, cluster.host_offset, fresh=True)

    # -- mapping

    def within(self, offset: int, end: int) -> list[int]:
        """Numbers of the partial clusters that a guest range touches, in ascending order."""
        first, last = offset >> self._bits, -(-end >> self._bits)
        clusters = self.clusters
        if last - first < len(clusters):
            return [number for number in range(first, last) if number in clusters]
        return sorted(number for number in clusters if first <= number < last)

    def overlay(self, extents: list[Extent], offset: int, end: int) -> list[Extent]:
        """Enter what is known here into what the image says of a guest range."""
        first = offset >> self._bits
        if end - 1 >> self._bits == first:
            cluster = self.clusters.get(first)
            return extents if cluster is None else cluster.extents(first << self._bits, offset, end)
        patches: list[Extent] = []
        for number in self.within(offset, end):
            start = number << self._bits
            patches += self.clusters[number].extents(start, max(offset, start), min(end, start + self._size))
        return patched(extents, patches)

    # -- completing

    async def complete(self, offset: int, end: int) -> None:
        """Return when no cluster of a guest range is partial any more; those that become so later are left alone.

        Raises the first error after all others are complete; what cannot be completed stays as it is.
        """
        await self._complete([(number, self.clusters[number]) for number in self.within(offset, end)])

    @asynccontextmanager
    async def claimed(self, offset: int, end: int) -> AsyncIterator[list[tuple[int, Partial]]]:
        """Have the partial clusters of a guest range to oneself, so that nobody completes them meanwhile.

        The caller holds the range lock, and the range is whole clusters.
        """
        while any(self.clusters[number].busy for number in self.within(offset, end)):
            await self._progress.wait()
        claimed = [(number, self.clusters[number]) for number in self.within(offset, end)]
        for _, cluster in claimed:
            cluster.busy = True
        try:
            yield claimed
        finally:
            self._let_go(claimed)

    def forget(self, claimed: list[tuple[int, Partial]]) -> None:
        """Give up clusters that the image says something else of by now."""
        for number, cluster in claimed:
            del self.clusters[number]
            self._give_back(number, cluster)

    def _let_go(self, clusters: list[tuple[int, Partial]]) -> None:
        for _, cluster in clusters:
            cluster.busy = False
        self._progress.set()
        self._progress = trio.Event()

    async def complete_in_background(self) -> None:
        """Wait until some clusters are partial and no writes come for a while, and complete them until some do.

        While writes come, copying would only hold them up, and many of the clusters are about to be filled.
        """
        while not self.clusters and not self.is_closed:
            self._some = trio.Event()
            await self._some.wait()
        seen = -1
        while seen != self._writes:
            seen = self._writes
            await trio.sleep(QUIET)
        while self.clusters and seen == self._writes:
            await self._complete(list(islice(self.clusters.items(), BATCH)))

    def close(self) -> None:
        """Nobody writes to the layer any more; all clusters are complete."""
        self.is_closed = True
        self._some.set()

    async def _complete(self, wanted: list[tuple[int, Partial]]) -> None:
        failure: CowfsError | None = None
        for start in range(0, len(wanted), BATCH):
            batch = wanted[start : start + BATCH]
            while batch := [item for item in batch if self.clusters.get(item[0]) is item[1]]:
                idle = [item for item in batch if not item[1].busy]
                if not idle:
                    await self._progress.wait()
                    continue
                error = await self._try(idle)
                if error is not None:
                    failure = failure or error
                    batch = [item for item in batch if item not in idle]
        if failure is not None:
            raise failure

    async def _try(self, batch: list[tuple[int, Partial]]) -> CowfsError | None:
        """Complete clusters together or, if that fails, one by one; returns the first error of those."""
        try:
            await self._space.insist(partial(self._complete_together, batch))
        except CowfsError as error:
            if len(batch) == 1:
                return error
        else:
            return None
        failures = [
            await self._try([item]) for item in batch if self.clusters.get(item[0]) is item[1] and not item[1].busy
        ]
        return next((failure for failure in failures if failure is not None), None)

    async def _complete_together(self, wanted: list[tuple[int, Partial]]) -> None:
        """Complete those of some clusters that nobody has completed meanwhile, or is completing."""
        batch = [item for item in wanted if self.clusters.get(item[0]) is item[1] and not item[1].busy]
        if not batch:
            return
        for _, cluster in batch:
            cluster.busy = True
        try:
            with self._readers.inside():
                moves: list[Move] = []
                for number, cluster in batch:
                    moves += await self._missing(number, cluster)
                await self._image.data_storage.copy_in(moves)
            reservation = await self._image.prepare_link([self._run(number, cluster) for number, cluster in batch])
            self._image.link(reservation)
            for number, _ in batch:
                del self.clusters[number]
        finally:
            self._let_go(batch)

    async def _missing(self, number: int, cluster: Partial) -> list[Move]:
        """Say how to copy what has not been written; what cannot be said in moves is copied on the way."""
        start = number << self._bits
        gaps = [
            (start + first * SECTOR, start + last * SECTOR)
            for first, last, written in cluster.runs(0, self._size // SECTOR)
            if not written
        ]
        if not gaps:
            return []
        sources = self._below.sources_now(start, self._size)
        if sources is not None:
            end, blank = start + self._size, cluster.reads_zero
            return moves_into(cluster.host_offset, start, end, gaps, sources, blank=blank)
        content = memoryview(await self._below.read(start, self._size))
        for first, last in gaps:
            buffers = [content[first - start : last - start]]
            await self._image.data_storage.write(cluster.host_offset + first - start, buffers)
        return []
