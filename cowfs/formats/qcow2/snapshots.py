"""The table of internal snapshots ("Snapshots")."""

import struct
from dataclasses import dataclass

from cowfs.errors import CorruptImage
from cowfs.formats.qcow2.layout import MAX_L1_BYTES, Header
from cowfs.storage.base import Storage

_ENTRY = struct.Struct(">QIHHIIQII")
#: bytes of extra data that an entry may have; QEMU keeps the same limit
_MAX_EXTRA = 1024


@dataclass
class Snapshot:
    """One internal snapshot; offset and sizes in bytes, date in seconds since the epoch."""

    id: str
    name: str
    l1_offset: int
    l1_entries: int
    date: float
    vm_clock: int
    vm_state_size: int
    disk_size: int


async def read_snapshots(storage: Storage, header: Header) -> tuple[list[Snapshot], int]:
    """Return the snapshots of an image, and the bytes that their table takes."""
    found: list[Snapshot] = []
    position = start = header.snapshots_offset
    for _ in range(header.snapshots):
        snapshot, size = await _read_entry(storage, position, header.size)
        found.append(snapshot)
        position += size
    return found, position - start


async def _read_entry(storage: Storage, position: int, disk_size: int) -> tuple[Snapshot, int]:
    if position + _ENTRY.size > storage.length:
        raise CorruptImage("the table of internal snapshots lies beyond the end of the file")
    fixed = _ENTRY.unpack(await storage.read_bytes(position, _ENTRY.size))
    l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, clock, state_size, extra_length = fixed
    if extra_length > _MAX_EXTRA or l1_entries * 8 > MAX_L1_BYTES:
        raise CorruptImage("an entry in the table of internal snapshots is too large")
    rest = await storage.read_bytes(position + _ENTRY.size, extra_length + id_length + name_length)
    if extra_length >= 8:
        state_size = int.from_bytes(rest[:8], "big")
    if extra_length >= 16:
        disk_size = int.from_bytes(rest[8:16], "big")
    texts = rest[extra_length:]
    snapshot = Snapshot(
        id=texts[:id_length].decode("utf-8", "replace"),
        name=texts[id_length:].decode("utf-8", "replace"),
        l1_offset=l1_offset,
        l1_entries=l1_entries,
        date=seconds + nanoseconds / 1e9,
        vm_clock=clock,
        vm_state_size=state_size,
        disk_size=disk_size,
    )
    size = _ENTRY.size + len(rest)
    return snapshot, -(-size // 8) * 8
