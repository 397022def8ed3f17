"""One connection in the transmission phase: many requests under way, replies in any order.

A task of its own receives, so that it does not matter to the stream of replies who of those that wait is cancelled:
the reply of a request that nobody waits for any more is read, and says no more than that the request is over. What the
socket does not take at once is sent by a task of its own too, so that no request is ever broken off halfway.
"""

import logging
import math
from collections.abc import Callable
from itertools import count

import trio

from cowfs.storage.nbd import protocol as nbd
from cowfs.storage.nbd.doubt import Doubts
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

    ``on_loss`` is called, once, when it is of no use any more, with the reason. ``on_turn`` is called when a request
    has not been answered in time, and, while the connection is held, whenever one has.
    """

    def __init__(
        self,
        agreed: Agreed,
        timeout: float,
        doubts: Doubts,
        on_loss: Callable[["Connection", Exception], None],
        on_turn: Callable[[], None],
    ) -> None:
        self.export = agreed.export
        self._inbox = agreed.inbox
        self._transport = agreed.inbox.transport
        self._timeout = timeout
        self._doubts = doubts
        self._on_loss = on_loss
        self._on_turn = on_turn
        self.failure: Exception | None = None
        self._held: Exception | None = None
        #: by cookie, oldest first
        self._requests: dict[int, Request] = {}
        self._slots = trio.Semaphore(MAX_IN_FLIGHT)
        self._sending = trio.Semaphore(1)
        #: of those that wait to send
        self._waiting: set[trio.CancelScope] = set()
        #: what of a request is still to be sent
        self._rest: list[memoryview] = []
        self._receiving = trio.CancelScope()
        self._alarm = trio.CancelScope()
        trio.lowlevel.spawn_system_task(self._run, name=f"NBD connection to {agreed.export.size} bytes")
        trio.lowlevel.spawn_system_task(self._watch, name="deadlines of an NBD connection")

    @property
    def load(self) -> int:
        """Requests under way."""
        return len(self._requests)

    @property
    def has_changes(self) -> bool:
        """Whether changes are under way, awaited by anybody or not."""
        return any(request.is_change for request in self._requests.values())

    @property
    def is_late(self) -> bool:
        """Whether a request has not been answered in time."""
        oldest = next(iter(self._requests.values()), None)
        return oldest is not None and oldest.deadline <= trio.current_time()

    # -- sending

    async def send(self, request: Request) -> None:
        """Send a request, once there is room for it; it fails if the connection does, and this raises nothing.

        It is sent as a whole or, if this is cancelled before, not at all.
        """
        if not await self._acquire(self._slots):
            request.finish(self._refusal or LostError("the server did not answer for a while"))
            return
        try:
            if await self._acquire(self._sending):
                if self._refusal is None:
                    self._transmit(request)
                else:
                    self._sending.release()
        finally:
            if not request.is_sent:
                self._slots.release()
        if not request.is_sent:
            request.finish(self._refusal or LostError("the server did not answer for a while"))

    @property
    def _refusal(self) -> Exception | None:
        """Why nothing is sent, if so."""
        return self.failure or self._held

    async def _acquire(self, semaphore: trio.Semaphore) -> bool:
        """Whether it was acquired before the connection was held, or failed."""
        try:
            semaphore.acquire_nowait()
        except trio.WouldBlock:
            with trio.CancelScope() as scope:
                self._waiting.add(scope)
                try:
                    await semaphore.acquire()
                finally:
                    self._waiting.discard(scope)
            return not scope.cancelled_caught
        return True

    def _transmit(self, request: Request) -> None:
        """Send as much as the socket takes, and leave the rest to a task."""
        cookie = next(_cookies)
        request.deadline = trio.current_time() + self._timeout
        request.is_sent = True
        self._requests[cookie] = request
        self._follow_deadline()
        head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, request.command, cookie, request.offset, request.length)
        self._rest = [memoryview(head), *request.data]
        try:
            self._transport.send_now(self._rest)
        except LostError as error:
            self._rest = []
            self.fail(error)
        if self._rest:
            trio.lowlevel.spawn_system_task(self._transmit_rest, name="rest of an NBD request")
        else:
            self._sending.release()

    async def _transmit_rest(self) -> None:
        try:
            await self._transport.send(self._rest)
        except LostError as error:
            self.fail(error)
        except Exception as error:
            log.exception("internal error; the connection ends")
            self.fail(LostError(f"the connection cannot be used any more ({error})"))
        finally:
            self._rest = []
            self._sending.release()

    def own_rest(self) -> None:
        """Copy what is still to be sent: its buffers go back to whoever has lent them."""
        self._rest[:] = [memoryview(b"".join(self._rest))] if self._rest else []

    def hold(self, reason: Exception) -> None:
        """Send nothing more, and have those who want to fail with a reason; what is under way goes on."""
        self._held = reason
        self._dismiss()

    def resume(self) -> None:
        """Send again."""
        self._held = None

    def _dismiss(self) -> None:
        for scope in list(self._waiting):
            scope.cancel()

    def _forget(self, cookie: int) -> None:
        """Let a request be one that is not under way."""
        del self._requests[cookie]
        self._slots.release()
        self._follow_deadline()

    # -- deadlines

    def _follow_deadline(self) -> None:
        """Let the watching task have the deadline of the oldest request, once it has been told of those before."""
        oldest = next(iter(self._requests.values()), None)
        deadline = math.inf if oldest is None or oldest.is_late else oldest.deadline
        if deadline != self._alarm.deadline:
            self._alarm.deadline = deadline

    async def _watch(self) -> None:
        """Say so, each time that the oldest request becomes late."""
        while self.failure is None:
            with self._alarm:
                await trio.sleep_forever()
            self._alarm = trio.CancelScope()
            for request in self._requests.values():
                request.is_late = request.deadline <= trio.current_time()
            self._follow_deadline()
            if self.failure is None and self.is_late:
                self._on_turn()

    # -- receiving

    async def _run(self) -> None:
        try:
            with self._receiving:
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
            self.fail(LostError("the connection was closed"))

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
        if request.is_change and request.abandoned:
            self._doubts.answered(request)
        if self._held is not None:
            self._on_turn()

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
        self._receiving.cancel()
        self._alarm.cancel()
        self._dismiss()
        requests, self._requests = self._requests, {}
        for request in requests.values():
            self._slots.release()
            request.finish(self._doubts.cut_off(request, error) if request.is_change else error)
        self._on_loss(self, error)

    async def close(self) -> None:
        """Say goodbye, if that can be done at once, and close."""
        with trio.move_on_after(1, shield=True):
            await self._sending.acquire()
            try:
                if self.failure is None:
                    head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_DISC, next(_cookies), 0, 0)
                    await self._transport.send([memoryview(head)])
            except LostError:
                # it is gone already, which is what is wanted
                pass
            finally:
                self._sending.release()
        self.fail(LostError("the connection was closed"))
