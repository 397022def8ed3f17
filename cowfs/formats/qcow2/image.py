"""The qcow2 driver: what its entries mean and where its clusters come from; the rest is `TwoLevelImage`."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import trio

from cowfs.block.check import CheckResult, Repair
from cowfs.block.extent import NO_OFFSET, Extent, Kind
from cowfs.block.image import Backing
from cowfs.block.metacache import MIN_TABLES, Level, MetadataCache, Table
from cowfs.block.snapshots import Fill, InternalSnapshot
from cowfs.block.twolevel import TwoLevelImage
from cowfs.errors import CorruptImage, Unsupported, UsageError
from cowfs.formats.qcow2 import bitmaps, changes, compressed, filling, overlap
from cowfs.formats.qcow2.check import check
from cowfs.formats.qcow2.facts import describe
from cowfs.formats.qcow2.header import State, first_sector, plan, write_rest
from cowfs.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
    COMPRESSED,
    COPIED,
    EXTENSION_STAMP,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    MAX_L1_BYTES,
    OFFSET_MASK,
    SECTOR,
    ZERO,
    Header,
    full_size,
    has_refcount_table,
    parse_header,
)
from cowfs.formats.qcow2.refcounts import Refcounts
from cowfs.formats.qcow2.repair import check_and_repair
from cowfs.formats.qcow2.snapshots import read_snapshots
from cowfs.storage.base import Storage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    from cowfs.lazy import np

#: bytes of unpacked clusters that one image remembers
UNPACKED_BYTES = 4 << 20
#: part of the file that may wait to become free before the file grows
MAX_PENDING = 64
#: bytes that file systems give, and take back, at once
HOST_BLOCK = 4096


class Qcow2Image(TwoLevelImage):
    """One open qcow2 file."""

    format = "qcow2"
    #: autoclear bits that stay true while this driver writes
    kept_autoclear = 0

    # -- what qcow2 overrides, and why --
    # decode, encode …     what entries mean: copied flag, zero flag, compressed descriptors
    # allocate, free …     reference counts decide which host clusters are free
    # read_compressed      only qcow2 has compressed clusters
    # begin_writing        autoclear bits must not outlive a write that does not keep up what they stand for
    # grow_l1              its L1 table may have to move
    # -------------------------------------

    def __init__(self, storage: Storage, header: Header, tables: MetadataCache, *, for_repair: bool = False) -> None:
        super().__init__()
        self.storage = storage
        self.header = header
        self.tables = tables
        self.size = header.size
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.table_bits = header.table_entries.bit_length() - 1
        self.data_file = header.data_file
        self.backing = header.backing
        self.stamp = next((data for kind, data in header.extensions if kind == EXTENSION_STAMP), None)
        self._for_repair = for_repair
        self.update_marks()
        self._has_zero_flag = header.version >= 3
        self._has_holes: bool | None = None
        self._unpacked: OrderedDict[int, bytes] = OrderedDict()
        #: where the guest's and the host's clusters ended that were allocated last: bytes, host cluster
        self._last = (-1, 0)
        #: whether the backing file is being changed in the header, or that has failed
        self._rewriting = False

    async def load(self, head: bytes) -> None:
        """Bring the tables that stay in memory in: first sector, L1, refcount table."""
        header, tables = self.header, self.tables
        sector = array("B", head[:SECTOR].ljust(SECTOR, b"\0"))
        self.sector = tables.keep(Table(0, sector, Level.COUNTS_LINK, fresh=False))
        entries = await tables.read(header.l1_offset, header.l1_entries * 8, "Q", "L1 table")
        self.l1 = tables.keep(Table(header.l1_offset, entries, Level.LINK, fresh=False))
        entries = array("Q")
        if not self._for_repair or has_refcount_table(header, self.storage.length):
            size = header.refcount_table_clusters << self.cluster_bits
            entries = await tables.read(header.refcount_table_offset, size, "Q", "refcount table")
        counts = tables.keep(Table(header.refcount_table_offset, entries, Level.COUNTS_LINK, fresh=False))
        self.refcounts = Refcounts(
            header, self.storage, tables, counts, self.sector, self._drop_area, self._tables_in_use
        )
        self._packed = compressed.PackedWriter(self.storage, self.refcounts, self.cluster_bits)

    async def reload(self) -> None:
        """Forget all tables and read anew what stays in memory: a repair has changed them in the file."""
        self.tables.clear()
        self._unpacked.clear()
        await self.load(await self.storage.read_bytes(0, SECTOR))

    def update_marks(self) -> None:
        """Follow what the header says of the image's state: dirty bit, corrupt bit."""
        self.dirty = bool(self.header.incompatible & INCOMPATIBLE_DIRTY)
        self.unwritable = None
        if self._for_repair:
            self.unwritable = "is open to be repaired, not to be written"
        elif self.header.incompatible & INCOMPATIBLE_CORRUPT:
            self.unwritable = "is marked corrupt and can only be read; repair it with 'cowfs check -r all'"

    # -- entries

    def table_offset(self, l1_entry: int) -> int:
        """Bits 9 to 55 of an L1 entry."""
        offset = l1_entry & OFFSET_MASK
        if offset & (self.cluster_size - 1):
            raise CorruptImage(f"L2 table at offset {offset:#x} is not aligned to a cluster", file=self.storage.name)
        return offset

    def owns_table(self, l1_entry: int) -> bool:
        """Bit 63: the reference count is exactly one."""
        return bool(l1_entry & COPIED)

    def table_entry(self, host_offset: int) -> int:
        """Fresh tables have one reference."""
        return host_offset | COPIED

    def decode(self, entry: int) -> tuple[Kind, int]:
        """Standard and compressed descriptors."""
        if entry & COMPRESSED:
            return Kind.COMPRESSED, entry & ~(COPIED | COMPRESSED)
        host = entry & OFFSET_MASK
        if host & (self.cluster_size - 1):
            raise CorruptImage(f"data at offset {host:#x} is not aligned to a cluster", file=self.storage.name)
        if entry & ZERO:
            if not self._has_zero_flag:
                raise CorruptImage("a version 2 image has a cluster with the zero flag", file=self.storage.name)
            return Kind.ZERO, host or NO_OFFSET
        if not host:
            return Kind.UNALLOCATED, NO_OFFSET
        return (Kind.DATA if entry & COPIED else Kind.SHARED), host

    def encode(self, host_offset: int) -> int:
        """Fresh clusters have one reference."""
        return host_offset | COPIED

    def zero_entry(self) -> int | None:
        """Version 2 has no zero clusters."""
        return ZERO if self._has_zero_flag else None

    async def has_holes(self) -> bool:
        """Asked when first needed; so are images whose metadata was made beforehand."""
        if self._has_holes is None:
            self._has_holes = await self.refcounts.exceed_space()
        return self._has_holes

    # -- space

    async def recover(self) -> None:
        """Rebuild the counts of an image with the dirty bit: with lazy refcounts, nobody has kept them true.

        Raises `CorruptImage` if that leaves errors.
        """
        if self.dirty and self.unwritable is None:
            found = await self.check(Repair.ALL)
            if found.corruptions:
                raise CorruptImage(
                    f"was not closed cleanly, and {found.corruptions} errors are left after a repair",
                    file=self.storage.name,
                )

    async def begin_writing(self) -> None:
        """Mark bitmaps as outdated, and clear autoclear bits that vouch for what this driver does not keep up."""
        await self.recover()
        kept = self.header.autoclear & self.kept_autoclear
        if await bitmaps.mark_in_use(self.storage, self.header):
            kept |= AUTOCLEAR_BITMAPS
        if self.header.autoclear != kept:
            self._set_field(88, 8, kept)
            await self.flush()
            self.header.autoclear = kept

    async def prepare(self) -> None:
        """Nothing: counts are kept true at every flush."""

    async def allocate(self, count: int) -> tuple[int, int]:
        """Up to ``count`` clusters; see `Refcounts.allocate`."""
        if self.refcounts.would_grow(count) and self._is_better_flushed(count):
            await self.flush()
        first, taken = await self.refcounts.allocate(count)
        return first << self.cluster_bits, taken

    async def allocate_data(self, offset: int, count: int) -> tuple[int, int]:
        """Go on where the cluster before lies, if there is room; see `Refcounts.choose`."""
        after = self._continuation(offset)
        if self.refcounts.would_grow(count, after) and self._is_better_flushed(count):
            await self.flush()
        first, taken = await self.refcounts.allocate(count, after)
        self._last = offset + (taken << self.cluster_bits), first + taken
        return first << self.cluster_bits, taken

    def take_now(self, offset: int) -> int:
        """`allocate_data` one cluster, if that finds all it needs in memory."""
        after = self._continuation(offset)
        if self._is_better_flushed(1) and self.refcounts.would_grow(1, after):
            return NO_OFFSET
        first = self.refcounts.take_now(after)
        if first is None:
            return NO_OFFSET
        self._last = offset + self.cluster_size, first + 1
        return first << self.cluster_bits

    def _continuation(self, offset: int) -> int | None:
        """Return the host cluster that follows the one of the guest's cluster before an offset."""
        if self._last[0] == offset:
            return self._last[1]
        if not offset & ((1 << self.cluster_bits + self.table_bits) - 1):
            return None
        index = offset >> self.cluster_bits
        table = self.tables.get(self.table_offset(self.l1.entries[index >> self.table_bits]))
        if table is None:
            return None
        entry = table.entries[((index - 1) & ((1 << self.table_bits) - 1)) * self.header.entry_words]
        host = 0 if entry & COMPRESSED else (entry & OFFSET_MASK) >> self.cluster_bits
        return host + 1 if host else None

    def _is_better_flushed(self, count: int) -> bool:
        """Whether to wait rather than let the file grow by clusters while others are free, but not durably so."""
        pending = len(self._dropped) + len(self._freeing)
        if self.cluster_size < HOST_BLOCK and self.refcounts.end + count > self.refcounts.ample:
            # what is free inside of a block of the host gives no space back
            return pending > 0
        return pending > self.refcounts.end // MAX_PENDING

    def _tables_in_use(self) -> npt.NDArray[np.int64]:
        """Host clusters of L1 and L2 tables."""
        first = self.l1.offset >> self.cluster_bits
        own = np.arange(first, first + -(-self.l1.size >> self.cluster_bits))
        places = np.frombuffer(self.l1.entries, np.uint64) & np.uint64(OFFSET_MASK)
        return np.concatenate([own, (places[places != 0] >> np.uint64(self.cluster_bits)).astype(np.int64)])

    async def regain(self) -> None:
        """Besides, cut off what is free at the end of the file: of blocks of the host, all that can be."""
        await super().regain()
        await self.refcounts.trim()

    async def settle(self) -> None:
        """Besides, cut off what has become free at the end of the file."""
        await super().settle()
        await self.refcounts.trim()

    async def allocate_table(self) -> int:
        """An L2 table is one cluster."""
        return (await self.allocate(1))[0]

    def make_table(self, host_offset: int, source: Table | None) -> Table:
        """An L2 table in a fresh cluster."""
        entries = array("Q", source.entries if source else bytes(self.cluster_size))
        return self.tables.add(Table(host_offset, entries, Level.LINK, fresh=True))

    async def load_table(self, host_offset: int) -> Table:
        """One cluster of entries. Raises `CorruptImage` if to write by them could destroy metadata."""
        known = self.tables.get(host_offset)
        table = known or await self.tables.load(host_offset, self.cluster_size, "Q", Level.LINK, "L2 table")
        if known is None:
            # no await since it came into memory: nobody has used it yet
            self._vet_table(table)
        return table

    def _vet_table(self, table: Table) -> None:
        """Refuse a table that has data in the place of metadata; who only reads may go on."""
        what = overlap.complaint(table.entries, self.header, self.refcounts.known_metadata())
        if what is None:
            return
        if self.storage.read_only:
            self.unwritable = self.unwritable or what
            return
        self.tables.forget(table)
        raise CorruptImage(what, file=self.storage.name)

    async def free_entry(self, entry: int) -> None:
        """Compressed clusters share host clusters: each that the packed bytes touch loses a reference."""
        kind, host = self.decode(entry)
        length = self.cluster_size
        if kind is Kind.COMPRESSED:
            self._unpacked.pop(host, None)
            host, length = compressed.locate(host, self.cluster_bits)
            self._packed.forget(host, length)
        clusters = range(host >> self.cluster_bits, host + length - 1 + self.cluster_size >> self.cluster_bits)
        for cluster in clusters[1:]:
            # so that all lose their reference, or none
            await self.refcounts.fetch(cluster)
        for cluster in clusters:
            await self.refcounts.release(cluster)

    async def free_table(self, host_offset: int) -> None:
        """An L2 table is one cluster."""
        await self.refcounts.release(host_offset >> self.cluster_bits)

    async def reclaim(self) -> None:
        """Hand freed clusters back to the host and to the allocator."""
        await self.refcounts.give_back()

    def _drop_area(self, offset: int, length: int) -> None:
        for start in range(offset, offset + length, self.cluster_size):
            self.drop_table(start)

    # -- compressed clusters

    def unpacked(self, extent: Extent) -> bytes | None:
        """One of the last few."""
        known = self._unpacked.get(extent.host_offset)
        if known is not None:
            self._unpacked.move_to_end(extent.host_offset)
        return known

    async def read_compressed(self, extent: Extent) -> bytes:
        """Unpack in a worker thread, remembering the last few."""
        known = self.unpacked(extent)
        if known is not None:
            return known
        place = compressed.locate(extent.host_offset, self.cluster_bits)
        packed = await self.storage.read_bytes(place.offset, place.length)
        try:
            data = await trio.to_thread.run_sync(
                compressed.unpack, packed, self.header.compression_type, self.cluster_size
            )
        except CorruptImage as error:
            error.file = self.storage.name
            if place.offset + place.length > self.storage.length:
                error.message = "a compressed cluster reaches beyond the end of the file, which has been cut short"
            raise
        self._unpacked[extent.host_offset] = data
        while len(self._unpacked) * self.cluster_size > UNPACKED_BYTES and len(self._unpacked) > 1:
            self._unpacked.popitem(last=False)
        return data

    packs = True

    def pack(self, data: bytes | memoryview) -> bytes | None:
        """By the method that the header names."""
        return compressed.pack(data, self.header.compression_type)

    async def write_packed(self, offset: int, packed: bytes) -> None:
        """Put the bytes behind those of the cluster packed before."""
        await self.prepare()
        entry = await self._packed.write(packed)
        try:
            await self._set_all(offset, self.cluster_size, entry)
        except BaseException:
            self.return_entry(entry)
            raise

    # -- header

    @property
    def spoiled_by_writing(self) -> bool:
        """Autoclear bits, and the bitmaps that one of them stands for."""
        return bool(self.header.autoclear & ~self.kept_autoclear)

    def _set_field(self, position: int, size: int, value: int) -> None:
        for index, byte in enumerate(value.to_bytes(size, "big"), start=position):
            self.sector.set(index, byte)

    async def set_backing(self, backing: Backing | None) -> None:
        """Record another backing file and its format, or none, by one write of the first sector.

        Raises `UsageError` for what no header records, `Unsupported` if this one has no room for it.
        """
        await self._change_header(backing, None)

    async def set_stamp(self, stamp: bytes | None) -> bool:
        """A header extension."""
        try:
            await self._change_header(self.backing, stamp)
        except Unsupported:
            return False
        return True

    async def _change_header(self, backing: Backing | None, stamp: bytes | None) -> None:
        await self.flush()
        header = self.header
        if self._rewriting:
            # the last change failed on its way, in one of several states that mean the same
            head = await self.storage.read_bytes(0, min(self.cluster_size, self.storage.length))
            header = parse_header(head, self.storage.length)
        steps = plan(header, backing, stamp)
        self._rewriting = True
        for state in steps.states:
            await write_rest(self.storage, state)
            await self._switch(state)
        self.header.backing_offset, self.header.backing_length = state.name_offset, state.name_length
        self.header.extensions = steps.extensions
        self._rewriting = False
        self.backing = self.header.backing = backing
        self.stamp = stamp
        for offset, length in steps.stale:
            # zeroed by the next flush, so that old names do not stay behind
            self.tables.add(Table(offset, array("B", bytes(length)), Level.BODY, fresh=True))

    async def _switch(self, state: State) -> None:
        """Let the first sector, durably, lead to a state of the header; in memory it is as before if that fails."""
        before = self.sector.entries.tobytes()
        self._set_variable_part(first_sector(before, self.header.length, state))
        try:
            await self.flush()
        except BaseException:
            self._set_variable_part(before)
            raise

    def _set_variable_part(self, sector: bytes) -> None:
        for index in (*range(8, 20), *range(self.header.length, SECTOR)):
            self.sector.set(index, sector[index])

    async def grow_l1(self, size: int) -> None:
        """Move L1 to a larger place if it needs one; the header then points there at once."""
        if size % SECTOR:
            raise UsageError(f"{size} bytes is no multiple of {SECTOR}, as sizes of qcow2 images are")
        if self.header.version < 3 and self.header.snapshots:
            raise Unsupported("the disk of a version 2 image that has snapshots cannot be resized")
        span_bits = self.cluster_bits + self.table_bits
        first = -(-self.size >> span_bits)
        if any(self.l1.entries[first:]):
            # state of a virtual machine, left by a snapshot that QEMU applied, must not become part of the disk
            await self.deallocate(first << span_bits, len(self.l1.entries) - first << span_bits)
        wanted = -(-size >> span_bits)
        if wanted <= len(self.l1.entries):
            return
        if wanted * 8 > MAX_L1_BYTES:
            raise Unsupported(f"with clusters of {self.cluster_size} bytes a disk cannot grow to {size} bytes")
        clusters = -(-wanted * 8 >> self.cluster_bits)
        first = await self.refcounts.allocate_adjacent(clusters)
        try:
            await self.flush()
        except BaseException:
            self._drop_area(first << self.cluster_bits, clusters << self.cluster_bits)
            raise
        old = self.l1
        entries = array("Q", old.entries)
        entries.frombytes(bytes((clusters << self.cluster_bits) - old.size))
        self.tables.forget(old)
        self.l1 = self.tables.keep(Table(first << self.cluster_bits, entries, Level.LINK, fresh=True))
        self._set_field(36, 4, len(entries))
        self._set_field(40, 8, self.l1.offset)
        # let go of by the flush that switches over, this one or, if it fails, a later one
        self._drop_area(old.offset, old.size)
        await self.flush()

    async def record_size(self, size: int) -> None:
        """One field of the header, in memory as before if that fails."""
        self._set_field(24, 8, size)
        try:
            await self.flush()
        except BaseException:
            self._set_field(24, 8, self.header.size)
            raise
        self.header.size = size
        self.refcounts.ample = full_size(self.header) >> self.cluster_bits

    async def shrink(self, size: int) -> None:
        """See `changes.shrink`."""
        await changes.shrink(self, size)

    async def adopt(self, header: Header) -> None:
        """Take over a header, and all metadata, that were changed in the file; nothing is dirty."""
        self.header = header
        self.size = header.size
        await self.reload()

    # -- internal snapshots

    async def snapshots(self) -> list[InternalSnapshot]:
        """In the order of the table."""
        found, _ = await read_snapshots(self.storage, self.header)
        return [snapshot.describe(self.header.size) for snapshot in found]

    async def snapshot_view(self, snapshot: InternalSnapshot) -> Qcow2Image:
        """What a snapshot refers to is shared with it, so nobody changes it in place: the file has it all."""
        head = await self.storage.read_bytes(0, min(self.cluster_size, self.storage.length))
        tables = MetadataCache(self.storage, "big", bound=MIN_TABLES << self.cluster_bits)
        view = type(self)(self.storage, parse_header(head, self.storage.length), tables)
        await view.load(head)
        await changes.show_snapshot(view, snapshot.id)
        return view

    async def fill_snapshots(self, fills: Sequence[Fill]) -> None:
        """See `filling.fill_snapshots`."""
        await filling.fill_snapshots(self, fills)

    async def show_snapshot(self, text: str) -> None:
        """See `changes.show_snapshot`."""
        await changes.show_snapshot(self, text)

    async def create_snapshot(self, name: str, date: tuple[int, int]) -> None:
        """See `changes.create_snapshot`."""
        await changes.create_snapshot(self, name, date)

    async def apply_snapshot(self, text: str) -> None:
        """See `changes.apply_snapshot`."""
        await changes.apply_snapshot(self, text)

    async def delete_snapshot(self, name: str) -> None:
        """See `changes.delete_snapshot`."""
        await changes.delete_snapshot(self, name)

    # -- the image as a whole

    async def check(self, repair: Repair = Repair.NONE) -> CheckResult:
        """Count all references and compare."""
        if repair is not Repair.NONE:
            return await check_and_repair(self, repair)
        return await check(self.storage, self.header, self.tables, self.l1, self.refcounts.table)

    async def details(self) -> dict[str, Any]:
        """See `facts.describe`."""
        return await describe(self.storage, self.header)
