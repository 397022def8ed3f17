"""A QED image: what its entries mean, where its clusters come from, and when its header changes.

Sections "Tables" and "Consistency checking" of the specification; mapping and writing are
`cowfs.block.twolevel`'s.
"""

import logging
import os
from array import array

import trio

from cowfs.block.check import CheckResult, Repair
from cowfs.block.extent import NO_OFFSET, Kind
from cowfs.block.freespace import FreeRuns
from cowfs.block.image import Backing
from cowfs.block.metacache import DEFAULT_BOUND, MIN_TABLES, Level, MetadataCache, Table
from cowfs.block.spaceretry import lacks_space
from cowfs.block.twolevel import TwoLevelImage
from cowfs.errors import CorruptImage, InvalidImage, StorageError, Unsupported, UsageError
from cowfs.formats.qed.check import Entries, Scan, check, entries_of, scan
from cowfs.formats.qed.compact import compact
from cowfs.formats.qed.create import backing_features, encode_name
from cowfs.formats.qed.layout import (
    ENTRY_SIZE,
    HEADER_LENGTH,
    MAGIC,
    SECTOR,
    ZERO_CLUSTER,
    Feature,
    Header,
    parse_header,
)
from cowfs.formats.qed.repair import check_and_repair, drop_wrong_entries
from cowfs.formats.qed.sharedstep import SharedStep
from cowfs.formats.qed.space import Space
from cowfs.formats.qed.stamp import read_stamp, stamp_place, write_stamp
from cowfs.storage.base import Storage

log = logging.getLogger(__name__)

#: bytes that may be moved to leave no leaks when writing has merely gone quiet
SETTLE_BYTES = 256 << 20
#: bytes of the header clusters that are searched for a place for a new backing file name
NAME_AREA = 1 << 16

_REPAIR = "repair it with 'cowfs check -r all'"


def probe(head: bytes) -> bool:
    """Whether a file that starts with these bytes says that it is QED."""
    return head.startswith(MAGIC)


async def open_image(storage: Storage, *, cache_size: int = DEFAULT_BOUND, for_repair: bool = False) -> "QedImage":
    """Read header and L1 table; check the image if it is writable and was not closed cleanly.

    ``cache_size`` bounds the bytes of L2 tables that are kept. ``for_repair`` leaves the check to who is going to
    repair what it finds.
    Raises `InvalidImage`, `CorruptImage`, `Unsupported`.
    """
    sector = await storage.read_bytes(0, min(SECTOR, storage.length))
    header = parse_header(sector, storage.length)
    tables = MetadataCache(storage, "little", bound=max(cache_size, MIN_TABLES * header.table_bytes))
    l1 = await tables.read(header.l1_offset, header.table_bytes, "Q", "L1 table")
    image = QedImage(storage, header, tables, sector, l1)
    image.backing = await _read_backing(storage, header)
    image.stamp = await read_stamp(storage, header)
    if for_repair:
        image.unwritable = "is open to be repaired, not to be written"
    elif not storage.read_only:
        await image.verify()
    return image


async def _read_backing(storage: Storage, header: Header) -> Backing | None:
    if not header.features & Feature.BACKING_FILE or not header.backing_size:
        return None
    name = await storage.read_bytes(header.backing_offset, header.backing_size)
    if b"\0" in name:
        raise InvalidImage("has a backing file name with a zero byte in it")
    return Backing(os.fsdecode(name), "raw" if header.features & Feature.BACKING_IS_RAW else None)


