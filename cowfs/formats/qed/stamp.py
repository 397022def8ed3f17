"""What a QED image keeps for cowfs in its header clusters, which other programs leave as they are.

The last sector of the header clusters, if nothing else is there: a magic, the length, the bytes, zeros.
"""

import struct

from cowfs.formats.qed.layout import SECTOR, Header
from cowfs.storage.base import Storage

_HEAD = struct.Struct("<8sI")
_MAGIC = b"cowfs\0\0\1"


def stamp_place(header: Header) -> int:
    """Offset of the sector."""
    return header.header_bytes - SECTOR


async def read_stamp(storage: Storage, header: Header) -> bytes | None:
    """Return what is kept; None if that is nothing of ours."""
    return _unpack(await storage.read_bytes(stamp_place(header), SECTOR))


async def write_stamp(storage: Storage, header: Header, stamp: bytes | None) -> bool:
    """Keep other bytes, or none, durably, by one write of the sector; False if that holds something else."""
    start = stamp_place(header)
    before = await storage.read_bytes(start, SECTOR)
    name_ends = header.backing_offset + header.backing_size
    if start < SECTOR or name_ends > start or (any(before) and _unpack(before) is None):
        return False
    after = b"" if stamp is None else _HEAD.pack(_MAGIC, len(stamp)) + stamp
    await storage.write(start, [after.ljust(SECTOR, b"\0")])
    await storage.flush()
    return True


def _unpack(sector: bytes) -> bytes | None:
    magic, length = _HEAD.unpack_from(sector)
    if magic != _MAGIC or length > SECTOR - _HEAD.size:
        return None
    return sector[_HEAD.size : _HEAD.size + length]
