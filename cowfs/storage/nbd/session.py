"""The connections to one export that are used together: they end together, and are made anew together.

Writes that one connection has answered are seen, and flushed, by the others: that is what `CAN_MULTI_CONN` says.
"""

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from cowfs.errors import CowfsError, StorageError
from cowfs.storage.nbd import protocol as nbd
from cowfs.storage.nbd.address import Address
from cowfs.storage.nbd.connection import Connection
from cowfs.storage.nbd.doubt import Doubts
from cowfs.storage.nbd.handshake import Agreed, open_export, read_exports
from cowfs.storage.nbd.request import Operation
from cowfs.storage.nbd.transport import LostError

T = TypeVar("T")

log = logging.getLogger(__name__)

#: connections to one export, where the server allows several
CONNECTIONS = 4
#: requests under way on each connection that make another one worth its while
BUSY = 8


async def agree(address: Address, seconds: float) -> Agreed:
    """`open_export`, with a deadline."""
    return await _within(seconds, open_export, address)


async def list_exports(address: Address, seconds: float) -> list[tuple[str, str]]:
    """`read_exports`, with a deadline, and errors that name the server. Raises `StorageError`."""
    try:
        return await _within(seconds, read_exports, address)
    except LostError as error:
        raise StorageError(str(error), errno=errno.EIO, file=address.uri) from error
    except CowfsError as error:
        error.file = error.file or address.uri
        raise


async def _within(seconds: float, ask: Callable[[Address], Awaitable[T]], address: Address) -> T:
    with trio.move_on_after(seconds):
        return await ask(address)
    raise LostError(f"the server did not answer within {seconds:g} seconds")


class Session:
    """Connections to one export, which end together.

    Before a change has been answered, nobody can tell whether it is over. So a session in which a request was not
    answered in time, or of which a connection was lost, is held as long as changes are under way on any connection that
    is left: nothing new is sent, and answers are waited for, however late they are. Then it goes on if nothing else is
    late and no connection was lost, and ends otherwise.

    ``on_hold`` and ``on_resume`` are called when that begins and ends; ``on_end`` once, with the reason.
    """

    def __init__(
        self,
        address: Address,
        timeout: float,
        agreed: Agreed,
        doubts: Doubts,
        *,
        on_hold: Callable[["Session", Exception], None],
        on_resume: Callable[["Session"], None],
        on_end: Callable[["Session", Exception], None],
    ) -> None:
        self.export = agreed.export
        self._address = address
        self._timeout = timeout
        self._doubts = doubts
        self._on_hold = on_hold
        self._on_resume = on_resume
        self._on_end = on_end
        self._growing: trio.CancelScope | None = None
        self._is_full = not agreed.export.flags & nbd.CAN_MULTI_CONN
        self._operations: set[Operation] = set()
        #: why it will end as soon as no change is under way
        self._ending: Exception | None = None
        self._turn = trio.Event()
        self._is_closing = False
        self.is_held = False
        self.failure: Exception | None = None
        self.connections = [self._connection(agreed)]

    def _connection(self, agreed: Agreed) -> Connection:
        return Connection(agreed, self._timeout, self._doubts, self._lost, self._look)

    async def perform(self, operation: Operation) -> None:
        """Return when all requests of an operation have come to an end: an answer, or the failure of their connection.

        Or when it is given up, which its ``is_given_up`` says. If this is cancelled, or it is given up, the buffers of
        the operation are left alone from then on.
        """
        self._operations.add(operation)
        try:
            for request in operation.requests:
                if not operation.is_given_up:
                    await self._least_busy().send(request)
            await operation.finished.wait()
        except BaseException:
            self._abandon(operation)
            raise
        finally:
            self._operations.discard(operation)

    def give_up(self) -> None:
        """Have nobody wait any longer for what is under way."""
        for operation in self._operations:
            if not operation.finished.is_set():
                operation.is_given_up = True
                self._abandon(operation)
                operation.finished.set()

    def _abandon(self, operation: Operation) -> None:
        self._doubts.abandon(operation)
        for connection in self.connections:
            connection.own_rest()

    def _least_busy(self) -> Connection:
        connections = self.connections
        found = connections[0] if len(connections) == 1 else min(connections, key=lambda each: each.load)
        if found.load >= BUSY and not self._is_full and not self.is_held and self.failure is None:
            self._is_full = True
            trio.lowlevel.spawn_system_task(self._grow, name="more NBD connections")
        return found

    async def _grow(self) -> None:
        """Make more connections, as long as the server takes them; one does for all that matters."""
        try:
            with trio.CancelScope() as self._growing:
                while len(self.connections) < CONNECTIONS and self.failure is None:
                    agreed = await agree(self._address, self._timeout)
                    if self._ending is not None or self.failure is not None or agreed.export != self.export:
                        agreed.inbox.transport.abort()
                        return
                    self.connections.append(self._connection(agreed))
                    self._look()
        except (LostError, CowfsError) as error:
            log.info("%s: stays with %d connections: %s", self._address.uri, len(self.connections), error)
        except Exception:
            log.exception("%s: internal error; stays with %d connections", self._address.uri, len(self.connections))

    # -- the end

    def _lost(self, connection: Connection, error: Exception) -> None:
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """Send nothing more, and end it as soon as no change is under way; only the first reason counts."""
        if self._ending is None:
            self._ending = error
        self._look()

    def _look(self) -> None:
        """See whether it has to be held, can go on, or comes to its end."""
        self._turn.set()
        if self.failure is not None or self._is_closing:
            return
        left = [connection for connection in self.connections if connection.failure is None]
        if self._ending is None and not any(connection.is_late for connection in left):
            self._resume()
            return
        reason = self._ending or LostError(f"the server did not answer within {self._timeout:g} seconds")
        if any(connection.has_changes for connection in left):
            self._hold(reason)
        else:
            self._end(reason)

    def _hold(self, reason: Exception) -> None:
        for connection in self.connections:
            connection.hold(reason if isinstance(reason, LostError) else LostError(str(reason)))
        if not self.is_held:
            self.is_held = True
            self._on_hold(self, reason)

    def _resume(self) -> None:
        if self.is_held:
            self.is_held = False
            for connection in self.connections:
                connection.resume()
            self._on_resume(self)

    def _end(self, reason: Exception) -> None:
        self.failure = reason
        if self._growing is not None:
            self._growing.cancel()
        for connection in self.connections:
            connection.fail(reason)
        self._on_end(self, reason)

    async def close(self) -> None:
        """Wait for the answers to changes that are under way, as long as one may take; say goodbye, and close.

        Whoever waits for anything here does so no longer.
        """
        self._is_closing = True
        if self._growing is not None:
            self._growing.cancel()
        for connection in self.connections:
            connection.hold(LostError("was closed"))
        self.give_up()
        with trio.move_on_after(self._timeout, shield=True):
            while any(connection.has_changes for connection in self.connections):
                self._turn = trio.Event()
                await self._turn.wait()
        for doubt in self._doubts.unanswered:
            log.error(
                "%s: closed, although %s has not been answered; it may still be carried out", self._address.uri, doubt
            )
        for connection in self.connections:
            await connection.close()
        if self.failure is None:
            self._end(LostError("was closed"))
