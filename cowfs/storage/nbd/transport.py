"""The bytes of one connection: TCP or a Unix socket, with TLS over it or without."""

import errno
import os
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import trio

from cowfs.errors import StorageError
from cowfs.storage.nbd.address import Address

#: asked for the buffers to be filled next, each time that there is something to put into them
Place = Callable[[], list[memoryview]]

#: ``<limits.h>``: most buffers one vectored call takes
IOV_MAX = 1024
#: bytes taken from TLS at once
_TLS_CHUNK = 256 << 10
#: a host that was started again says so within seconds; one that says nothing is waited for as long as the kernel
#: waits for one that has not acknowledged what was sent, a quarter of an hour, since only the old connection can tell
#: what has become of the requests on it
_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 90),
)
#: bytes kept that have come in before anybody has asked for them
_INBOX = 64 << 10


class LostError(Exception):
    """The connection is gone, or of no use any more, and another one might do better.

    ``by_server`` says that it is the server that has ended it, and that answers nothing any more.
    """

    def __init__(self, what: str, *, by_server: bool = False) -> None:
        super().__init__(what)
        self.by_server = by_server


class MisbehavedError(StorageError):
    """A server has sent what no server may send: nothing that it says can be trusted."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the NBD server {what}", errno=StorageError.errno)


class Transport(ABC):
    """A two-way stream of bytes. One task sends at a time, and one receives."""

    @abstractmethod
    async def receive(self, place: Place) -> int:
        """Wait for bytes, and put what there is into buffers, asked for when there is something; how many."""

    def send_now(self, rest: list[memoryview]) -> None:
        """Send as much as can be sent at once, and leave in ``rest`` what is still to be sent; perhaps all of it."""

    @abstractmethod
    async def send(self, rest: list[memoryview]) -> None:
        """Send all of it; what has been taken is no longer in ``rest``, of which the buffers may be exchanged meanwhile
        for others with the same bytes. If this is cancelled, a part may have been sent."""

    @abstractmethod
    def abort(self) -> None:
        """Close at once, whoever waits. Twice is harmless."""

    @property
    @abstractmethod
    def peer(self) -> str:
        """Who is at the other end, whatever name it was called by."""


class PlainTransport(Transport):
    """A socket, read into the buffers where the bytes belong and written from those where they are."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._socket = stream.socket

    async def receive(self, place: Place) -> int:
        """One ``readv``, after waiting if there is nothing."""
        try:
            while True:
                try:
                    done = os.readv(self._socket.fileno(), place()[:IOV_MAX])
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._socket)
                else:
                    return done
        except (OSError, ValueError, trio.ClosedResourceError) as error:
            raise _lost(error) from error

    def send_now(self, rest: list[memoryview]) -> None:
        """As many ``writev`` as the socket takes."""
        try:
            while rest:
                done = os.writev(self._socket.fileno(), rest[:IOV_MAX])
                while rest and done >= len(rest[0]):
                    done -= len(rest.pop(0))
                if done:
                    rest[0] = rest[0][done:]
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            raise _lost(error) from error

    async def send(self, rest: list[memoryview]) -> None:
        """As many ``writev`` as it takes."""
        while True:
            self.send_now(rest)
            if not rest:
                return
            try:
                await trio.lowlevel.wait_writable(self._socket)
            except (OSError, ValueError, trio.ClosedResourceError) as error:
                raise _lost(error) from error

    def abort(self) -> None:
        """Close the socket; trio wakes up who waits for it."""
        self._socket.close()

    @property
    def peer(self) -> str:
        """Address and port, or the path of the socket."""
        try:
            name = self._socket.getpeername()
        except OSError as error:
            raise _lost(error) from error
        return os.path.realpath(name) if isinstance(name, str) else f"{name[0]} {name[1]}"


