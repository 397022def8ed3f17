"""An NBD server in the test's own process, which does what it is told to, however wrong that is.

As it stands it serves its content well, with structured replies. A test takes away from that: it replaces a greeting,
an answer to an option, a reply to a request; cuts the stream after some bytes; or sends them one by one.
"""

import math
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from cowfs.storage.nbd import protocol as nbd

FLAGS = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES
GREETING = nbd.INIT_MAGIC + nbd.OPTION_MAGIC + struct.pack(">H", nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES)


def option_reply(option: int, type: int, data: bytes = b"") -> bytes:
    return nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, type, len(data)) + data


def ack(option: int) -> bytes:
    return option_reply(option, nbd.REP_ACK)


def info_export(size: int, flags: int = FLAGS) -> bytes:
    data = nbd.INFO_TYPE.pack(nbd.INFO_EXPORT) + nbd.EXPORT_FACTS.pack(size, flags)
    return option_reply(nbd.OPT_GO, nbd.REP_INFO, data)


def info_blocks(least: int, preferred: int, most: int) -> bytes:
    data = nbd.INFO_TYPE.pack(nbd.INFO_BLOCK_SIZE) + nbd.BLOCK_SIZES.pack(least, preferred, most)
    return option_reply(nbd.OPT_GO, nbd.REP_INFO, data)


def simple(cookie: int, data: bytes = b"", error: int = 0) -> bytes:
    return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie) + data


