"""The one wrapper around every image: checks the contract, emulates what a format does not override.

What lies above (`Disk`, jobs, commands) sees layers only; what lies below (formats) is never asked for
anything out of range, and never for a change while read-only.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

import trio

from cowfs.block.extent import NO_OFFSET, Extent, Kind, merge, patched
from cowfs.block.image import Backing, Image, Run
from cowfs.block.partial import Partial, PartialClusters
from cowfs.block.spaceretry import SpaceRetry
from cowfs.errors import CowfsError, OutOfRange, ReadOnly
from cowfs.storage.base import Storage

_ZEROS = memoryview(bytes(1 << 20))


def fill_zeros(view: memoryview) -> None:
    """Zero a buffer of any length."""
    for start in range(0, len(view), len(_ZEROS)):
        part = view[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]


class Layer:
    """One image of a chain, as the rest of the program uses it. Offsets and lengths are the guest's, in bytes."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._lookup = image.lookup
        #: where host offsets of extents lead
        self.data_storage = image.data_storage
        self._space = SpaceRetry(image)
        #: whether the image has been told that it is being written to
        self.begun = False
        # flushes that are under way, and what tells when the last of them is over
        self._flushes = 0
        self._flushed = trio.Event()
        self._partial: PartialClusters | None = None
        # those of it; empty where there is none
        self._parts: dict[int, Partial] = {}

    @property
    def partial(self) -> PartialClusters | None:
        """The clusters that are known here and not yet in the image's tables."""
        return self._partial

    @partial.setter
    def partial(self, partial: PartialClusters) -> None:
        self._partial = partial
        self._parts = partial.clusters

    @property
    def storage(self) -> Storage:
        """Where its header lives."""
        return self.image.storage

    @property
    def storages(self) -> tuple[Storage, ...]:
        """All files that it is."""
        return self.image.storages

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.image.storage.name

    @property
    def format(self) -> str:
        """Name of its format."""
        return self.image.format

    @property
    def size(self) -> int:
        """Bytes of the guest's disk."""
        return self.image.size

    @property
    def cluster_size(self) -> int:
        """Bytes; unit of allocation. 1 where there is no such unit."""
        return self.image.cluster_size

    @property
    def unit(self) -> int:
        """Bytes; writes of less copy the rest. At most a cluster."""
        return self.image.unit

    @property
    def backing(self) -> Backing | None:
        """What its header says of its backing file."""
        return self.image.backing

    @property
    def has_parts(self) -> bool:
        """Whether any clusters are partial: the image says of them that it holds nothing."""
        return bool(self._parts)

    # -- mapping

    def map_now(self, offset: int, length: int) -> list[Extent] | None:
        """`Image.lookup`, with zeros after the end of the layer: nothing deeper shines through there."""
        beyond = offset + length - self.image.size
        if beyond <= 0:
            extents = self._lookup(offset, length)
            if self._parts and self._partial is not None and extents is not None:
                return self._partial.overlay(extents, offset, offset + length)
            return extents
        if beyond >= length:
            return [Extent(Kind.ZERO, offset, length, NO_OFFSET)]
        extents = self.map_now(offset, length - beyond)
        return None if extents is None else self._padded(extents, beyond)

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Like `map_now`, loading metadata where needed."""
        return await self._mapped(self.image.map, offset, length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Like `map`, with the holes that the storage knows of as zeros."""
        return await self._mapped(self.image.block_status, offset, length)

    def held_from(self, offset: int) -> int:
        """Offset, not before the given one, up to which the layer holds nothing, as far as that is easy to tell."""
        if offset >= self.size:
            return 1 << 63
        return offset if self._parts else self.image.held_from(offset)

    async def _mapped(
        self, look: Callable[[int, int], Awaitable[list[Extent]]], offset: int, length: int
    ) -> list[Extent]:
        inside = min(length, self.size - offset)
        extents: list[Extent] = []
        if inside > 0:
            end = offset + inside
            before = self._partial.within(offset, end) if self._partial is not None else []
            extents = await look(offset, inside)
            # completed meanwhile, perhaps after the image was asked about them
            while linked := [number for number in before if number not in self._parts]:
                before = [number for number in before if number in self._parts]
                size = self.cluster_size
                for number in linked:
                    start = max(offset, number * size)
                    found = await look(start, min(end, (number + 1) * size) - start)
                    extents = patched(extents, found)
            if self._partial is not None:
                extents = self._partial.overlay(extents, offset, end)
        return self._padded(extents, length - max(inside, 0), offset)

    @staticmethod
    def _padded(extents: list[Extent], beyond: int, offset: int = 0) -> list[Extent]:
        if beyond <= 0:
            return extents
        start = extents[-1].end if extents else offset
        return merge([*extents, Extent(Kind.ZERO, start, beyond, NO_OFFSET)])

    # -- reading

    def read_now(self, extent: Extent, view: memoryview) -> bool:
        """Fill ``view`` with an extent's content on the spot; False if that has to wait."""
        kind = extent.kind
        if kind <= Kind.SHARED:
            return self.data_storage.read_now(extent.host_offset, (view,))
        if kind is Kind.ZERO or kind is Kind.UNALLOCATED:
            fill_zeros(view)
            return True
        unpacked = self.image.unpacked(extent)
        if unpacked is not None:
            self._take_part(extent, unpacked, view)
        return unpacked is not None

    def _take_part(self, extent: Extent, unpacked: bytes, view: memoryview) -> None:
        within = extent.offset % self.cluster_size
        view[:] = memoryview(unpacked)[within : within + extent.length]

    async def read(self, extent: Extent, view: memoryview) -> None:
        """Fill ``view`` with an extent's content; what is not allocated reads as zeros."""
        if extent.kind is Kind.COMPRESSED:
            self._take_part(extent, await self.image.read_compressed(extent), view)
        elif not self.read_now(extent, view):
            await self.data_storage.read(extent.host_offset, (view,))

    # -- writing

    def require_writable(self) -> None:
        """Raise `ReadOnly`, with the reason, unless the layer can be written."""
        if self.image.unwritable is not None:
            raise ReadOnly(self.image.unwritable, file=self.name)
        if self.storage.read_only:
            raise ReadOnly("is open read-only", file=self.name)

    async def begin(self) -> None:
        """Tell the image, before the first write, that one follows; then it may also be written in place."""
        if not self.begun:
            self.require_writable()
            await self.image.begin_writing()
            self.image.secure()
            self.begun = True

    async def complete(self, offset: int, end: int) -> None:
        """Have no partial clusters in a range; whoever changes it by anything but a guest's write does that first."""
        if self._parts and self._partial is not None:
            await self._partial.complete(offset, end)

    async def end_partial(self) -> None:
        """Complete all partial clusters, and let there be no more; nobody writes to the layer meanwhile."""
        await self.complete(0, self.size)
        if self._partial is not None:
            self._partial.close()
            self._partial, self._parts = None, {}

    def _check_write(self, offset: int, length: int) -> None:
        self.require_writable()
        if offset + length > self.size:
            raise OutOfRange(f"write beyond the end of the disk at {self.size} bytes", file=self.name)

    async def write_clusters(self, offset: int, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """Write whole units to newly allocated space, then link it; all of it or, on an error, none.

        The last unit may reach beyond the end of the disk.
        """

        async def write(places: list[Place]) -> None:
            rest = [memoryview(buffer) for buffer in buffers]
            for _, host, size in places:
                part, rest = _cut(rest, size)
                if not self.data_storage.write_now(host, part):
                    await self.data_storage.write(host, part)

        await self.fill_clusters(offset, sum(map(len, buffers)), write)

    async def fill_clusters(self, offset: int, length: int, fill: Callable[[list["Place"]], Awaitable[None]]) -> None:
        """Allocate space for whole units, have ``fill`` write all of it, then link it; see `write_clusters`."""
        self._check_write(offset, min(length, self.size - offset))
        await self.begin()
        await self.complete(offset, offset + length)

        async def attempt() -> None:
            reservation = await self.image.reserve(offset, length)
            try:
                end = offset + length if self.image.writes_past_end else min(offset + length, self.size)
                await fill(_places(reservation.runs, offset, end))
            except BaseException:
                self.image.release(reservation)
                raise
            self.image.link(reservation)

        await self._space.insist(attempt)

    async def write_in_place(self, host_offset: int, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """Write where the layer has its own data, which may be a hole on the host by now."""

        async def attempt() -> None:
            if not self.data_storage.write_now(host_offset, buffers):
                await self.data_storage.write(host_offset, buffers)

        await self._space.insist(attempt)

    async def change_in_place(self, change: Callable[[], Awaitable[None]]) -> None:
        """Have ``change`` write where the layer has its own data; it may be called again from the start."""
        await self._space.insist(change)

    async def write_packed(self, offset: int, packed: bytes) -> None:
        """Write one whole cluster that `Image.pack` has packed; it may reach beyond the end of the disk."""
        self._check_write(offset, min(self.cluster_size, self.size - offset))
        await self.begin()
        await self.complete(offset, offset + self.cluster_size)
        await self._space.insist(partial(self.image.write_packed, offset, packed))

    async def write_zeroes(self, offset: int, length: int) -> bool:
        """Make whole units read as zeros without data; False if the format cannot."""
        return await self._replace(offset, length, self.image.write_zeroes)

    async def deallocate(self, offset: int, length: int) -> None:
        """Forget whole clusters."""

        async def change(offset: int, length: int) -> bool:
            await self.image.deallocate(offset, length)
            return True

        await self._replace(offset, length, change)

    async def discard(self, offset: int, length: int, *, bare: bool) -> bool:
        """Make whole clusters read as zeros and give their space back; see `Image.discard`."""
        return await self._replace(offset, length, partial(self.image.discard, bare=bare))

    async def _replace(self, offset: int, length: int, change: Callable[[int, int], Awaitable[bool]]) -> bool:
        """Change whole units into something that is no data, if the image can.

        Partial clusters among them need not be completed. They are what the layer holds until the image has changed,
        so that nothing shines through in between.
        """
        self._check_write(offset, min(length, self.size - offset))
        await self.begin()
        insist = partial(self._space.insist, partial(change, offset, length))
        if not self._parts or self._partial is None:
            return await insist()
        async with self._partial.claimed(offset, offset + length) as claimed:
            changed = await insist()
            if changed:
                self._partial.forget(claimed)
        return changed

    # -- the layer as a whole

    async def flush(self) -> None:
        """Make everything durable that was written before; all that can be, where something cannot."""
        if self.storage.read_only:
            return
        self._flushes += 1
        try:
            try:
                await self.complete(0, self.size)
            finally:
                await self.image.flush()
        finally:
            self._flushes -= 1
            if not self._flushes:
                self._flushed.set()
                self._flushed = trio.Event()

    async def _no_flush(self) -> None:
        """Wait until no flush is under way: worker threads may be in the middle of it, with the files' descriptors."""
        while self._flushes:
            await self._flushed.wait()

    async def settle(self) -> None:
        """Writing has gone quiet, and nobody writes meanwhile: take back marks that the image is in use."""
        await self.complete(0, self.size)
        await self.image.settle()

    async def _settle_for_good(self) -> None:
        """`settle`, with no flush under way in the end: others take no lock, and may leave something to write."""
        await self.settle()
        while self._flushes:
            await self._no_flush()
            await self.settle()

    async def compact(self) -> None:
        """Give back host space that holds nothing; nothing else is under way on this layer."""
        await self.complete(0, self.size)
        await self.image.compact()

    async def grow(self, size: int, zeroed_until: int) -> None:
        """Make the disk larger; see `Image.grow`."""
        await self.begin()
        await self.complete(0, self.size)
        await self.image.grow(size, zeroed_until)

    async def shrink(self, size: int) -> None:
        """Make the disk smaller; nobody else changes it meanwhile."""
        await self.begin()
        await self.complete(0, self.size)
        try:
            await self.image.shrink(size)
        except CowfsError as error:
            error.file = error.file or self.name
            raise

    async def set_backing(self, backing: Backing | None) -> None:
        """Change the recorded backing file."""
        await self.begin()
        await self.complete(0, self.size)
        await self.image.set_backing(backing)

    async def set_writable(self, writable: bool) -> None:
        """Change between reading and writing; on the way back everything is flushed and settled first.

        If it cannot be flushed, it stays open for writing; if it cannot be settled, it does not. The error is raised.
        """
        if writable:
            if self.image.unwritable is not None:
                raise ReadOnly(self.image.unwritable, file=self.name)
        elif not self.storage.read_only:
            await self.flush()
            try:
                await self._settle_for_good()
            except CowfsError:
                # all is durable; what is left are marks and leaks, which whoever writes to it next can do away with
                self.begun = False
                await self.reopen(writable=False)
                raise
            self.begun = False
        await self.reopen(writable=writable)
        if writable:
            try:
                # what an image needs that was not closed cleanly is done here, before anybody depends on it
                await self.begin()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self.reopen(writable=False)
                raise

    async def reopen(self, *, writable: bool) -> None:
        """Change the way in which its files are open, and locked against others; the image is not told."""
        changed: list[Storage] = []
        try:
            # the header's file last: while it cannot be written, nothing can
            for storage in reversed(self.storages):
                before = storage.read_only
                await storage.reopen(writable=writable)
                if storage.read_only != before:
                    changed.append(storage)
        except BaseException:
            with trio.CancelScope(shield=True):
                for storage in changed:
                    await storage.reopen(writable=not writable)
            raise

    async def close(self) -> None:
        """Flush and close, once no other flush is under way."""
        try:
            await self.complete(0, self.size)
            await self._no_flush()
        finally:
            await self.image.close()


class Place(NamedTuple):
    """Host space for ``length`` bytes of the guest's disk from ``offset`` on."""

    offset: int
    host_offset: int
    length: int


def _places(runs: Sequence[Run], offset: int, end: int) -> list[Place]:
    """Say where a guest range goes, cut at ``end``, in as few pieces as can be."""
    places: list[Place] = []
    for run in runs:
        size = min(run.length, end - offset)
        if size <= 0:
            break
        if places and places[-1].host_offset + places[-1].length == run.host_offset:
            last = places.pop()
            places.append(last._replace(length=last.length + size))
        else:
            places.append(Place(offset, run.host_offset, size))
        offset += size
    return places


def _cut(views: list[memoryview], size: int) -> tuple[list[memoryview], list[memoryview]]:
    """Split a list of buffers after ``size`` bytes."""
    for index, view in enumerate(views):
        if len(view) >= size:
            rest = [view[size:]] if len(view) > size else []
            return [*views[:index], view[:size]], rest + views[index + 1 :]
        size -= len(view)
    raise ValueError("buffers are shorter than asked")
