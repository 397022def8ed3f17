"""An export of an NBD server as a storage."""

import errno
from collections.abc import Callable, Sequence
from itertools import accumulate

import trio

from cowfs.errors import CowfsError, ReadOnly, StorageError
from cowfs.storage.base import ReadBuffers, Region, Storage, WriteBuffers
from cowfs.storage.buffers import part_of
from cowfs.storage.nbd import protocol as nbd
from cowfs.storage.nbd.address import Address, parse_address
from cowfs.storage.nbd.handshake import Agreed
from cowfs.storage.nbd.journal import BOUND
from cowfs.storage.nbd.link import Link
from cowfs.storage.nbd.request import Request
from cowfs.storage.nbd.session import agree
from cowfs.storage.nbd.transport import LostError
from cowfs.storage.network import DEFAULT_NETWORK, Network

#: bytes that one request reads or writes
CHUNK = 256 << 10
#: bytes that one request without data covers
SPAN = 1 << 30
#: questions for holes in one range, after which the rest passes for data; and regions that are told of one range
MAX_QUESTIONS = 4096
MAX_REGIONS = 1 << 17

_ZEROS = memoryview(bytes(CHUNK))


class NbdStorage(Storage):
    """One export. Its size is fixed, as that of a block device is."""

    is_remote = True

    def __init__(self, address: Address, network: Network, agreed: Agreed, *, read_only: bool) -> None:
        self.name = address.uri
        self.read_only = read_only
        self.length = agreed.export.size
        self.address = address
        self._export = agreed.export
        self._identity = ("nbd", agreed.inbox.transport.peer, address.export)
        self._making_room = trio.Lock()
        self._merging = trio.Lock()
        self._flush_error: StorageError | None = None
        self._link = Link(address, network, agreed, lambda: self.read_only)

    @classmethod
    async def open(cls, name: str, *, writable: bool, network: Network = DEFAULT_NETWORK) -> "NbdStorage":
        """Connect to the export that a URI names; one attempt is made.

        Raises `UsageError` or `Unsupported` for names that are none, `NotFound` if the server has no such export, and
        `StorageError`, EROFS where it may not be written.
        """
        address = parse_address(name)
        try:
            agreed = await agree(address, network.timeout)
            if writable and agreed.export.read_only:
                agreed.inbox.transport.abort()
                raise StorageError("the NBD server offers it read-only", errno=errno.EROFS)
            return cls(address, network, agreed, read_only=not writable)
        except LostError as error:
            raise StorageError(str(error), errno=errno.EIO, file=address.uri) from error
        except CowfsError as error:
            error.file = error.file or address.uri
            raise

    @property
    def identity(self) -> tuple[object, ...]:
        """The server, by the address that its name has come down to, and the export."""
        return self._identity

    @property
    def keeps_old_bytes(self) -> bool:
        """An export cannot be emptied."""
        return True

    @property
    def allocated(self) -> int:
        """The size: how much of it is holes would have to be asked for."""
        return self.length

    @property
    def connections(self) -> int:
        """How many there are; none while the server is away."""
        return self._link.connections

    # -- reading

    def read_now(self, offset: int, buffers: ReadBuffers) -> bool:
        """Whatever it is, it takes a while."""
        return False

    async def read(self, offset: int, buffers: ReadBuffers) -> None:
        """Many requests at once, each of `CHUNK` bytes at most."""
        await self._read_ranges([(offset, [view for view in buffers if len(view)])])

    async def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """All at once."""
        found = [bytearray(length) for _, length in ranges]
        await self._read_ranges(
            [(offset, [memoryview(buffer)]) for (offset, _), buffer in zip(ranges, found, strict=True)]
        )
        return [bytes(buffer) for buffer in found]

    async def _read_ranges(self, ranges: Sequence[tuple[int, Sequence[memoryview]]]) -> None:
        requests: list[Request] = []
        bounced: list[tuple[memoryview, list[memoryview]]] = []
        for offset, views in ranges:
            total = sum(map(len, views))
            inside = max(0, min(total, self.length - offset))
            for view in part_of(views, inside, total - inside):
                view[:] = bytes(len(view))
            wanted = views if inside == total else part_of(views, 0, inside)
            if (offset | inside) % self._export.minimum:
                start, end = self._widened(offset, offset + inside)
                bounce = memoryview(bytearray(end - start))
                bounced.append((bounce[offset - start :][:inside], list(wanted)))
                offset, inside, wanted = start, end - start, [bounce]
            requests += self._cut(nbd.CMD_READ, offset, inside, views=wanted)
        await self._link.perform(requests)
        for bounce, views in bounced:
            for view, end in zip(views, accumulate(map(len, views)), strict=True):
                view[:] = bounce[end - len(view) : end]

    def _widened(self, start: int, end: int) -> tuple[int, int]:
        """The range of whole blocks of the server around another one; the export consists of such."""
        unit = self._export.minimum
        return start - start % unit, end + -end % unit

    def _cut(
        self, command: int, offset: int, length: int, *, views: ReadBuffers = (), data: ReadBuffers = ()
    ) -> list[Request]:
        """Requests for whole blocks of the server, none larger than it likes."""
        step = SPAN if command == nbd.CMD_TRIM else self._export.maximum
        if views or data:
            step = min(CHUNK, step)
        return [
            Request(
                command,
                offset + start,
                min(step, length - start),
                views=part_of(views, start, step),
                data=part_of(data, start, step),
            )
            for start in range(0, length, step)
        ]

    # -- writing

    def write_now(self, offset: int, buffers: WriteBuffers) -> bool:
        """Whatever it is, it takes a while."""
        if self.read_only:
            raise ReadOnly("is open read-only", file=self.name)
        return False

    async def write(self, offset: int, buffers: WriteBuffers) -> None:
        """Many requests at once; ENOSPC beyond the end."""
        views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        length = sum(map(len, views))
        self._check_change(offset + length)
        if (offset | length) % self._export.minimum:
            await self._merge(offset, views, length)
        else:
            await self._write(offset, views, length)

    async def _write(self, offset: int, views: Sequence[memoryview], length: int) -> None:
        # no more at a time than the journal keeps
        for start in range(0, length, BOUND):
            size = min(BOUND, length - start)
            requests = self._cut(nbd.CMD_WRITE, offset + start, size, data=part_of(views, start, size))
            await self._change(requests, size)

    async def _merge(self, offset: int, views: Sequence[memoryview], length: int) -> None:
        """Write parts of the server's blocks: with what is in the rest of them.

        Callers see to it that nobody writes the same bytes meanwhile, but not that nobody writes the same blocks.
        """
        start, end = self._widened(offset, offset + length)
        unit = self._export.minimum
        async with self._merging:
            first, last = await self.read_each([(start, unit), (end - unit, unit)])
            head, tail = first[: offset - start], last[unit - (end - offset - length) :]
            await self._write(start, [memoryview(head), *views, memoryview(tail)], end - start)

    def _check_change(self, end: int) -> None:
        if self.read_only:
            raise ReadOnly("is open read-only", file=self.name)
        if end > self.length:
            raise StorageError("the export is too small", errno=errno.ENOSPC, file=self.name)

    async def _change(self, requests: Sequence[Request], cost: int) -> None:
        """Make requests that change the export, and remember them until the next flush."""
        journal = self._link.journal
        if journal is None:
            await self._link.perform(requests, as_one=True)
            return
        while not journal.has_room(cost):
            async with self._making_room:
                if not journal.has_room(cost):
                    await self.flush()
        with journal.expecting(cost):
            await self._link.perform(requests, lambda: lambda: journal.record(requests), as_one=True)

    async def punch(self, offset: int, length: int) -> None:
        """`CMD_WRITE_ZEROES`, which lets the server make holes; zeros where it does not know that."""
        length = min(length, self.length - offset)
        if length <= 0:
            return
        self._check_change(offset + length)
        unit = self._export.minimum
        first, last = offset + -offset % unit, (offset + length) // unit * unit
        if not self._export.flags & nbd.SEND_WRITE_ZEROES or first >= last:
            await self._write_zeros(offset, offset + length)
            return
        await self._write_zeros(offset, first)
        for start in range(first, last, SPAN):
            await self._change(self._cut(nbd.CMD_WRITE_ZEROES, start, min(SPAN, last - start)), 0)
        await self._write_zeros(last, offset + length)

    async def _write_zeros(self, start: int, end: int) -> None:
        step = BOUND // 4
        for place in range(start, end, step):
            size = min(step, end - place)
            await self.write(place, part_of([_ZEROS] * -(-size // CHUNK), 0, size))

    async def discard(self, offset: int, length: int) -> None:
        """`CMD_TRIM`, if the server knows that: it may leave the bytes as they are, or not."""
        unit = self._export.minimum
        first, last = offset + -offset % unit, min(offset + length, self.length) // unit * unit
        self._check_change(first)
        if self._export.flags & nbd.SEND_TRIM and first < last:
            await self._link.perform(self._cut(nbd.CMD_TRIM, first, last - first))

    async def flush(self) -> None:
        """`CMD_FLUSH`; of a server that does not know that, every write is durable.

        An error that the server reports is remembered. That it is away is not: what it may have lost is written again.
        """
        if self._flush_error is not None:
            raise self._flush_error
        journal = self._link.journal
        if journal is None:
            return

        def begin() -> Callable[[], None]:
            mark = journal.mark
            return lambda: journal.forget(mark)

        request = Request(nbd.CMD_FLUSH, 0, 0)
        try:
            await self._link.perform([request], begin)
        except StorageError as error:
            if request.error is not None:
                self._flush_error = error
            raise

    async def truncate(self, length: int) -> None:
        """Keep its size, and refuse what does not fit, as a block device does."""
        self._check_change(length)

    async def preallocate(self, length: int, *, full: bool) -> None:
        """There is nothing to take, and no telling whether the server has taken it."""
        self._check_change(length)

    # -- the rest

    async def regions(self, offset: int, length: int) -> list[Region]:
        """`CMD_BLOCK_STATUS`; what comes in too small pieces passes for data."""
        end = min(offset + length, self.length)
        found: list[Region] = []
        if self._export.context is not None and offset < end:
            start, limit = self._widened(offset, end)
            for _ in range(MAX_QUESTIONS):
                if start >= limit or len(found) > MAX_REGIONS:
                    break
                start = await self._ask_regions(start, limit, found)
        position = found[-1].offset + found[-1].length if found else min(offset, end)
        if position < end:
            _add(found, Region(position, end - position, hole=False))
        if end < offset + length:
            start = max(offset, end)
            _add(found, Region(start, offset + length - start, hole=True))
        return clipped(found, offset, offset + length)

    async def _ask_regions(self, start: int, end: int, found: list[Region]) -> int:
        """Ask once, and add to what was found; returns how far the answer goes."""
        request = Request(nbd.CMD_BLOCK_STATUS, start, min(SPAN, end - start))
        await self._link.perform([request])
        for length, flags in nbd.DESCRIPTOR.iter_unpack(request.extents):
            length = min(length, end - start)
            if length <= 0 or len(found) > MAX_REGIONS:
                break
            _add(found, Region(start, length, hole=bool(flags & nbd.STATE_ZERO)))
            start += length
        return start

    async def reopen(self, *, writable: bool) -> None:
        """Nothing changes but what is allowed: the server does not know of reading and writing."""
        if writable and self._export.read_only:
            raise StorageError("the NBD server offers it read-only", errno=errno.EROFS, file=self.name)
        self.read_only = not writable

    def stop_holding(self) -> None:
        """From now on, `Network.retry` is the bound."""
        self._link.stop_holding()

    async def close(self) -> None:
        """Say goodbye to the server; requests that wait for it end, and changes that are under way are waited for."""
        await self._link.close()


def _add(regions: list[Region], region: Region) -> None:
    """Append a region, as part of the last one if they are alike."""
    if regions and regions[-1].hole == region.hole:
        region = Region(regions[-1].offset, regions[-1].length + region.length, region.hole)
        regions.pop()
    regions.append(region)


def clipped(regions: Sequence[Region], start: int, end: int) -> list[Region]:
    """Return what of regions lies from ``start`` up to ``end``."""
    found = []
    for region in regions:
        first, last = max(region.offset, start), min(region.offset + region.length, end)
        if first < last:
            found.append(Region(first, last - first, region.hole))
    return found