def chunk(cookie: int, type: int, payload: bytes = b"", *, done: bool = False, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return nbd.CHUNK.pack(nbd.CHUNK_MAGIC, nbd.CHUNK_DONE if done else 0, type, cookie, size) + payload


def data_chunk(cookie: int, offset: int, data: bytes, *, done: bool = False) -> bytes:
    return chunk(cookie, nbd.CHUNK_OFFSET_DATA, nbd.OFFSET.pack(offset) + data, done=done)


def hole_chunk(cookie: int, offset: int, length: int, *, done: bool = False) -> bytes:
    return chunk(cookie, nbd.CHUNK_OFFSET_HOLE, nbd.HOLE.pack(offset, length), done=done)


def end_chunk(cookie: int) -> bytes:
    return chunk(cookie, nbd.CHUNK_NONE, done=True)


def error_chunk(cookie: int, error: int, text: bytes = b"", *, done: bool = True, claimed: int | None = None) -> bytes:
    payload = nbd.ERROR.pack(error, len(text) if claimed is None else claimed) + text
    return chunk(cookie, nbd.CHUNK_FLAG_ERROR | 1, payload, done=done)


class Request:
    """What a client has asked for."""

    def __init__(self, command: int, cookie: int, offset: int, length: int, data: bytes) -> None:
        self.command = command
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.data = data


class HostileServer:
    """Belongs to one trio run; see `serving`."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.uri = f"nbd+unix:///?socket={path}"
        self.content = bytearray(content)
        self.greeting = GREETING
        #: by option: the whole answer
        self.answers: dict[int, Callable[[bytes], bytes]] = {}
        #: by command: the whole reply
        self.replies: dict[int, Callable[[Request], bytes]] = {}
        #: awaited before each reply
        self.before_reply: Callable[[Request], Awaitable[None]] | None = None
        #: carries out requests side by side, and goes on with those whose connection is gone
        self.parallel: trio.Nursery | None = None
        #: bytes of each connection after which it is closed
        self.cut: float = math.inf
        #: seconds after each byte
        self.pause = 0.0
        #: changes a byte, by its place in what a connection sends
        self.twist: dict[int, int] = {}
        self.connections = 0
        self.sent = 0
        #: what was asked for, and what was carried out: command, offset, length
        self.asked: list[tuple[int, int, int]] = []
        self.log: list[tuple[int, int, int]] = []
        #: what a flush has made durable
        self.durable = bytes(content)
        self._streams: set[trio.SocketStream] = set()

    # -- what it says if nothing else is said

    def answer(self, option: int, data: bytes) -> bytes:
        if option in self.answers:
            return self.answers[option](data)
        if option == nbd.OPT_STRUCTURED_REPLY:
            return ack(option)
        if option == nbd.OPT_SET_META_CONTEXT:
            return option_reply(option, nbd.REP_META_CONTEXT, nbd.CONTEXT.pack(7) + nbd.BASE_ALLOCATION) + ack(option)
        if option == nbd.OPT_GO:
            return info_export(len(self.content)) + ack(option)
        return option_reply(option, nbd.REP_ERR_UNSUP)

    def reply(self, request: Request) -> bytes:
        self.log.append((request.command, request.offset, request.length))
        if request.command in self.replies:
            return self.replies[request.command](request)
        start, end, cookie = request.offset, request.offset + request.length, request.cookie
        if request.command == nbd.CMD_READ:
            return data_chunk(cookie, start, bytes(self.content[start:end]), done=True)
        if request.command == nbd.CMD_BLOCK_STATUS:
            extents = nbd.CONTEXT.pack(7) + nbd.DESCRIPTOR.pack(request.length, 0)
            return chunk(cookie, nbd.CHUNK_BLOCK_STATUS, extents, done=True)
        if request.command == nbd.CMD_WRITE:
            self.content[start:end] = request.data
        elif request.command == nbd.CMD_WRITE_ZEROES:
            self.content[start:end] = bytes(request.length)
        elif request.command == nbd.CMD_FLUSH:
            self.durable = bytes(self.content)
        return simple(cookie)

    # -- how it says it

    def drop(self) -> None:
        """Close all connections."""
        for stream in list(self._streams):
            stream.socket.close()

    def crash(self) -> None:
        """Close all connections, and forget what was not flushed."""
        self.drop()
        self.content[:] = self.durable

    async def handle(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        self._streams.add(stream)
        try:
            await self._talk(_Pipe(self, stream))
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            # that is how clients, and tests, go
            pass
        finally:
            self._streams.discard(stream)
            stream.socket.close()

    async def _talk(self, pipe: "_Pipe") -> None:
        await pipe.send(self.greeting)
        await pipe.read(nbd.CLIENT_FLAGS.size)
        is_open = False
        while not is_open:
            _, option, length = nbd.OPTION.unpack(await pipe.read(nbd.OPTION.size))
            answer = self.answer(option, await pipe.read(length))
            is_open = answer.endswith(ack(nbd.OPT_GO))
            await pipe.send(answer)
        while True:
            _, _, command, cookie, offset, length = nbd.REQUEST.unpack(await pipe.read(nbd.REQUEST.size))
            if command == nbd.CMD_DISC:
                return
            data = await pipe.read(length) if command == nbd.CMD_WRITE else b""
            request = Request(command, cookie, offset, length, data)
            self.asked.append((command, offset, length))
            if self.parallel is not None:
                self.parallel.start_soon(self._serve_aside, pipe, request)
            else:
                await self._serve(pipe, request)

    async def _serve(self, pipe: "_Pipe", request: Request) -> None:
        if self.before_reply is not None:
            await self.before_reply(request)
        await pipe.send(self.reply(request))

    async def _serve_aside(self, pipe: "_Pipe", request: Request) -> None:
        # whoever has asked may be gone by now
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            await self._serve(pipe, request)


class _Pipe:
    """One connection, with all that can go wrong on it."""

    def __init__(self, server: HostileServer, stream: trio.SocketStream) -> None:
        self._server = server
        self._stream = stream
        self._sent = 0
        self._inbox = b""
        self._sending = trio.Lock()

    async def read(self, length: int) -> bytes:
        while len(self._inbox) < length:
            more = await self._stream.receive_some(1 << 16)
            if not more:
                raise EOFError
            self._inbox += more
        data, self._inbox = self._inbox[:length], self._inbox[length:]
        return data

    async def send(self, data: bytes) -> None:
        async with self._sending:
            await self._send(data)

    async def _send(self, data: bytes) -> None:
        server = self._server
        twisted = bytearray(data)
        for place, value in server.twist.items():
            if self._sent <= place < self._sent + len(data):
                twisted[place - self._sent] ^= value
        end = min(len(data), max(0, server.cut - self._sent))
        step = 1 if server.pause else len(data)
        for start in range(0, int(end), step or 1):
            await self._stream.send_all(twisted[start : min(start + step, int(end))])
            await trio.sleep(server.pause)
        self._sent += len(data)
        server.sent = max(server.sent, self._sent)
        if self._sent > server.cut:
            raise EOFError


@asynccontextmanager
async def serving(path: Path, content: bytes) -> AsyncIterator[HostileServer]:
    """Serve some bytes behind a socket while the context lasts."""
    server = HostileServer(path, content)
    socket = trio.socket.socket(trio.socket.AF_UNIX)
    await socket.bind(str(path))
    socket.listen(64)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.handle, [trio.SocketListener(socket)])
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()
