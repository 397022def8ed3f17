"""An object of a server as a storage that can only be read.

What comes in is kept for a while, and fetched ahead of who reads in order (`cowfs.storage.fetching`). While the server
is away, requests are made again, for as long as `Network` says. Content of another version than the
first is never given to anybody.
"""

import errno
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import trio

from cowfs.errors import CowfsError, ReadOnly, StorageError
from cowfs.storage.base import ReadBuffers, Region, Storage, WriteBuffers
from cowfs.storage.cache import BLOCK
from cowfs.storage.fetching import Fetcher, copied
from cowfs.storage.network import DEFAULT_NETWORK, Network
from cowfs.storage.remote.address import Address, parse_address
from cowfs.storage.remote.store import AwayError, Facts, Store

log = logging.getLogger(__name__)

#: requests under way at a time for those who wait
MAX_WAITED_FOR = 8
#: seconds until the next attempt: the first time, and at the most
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0


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
        self._identity = ("remote", address.link)
        self.length = facts.size
        #: requests that were answered
        self.fetches = 0
        self._network = network
        self._store = store
        self._facts = facts
        self._fetcher = Fetcher(address.uri, facts.size, self._fetch, self._is_well)
        self._waited_for = trio.CapacityLimiter(MAX_WAITED_FOR)
        self._away_since: float | None = None
        self._changed: StorageError | None = None
        self._hurry = trio.Event()
        self._is_closed = False

    @classmethod
    async def open(
        cls, name: str, *, writable: bool, network: Network = DEFAULT_NETWORK, fleeting: bool = False
    ) -> "RemoteStorage":
        """Look at the object that a URL names; one attempt is made. ``fleeting`` is that of `parse_address`.

        Raises `UsageError` or `Unsupported` for names that are none, and for servers that give no parts of objects;
        `NotFound`; and `StorageError`, EROFS where it is to be written.
        """
        address = parse_address(name, fleeting=fleeting)
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
                storage._fetcher.keep(start)
            return storage
        except AwayError as error:
            raise StorageError(f"the server is away: {error}", errno=errno.EIO, file=address.uri) from None
        except CowfsError as error:
            error.file = error.file or address.uri
            raise

    @property
    def identity(self) -> tuple[object, ...]:
        """The URL: that two of them lead to one object cannot be told."""
        return self._identity

    @property
    def version(self) -> str:
        """What the store calls its version: ETag or the like; nothing if that has turned out not to tell."""
        return "" if self._store.is_fickle else self._facts.version

    @property
    def place(self) -> str:
        """The server that a redirection has led to."""
        return self._facts.place

    @property
    def allocated(self) -> int:
        """The size."""
        return self.length

    @property
    def fetched_bytes(self) -> int:
        """Bytes that have been fetched."""
        return self._fetcher.fetched_bytes

    # -- reading

    def read_now(self, offset: int, buffers: ReadBuffers) -> bool:
        """From what has come in lately."""
        return self._fetcher.read_now(offset, buffers)

    async def read(self, offset: int, buffers: ReadBuffers) -> None:
        """Fetch what is missing, several parts at a time."""
        await self._fetcher.read(offset, buffers)

    async def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """All at once."""
        await self._fetcher.prepare(ranges)
        return [await self.read_bytes(offset, length) for offset, length in ranges]

    # -- requests

    def _is_well(self) -> bool:
        return self._away_since is None and self._changed is None

    async def _fetch(self, start: int, end: int, is_ahead: bool) -> list[bytes]:
        """Make one request, again and again while the server is away."""
        since: float | None = None
        pause = FIRST_PAUSE
        while True:
            self._require_open()
            try:
                data = await self._attempt(start, end, is_ahead)
            except AwayError as error:
                now = trio.current_time()
                since = now if since is None else since
                if self._away_since is None:
                    self._away_since = now
                    log.info("%s: the server is away: %s", self.name, error)
                if not self._network.hold and now - min(since, self._away_since) >= self._network.retry:
                    raise StorageError(f"the server is away: {error}", errno=errno.EIO) from None
            else:
                return [data[place : place + BLOCK] for place in range(0, len(data), BLOCK)]
            with trio.move_on_after(pause):
                await self._hurry.wait()
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _attempt(self, start: int, end: int, is_ahead: bool) -> bytes:
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
        # with all else that came in meanwhile
        self._fetcher.measured(self.fetched_bytes - before + end - start, trio.current_time() - begun)
        if self._away_since is not None:
            self._away_since = None
            log.info("%s: the server answers again", self.name)
        return data

    def _require_open(self) -> None:
        if self._changed is not None:
            raise copied(self._changed)
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
        await self._fetcher.close()
        with trio.CancelScope(shield=True):
            await self._store.close()


def _only_read(name: str | None = None) -> ReadOnly:
    return ReadOnly("is an object of a server, which can only be read", file=name)
