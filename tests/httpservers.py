"""An HTTP server for tests: it serves ranges, and can be told to do so badly."""

import contextlib
import hashlib
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

#: what a fault may do instead of a proper answer; returns whether it has answered
Fault = Callable[["Handler"], bool]


@dataclass
class Thing:
    """One object; ``etag`` None is made from its content, '' sends none."""

    content: bytes
    etag: str | None = None
    ranges: bool = True

    @property
    def tag(self) -> str:
        return f'"{hashlib.md5(self.content).hexdigest()}"' if self.etag is None else self.etag


@dataclass
class Seen:
    """What was asked for: ranges of the content, headers."""

    ranges: list[tuple[int, int]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0


class Handler(BaseHTTPRequestHandler):
    """Answers GET for whole things and for single ranges."""

    protocol_version = "HTTP/1.1"
    server: "_Listener"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        web = self.server.web
        with web.lock:
            web.seen.headers.append(dict(self.headers.items()))
            web.seen.at_once += 1
            web.seen.most_at_once = max(web.seen.most_at_once, web.seen.at_once)
            fault = web.faults.pop(0) if web.faults else web.fault
        try:
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                if fault is None or not fault(self):
                    self.answer()
        finally:
            with web.lock:
                web.seen.at_once -= 1

    def answer(self, **headers: str) -> None:
        """Answer as a good server does, with other headers if some are given."""
        thing = self.server.web.things.get(self.path.partition("?")[0])
        if thing is None:
            self.say(404, b"")
            return
        own = {"ETag": thing.tag} if thing.tag else {}
        part = self.range_of(thing)
        if part is None:
            self.say(200, thing.content, own | headers)
            return
        start, end = part
        total = len(thing.content)
        if start >= total:
            self.say(416, b"", {"Content-Range": f"bytes */{total}"})
            return
        with self.server.web.lock:
            self.server.web.seen.ranges.append((start, end))
        span = {"Content-Range": f"bytes {start}-{end - 1}/{total}"}
        self.say(206, thing.content[start:end], span | own | headers)

    def range_of(self, thing: Thing) -> tuple[int, int] | None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None or not thing.ranges or self.headers.get("If-Range", thing.tag) != thing.tag:
            return None
        return int(found[1]), min(int(found[2]) + 1, len(thing.content))

    def say(self, status: int, body: bytes, headers: Mapping[str, str] = {}, *, sent: int | None = None) -> None:
        """Send an answer, of whose body only ``sent`` bytes come."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    web: "Web"

    def handle_error(self, request: Any, address: Any) -> None:
        """Clients that break off are none of our errors."""


class Web:
    """A server with ``things`` by path. ``faults`` are used up, one a request; ``fault`` is for all others."""

    def __init__(self, port: int = 0, certificate: Path | None = None) -> None:
        self.things: dict[str, Thing] = {}
        self.faults: list[Fault] = []
        self.fault: Fault | None = None
        self.seen = Seen()
        self.lock = threading.Lock()
        self._scheme = "http" if certificate is None else "https"
        self._certificate = certificate
        self.port = port
        self._listener: _Listener | None = None
        self.start()

    def start(self) -> None:
        self._listener = _Listener(("127.0.0.1", self.port), Handler)
        self._listener.web = self
        self.port = self._listener.server_port
        if self._certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate)
            self._listener.socket = context.wrap_socket(self._listener.socket, server_side=True)
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Take no more requests; what connections there are stay."""
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener = None

    def put(self, path: str, content: bytes, **words: Any) -> str:
        """Serve something; its URL."""
        self.things[f"/{path}"] = Thing(content, **words)
        return self.url(path)

    def url(self, path: str) -> str:
        return f"{self._scheme}://localhost:{self.port}/{path}"


def status(number: int) -> Fault:
    """A fault that answers with a status and nothing else."""

    def fault(handler: Handler) -> bool:
        handler.say(number, b"")
        return True

    return fault


def saying(answer: Callable[[Handler], None]) -> Fault:
    """A fault that answers in another way."""

    def fault(handler: Handler) -> bool:
        answer(handler)
        return True

    return fault


def drop(handler: Handler) -> bool:
    """A fault that closes the connection without an answer."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def stalled(until: threading.Event) -> Fault:
    """A fault that says nothing before something happens, and then closes the connection."""

    def fault(handler: Handler) -> bool:
        until.wait(60)
        handler.close_connection = True
        return True

    return fault


@contextlib.contextmanager
def web_server(**words: Any) -> Iterator[Web]:
    """Serve while the context lasts."""
    web = Web(**words)
    try:
        yield web
    finally:
        web.stop()
