"""QEMU's ``json:`` names, as far as they say where bytes are: in a file, a block device, an export, or a part of one.

QEMU, and programs on top of it, write such a name where a plain one cannot say what it says. Which format the bytes
have is for others to know (`cowfs.formats.jsonname`), but for the driver ``raw``, which is also what a part of
something is made with (``offset`` and ``size``).
"""

import json
import os.path
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from cowfs.errors import Unsupported
from cowfs.storage.blockoptions import PREFIX, Check, Options, is_size, is_switch, one_of, parse_tree
from cowfs.storage.nbd.address import Address
from cowfs.storage.nbd.blockoptions import take_export

RAW = "raw"
#: drivers that lead to bytes and say nothing of their format
FILE, HOST_DEVICE, NBD = "file", "host_device", "nbd"
PROTOCOLS = (FILE, HOST_DEVICE, NBD)
#: bytes; a part of something is whole ones of these
SECTOR = 512
#: bytes; where nothing can be any more
END = 1 << 63

#: options of files and devices that mean nothing here: how QEMU asks the host for them, and whether it locks them
_HARMLESS_OF_FILES: Mapping[str, Check] = {
    "locking": lambda value: is_switch(value) or value == "auto",
    "aio": one_of("threads", "native", "io_uring"),
    "aio-max-batch": is_size,
    "drop-cache": is_switch,
}


class Window(NamedTuple):
    """A part of something: where it begins, and its bytes; without a ``size`` it reaches to the end."""

    offset: int
    size: int | None

    def inside(self, outer: "Window") -> "Window":
        """Return this part of a part, as a part of the whole. Raises `Unsupported` if it reaches out of ``outer``."""
        offset = outer.offset + self.offset
        if outer.size is None:
            size = self.size
        elif self.offset + (self.size or 0) > outer.size:
            raise Unsupported("wants a part of something that reaches beyond it")
        else:
            size = outer.size - self.offset if self.size is None else self.size
        return Window(offset, size)


class Place(NamedTuple):
    """Where bytes are: in ``target``, a path or an export; ``driver`` says whether a path is a file or a device."""

    target: "str | Address"
    driver: str | None = None
    window: Window | None = None
    read_only: bool = False

    @property
    def target_name(self) -> str:
        """The path, or the URI."""
        return self.target.uri if isinstance(self.target, Address) else as_path(self.target)

    @property
    def name(self) -> str:
        """The shortest name that says all of this, and nothing of a format."""
        if self.window is None and not self.read_only and (self.driver is None or isinstance(self.target, Address)):
            return self.target_name
        file: dict[str, Any] = {"driver": self.driver} if self.driver is not None else {}
        file |= _export_options(self.target) if isinstance(self.target, Address) else {"filename": self.target}
        if self.read_only:
            file["read-only"] = True
        if self.window is not None:
            size = {} if self.window.size is None else {"size": self.window.size}
            file = {"driver": RAW, "offset": self.window.offset, **size, "file": file}
        return PREFIX + json.dumps({"file": file})

    def absolute(self) -> "Place":
        """Return the same for whoever has another working directory."""
        if isinstance(self.target, Address):
            return self._replace(target=self.target.absolute())
        return self._replace(target=os.path.join(os.getcwd(), self.target))  # noqa: PTH109, PTH118


def as_path(path: str) -> str:
    """Return a path in a form that cannot be taken for the name of something else, with a protocol in front."""
    return f"./{path}" if ":" in path.partition("/")[0] else path


def _export_options(address: Address) -> dict[str, Any]:
    if address.socket is not None:
        server = {"type": "unix", "path": address.socket}
    else:
        server = {"type": "inet", "host": address.host, "port": str(address.port)}
    return {"driver": NBD, "server": server, "export": address.export}


@lru_cache(maxsize=1024)
def place_of(name: str) -> Place:
    """Read a ``json:`` name that leads to bytes. Raises `Unsupported`, with a sentence that follows the name."""
    options = Options(parse_tree(name))
    if options.peek_text("driver") is None and "file" in options:
        # whatever format it may have
        return take_file(options)
    return take_place(options)


def take_file(options: Options) -> Place:
    """Take what is left of the options of a format: those that mean nothing, and where its bytes are."""
    options.take_text("driver")
    read_only = options.take_switch("read-only")
    options.take_harmless({})
    file = options.take_options("file")
    options.refuse_rest()
    if file is None:
        raise Unsupported("says nothing of where its bytes are: it has no 'file'")
    place = take_place(file)
    return place._replace(read_only=place.read_only or read_only)


def take_place(options: Options) -> Place:
    """Take all options of a block device that holds bytes. Raises `Unsupported`, see `place_of`."""
    window: Window | None = None
    read_only = False
    while True:
        driver = options.take_text("driver")
        read_only |= options.take_switch("read-only")
        if driver != RAW:
            break
        part = _take_window(options)
        if part is not None:
            # from the outside in: what was met before is a part of this one
            window = part if window is None else window.inside(part)
        options.take_harmless({})
        inner = options.take_options("file")
        options.refuse_rest()
        if inner is None:
            raise Unsupported("says nothing of where its bytes are: it has no 'file'")
        options = inner
    if driver == NBD:
        return Place(take_export(options), NBD, window, read_only)
    if driver not in (None, FILE, HOST_DEVICE):
        raise Unsupported(f"needs the driver '{driver}' for its bytes; cowfs knows {', '.join(PROTOCOLS)} and {RAW}")
    return Place(_take_path(options), driver, window, read_only)


def _take_window(options: Options) -> Window | None:
    offset, size = options.take_size("offset"), options.take_size("size")
    if size is not None and size % SECTOR:
        raise Unsupported(f"has the 'size' {size}, which is no multiple of {SECTOR}")
    if (offset or 0) + (size or 0) >= END:
        raise Unsupported("wants a part of something that is beyond all sizes")
    return None if offset is None and size is None else Window(offset or 0, size)


def _take_path(options: Options) -> str:
    options.take_harmless(_HARMLESS_OF_FILES)
    path = options.take_text("filename")
    options.refuse_rest()
    if not path:
        raise Unsupported("names no file: there is no 'filename'")
    return path
