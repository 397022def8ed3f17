"""One connection in the transmission phase: many requests under way, replies in any order.

A task of its own receives, so that it does not matter to the stream of replies who of those that wait is cancelled:
the reply of a request that nobody waits for any more is read and thrown away. The oldest request's deadline is that
of the receiving task.
"""

import logging
import math
from collections.abc import Callable
from itertools import count

import trio

from cowfs.storage.nbd import protocol as nbd
from cowfs.storage.nbd.handshake import Agreed, readable
from cowfs.storage.nbd.request import Request
from cowfs.storage.nbd.transport import LostError, MisbehavedError

log = logging.getLogger(__name__)

#: requests of one connection that may be under way
MAX_IN_FLIGHT = 32
#: descriptors that an answer to a block status may have (section "Block status")
MAX_EXTENTS = 1 << 20

_cookies = count(1)


class Connection:
    """Sends requests, and gives them what comes back.

    ``on_loss`` is called, once, when it is of no use any more, with the reason.
    """

    def __init__(self, agreed: Agreed, timeout: float, on_loss: Callable[["Connection", Exception], None]) -> None:
        self.export = agreed.export
        self._inbox = agreed.inbox
        self._transport = agreed.inbox.transport
        self._timeout = timeout
        self._on_loss = on_loss
        self.failure: Exception | None = None
        #: by cookie, oldest first
        self._requests: dict[int, Request] = {}
        self._slots = trio.Semaphore(MAX_IN_FLIGHT)
        self._sending = trio.Lock()
        self._scope = trio.CancelScope()
        trio.lowlevel.spawn_system_task(self._run, name=f"NBD connection to {agreed.export.size} bytes")

    @property
    def load(self) -> int:
        """Requests under way."""
        return len(self._requests)

    # -- sending

    async def send(self, request: Request) -> None:
        """Send a request, once there is room for it; it fails if the connection does, and this raises nothing.

        If this is cancelled, the request will never be finished; if that has left half a request in the stream, nor
        will this connection ever be used again.
        """
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            await self._slots.acquire()
        if self.failure is not None:
            self._slots.release()
            request.finish(self.failure)
            return
        cookie = next(_cookies)
        request.deadline = trio.current_time() + self._timeout
        self._requests[cookie] = request
        self._follow_deadline()
        try:
            try:
                self._sending.acquire_nowait()
            except trio.WouldBlock:
                await self._sending.acquire()
        except BaseException:
            self._forget(cookie)
            raise
        try:
            if self.failure is None:
                head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, request.command, cookie, request.offset, request.length)
                await self._transport.send([head, *request.data])
        except LostError as error:
            self.fail(error)
        except BaseException:
            # nobody knows how much of it has left
            self.fail(LostError("a request was broken off"))
            raise
        finally:
            self._sending.release()

    def _forget(self, cookie: int) -> None:
        """Let a request be one that is not under way, if it still was."""
        if self._requests.pop(cookie, None) is not None:
            self._slots.release()
            self._follow_deadline()

    def _follow_deadline(self) -> None:
        """Let the receiving task have the deadline of the oldest request."""
        oldest = next(iter(self._requests.values()), None)
        deadline = math.inf if oldest is None else oldest.deadline
        if deadline != self._scope.deadline:
            self._scope.deadline = deadline

    # -- receiving

    async def _run(self) -> None:
        try:
            with self._scope:
                while True:
                    await self._receive()
        except (LostError, MisbehavedError) as error:
            self.fail(error)
        except trio.Cancelled:
            # the program ends, and nobody is to do anything about this loss
            self._on_loss = lambda connection, error: None
            raise
        except Exception as error:
            log.exception("internal error; the connection ends")
            self.fail(MisbehavedError(f"sent what cowfs cannot deal with, which is a bug of cowfs ({error})"))
        finally:
            self.fail(LostError(f"the server did not answer within {self._timeout:g} seconds"))

    async def _receive(self) -> None:
        """One simple reply, or one chunk of a structured one."""
        head = await self._inbox.exactly(nbd.SIMPLE_REPLY.size)
        magic = int.from_bytes(head[:4], "big")
        if magic == nbd.SIMPLE_REPLY_MAGIC:
            _, error, cookie = nbd.SIMPLE_REPLY.unpack(head)
            await self._simple(cookie, self._asked(cookie), error)
        elif magic == nbd.CHUNK_MAGIC and self.export.structured:
            _, flags, type, cookie = nbd.CHUNK.unpack(bytes(head) + bytes(4))[:4]
            length = int.from_bytes(await self._inbox.exactly(4), "big")
            request = self._asked(cookie)
            await self._chunk(request, type, flags, length)
            if flags & nbd.CHUNK_DONE:
                self._finish(cookie, request)
        else:
            raise MisbehavedError("sends what is no reply")

    def _asked(self, cookie: int) -> Request:
        request = self._requests.get(cookie)
        if request is None:
            raise MisbehavedError("answers a request that was not made")
        return request

    async def _simple(self, cookie: int, request: Request, error: int) -> None:
        if error:
            request.error = (error, "")
        elif request.command == nbd.CMD_BLOCK_STATUS or (request.command == nbd.CMD_READ and self.export.structured):
            raise MisbehavedError("sends a reply of the wrong kind")
        elif request.command == nbd.CMD_READ:
            start = request.expect(request.offset, request.length)
            await self._fill(request, start, request.length)
        self._finish(cookie, request)

    def _finish(self, cookie: int, request: Request) -> None:
        if request.error is None:
            if request.command == nbd.CMD_READ and not request.is_complete:
                raise MisbehavedError("leaves out a part of what was asked for")
            if request.command == nbd.CMD_BLOCK_STATUS and not request.extents:
                raise MisbehavedError("answers without what was asked for")
        self._forget(cookie)
        request.finish()

    async def _chunk(self, request: Request, type: int, flags: int, length: int) -> None:
        if type & nbd.CHUNK_FLAG_ERROR:
            await self._error_chunk(request, type, length)
        elif type == nbd.CHUNK_NONE and not length and flags & nbd.CHUNK_DONE:
            pass
        elif type == nbd.CHUNK_OFFSET_DATA and request.command == nbd.CMD_READ:
            if not nbd.OFFSET.size < length <= nbd.OFFSET.size + request.length:
                raise MisbehavedError("sends bytes that were not asked for")
            (offset,) = nbd.OFFSET.unpack(await self._inbox.exactly(nbd.OFFSET.size))
            size = length - nbd.OFFSET.size
            await self._fill(request, request.expect(offset, size), size)
        elif type == nbd.CHUNK_OFFSET_HOLE and request.command == nbd.CMD_READ and length == nbd.HOLE.size:
            offset, size = nbd.HOLE.unpack(await self._inbox.exactly(length))
            start = request.expect(offset, size)
            if not request.abandoned:
                for view in request.place(start, size):
                    view[:] = bytes(len(view))
        elif type == nbd.CHUNK_BLOCK_STATUS and request.command == nbd.CMD_BLOCK_STATUS:
            await self._status_chunk(request, length)
        else:
            raise MisbehavedError("sends a reply of the wrong kind")

    async def _fill(self, request: Request, start: int, size: int) -> None:
        await self._inbox.fill(size, lambda done: request.place(start + done, size - done))

    async def _error_chunk(self, request: Request, type: int, length: int) -> None:
        if not nbd.ERROR.size <= length <= nbd.ERROR.size + nbd.MAX_STRING + nbd.OFFSET.size:
            raise MisbehavedError(f"reports an error with {length} bytes")
        request.count_chunk()
        data = bytes(await self._inbox.exactly(length))
        error, size = nbd.ERROR.unpack(data[: nbd.ERROR.size])
        rest = length - nbd.ERROR.size - size
        if not error or rest < 0 or (rest != nbd.OFFSET.size and type == nbd.CHUNK_ERROR_OFFSET):
            raise MisbehavedError("reports an error in a way that makes no sense")
        # of several, the first
        request.error = request.error or (error, readable(data[nbd.ERROR.size : nbd.ERROR.size + size]))

    async def _status_chunk(self, request: Request, length: int) -> None:
        size = length - nbd.CONTEXT.size
        if size <= 0 or size % nbd.DESCRIPTOR.size or size > MAX_EXTENTS * nbd.DESCRIPTOR.size or request.extents:
            raise MisbehavedError("tells holes from data in a way that makes no sense")
        (context,) = nbd.CONTEXT.unpack(await self._inbox.exactly(nbd.CONTEXT.size))
        if context != self.export.context:
            raise MisbehavedError("tells of metadata that was not asked for")
        data = memoryview(bytearray(size))
        await self._inbox.fill(size, lambda done: [data[done:]])
        if any(not length or length % self.export.minimum for length, _ in nbd.DESCRIPTOR.iter_unpack(data)):
            raise MisbehavedError("tells holes from data in a way that makes no sense")
        request.extents = data

    # -- the end

    def fail(self, error: Exception) -> None:
        """End the connection, and all requests on it; only the first reason counts."""
        if self.failure is not None:
            return
        self.failure = error
        self._transport.abort()
        self._scope.cancel()
        requests, self._requests = self._requests, {}
        for request in requests.values():
            self._slots.release()
            request.finish(error)
        self._on_loss(self, error)

    async def close(self) -> None:
        """Say goodbye, if that can be done at once, and close."""
        head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_DISC, next(_cookies), 0, 0)
        with trio.move_on_after(1, shield=True):
            try:
                async with self._sending:
                    if self.failure is None:
                        await self._transport.send([head])
            except LostError:
                # it is gone already, which is what is wanted
                pass
        self.fail(LostError("the connection was closed"))