class QedImage(TwoLevelImage):
    """One QED file.

    The need-check bit is on disk from before the first change until writing has gone quiet and nothing is free
    inside the file. So an image without it has no leaks, and one with it is scanned before it is changed.
    """

    format = "qed"

    def __init__(
        self, storage: Storage, header: Header, tables: MetadataCache, sector: bytes, l1: "array[int]"
    ) -> None:
        super().__init__()
        self.storage = storage
        self.header = header
        self.tables = tables
        self.size = header.size
        self.cluster_size = header.cluster_size
        self.cluster_bits = header.cluster_size.bit_length() - 1
        self.table_bits = (header.table_bytes // ENTRY_SIZE).bit_length() - 1
        self._sector = tables.keep(Table(0, array("B", sector), Level.COUNTS_LINK, fresh=False))
        self.l1 = tables.keep(Table(header.l1_offset, l1, Level.LINK, fresh=False))
        self._first_offset = header.header_bytes
        self.space = Space(-(-storage.length >> self.cluster_bits))
        self.dirty = bool(header.features & Feature.NEED_CHECK)
        #: has the image scanned if it may have leaks or worse
        self._verified = SharedStep(self._verify)
        #: besides that, clears autoclear bits
        self._begun = SharedStep(self._begin)
        #: besides that, puts the need-check bit on disk
        self._marked = SharedStep(self._set_need_check)
        # let go of, and not handed back yet
        self._returned = FreeRuns()
        #: False once free clusters may have got out of sight
        self.knows_free = True

    @property
    def limit(self) -> int | None:
        """Clusters that the storage can hold, if it cannot grow: then it does not tell where the image ends."""
        return None if self.storage.limit is None else self.storage.limit >> self.cluster_bits

    # -- entries: section "Tables"

    def table_offset(self, l1_entry: int) -> int:
        """L1 entries are plain offsets."""
        return l1_entry

    def owns_table(self, l1_entry: int) -> bool:
        """Every cluster is referenced once only."""
        return True

    def decode(self, entry: int) -> tuple[Kind, int]:
        """0 is unallocated, 1 zeros, everything else the offset of a whole cluster behind the header."""
        if entry > ZERO_CLUSTER:
            if entry & (self.cluster_size - 1) or not self._is_inside(entry):
                raise CorruptImage(f"an L2 entry is {entry:#x}, where no cluster can be", file=self.storage.name)
            return Kind.DATA, entry
        return (Kind.ZERO if entry else Kind.UNALLOCATED), NO_OFFSET

    def _is_inside(self, offset: int) -> bool:
        return self._first_offset <= offset < self.space.end << self.cluster_bits

    def encode(self, host_offset: int) -> int:
        """L2 entries are plain offsets."""
        return host_offset

    def zero_entry(self) -> int:
        """Zero clusters have an entry of their own, and no space."""
        return ZERO_CLUSTER

    def table_entry(self, host_offset: int) -> int:
        """L1 entries are plain offsets."""
        return host_offset

    # -- space

    async def allocate(self, count: int) -> tuple[int, int]:
        """Clusters that were let go of, or new ones at the end of the file."""
        first, taken = self.space.take(count)
        return first << self.cluster_bits, taken

    def take_now(self, offset: int) -> int:
        """The same, once the need-check bit is on disk."""
        return self.space.take(1)[0] << self.cluster_bits if self._marked.done else NO_OFFSET

    async def allocate_table(self) -> int:
        """Tables take ``table_size`` adjacent clusters."""
        return self.space.take_all(self.header.table_size) << self.cluster_bits

    async def load_table(self, host_offset: int) -> Table:
        """Raises `CorruptImage` for a place where no L2 table can be."""
        table = self.tables.get(host_offset)
        if table is not None:
            return table
        if host_offset & (self.cluster_size - 1) or not self._is_inside(host_offset):
            raise CorruptImage(f"an L1 entry is {host_offset:#x}, where no table can be", file=self.storage.name)
        return await self.tables.load(host_offset, self.header.table_bytes, "Q", Level.LINK, "L2 table")

    async def peek_table(self, host_offset: int) -> Entries:
        """Entries of an L2 table as they are now, without keeping it in memory."""
        table = self.tables.get(host_offset)
        if table is not None:
            return entries_of(table.entries)
        return entries_of(await self.tables.read(host_offset, self.header.table_bytes, "Q", "L2 table"))

    def make_table(self, host_offset: int, source: Table | None) -> Table:
        """An L2 table in clusters that nothing refers to."""
        self._forget_table(host_offset)
        entries = array("Q", source.entries) if source else array("Q", [0]) * (1 << self.table_bits)
        return self.tables.add(Table(host_offset, entries, Level.LINK, fresh=True))

    def _forget_table(self, host_offset: int) -> None:
        table = self.tables.get(host_offset)
        if table is not None:
            self.tables.forget(table)

    async def free_entry(self, entry: int) -> None:
        """The cluster may be handed out again once `reclaim` has run."""
        self._returned.add(entry >> self.cluster_bits, 1)

    async def free_table(self, host_offset: int) -> None:
        """The table's clusters may be handed out again once `reclaim` has run."""
        self._forget_table(host_offset)
        self._returned.add(host_offset >> self.cluster_bits, self.header.table_size)

    async def reclaim(self) -> None:
        """Punch holes, as a table finds no place in clusters that are not adjacent, and takes space elsewhere."""
        returned, self._returned = list(self._returned), FreeRuns()
        try:
            for start, count in returned:
                await self.storage.discard(start << self.cluster_bits, count << self.cluster_bits)
        finally:
            # what could not be given back to the host can be used again all the same
            for start, count in returned:
                self.space.give(start, count)

    async def write_zeroes(self, offset: int, length: int) -> bool:
        """Punch holes into clusters that are allocated, which leaves no leaks; enter zero clusters elsewhere."""
        for extent in await self.map(offset, length):
            if extent.kind is Kind.DATA:
                await self.storage.punch(extent.host_offset, extent.length)
            elif extent.kind is Kind.UNALLOCATED:
                await super().write_zeroes(extent.offset, extent.length)
        return True

    async def discard(self, offset: int, length: int, *, bare: bool) -> bool:
        """The same: a hole takes no space either, and clusters that nothing refers to would be leaks."""
        return await self.write_zeroes(offset, length)

    async def has_holes(self) -> bool:
        """If clearly more clusters are in use than the file takes space for: zeros are holes here."""
        return self.storage.allocated * 10 // 9 < self.storage.length

    # -- the need-check bit: section "Consistency checking"

    async def verify(self) -> None:
        """Scan an image that was not closed cleanly, for damage and for clusters that were lost.

        Under the need-check bit, entries that point beyond the end of the file are dropped, as QEMU does: the file
        grew, and the crash came before that was durable. The same scan, without repair, where the file ends inside
        a cluster: QEMU takes that for the end, and would use it again; and on a device, whose end says nothing.
        Raises `CorruptImage` for damage.
        """
        await self._verified()

    async def _verify(self) -> None:
        if not (self.dirty or self.limit is not None or self.storage.length % self.cluster_size):
            return
        self.space = Space(self.storage.length >> self.cluster_bits)
        found = await scan(self, self.space.end)
        if self.dirty and found.dangling and found.dangling == found.result.corruptions:
            dropped = CheckResult()
            await drop_wrong_entries(self, dropped)
            log.warning(
                "%s: was not closed cleanly; %d entries that point beyond the end of the file are dropped",
                self.storage.name,
                dropped.corruptions_fixed,
            )
            found = await scan(self, self.space.end)
        if found.result.corruptions:
            raise CorruptImage(
                f"was not closed cleanly, and a check finds {found.result.corruptions} errors; {_REPAIR}",
                file=self.storage.name,
            )
        self.adopt(found)

    def adopt(self, found: Scan) -> None:
        """Take over from a scan without errors what may be handed out."""
        self.space = found.used.space(self.limit)
        self._marked.done = self.dirty
        self._verified.done = True

    async def mark(self) -> None:
        """Have the need-check bit on disk, whatever state the image is in."""
        if not self.dirty:
            await self._set_need_check()

    async def begin_writing(self) -> None:
        """Verify, and clear autoclear bits: none is known, so none is kept true."""
        await self._begun()

    async def _begin(self) -> None:
        await self.verify()
        if self.header.autoclear_features:
            await self._write_header(autoclear_features=0)

    async def prepare(self) -> None:
        """Have the need-check bit on disk."""
        if not self._marked.done:
            await self._begun()
            await self._marked()

    async def _set_need_check(self) -> None:
        self._change_header(features=self.header.features | Feature.NEED_CHECK)
        await self.tables.flush()

    async def settle(self) -> None:
        """Clear the need-check bit, if no leaks are left behind, or can be kept from being with little work.

        Otherwise it stays, so that the next one who opens the image for writing finds what is free.
        """
        if not self._marked.done:
            return
        await self.quiesce()
        free = self.space.free.total
        if free and min(free, self.space.end - free) <= SETTLE_BYTES >> self.cluster_bits:
            # broken off, it would leave leaks for the next one who opens the image to find
            with trio.CancelScope(shield=True):
                await self.compact()
        if self.space.free.total or not self.knows_free or not self.tables.is_clean:
            return
        if self.storage.length > (end := self.space.end << self.cluster_bits):
            # a crash has left the file ending inside a cluster
            await self.storage.truncate(end)
        self._marked.done = False
        self._change_header(features=self.header.features & ~Feature.NEED_CHECK)
        await self.tables.flush()

    async def compact(self) -> None:
        """Move what lies behind free clusters into them, and cut the file off after it.

        If the host has no space for the copies, the need-check bit stays, and nothing is lost by that.
        """
        try:
            await compact(self)
        except StorageError as error:
            if not lacks_space(error):
                raise
            log.warning("%s: stays marked as in use, since the host has no space to compact it", self.storage.name)

    # -- the header

    def _change_header(self, **fields: int) -> None:
        """Change fields in memory; the sector that holds them is written at the next flush."""
        self.header = self.header._replace(**fields)
        self.dirty = bool(self.header.features & Feature.NEED_CHECK)
        self._sector.entries[:HEADER_LENGTH] = array("B", self.header.pack())
        self._sector.dirty.add(0)

    async def _write_header(self, **fields: int) -> None:
        """Change fields on disk, at once and durably; if that fails they are as before, in memory."""
        before = {name: getattr(self.header, name) for name in fields}
        self._change_header(**fields)
        try:
            await self.tables.flush()
        except BaseException:
            self._change_header(**before)
            raise

    async def grow_l1(self, size: int) -> None:
        """L1 has one size for ever."""
        if size % SECTOR:
            raise UsageError(f"{size} bytes is no multiple of {SECTOR}, as sizes of qed images are")
        if size > self.header.max_size:
            raise Unsupported(f"its tables can map {self.header.max_size} bytes; qed images cannot grow beyond that")

    async def record_size(self, size: int) -> None:
        """One sector changes."""
        await self._write_header(size=size)

    async def set_backing(self, backing: Backing | None) -> None:
        """Write a new name beside the old one, then let the header point to it.

        Raises `UsageError` for a name that no header holds, `Unsupported` if this one has no room for it.
        """
        name = encode_name(backing.name) if backing else b""
        await self.flush()
        features, place = self.header.features & ~(Feature.BACKING_FILE | Feature.BACKING_IS_RAW), 0
        if backing is not None:
            features |= backing_features(backing)
            place = await self._place_for(len(name))
            await self.storage.write(place, [name])
            await self.storage.flush()
        old = self.header
        await self._write_header(features=features, backing_offset=place, backing_size=len(name))
        self.backing = backing
        if self.stamp is not None:
            await self.set_stamp(None)
        if old.features & Feature.BACKING_FILE:
            self._wipe(old.backing_offset, old.backing_size)

    async def set_stamp(self, stamp: bytes | None) -> bool:
        """The last sector of the header clusters."""
        kept = await write_stamp(self.storage, self.header, stamp)
        if kept:
            self.stamp = stamp
        return kept

    async def _place_for(self, length: int) -> int:
        """Offset of so many unused bytes in the header clusters, behind the sector that changes atomically."""
        area = bytearray(await self.storage.read_bytes(SECTOR, min(stamp_place(self.header), NAME_AREA) - SECTOR))
        start, end = self.header.backing_offset - SECTOR, self.header.backing_offset + self.header.backing_size - SECTOR
        if self.header.features & Feature.BACKING_FILE and end > 0:
            area[max(start, 0) : end] = b"\xff" * (end - max(start, 0))
        place = area.find(bytes(length))
        if place < 0:
            raise Unsupported("has no room in its header for the name of a new backing file")
        return SECTOR + place

    def _wipe(self, start: int, length: int) -> None:
        """Have a name that is no longer referred to zeroed by the next flush, so that its place can be used again."""
        end = start + length
        for index in range(max(start, HEADER_LENGTH), min(end, SECTOR)):
            self._sector.set(index, 0)
        if end > SECTOR:
            start = max(start, SECTOR)
            rest = Table(start, array("B", bytes(end - start)), Level.BODY, fresh=False)
            self.tables.keep(rest).dirty.add(0)

    # -- the image as a whole

    async def check(self, repair: Repair = Repair.NONE) -> CheckResult:
        """Look for damage and leaks; nothing else may be under way."""
        if repair is not Repair.NONE:
            return await check_and_repair(self, repair)
        return await check(self)
