"""An object of a server as a storage that can only be read.

Requests are for whole blocks, neighbours in one, several under way at a time; what comes in is kept for a while.
While the server is away, requests are made again, for as long as `Network` says. Content of another version than the
first is never given to anybody.
"""

import errno
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import trio

from cowfs.errors import CowfsError, ReadOnly, StorageError
from cowfs.storage.base import ReadBuffers, Region, Storage, WriteBuffers
from cowfs.storage.nbd.request import part_of
from cowfs.storage.network import DEFAULT_NETWORK, Network
from cowfs.storage.remote.address import Address, parse_address
from cowfs.storage.remote.ahead import Ahead
from cowfs.storage.remote.cache import BLOCK, Blocks
from cowfs.storage.remote.store import AwayError, Facts, Store

log = logging.getLogger(__name__)

#: blocks that one request asks for at most: 2 MiB
CHUNK = 32
#: requests under way at a time for those who wait, and for those who will
MAX_WAITED_FOR, MAX_AHEAD = 8, 12
#: blocks that one reader collects at a time: 8 MiB
TURN = 128
#: seconds until the next attempt: the first time, and at the most
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0


class _Fetch:
    """One request under way, for blocks from ``first`` up to ``stop``."""

    def __init__(self, first: int, stop: int) -> None:
        self.first, self.stop = first, stop
        self.blocks: dict[int, bytes] = {}
        self.error: CowfsError | None = None
        self.done = trio.Event()


def _store(address: Address, network: Network) -> Store:
    # which need the loop of asyncio, and nobody else does
    from cowfs.storage.remote.http import HttpStore
    from cowfs.storage.remote.objects import AnyStore, S3Store

    if address.scheme in ("http", "https"):
        return HttpStore(address, network.timeout)
    return (S3Store if address.scheme in ("s3", "s3a") else AnyStore)(address, network.timeout)


