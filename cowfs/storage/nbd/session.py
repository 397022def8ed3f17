"""The connections to one export that are used together: lost together, and made anew together.

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
    """Connections to one export. ``on_loss`` is called once, when one of them, and so all, are of no use any more."""

    def __init__(
        self, address: Address, timeout: float, agreed: Agreed, on_loss: Callable[["Session", Exception], None]
    ) -> None:
        self.export = agreed.export
        self._address = address
        self._timeout = timeout
        self._on_loss = on_loss
        self._growing: trio.CancelScope | None = None
        self._is_full = not agreed.export.flags & nbd.CAN_MULTI_CONN
        self.failure: Exception | None = None
        self.connections = [Connection(agreed, timeout, self._lost)]

    async def perform(self, operation: Operation) -> None:
        """Return when all requests of an operation have come to an end: an answer, or the failure of the session.

        If this is cancelled, the buffers of the operation are left alone from then on.
        """
        try:
            for request in operation.requests:
                await self._least_busy().send(request)
            await operation.finished.wait()
        except BaseException:
            operation.abandon()
            raise

    def _least_busy(self) -> Connection:
        connections = self.connections
        found = connections[0] if len(connections) == 1 else min(connections, key=lambda each: each.load)
        if found.load >= BUSY and not self._is_full and self.failure is None:
            self._is_full = True
            trio.lowlevel.spawn_system_task(self._grow, name="more NBD connections")
        return found

    async def _grow(self) -> None:
        """Make more connections, as long as the server takes them; one does for all that matters."""
        try:
            with trio.CancelScope() as self._growing:
                while len(self.connections) < CONNECTIONS and self.failure is None:
                    agreed = await agree(self._address, self._timeout)
                    if self.failure is not None or agreed.export != self.export:
                        agreed.inbox.transport.abort()
                        return
                    self.connections.append(Connection(agreed, self._timeout, self._lost))
        except (LostError, CowfsError) as error:
            log.info("%s: stays with %d connections: %s", self._address.uri, len(self.connections), error)
        except Exception:
            log.exception("%s: internal error; stays with %d connections", self._address.uri, len(self.connections))

    def _lost(self, connection: Connection, error: Exception) -> None:
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """End it, and all requests; only the first reason counts."""
        if self.failure is not None:
            return
        self.failure = error
        if self._growing is not None:
            self._growing.cancel()
        for connection in self.connections:
            connection.fail(error)
        self._on_loss(self, error)

    async def close(self) -> None:
        """Say goodbye, and close."""
        # from here on nobody cares what becomes of it
        self._on_loss = lambda session, error: None
        if self._growing is not None:
            self._growing.cancel()
        for connection in list(self.connections):
            await connection.close()
