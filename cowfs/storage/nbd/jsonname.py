"""QEMU's ``json:`` names, as far as they stand for an export of an NBD server; all others are refused, by name.

Such a name is the tree of options of a block device. QEMU writes it into a header where a URI cannot say what it
says. It can also say much that an image from a stranger must not, so each key is one that is known here, or there
is no such name.
"""

import json
from typing import Any, NamedTuple

from cowfs.errors import Unsupported
from cowfs.storage.nbd.address import PORT, Address

PREFIX = "json:"

#: format drivers that may lie over the export
_FORMATS = ("raw", "qcow2", "qed")


class JsonName(NamedTuple):
    """An export, and the format of what it holds if the name says so."""

    address: Address
    format: str | None


def parse_json_name(name: str) -> JsonName:
    """Read a name that starts with ``json:``. Raises `Unsupported`, with a sentence that follows the name."""
    try:
        tree = json.loads(name.removeprefix(PREFIX), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError):
        raise Unsupported("is not what it says, JSON") from None
    if not isinstance(tree, dict):
        raise Unsupported("is JSON, but no block device")
    tree = _nested(tree)
    driver = tree.get("driver")
    if driver == "nbd":
        return JsonName(_export(tree), None)
    if driver not in _FORMATS:
        raise Unsupported(f"stands for a block device ('{driver}') that a header may not lead to")
    _refuse_others(tree, "driver", "file")
    file = tree.get("file")
    if not isinstance(file, dict) or file.get("driver") != "nbd":
        raise Unsupported("stands for a block device that a header may not lead to: only exports of NBD servers may be")
    return JsonName(_export(file), driver)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise Unsupported("says something twice")
    return tree


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Make ``{"file": {"driver": …}}`` of ``{"file.driver": …}``, as QEMU does."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = tree
        for step in path:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise Unsupported("says something twice")
        if last in place:
            raise Unsupported("says something twice")
        place[last] = _nested(value) if isinstance(value, dict) else value
    return tree


def _export(tree: dict[str, Any]) -> Address:
    """Read the options of QEMU's driver ``nbd``."""
    _refuse_others(tree, "driver", "server", "host", "port", "path", "export")
    server = tree.get("server")
    if server is None:
        server = {key: tree[key] for key in ("host", "port", "path") if key in tree}
        server["type"] = "unix" if "path" in server else "inet"
    elif not isinstance(server, dict) or tree.keys() & {"host", "port", "path"}:
        raise Unsupported("says of its server what makes no sense")
    export = _text(tree, "export", "")
    if server.get("type") == "unix":
        _refuse_others(server, "type", "path")
        return Address(export, socket=_text(server, "path", ""))
    if server.get("type") != "inet":
        raise Unsupported(f"has a server that is reached by '{server.get('type')}'; cowfs knows inet and unix")
    _refuse_others(server, "type", "host", "port")
    port = str(server.get("port", PORT))
    if not (port.isascii() and port.isdecimal() and len(port) <= 5):
        raise Unsupported(f"has a port that is none: '{port}'")
    return Address(export, _text(server, "host", "localhost"), int(port))


def _text(tree: dict[str, Any], key: str, default: str) -> str:
    value = tree.get(key, default)
    if not isinstance(value, str):
        raise Unsupported(f"has a '{key}' that is no text")
    return value


def _refuse_others(tree: dict[str, Any], *known: str) -> None:
    others = sorted(tree.keys() - set(known))
    if others:
        raise Unsupported(f"has '{others[0]}', which cowfs does not know")
