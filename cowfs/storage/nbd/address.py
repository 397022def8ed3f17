"""Names of exports: NBD URIs, and the two other ways in which QEMU writes them into headers.

``nbd://HOST[:PORT]/EXPORT`` and ``nbd+unix:///EXPORT?socket=PATH``, with ``nbds`` for TLS, are those of the NBD URI
specification. ``nbd:HOST:PORT[:exportname=EXPORT]`` and ``nbd:unix:PATH[:exportname=EXPORT]`` are older. The
``json:`` form is in `cowfs.storage.jsonname`.

Names also come from headers, which anybody may have written: what is not understood to the last byte is refused.
"""

import os.path
import re
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from cowfs.errors import InvalidImage, Unsupported, UsageError
from cowfs.storage.remote.address import shown

PORT = 10809
#: bytes that an export's name may have (section "Values")
MAX_NAME = 4096
#: bytes of ``sun_path`` in ``<sys/un.h>``, with the NUL at its end
MAX_SOCKET_PATH = 108

_SCHEMES = {
    # scheme to (socket, TLS)
    "nbd": (False, False),
    "nbd+tcp": (False, False),
    "nbds": (False, True),
    "nbds+tcp": (False, True),
    "nbd+unix": (True, False),
    "nbds+unix": (True, True),
}
_NAME = re.compile(r"^(nbds?(\+[a-z]+)?://|nbd:)", re.IGNORECASE)
_PARAMETERS = ("socket", "tls-certificates", "tls-hostname")


class Address(NamedTuple):
    """Where an export is: on a TCP port of a host, or behind the Unix socket ``socket``.

    ``certificates`` is a directory with ``ca-cert.pem``, and perhaps ``client-cert.pem`` and ``client-key.pem``;
    without one, the system's authorities are trusted. ``hostname`` is what the server's certificate must say.
    """

    export: str
    host: str = "localhost"
    port: int = PORT
    socket: str | None = None
    tls: bool = False
    certificates: str | None = None
    hostname: str | None = None

    @property
    def server(self) -> str:
        """The server in words."""
        if self.socket is not None:
            return self.socket
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def uri(self) -> str:
        """The URI that says all this."""
        scheme = ("nbds" if self.tls else "nbd") + ("+unix" if self.socket is not None else "")
        place = "" if self.socket is not None else self.server.removesuffix(f":{PORT}")
        values = (self.socket, self.certificates, self.hostname)
        query = "&".join(
            f"{name}={quote(value, safe='/:')}" for name, value in zip(_PARAMETERS, values, strict=True) if value
        )
        return f"{scheme}://{place}/{quote(self.export)}" + (f"?{query}" if query else "")

    def absolute(self) -> "Address":
        """Return the same for whoever has another working directory."""
        found = [None if path is None else os.path.abspath(path) for path in (self.socket, self.certificates)]  # noqa: PTH100
        return self._replace(socket=found[0], certificates=found[1])


def is_address(name: str) -> bool:
    """Whether a name is that of an export; a file of such a name is called ``./nbd:…``."""
    return _NAME.match(name) is not None


def parse_address(name: str) -> Address:
    """Read a URI, or QEMU's older form. Raises `UsageError`, or `Unsupported`, with what may be shown of the name."""
    try:
        return checked(_parse_uri(name) if "://" in name else _parse_old(name))
    except (UsageError, Unsupported) as error:
        error.file = shown(error.file or name)
        raise
    except ValueError as error:
        raise UsageError(f"is no NBD URI: {error}", file=shown(name)) from None


def checked(address: Address) -> Address:
    """Return an address, having refused what no server can be asked for: `UsageError`."""
    if len(address.export.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise UsageError(f"the name of an export has {MAX_NAME} bytes at most")
    if address.socket is not None:
        if not address.socket or "\0" in address.socket:
            raise UsageError("there is no socket to connect to; write nbd+unix:///EXPORT?socket=PATH")
        if len(address.socket.encode("utf-8", "surrogateescape")) >= MAX_SOCKET_PATH:
            raise UsageError(f"the path of a socket has fewer than {MAX_SOCKET_PATH} bytes")
    if not 0 < address.port < 1 << 16:
        raise UsageError("a port is a number from 1 to 65535")
    if not address.host.isprintable() or " " in address.host or not address.host:
        raise UsageError("there is no such host name")
    if "\0" in address.export:
        raise UsageError("there is no export of such a name")
    return address


def _parse_uri(name: str) -> Address:
    scheme, _, rest = name.partition("://")
    if scheme.lower() not in _SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES if "tcp" not in scheme)
        raise Unsupported(f"there is no way to reach a server called {scheme}://; there are {known}")
    # what is not printable would be taken out of the text without a word
    if not rest.isprintable() or " " in rest:
        raise UsageError("has characters that a URI writes as %XX")
    over_socket, tls = _SCHEMES[scheme.lower()]
    parts = urlsplit(f"nbd://{rest}")
    if parts.fragment or "#" in rest:
        raise UsageError("has a part behind '#', which means nothing here")
    if parts.username is not None or "@" in parts.netloc:
        raise Unsupported("has the name of a user, which only TLS with pre-shared keys has a use for")
    words = _parameters(parts.query)
    if over_socket != ("socket" in words) or (over_socket and parts.netloc):
        raise UsageError("is neither nbd://HOST:PORT/EXPORT nor nbd+unix:///EXPORT?socket=PATH")
    if not tls and words.keys() & {"tls-certificates", "tls-hostname"}:
        raise UsageError("says how TLS is to be used, but not that it is: write nbds:// or nbds+unix://")
    return Address(
        _unquoted(parts.path.removeprefix("/")),
        _unquoted(parts.hostname) if parts.hostname else "localhost",
        PORT if parts.port is None else parts.port,
        words.get("socket"),
        tls,
        words.get("tls-certificates"),
        words.get("tls-hostname"),
    )


def _unquoted(text: str) -> str:
    return unquote(text, errors="surrogateescape")


def _parameters(query: str) -> dict[str, str]:
    words: dict[str, str] = {}
    for word in query.split("&") if query else ():
        # a plus sign is one: only forms on web pages have another rule
        key, _, value = (_unquoted(part) for part in word.partition("="))
        if key == "tls-psk-file":
            raise Unsupported("asks for TLS with pre-shared keys, which cowfs does not have; it has certificates")
        if key not in _PARAMETERS:
            raise Unsupported(f"has the parameter '{key}', which cowfs does not know")
        if key in words:
            raise UsageError(f"has the parameter '{key}' twice")
        words[key] = value
    return words


def _parse_old(name: str) -> Address:
    """``nbd:unix:PATH[:exportname=EXPORT]`` or ``nbd:HOST:PORT[:exportname=EXPORT]``."""
    place, _, export = name.partition(":")[2].partition(":exportname=")
    if place.startswith("unix:"):
        return Address(export, socket=place.removeprefix("unix:"))
    host, sign, port = place.rpartition(":")
    if not sign or not host or not (port.isascii() and port.isdecimal()) or len(port) > 5:
        raise UsageError("is neither nbd:HOST:PORT:exportname=EXPORT nor nbd:unix:PATH:exportname=EXPORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return Address(export, host, int(port))


def require_absolute(address: Address, file: str) -> Address:
    """Refuse paths in the name of a backing file that depend on where somebody happens to be."""
    for path in (address.socket, address.certificates):
        if path is not None and not path.startswith("/"):
            raise InvalidImage(f"its backing file '{address.uri}' needs '{path}', which is no absolute path", file=file)
    return address
