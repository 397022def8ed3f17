"""The table of internal snapshots ("Snapshots")."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cowfs.block.alignment import align_up
from cowfs.block.snapshots import InternalSnapshot
from cowfs.errors import CorruptImage, NotFound
from cowfs.formats.qcow2.layout import MAX_L1_BYTES, Header
from cowfs.storage.base import Storage

_ENTRY = struct.Struct(">QIHHIIQII")
#: bytes of extra data that an entry may have; QEMU keeps the same limit
_MAX_EXTRA = 1024
#: what QEMU knows of the extra data: size of the VM state, of the disk, instructions executed
_EXTRA = struct.Struct(">QQQ")
#: no instructions were counted
_NO_ICOUNT = (1 << 64) - 1


@dataclass(frozen=True)
class Snapshot:
    """One entry: L1 table (host offset, entries), and the rest of it as it stands in the file."""

    l1_offset: int
    l1_entries: int
    id: bytes
    name: bytes
    #: seconds and nanoseconds
    date: tuple[int, int]
    vm_clock: int
    #: as the fixed part has it; the extra data may know better
    vm_state_size: int
    extra: bytes

    def pack(self) -> bytes:
        """Return the entry as it stands in the table, padded to a multiple of 8 bytes; extra data is kept as it is."""
        packed = _ENTRY.pack(
            self.l1_offset,
            self.l1_entries,
            len(self.id),
            len(self.name),
            *self.date,
            self.vm_clock,
            self.vm_state_size,
            len(self.extra),
        )
        packed += self.extra + self.id + self.name
        return packed.ljust(align_up(len(packed), 8), b"\0")

    def describe(self, disk_size: int) -> InternalSnapshot:
        """Say what it is; ``disk_size``, the image's, counts where the entry has none of its own."""
        state_size, icount = self.vm_state_size, None
        if len(self.extra) >= 8:
            state_size = int.from_bytes(self.extra[:8], "big")
        if len(self.extra) >= 16:
            disk_size = int.from_bytes(self.extra[8:16], "big")
        if len(self.extra) >= 24:
            icount = int.from_bytes(self.extra[16:24], "big")
        return InternalSnapshot(
            id=self.id.decode("utf-8", "surrogateescape"),
            name=self.name.decode("utf-8", "surrogateescape"),
            date=self.date[0],
            date_nanoseconds=self.date[1],
            vm_clock=self.vm_clock,
            vm_state_size=state_size,
            disk_size=disk_size,
            icount=None if icount == _NO_ICOUNT else icount,
        )


def new_entry(name: bytes, date: tuple[int, int], disk_size: int, others: Sequence[Snapshot]) -> Snapshot:
    """Return the entry of a new snapshot, without its L1 table; the id is one more than the highest, as in QEMU."""
    highest = max((_number(other.id) for other in others), default=0)
    return Snapshot(0, 0, str(highest + 1).encode(), name, date, 0, 0, _EXTRA.pack(0, disk_size, 0))


def _number(id: bytes) -> int:
    digits = id[: len(id) - len(id.lstrip(b"0123456789"))]
    return int(digits or b"0")


def find_snapshot(snapshots: Sequence[Snapshot], text: str, *, by_id: bool) -> int:
    """Return the index of the first snapshot of a name; an id, if ``by_id``, counts before a name.

    Raises `NotFound`.
    """
    wanted = text.encode("utf-8", "surrogateescape")
    if by_id:
        for index, snapshot in enumerate(snapshots):
            if snapshot.id == wanted:
                return index
    for index, snapshot in enumerate(snapshots):
        if snapshot.name == wanted:
            return index
    raise NotFound(f"there is no snapshot '{text}'")


async def read_snapshots(storage: Storage, header: Header) -> tuple[list[Snapshot], int]:
    """Return the snapshots of an image, and the bytes that their table takes. Raises `CorruptImage`."""
    found: list[Snapshot] = []
    position = start = header.snapshots_offset
    for _ in range(header.snapshots):
        snapshot, size = await _read_entry(storage, position)
        found.append(snapshot)
        position += size
    return found, position - start


async def _read_entry(storage: Storage, position: int) -> tuple[Snapshot, int]:
    if position + _ENTRY.size > storage.length:
        raise CorruptImage("the table of internal snapshots lies beyond the end of the file")
    fixed = _ENTRY.unpack(await storage.read_bytes(position, _ENTRY.size))
    l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, clock, state_size, extra_length = fixed
    if extra_length > _MAX_EXTRA or l1_entries * 8 > MAX_L1_BYTES:
        raise CorruptImage("an entry in the table of internal snapshots is too large")
    if position + _ENTRY.size + extra_length + id_length + name_length > storage.length:
        raise CorruptImage("the table of internal snapshots lies beyond the end of the file")
    rest = await storage.read_bytes(position + _ENTRY.size, extra_length + id_length + name_length)
    texts = rest[extra_length:]
    snapshot = Snapshot(
        l1_offset=l1_offset,
        l1_entries=l1_entries,
        id=texts[:id_length],
        name=texts[id_length:],
        date=(seconds, nanoseconds),
        vm_clock=clock,
        vm_state_size=state_size,
        extra=rest[:extra_length],
    )
    return snapshot, align_up(_ENTRY.size + len(rest), 8)