class RemoteStorage(Storage):
    """One object, of the version that it had when it was opened."""

    is_remote = True
    read_only = True

    def __init__(self, address: Address, network: Network, store: Store, facts: Facts) -> None:
        self.name = address.uri
        self.length = facts.size
        #: bytes that have been fetched, and requests that were answered
        self.fetched_bytes = self.fetches = 0
        self._network = network
        self._store = store
        self._facts = facts
        self._blocks = Blocks()
        self._ahead = Ahead()
        self._under_way: dict[int, _Fetch] = {}
        self._waited_for = trio.CapacityLimiter(MAX_WAITED_FOR)
        self._count_ahead = 0
        self._away_since: float | None = None
        self._changed: StorageError | None = None
        self._hurry = trio.Event()
        self._scopes: set[trio.CancelScope] = set()
        self._is_closed = False

    @classmethod
    async def open(cls, name: str, *, writable: bool, network: Network = DEFAULT_NETWORK) -> "RemoteStorage":
        """Look at the object that a URL names; one attempt is made.

        Raises `UsageError` or `Unsupported` for names that are none, and for servers that give no parts of objects;
        `NotFound`; and `StorageError`, EROFS where it is to be written.
        """
        address = parse_address(name)
        try:
            if writable:
                raise _only_read()
            store = _store(address, network)
            try:
                facts, start = await store.look(BLOCK)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await store.close()
                raise
            storage = cls(address, network, store, facts)
            if start:
                storage._blocks.put(0, start)
            return storage
        except AwayError as error:
            raise StorageError(f"the server is away: {error}", errno=errno.EIO, file=address.uri) from None
        except CowfsError as error:
            error.file = error.file or address.uri
            raise

    @property
    def identity(self) -> tuple[object, ...]:
        """The URL: that two of them lead to one object cannot be told."""
        return ("remote", self.name)

    @property
    def version(self) -> str:
        """What the store calls its version: ETag or the like."""
        return self._facts.version

    @property
    def allocated(self) -> int:
        """The size."""
        return self.length

    # -- reading

    def read_now(self, offset: int, buffers: ReadBuffers) -> bool:
        """From what has come in lately."""
        total = sum(map(len, buffers))
        first, stop = self._span(offset, total)
        if stop - first > TURN or not all(number in self._blocks for number in range(first, stop)):
            return False
        found = {number: data for number in range(first, stop) if (data := self._blocks.get(number)) is not None}
        _fill(buffers, offset, found)
        self._read_ahead(first, stop)
        return True

    async def read(self, offset: int, buffers: ReadBuffers) -> None:
        """Fetch what is missing, several parts at a time."""
        views = [view for view in buffers if len(view)]
        total = sum(map(len, views))
        first, stop = self._span(offset, total)
        for start in range(first, stop, TURN):
            found = await self._collect(start, min(start + TURN, stop))
            begin, end = max(offset, start * BLOCK), min(offset + total, (start + TURN) * BLOCK)
            _fill(part_of(views, begin - offset, end - begin), begin, found)
        inside = max(0, min(total, self.length - offset))
        for view in part_of(views, inside, total - inside):
            view[:] = bytes(len(view))

    async def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """All at once."""
        wanted = sorted({number for offset, length in ranges for number in range(*self._span(offset, length))})
        for start in range(0, len(wanted), TURN):
            self._request(wanted[start : start + TURN])
            await self._gather(wanted[start : start + TURN])
        return [await self.read_bytes(offset, length) for offset, length in ranges]

    def _span(self, offset: int, length: int) -> tuple[int, int]:
        """Blocks that a range touches."""
        end = min(offset + length, self.length)
        return (offset // BLOCK, -(-end // BLOCK)) if offset < end else (0, 0)

    async def _collect(self, first: int, stop: int) -> dict[int, bytes]:
        """Return blocks, and see to it that the next ones come too if they are wanted in order."""
        numbers = range(first, stop)
        self._request(numbers)
        self._read_ahead(first, stop)
        return await self._gather(numbers)

    async def _gather(self, numbers: Iterable[int]) -> dict[int, bytes]:
        """Wait for blocks that are here or under way. Raises the error of the first that does not come."""
        found: dict[int, bytes] = {}
        fetches: list[_Fetch] = []
        for number in numbers:
            data = self._blocks.get(number)
            if data is not None:
                found[number] = data
            elif (fetch := self._under_way[number]) not in fetches[-1:]:
                fetches.append(fetch)
        for fetch in fetches:
            await fetch.done.wait()
            if fetch.error is not None:
                raise _copied(fetch.error)
            found.update(fetch.blocks)
        return found

    # -- requests

    def _request(self, numbers: Iterable[int]) -> None:
        """Begin to fetch those blocks that are neither here nor under way."""
        for first, stop in _runs(n for n in numbers if n not in self._blocks and n not in self._under_way):
            self._begin(first, stop)

    def _read_ahead(self, first: int, stop: int) -> None:
        begin, end = self._ahead.wanted(first, stop)
        end = min(end, -(-self.length // BLOCK))
        # small requests only at the beginning, when there is nothing else
        if begin >= end or (self._count_ahead and end - begin < CHUNK and end * BLOCK < self.length):
            self._ahead.lag(begin)
            return
        missing = (n for n in range(begin, end) if n not in self._blocks and n not in self._under_way)
        for start, last in _runs(missing):
            if self._count_ahead >= MAX_AHEAD or self._away_since is not None or self._changed is not None:
                self._ahead.lag(start)
                return
            self._begin(start, last, is_ahead=True)

    def _begin(self, first: int, stop: int, *, is_ahead: bool = False) -> None:
        fetch = _Fetch(first, stop)
        self._under_way |= dict.fromkeys(range(first, stop), fetch)
        self._count_ahead += is_ahead
        trio.lowlevel.spawn_system_task(self._run, fetch, is_ahead, name=f"fetch from {self.name}")

    async def _run(self, fetch: _Fetch, is_ahead: bool) -> None:
        """Fetch, and tell those who wait, whatever happens."""
        fetch.error = StorageError("was closed", errno=errno.EBADF, file=self.name)
        try:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                await self._fetch(fetch, is_ahead)
                fetch.error = None
        except CowfsError as error:
            error.file = self.name
            fetch.error = error
        except Exception:
            log.exception("%s: internal error", self.name)
            fetch.error = StorageError("internal error; the log has the details", errno=errno.EIO, file=self.name)
        finally:
            self._scopes.discard(scope)
            self._count_ahead -= is_ahead
            for number in range(fetch.first, fetch.stop):
                del self._under_way[number]
            fetch.done.set()

    async def _fetch(self, fetch: _Fetch, is_ahead: bool) -> None:
        """Make one request, again and again while the server is away."""
        since: float | None = None
        pause = FIRST_PAUSE
        while True:
            self._require_open()
            try:
                await self._attempt(fetch, is_ahead)
            except AwayError as error:
                now = trio.current_time()
                since = now if since is None else since
                if self._away_since is None:
                    self._away_since = now
                    log.info("%s: the server is away: %s", self.name, error)
                if not self._network.hold and now - min(since, self._away_since) >= self._network.retry:
                    raise StorageError(f"the server is away: {error}", errno=errno.EIO) from None
            else:
                return
            with trio.move_on_after(pause):
                await self._hurry.wait()
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _attempt(self, fetch: _Fetch, is_ahead: bool) -> None:
        start, end = fetch.first * BLOCK, min(fetch.stop * BLOCK, self.length)
        async with nullcontext() if is_ahead else self._waited_for:
            begun, before = trio.current_time(), self.fetched_bytes
            try:
                data = await self._store.fetch(self._facts, start, end)
            except StorageError as error:
                if error.errno == errno.ESTALE and self._changed is None:
                    error.file = self.name
                    self._changed = error
                    log.error("%s", error)
                raise
        self._require_open()
        self.fetches += 1
        self.fetched_bytes += end - start
        # with all else that came in meanwhile
        self._ahead.measured(self.fetched_bytes - before, trio.current_time() - begun)
        if self._away_since is not None:
            self._away_since = None
            log.info("%s: the server answers again", self.name)
        for number in range(fetch.first, fetch.stop):
            place = number * BLOCK - start
            fetch.blocks[number] = block = data[place : place + BLOCK]
            self._blocks.put(number, block)

    def _require_open(self) -> None:
        if self._changed is not None:
            raise _copied(self._changed)
        if self._is_closed:
            raise StorageError("was closed", errno=errno.EBADF)

    # -- writing, which there is none of

    def write_now(self, offset: int, buffers: WriteBuffers) -> bool:
        """Refuse."""
        raise _only_read(self.name)

    async def write(self, offset: int, buffers: WriteBuffers) -> None:
        """Refuse."""
        raise _only_read(self.name)

    async def flush(self) -> None:
        """Nothing is ever written."""

    async def truncate(self, length: int) -> None:
        """Refuse."""
        raise _only_read(self.name)

    async def punch(self, offset: int, length: int) -> None:
        """Refuse."""
        raise _only_read(self.name)

    async def preallocate(self, length: int, *, full: bool) -> None:
        """Refuse."""
        raise _only_read(self.name)

    # -- the rest

    async def regions(self, offset: int, length: int) -> list[Region]:
        """All is data: stores know no holes."""
        end = max(offset, min(offset + length, self.length))
        found = [Region(offset, end - offset, hole=False), Region(end, offset + length - end, hole=True)]
        return [region for region in found if region.length > 0]

    async def reopen(self, *, writable: bool) -> None:
        """Refuse to write."""
        if writable:
            raise _only_read(self.name)

    def stop_holding(self) -> None:
        """From now on, `Network.retry` is the bound."""
        self._network = replace(self._network, hold=False)
        waiting, self._hurry = self._hurry, trio.Event()
        waiting.set()

    async def close(self) -> None:
        """End what is under way, forget what has come in, and let go of connections."""
        if self._is_closed:
            return
        self._is_closed = True
        for scope in self._scopes:
            scope.cancel()
        self._blocks.clear()
        with trio.CancelScope(shield=True):
            for fetch in set(self._under_way.values()):
                await fetch.done.wait()
            await self._store.close()


def _only_read(name: str | None = None) -> ReadOnly:
    return ReadOnly("is an object of a server, which can only be read", file=name)


def _copied(error: CowfsError) -> StorageError:
    """Return an error anew: several may get it, and each adds to its text."""
    return StorageError(error.message, errno=error.errno, file=error.file)


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbours among ascending numbers, in runs that one request can ask for."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number and number - runs[-1][0] < CHUNK:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _fill(views: ReadBuffers, offset: int, blocks: Mapping[int, bytes]) -> None:
    """Fill buffers, which begin at ``offset``, from blocks; zeros past the last."""
    position = offset
    for view in views:
        done = 0
        while done < len(view):
            number, inside = divmod(position, BLOCK)
            part = memoryview(blocks.get(number, b""))[inside : inside + len(view) - done]
            if not part:
                view[done:] = bytes(len(view) - done)
                position += len(view) - done
                break
            view[done : done + len(part)] = part
            done += len(part)
            position += len(part)
