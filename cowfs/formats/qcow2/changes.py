"""Internal snapshots shown, made, reverted to and deleted, and disks made smaller: what changes a whole image at once.

Names, ids and what the table says are those of ``qemu-img snapshot``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cowfs.block.metacache import Level, Table
from cowfs.errors import CorruptImage, Unsupported, UsageError
from cowfs.formats.qcow2 import compressed
from cowfs.formats.qcow2.layout import COMPRESSED, COPIED, MAX_L1_BYTES, MAX_SNAPSHOTS, OFFSET_MASK, ZERO
from cowfs.formats.qcow2.overhaul import Entries, Overhaul, overhaul
from cowfs.formats.qcow2.snapshots import find_snapshot, new_entry, read_snapshots

if TYPE_CHECKING:
    import numpy as np

    from cowfs.formats.qcow2.image import Qcow2Image
else:
    from cowfs.lazy import np

#: bytes of a snapshot's name; QEMU cuts longer ones off
MAX_NAME = 255
#: bytes; disks are whole numbers of sectors
_SECTOR = 512
_ALL_ALLOCATED = (1 << 32) - 1


async def show_snapshot(image: Qcow2Image, text: str) -> None:
    """Map by the L1 table of a snapshot."""
    found, _ = await read_snapshots(image.storage, image.header)
    snapshot = found[find_snapshot(found, text, by_id=True)]
    size = snapshot.describe(image.header.size).disk_size
    if snapshot.l1_offset & (image.cluster_size - 1):
        raise CorruptImage(f"the L1 table of the snapshot '{text}' is not aligned to a cluster")
    entries = await image.tables.read(snapshot.l1_offset, snapshot.l1_entries * 8, "Q", "L1 table of a snapshot")
    if len(entries) < -(-size >> image.cluster_bits + image.table_bits):
        raise CorruptImage(f"the L1 table of the snapshot '{text}' is too small for its disk")
    image.unwritable = f"shows the internal snapshot '{text}', which can only be read"
    image.tables.forget(image.l1)
    image.l1 = image.tables.keep(Table(snapshot.l1_offset, entries, Level.LINK, fresh=False))
    image.size = size


async def create_snapshot(image: Qcow2Image, name: str, date: tuple[int, int]) -> None:
    """Keep the disk as it is now under a name; ``date`` is in seconds and nanoseconds.

    Raises `Unsupported` where the image cannot hold one more, `UsageError` for a name that is too long.
    """
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > MAX_NAME:
        raise UsageError(f"the name of a snapshot has at most {MAX_NAME} bytes")
    if image.header.refcount_order == 0:
        raise Unsupported("reference counts of 1 bit cannot count what snapshots share")
    if image.header.snapshots >= MAX_SNAPSHOTS:
        raise Unsupported(f"has {MAX_SNAPSHOTS} snapshots, and an image holds no more")

    async def work(change: Overhaul) -> None:
        await change.count_tree(change.l1, 1)
        await change.set_copied(references=2)
        place = await change.write_table(change.l1)
        entry = new_entry(encoded, date, change.disk_size, change.snapshots)
        change.snapshots.append(replace(entry, l1_offset=place, l1_entries=len(change.l1)))

    await overhaul(image, work)


async def apply_snapshot(image: Qcow2Image, text: str) -> None:
    """Make the disk what it was, size included, when a snapshot, by id or name, was made. Raises `NotFound`."""

    async def work(change: Overhaul) -> None:
        snapshot = change.snapshots[find_snapshot(change.snapshots, text, by_id=True)]
        size = snapshot.describe(change.disk_size).disk_size
        entries = -(-size // change.span)
        if entries * 8 > MAX_L1_BYTES:
            raise Unsupported(f"the snapshot's disk of {size} bytes is too large")
        if snapshot.l1_entries < entries:
            raise CorruptImage(f"the L1 table of the snapshot '{text}' is too small for its disk")
        # what lies behind the disk is state of a virtual machine, which only the snapshot keeps
        kept = (await change.read_words(snapshot.l1_offset, snapshot.l1_entries * 8))[:entries]
        await change.count_tree(kept, 1)
        await change.count_tree(change.l1, -1)
        change.l1 = np.concatenate([kept, np.zeros(entries - len(kept), np.uint64)])
        change.disk_size = size
        await change.set_copied()

    await overhaul(image, work)


async def delete_snapshot(image: Qcow2Image, name: str) -> None:
    """Forget the first snapshot of a name. Raises `NotFound`."""

    async def work(change: Overhaul) -> None:
        snapshot = change.snapshots.pop(find_snapshot(change.snapshots, name, by_id=False))
        tables = await change.read_words(snapshot.l1_offset, snapshot.l1_entries * 8)
        await change.count_tree(tables, -1)
        change.counts.add_area(snapshot.l1_offset, tables.nbytes, change.bits, -1)
        await change.set_copied()

    await overhaul(image, work)


async def shrink(image: Qcow2Image, size: int) -> None:
    """Cut the disk off after ``size`` bytes; snapshots keep what they have of the rest.

    Raises `Unsupported` for version 2 with snapshots, whose sizes that version does not record.
    """
    if image.header.version < 3 and image.header.snapshots:
        raise Unsupported("the disk of a version 2 image that has snapshots cannot be resized")
    if size % _SECTOR:
        raise UsageError(f"{size} bytes is no multiple of {_SECTOR}, as sizes of {image.format} images are")

    async def work(change: Overhaul) -> None:
        entries = -(-size // change.span)
        await change.count_tree(change.l1[entries:], -1)
        change.l1 = change.l1[:entries]
        if size % change.span and int(change.l1[-1]) & OFFSET_MASK:
            await _cut_table(change, size)
        change.disk_size = size
        await change.set_copied()

    await overhaul(image, work)


async def _cut_table(change: Overhaul, size: int) -> None:
    """Drop from the last L2 table what lies behind the end of the disk."""
    offset = int(change.l1[-1]) & OFFSET_MASK
    table = await change.read_words(offset, change.size)
    first = -(-(size % change.span) // change.size) * change.words
    changed = table.copy()
    changed[first:] = 0
    change.counts.add(change.clusters_of(table[first:]), -1)
    if size % change.size:
        await _cut_cluster(change, changed[first - change.words : first], size % change.size)
    if not np.array_equal(changed, table):
        change.counts.add_area(offset, change.size, change.bits, -1)
        change.l1[-1] = await change.write_table(changed)


async def _cut_cluster(change: Overhaul, entry: Entries, length: int) -> None:
    """Zero the last cluster after ``length`` bytes: in a copy, since the old disk is in force until all is done."""
    first = int(entry[0])
    if first & COMPRESSED:
        place = compressed.locate(first, change.bits)
        packed = await change.storage.read_bytes(place.offset, place.length)
        data = compressed.unpack(packed, change.header.compression_type, change.size)
    elif first & OFFSET_MASK and not (change.words == 1 and first & ZERO):
        data = await change.storage.read_bytes(first & OFFSET_MASK, change.size)
    else:
        return
    if not any(data[length:]):
        return
    change.counts.add(change.clusters_of(entry), -1)
    entry[0] = await change.write_area(data[:length]) | COPIED
    if first & COMPRESSED and change.words == 2:
        entry[1] = _ALL_ALLOCATED
