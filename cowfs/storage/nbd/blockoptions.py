"""The options of QEMU's driver ``nbd``."""

from cowfs.errors import Unsupported, UsageError
from cowfs.storage.blockoptions import Options, is_size
from cowfs.storage.nbd.address import PORT, Address, checked

#: what means nothing here: seconds, for which the mount has options of its own
_HARMLESS = {"reconnect-delay": is_size, "open-timeout": is_size}


def take_export(options: Options) -> Address:
    """Take all options of an export. Raises `Unsupported`, with a sentence that follows the name."""
    options.take_harmless(_HARMLESS)
    export = options.take_text("export") or ""
    server = options.take_options("server")
    if server is None:
        address = _take_old_place(options, export)
    elif any(key in options for key in ("host", "port", "path")):
        raise Unsupported("says of its server what makes no sense")
    else:
        address = _take_place(server, export)
        server.refuse_rest()
    options.refuse_rest()
    try:
        return checked(address)
    except UsageError as error:
        raise Unsupported(f"makes no sense: {error.message}") from None


def _take_old_place(options: Options, export: str) -> Address:
    if "path" in options:
        return Address(export, socket=options.take_text("path"))
    return _take_host(options, export)


def _take_place(server: Options, export: str) -> Address:
    kind = server.take_text("type")
    if kind == "unix":
        return Address(export, socket=server.take_text("path") or "")
    if kind != "inet":
        raise Unsupported(f"has a server that is reached by '{kind}'; cowfs knows inet and unix")
    return _take_host(server, export)


def _take_host(options: Options, export: str) -> Address:
    host = options.take_text("host")
    port = options.take_number_or_text("port")
    if port is None:
        port = str(PORT)
    if not (port.isascii() and port.isdecimal() and len(port) <= 5):
        raise Unsupported(f"has a port that is none: '{port}'")
    return Address(export, "localhost" if host is None else host, int(port))