class TlsTransport(Transport):
    """TLS over a socket."""

    def __init__(self, plain: PlainTransport, context: ssl.SSLContext, hostname: str) -> None:
        self._plain = plain
        # servers may just close, and what they said before is complete anyhow: every reply has its length
        self._stream = trio.SSLStream(plain.stream, context, server_hostname=hostname, https_compatible=True)
        self._rest = memoryview(b"")

    async def start(self) -> None:
        """Shake hands. Raises `StorageError` with what OpenSSL says, or `LostError`."""
        try:
            await self._stream.do_handshake()
        except trio.BrokenResourceError as error:
            if isinstance(error.__cause__, ssl.SSLError):
                raise StorageError(f"TLS: {_ssl_reason(error.__cause__)}", errno=StorageError.errno) from error
            raise _lost(error) from error

    async def receive(self, place: Place) -> int:
        """Decrypt some, and copy it to where it belongs."""
        try:
            while not self._rest:
                data = await self._stream.receive_some(_TLS_CHUNK)
                if not data:
                    return 0
                self._rest = memoryview(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _lost(error) from error
        done = 0
        for view in place():
            part = self._rest[: len(view)]
            view[: len(part)] = part
            self._rest = self._rest[len(part) :]
            done += len(part)
        return done

    async def send(self, rest: list[memoryview]) -> None:
        """Encrypt a copy, and send that."""
        data = b"".join(rest)
        rest.clear()
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _lost(error) from error

    def abort(self) -> None:
        """Close the socket below, without the goodbye of TLS."""
        self._plain.abort()

    @property
    def peer(self) -> str:
        """That of the socket."""
        return self._plain.peer


class Inbox:
    """What a connection has received and nobody has asked for yet; reads just what is asked for out of it."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._buffer = memoryview(bytearray(_INBOX))
        self._start = self._end = 0

    @property
    def is_empty(self) -> bool:
        """Whether everything that has come in was asked for."""
        return self._start == self._end

    async def exactly(self, length: int) -> memoryview:
        """The next ``length`` bytes, at most 64 KiB, valid until the next call. Raises `LostError`."""
        while self._end - self._start < length:
            if self._start:
                rest = self._end - self._start
                self._buffer[:rest] = bytes(self._buffer[self._start : self._end])
                self._start, self._end = 0, rest
            self._end += await self._receive(lambda: [self._buffer[self._end :]])
        self._start += length
        return self._buffer[self._start - length : self._start]

    async def fill(self, length: int, place: Callable[[int], list[memoryview]]) -> None:
        """Put the next ``length`` bytes into buffers; ``place`` is asked for those that follow a number of bytes.

        It is asked anew whenever bytes have come in, so that nothing is written where nobody wants it any more.
        """
        done = 0
        while done < length:
            if self._start < self._end:
                done += self._take(place(done))
                continue
            self._start = self._end = 0
            came = await self._receive(lambda done=done: [*place(done)[: IOV_MAX - 1], self._buffer])  # type: ignore[misc]
            wanted = min(came, sum(map(len, place(done)[: IOV_MAX - 1])))
            self._end = came - wanted
            done += wanted
            await trio.lowlevel.checkpoint()

    def _take(self, views: list[memoryview]) -> int:
        taken = 0
        for view in views:
            part = self._buffer[self._start : min(self._end, self._start + len(view))]
            view[: len(part)] = part
            self._start += len(part)
            taken += len(part)
        return taken

    async def _receive(self, place: Place) -> int:
        came = await self.transport.receive(place)
        if not came:
            raise LostError("the server has closed the connection", by_server=True)
        return came


async def connect(address: Address) -> PlainTransport:
    """Open a connection. Raises `LostError` with the host's reason; the caller sets the deadline."""
    try:
        if address.socket is not None:
            return PlainTransport(await trio.open_unix_socket(address.socket))
        stream = await trio.open_tcp_stream(address.host, address.port)
    except (OSError, UnicodeError) as error:
        raise LostError(f"cannot connect: {_reason(error)}") from error
    for level, option, value in _KEEP_ALIVE:
        stream.setsockopt(level, option, value)
    return PlainTransport(stream)


def tls_context(address: Address) -> ssl.SSLContext:
    """Return what TLS needs to know. Blocks. Raises `StorageError` for certificates that are not there, or are none."""
    if address.certificates is None:
        return ssl.create_default_context()
    folder = Path(address.certificates)
    name = folder / "ca-cert.pem"
    try:
        context = ssl.create_default_context(cafile=name)
        name = folder / "client-cert.pem"
        if name.exists():
            context.load_cert_chain(name, folder / "client-key.pem")
    except OSError as error:
        # an SSLError is one too, without a number of the system's
        reason = _ssl_reason(error) if isinstance(error, ssl.SSLError) else _reason(error)
        raise StorageError(f"{name}: cannot be used as a certificate: {reason}", errno=StorageError.errno) from error
    return context


def _ssl_reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not accepted: {error.verify_message}"
    return (error.reason or str(error)).replace("_", " ").lower()


def _reason(error: BaseException) -> str:
    # trio tries all addresses of a host, and has the errors of all
    while parts := getattr(error, "exceptions", ()):
        error = parts[0]
    cause = error.__cause__
    if isinstance(error, OSError) and error.errno is None and cause is not None:
        return _reason(cause)
    if isinstance(error, socket.gaierror):
        return error.strerror or "there is no such host"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error)


def _lost(error: BaseException) -> LostError:
    if isinstance(error, trio.ClosedResourceError) or (isinstance(error, (OSError, ValueError)) and _is_closed(error)):
        return LostError("the connection was closed")
    cause = error.__cause__ or error
    by_server = isinstance(cause, OSError) and cause.errno in (errno.ECONNRESET, errno.EPIPE)
    return LostError(_reason(cause), by_server=by_server)


def _is_closed(error: OSError | ValueError) -> bool:
    return isinstance(error, ValueError) or error.errno == errno.EBADF
