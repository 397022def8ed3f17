"""Persistent bitmaps ("Bitmaps extension"): which there are, and that they no longer say what was written.

cowfs does not keep them up to date. An image that is written has all of them marked as in use, durably, before
anything changes: that is how QEMU leaves bitmaps behind when it is killed, and how it then takes them.
"""

import logging
import struct
from typing import Any, NamedTuple

from cowfs.block.alignment import align_up
from cowfs.errors import CorruptImage
from cowfs.formats.qcow2.layout import AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, Header
from cowfs.storage.base import Storage

log = logging.getLogger(__name__)

#: bitmap's data or attributes may be outdated
IN_USE = 1 << 0
#: flags in the words of ``qemu-img info``; the second: whoever writes to the disk keeps it up
_FLAG_NAMES = {IN_USE: "in-use", 1 << 1: "auto"}

#: number of bitmaps, reserved, bytes and host offset of the directory
_EXTENSION = struct.Struct(">IIQQ")
#: "Bitmap directory": table offset, table entries, flags, type, granularity bits, lengths of name and extra data
_ENTRY = struct.Struct(">QIIBBHI")
#: flags among them
_FLAGS = struct.Struct(">I")
_FLAGS_AT = 12
#: limits that QEMU keeps: bytes of a bitmap, bitmaps, bytes of a directory with the longest names
MAX_BITMAP = 512 << 20
_MAX_BITMAPS = 65535
_MAX_DIRECTORY = _MAX_BITMAPS * (_ENTRY.size + 1023 + 1)


class Directory(NamedTuple):
    """Where the directory lies: host offset and bytes, and how many ``bitmaps`` it should have."""

    offset: int
    size: int
    bitmaps: int


class Bitmap(NamedTuple):
    """One entry of the directory, ``position`` bytes behind its start; ``table`` is a host offset."""

    position: int
    table: int
    table_entries: int
    flags: int
    granularity_bits: int
    name: bytes


def locate(header: Header) -> Directory | None:
    """Find the directory; None if there is none, or nobody has vouched for it."""
    data = next((data for kind, data in header.extensions if kind == EXTENSION_BITMAPS), b"")
    if not header.autoclear & AUTOCLEAR_BITMAPS or len(data) < _EXTENSION.size:
        return None
    count, _, size, offset = _EXTENSION.unpack_from(data)
    return Directory(offset, size, count)


async def read_bitmaps(storage: Storage, directory: Directory) -> list[Bitmap]:
    """Read all entries. Raises `CorruptImage` for a directory that cannot be one."""
    offset, size, count = directory
    if size > _MAX_DIRECTORY or offset + size > storage.length:
        raise CorruptImage(f"bitmap directory at {offset:#x} lies beyond the end of the file")
    if count > _MAX_BITMAPS:
        raise CorruptImage(f"bitmap directory claims {count} bitmaps, which is too many")
    entries = await storage.read_bytes(offset, size)
    found: list[Bitmap] = []
    position = 0
    while len(found) < count:
        if position + _ENTRY.size > size:
            raise CorruptImage("bitmap directory is cut off")
        table, table_entries, flags, _, granularity, name, extra = _ENTRY.unpack_from(entries, position)
        place = position + _ENTRY.size + extra
        found.append(Bitmap(position, table, table_entries, flags, granularity, entries[place : place + name]))
        position += entry_size(name + extra)
    return found


def entry_size(variable: int) -> int:
    """Bytes of an entry whose name and extra data have so many."""
    return align_up(_ENTRY.size + variable, 8)


async def describe(storage: Storage, header: Header) -> list[dict[str, Any]]:
    """Return what ``qemu-img info`` says of each bitmap. Raises `CorruptImage`."""
    directory = locate(header)
    found = await read_bitmaps(storage, directory) if directory is not None else []
    return [
        {
            "flags": [name for bit, name in _FLAG_NAMES.items() if bitmap.flags & bit],
            "name": bitmap.name.decode("utf-8", "surrogateescape"),
            "granularity": 1 << bitmap.granularity_bits,
        }
        for bitmap in found
    ]


async def mark_in_use(storage: Storage, header: Header) -> bool:
    """Have every bitmap say, durably, that it may be outdated; False if nobody may vouch for them as they are.

    Each entry changes at once, and an image whose bitmaps are partly marked is as good as one of which none is.
    """
    directory = locate(header)
    if directory is None:
        return False
    try:
        found = await read_bitmaps(storage, directory)
    except CorruptImage as error:
        log.warning("%s: bitmaps are given up: %s", storage.name, error.message)
        return False
    bitmaps = [bitmap for bitmap in found if not bitmap.flags & IN_USE]
    for bitmap in bitmaps:
        place = directory.offset + bitmap.position + _FLAGS_AT
        await storage.write(place, [_FLAGS.pack(bitmap.flags | IN_USE)])
    if bitmaps:
        await storage.flush()
    return True
