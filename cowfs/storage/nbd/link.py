"""The way to an export: requests are made on whatever connections there are, and made again on others.

While the server is away, requests wait, and are made again when it is back; for how long, `Network` says. A change is
made again only when the first one is over, as far as can be known (`cowfs.storage.nbd.doubt`). What the server said of
the export at first it has to say again. Nothing of all this holds up what needs nothing of the server.
"""

import errno
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import trio

from cowfs.errors import CowfsError, StorageError
from cowfs.storage.nbd import protocol as nbd
from cowfs.storage.nbd.address import Address
from cowfs.storage.nbd.connection import MAX_IN_FLIGHT
from cowfs.storage.nbd.doubt import Doubt, Doubts
from cowfs.storage.nbd.handshake import Agreed
from cowfs.storage.nbd.journal import Journal
from cowfs.storage.nbd.request import Operation, Request
from cowfs.storage.nbd.session import Session, agree
from cowfs.storage.nbd.transport import LostError
from cowfs.storage.network import Network

log = logging.getLogger(__name__)

#: seconds until the next attempt to connect: the first time, and at the most
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0

#: what a server has to go on offering
_ABILITIES = nbd.SEND_FLUSH | nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES


class Link:
    """Begins with one connection. ``is_read_only`` says whether nobody wants to write to the export, now.

    ``journal`` has what is to be written again; None where the server knows no flush, and every write is durable.
    """

    def __init__(self, address: Address, network: Network, agreed: Agreed, is_read_only: Callable[[], bool]) -> None:
        self.name = address.uri
        self.export = agreed.export
        self.journal = Journal() if agreed.export.flags & nbd.SEND_FLUSH else None
        self._address = address
        self._network = network
        self._is_read_only = is_read_only
        self._away_since = 0.0
        self._reason: Exception | None = None
        self._news = trio.Event()
        self._returning: trio.CancelScope | None = None
        self._is_closed = False
        self._doubts = Doubts(self._record, self._announce)
        #: those that have not come to their end
        self._sessions: set[Session] = set()
        self.session: Session | None = self._new_session(agreed)

    @property
    def connections(self) -> int:
        """How many there are; none while the server is away."""
        return 0 if self.session is None or self.session.is_held else len(self.session.connections)

    # -- requests

    async def perform(
        self,
        requests: Sequence[Request],
        begin: Callable[[], Callable[[], None] | None] = lambda: None,
        *,
        as_one: bool = False,
    ) -> None:
        """Make requests, again if the server goes away meanwhile; all of them ``as_one``, or only what is missing.

        ``begin`` is called before each attempt; what it returns, as soon as the server has done all.
        """
        first_loss: float | None = None
        missing = requests
        try:
            while missing:
                session = await self._ready(missing)
                operation = Operation(missing, begin())
                await session.perform(operation)
                if operation.is_given_up:
                    raise self._closed() if self._is_closed else self._gone(self._reason)
                failures = [failure for request in missing if (failure := self._failure(request, session)) is not None]
                if not failures:
                    return
                now = trio.current_time()
                first_loss = now if first_loss is None else first_loss
                if not self._network.hold and now - first_loss >= self._network.retry:
                    raise self._gone(failures[0])
                if not as_one:
                    missing = [
                        request for request in missing if request.failure is not None or request.error is not None
                    ]
        finally:
            if first_loss is not None:
                # those that were lost are remembered for a while; buffers go back at once
                for request in requests:
                    request.let_go()

    def _failure(self, request: Request, session: Session) -> LostError | None:
        """Say why a request has to be made again, if it has; raises what is wrong otherwise."""
        if request.failure is None and request.error is not None:
            # the server's last word, and not just the beginning of it
            number, text = request.error
            if nbd.ERRNOS.get(number) != errno.ESHUTDOWN:
                raise self._refusal(request, number, text)
            lost = LostError("the server is shutting down")
            session.fail(lost)
            return lost
        if request.failure is None or isinstance(request.failure, LostError):
            return request.failure
        raise StorageError(str(request.failure), errno=errno.EIO, file=self.name) from request.failure

    def _refusal(self, request: Request, number: int, text: str) -> StorageError:
        doing = {nbd.CMD_READ: "read", nbd.CMD_FLUSH: "flush", nbd.CMD_BLOCK_STATUS: "tell holes from data"}
        code = nbd.ERRNOS.get(number, errno.EIO)
        error = OSError(code, "")
        said = StorageError.from_os(error, file=self.name, doing=f"cannot {doing.get(request.command, 'write')}")
        if text:
            said.message += f" ('{text}')"
        return said

    def _closed(self) -> StorageError:
        return StorageError("was closed", errno=errno.EBADF, file=self.name)

    def _gone(self, reason: Exception | None) -> StorageError:
        said = reason.message if isinstance(reason, CowfsError) else reason
        return StorageError(f"the NBD server is away: {said}", errno=errno.EIO, file=self.name)

    async def _ready(self, requests: Sequence[Request]) -> Session:
        """Return connections that work, as far as anybody knows, once nothing else is on its way to the same places.

        Raises `StorageError` if that takes too long.
        """
        begun = trio.current_time()
        while not self._is_closed:
            doubt = self._doubt_about(requests)
            session = self.session
            if session is None or session.is_held:
                since, reason = self._away_since, self._reason
            elif doubt is None:
                return session
            else:
                since, reason = begun, LostError(f"the server has not answered {doubt}, which was given up")
            end = math.inf if self._network.hold else since + self._network.retry
            if doubt is not None and doubt.end < math.inf:
                # no server has to do anything for that
                end = max(end, doubt.end)
            if trio.current_time() >= end:
                raise self._gone(reason)
            news = self._news
            with trio.move_on_at(end if doubt is None else min(end, doubt.end)):
                await news.wait()
        raise self._closed()

    def _doubt_about(self, requests: Sequence[Request]) -> Doubt | None:
        try:
            return self._doubts.concerning(requests)
        except StorageError as error:
            error.file = self.name
            raise

    def _record(self, request: Request) -> None:
        """Keep a change that the server has made although nobody waits for it any more."""
        if self.journal is not None and request.command != nbd.CMD_TRIM:
            self.journal.record([request])

    def _announce(self) -> None:
        """Have those who wait look again."""
        news, self._news = self._news, trio.Event()
        news.set()

    # -- a server that is slow, or away

    def _held(self, session: Session, reason: Exception) -> None:
        """Changes are not answered: until they are, the server counts as away."""
        if session is not self.session:
            # what is written again is waited for
            return
        log.info("%s: %s; waiting for what is under way", self.name, reason)
        self._be_away(reason)
        trio.lowlevel.spawn_system_task(self._lose_patience, session, name=f"patience with {self.name}")

    def _resumed(self, session: Session) -> None:
        if session is self.session:
            log.info("%s: the server has answered", self.name)
            self._announce()

    async def _lose_patience(self, session: Session) -> None:
        """Give up what is under way when it has taken too long."""
        while session.is_held and session.failure is None and not self._is_closed:
            end = math.inf if self._network.hold else self._away_since + self._network.retry
            if trio.current_time() >= end:
                session.give_up()
                return
            news = self._news
            with trio.move_on_at(end):
                await news.wait()

    def _be_away(self, reason: Exception) -> None:
        self._reason = reason
        self._away_since = trio.current_time()
        self._announce()

    def _lost(self, session: Session, error: Exception) -> None:
        self._sessions.discard(session)
        if session is not self.session:
            # one that was never in use
            self._announce()
            return
        log.info("%s: the connection is lost: %s", self.name, error)
        self.session = None
        if session.is_held:
            self._reason = error
            self._announce()
        else:
            self._be_away(error)
        if not self._is_closed:
            trio.lowlevel.spawn_system_task(self._return, name=f"return to {self.name}")

    async def _return(self) -> None:
        """Try to connect until that works."""
        pause = FIRST_PAUSE
        with trio.CancelScope() as self._returning:
            while not self._is_closed:
                try:
                    self.session = await self._establish()
                    log.info("%s: connected again", self.name)
                    break
                except (LostError, CowfsError) as error:
                    self._reason = error
                    log.info("%s: %s", self.name, error.message if isinstance(error, CowfsError) else error)
                except Exception as error:
                    log.exception("%s: internal error", self.name)
                    self._reason = error
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        self._announce()

    async def _establish(self) -> Session:
        """Connect, see that the export is what it was, and write again what has been written since the last flush."""
        while self._sessions:
            # an attempt of which the writes have not been answered
            await self._news.wait()
        agreed = await agree(self._address, self._network.timeout)
        try:
            self._require_same(agreed.export)
        except BaseException:
            agreed.inbox.transport.abort()
            raise
        session = self._new_session(agreed)
        try:
            for batch in self.journal.batches(MAX_IN_FLIGHT) if self.journal else ():
                await session.perform(Operation(batch))
                for request in batch:
                    failure = self._failure(request, session)
                    if failure is not None:
                        raise failure
            if session.failure is not None:
                raise session.failure
        except BaseException as error:
            session.fail(LostError(f"not used: {error!r}"))
            raise
        return session

    def _new_session(self, agreed: Agreed) -> Session:
        session = Session(
            self._address,
            self._network.timeout,
            agreed,
            self._doubts,
            on_hold=self._held,
            on_resume=self._resumed,
            on_end=self._lost,
        )
        self._sessions.add(session)
        return session

    def _require_same(self, now: nbd.Export) -> None:
        """The guest has been told of an export; another one will not do."""
        before = self.export
        if now.size != before.size:
            raise StorageError(
                f"the export has {now.size} bytes now, and had {before.size}", errno=errno.EIO, file=self.name
            )
        same = (
            now.flags & _ABILITIES == before.flags & _ABILITIES
            and (now.context is None) == (before.context is None)
            and (now.minimum, now.maximum) == (before.minimum, before.maximum)
        )
        if not same or (now.read_only and not self._is_read_only()):
            raise StorageError("the export can do less than before", errno=errno.EIO, file=self.name)

    # -- the end

    def stop_holding(self) -> None:
        """From now on, `Network.retry` is the bound."""
        self._network = replace(self._network, hold=False)
        self._announce()

    async def close(self) -> None:
        """Say goodbye to the server; requests that wait for it end.

        Changes that are under way, awaited by somebody or given up, are waited for, as long as a request may take: who
        opens the export next must not be overtaken by them.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self._returning is not None:
            self._returning.cancel()
        self._announce()
        for session in list(self._sessions):
            await session.close()
