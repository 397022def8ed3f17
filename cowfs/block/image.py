"""What a format must supply, and what it gets for nothing.

An image is one layer: a format driver over one storage. It knows its own metadata: what part of the guest's
disk it holds, where, and how to allocate more. It knows nothing of other layers, of locks, or of FUSE, and
trusts its caller, `cowfs.block.layer.Layer`, to stay in range and to serialise changes of the same clusters.

A read-only format supplies `Image.lookup` and nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from cowfs.block.check import CheckResult, Repair
from cowfs.block.extent import NO_OFFSET, Extent, Kind
from cowfs.block.metacache import Table
from cowfs.block.snapshots import Fill, InternalSnapshot
from cowfs.errors import Unsupported
from cowfs.storage.base import Storage


class Backing(NamedTuple):
    """What an image's header says of its backing file: the name as recorded, and the format if recorded."""

    name: str
    format: str | None


class Run(NamedTuple):
    """Host space for a stretch of the guest's disk, whole units, offsets and length in bytes.

    ``fresh`` tells space that was allocated for this purpose from space that was already kept for the range.
    """

    offset: int
    length: int
    host_offset: int
    fresh: bool


@dataclass
class Reservation:
    """Host clusters set aside for a guest range, until they are linked or released."""

    runs: list[Run] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


class Image(ABC):
    """A format driver over one storage, with the operations that most formats take as they are."""

    #: name of the format, as ``-f`` takes it
    format: ClassVar[str]

    storage: Storage
    #: bytes of the guest's disk
    size: int
    #: bytes; the unit of allocation. 1 where ranges need no allocation
    cluster_size: int = 1
    backing: Backing | None = None
    #: sentence why this image can be read but not written, whatever the file's permissions
    unwritable: str | None = None
    #: whether the image says on disk that it was not closed cleanly
    dirty: bool = False
    #: name, as the header records it, of a second file that holds the guest's data; see `attach_data`
    data_file: str | None = None
    #: what the image keeps for `cowfs.block.identity`; means nothing to the format
    stamp: bytes | None = None
    #: whether a cluster that reaches beyond the end of the disk is written as a whole
    writes_past_end: bool = True

    @property
    def spoiled_by_writing(self) -> bool:
        """Whether any write takes something from the image that other programs put there."""
        return False

    @property
    def unit(self) -> int:
        """Bytes; what a write copies the rest of. The cluster, for formats that cannot write less of one."""
        return self.cluster_size

    @property
    def data_storage(self) -> Storage:
        """Where host offsets of the guest's data lead: the one storage, for all formats but a few."""
        return self.storage

    @property
    def storages(self) -> tuple[Storage, ...]:
        """All files that are this image, the one with its header first."""
        return (self.storage,)

    def attach_data(self, storage: Storage) -> None:
        """Take over the file that `data_file` names; whoever opens such an image does this before anything else."""
        raise Unsupported(f"{self.format} images have no data file")

    @abstractmethod
    def lookup(self, offset: int, length: int) -> list[Extent] | None:
        """Say where a range is, from memory: extents in order, without gaps, merged.

        None if metadata is missing that `map` would load. Never suspends, does no data I/O.
        Raises `CorruptImage` for entries that make no sense.
        """

    def place(self, offset: int, length: int) -> int:
        """Return the host offset of a range that is plain data in one piece, if that is quickly told.

        BELOW where nothing of it is allocated; NO_OFFSET where only `lookup` can tell. The hot path asks here first.
        """
        return NO_OFFSET

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Like `lookup`, loading what is not in memory."""
        extents = self.lookup(offset, length)
        assert extents is not None, "a format that loads metadata must override map"
        return extents

    #: whether the storage is the disk, byte for byte; then its holes are all that is known of the disk
    is_flat: bool = False

    async def has_holes(self) -> bool:
        """Whether the storage seems to have holes where `map` says data, so that looking for them pays."""
        return False

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Like `map`, but takes the time, if it pays, to tell holes from data inside what `map` calls data."""
        extents = await self.map(offset, length)
        return await self.split_at_holes(extents) if await self.has_holes() else extents

    async def split_at_holes(self, extents: Sequence[Extent]) -> list[Extent]:
        """Make zeros, with their places, of what is a hole in the storage."""
        found: list[Extent] = []
        for extent in extents:
            kind, start, length, host = extent
            if kind > Kind.SHARED:
                found.append(extent)
                continue
            for region in await self.data_storage.regions(host, length):
                position = start + region.offset - host
                found.append(Extent(Kind.ZERO if region.hole else kind, position, region.length, region.offset))
        return found

    def held_from(self, offset: int) -> int:
        """Return an offset, not before the given one, up to which nothing is held, as far as that is easy to tell."""
        return offset

    def unpacked(self, extent: Extent) -> bytes | None:
        """Return what `read_compressed` does, where it is in memory."""
        return None

    async def read_compressed(self, extent: Extent) -> bytes:
        """Unpack the whole cluster that a compressed extent lies in."""
        raise Unsupported(f"{self.format} has no compressed clusters")

    #: whether clusters can be written packed
    packs: bool = False

    def pack(self, data: bytes | memoryview) -> bytes | None:
        """Pack the bytes of one whole cluster; None if that makes them no shorter.

        Called in worker threads: it depends on nothing that changes while the image is open.
        """
        raise Unsupported(f"{self.format} has no compressed clusters")

    async def write_packed(self, offset: int, packed: bytes) -> None:
        """Make the cluster at a guest offset hold what `pack` made of its content, in place of what it held."""
        raise Unsupported(f"{self.format} has no compressed clusters")

    #: bytes at the start of the disk that `vet_head` wants to see before they are written; 0 for none
    vetted: int = 0

    def vet_head(self, head: bytes) -> None:
        """Raise `NotPermitted` unless the first ``vetted`` bytes of the disk may become ``head``."""

    async def begin_writing(self) -> None:
        """The first change since it was opened for writing is about to be made, perhaps to data alone."""

    def secure(self) -> None:
        """Take the host's space for metadata that writing will change; called after `begin_writing`."""

    # -- allocation, for formats whose lookup answers anything but data

    async def reserve(self, offset: int, length: int) -> Reservation:
        """Set host clusters aside for whole units of the guest's disk; nothing can be seen of it yet."""
        raise Unsupported(f"{self.format} cannot allocate")

    def link(self, reservation: Reservation) -> None:
        """Make the guest range point to the reserved clusters, whose data has been written."""
        raise Unsupported(f"{self.format} cannot allocate")

    def release(self, reservation: Reservation) -> None:
        """Give reserved clusters back that were not linked."""
        raise Unsupported(f"{self.format} cannot allocate")

    def take_now(self, offset: int) -> int:
        """Take one host cluster for the guest's cluster at ``offset``, on the spot: its host offset.

        It is linked through `prepare_link`, or given back as part of a reservation. `NO_OFFSET` if that takes more than
        memory, or if this is no format to write a part of a cluster in before it is linked.
        """
        return NO_OFFSET

    async def prepare_link(self, runs: list[Run]) -> Reservation:
        """Make ready to link clusters that `take_now` has taken. They stay taken if this fails."""
        raise Unsupported(f"{self.format} cannot allocate")

    async def write_zeroes(self, offset: int, length: int) -> bool:
        """Make whole units read as zeros without writing data; False if the format has no way to."""
        return False

    async def deallocate(self, offset: int, length: int) -> None:
        """Forget whole clusters, so that what is below shines through again."""
        raise Unsupported(f"{self.format} cannot deallocate")

    async def discard(self, offset: int, length: int, *, bare: bool) -> bool:
        """Make whole clusters read as zeros and let their space go; False if the format has no way to.

        ``bare`` says that they may as well be unallocated: what is below has only zeros there.
        """
        if bare:
            await self.deallocate(offset, length)
            return True
        return await self.write_zeroes(offset, length)

    # -- the image as a whole

    @property
    def owes_space(self) -> bool:
        """Whether there is host space that was let go of, and cannot be used again yet."""
        return False

    @property
    def let_go(self) -> int:
        """How often anything that was in use has been let go of since it was opened; it only grows."""
        return 0

    async def regain(self) -> None:
        """Have host space that is owed back, as far as there is any; waits for the readers that may be in it."""

    async def flush(self) -> None:
        """Make data and metadata durable, in an order that is safe at every instant."""
        await self.storage.flush()

    async def settle(self) -> None:
        """Writing has gone quiet: take back marks that say that the image is in use."""

    def rest(self) -> int:
        """Nobody has used the disk for a while: let go of what is read again easily; bytes of memory."""
        return 0

    async def compact(self) -> None:
        """Give back host space that is of no use; nothing else is under way on this image."""

    async def grow(self, size: int, zeroed_until: int) -> None:
        """Make the disk larger, durably, and at once as far as a crash can tell.

        Up to ``zeroed_until``, if that is beyond the old size, the new part must read as zeros although
        something below has other bytes there; after that it is left unallocated.
        """
        raise Unsupported(f"{self.format} images cannot be resized")

    async def shrink(self, size: int) -> None:
        """Make the disk smaller, durably, and at once as far as a crash can tell; nothing else changes the image."""
        raise Unsupported(f"{self.format} images cannot be made smaller")

    async def set_backing(self, backing: Backing | None) -> None:
        """Change the recorded backing file. Everything before is durable first, the change itself atomic."""
        raise Unsupported(f"{self.format} images have no backing file")

    async def set_stamp(self, stamp: bytes | None) -> bool:
        """Keep other bytes, or none, as `stamp`, durably and at once; False if there is no room."""
        return False

    def fingerprint(self) -> bytes:
        """Return bytes of metadata in memory that are likely to change if the disk does, the same on all machines."""
        return b""

    async def check(self, repair: Repair = Repair.NONE) -> CheckResult:
        """Look for structural damage and leaks, and put right what ``repair`` says; nothing else is under way.

        The result of a repair is that of a second check after it, with what was fixed. What can be read keeps its
        content, and a crash in the middle leaves an image that can still be repaired.
        """
        raise Unsupported(f"{self.format} images cannot be checked")

    # -- internal snapshots; nothing else changes the image meanwhile, and each change is made at once and durably

    async def snapshots(self) -> list[InternalSnapshot]:
        """Those that the image holds, oldest first."""
        return []

    async def snapshot_view(self, snapshot: InternalSnapshot) -> "Image":
        """Return another image over the same storage that is the disk as of one of `snapshots`.

        It is there to be mapped and read while this one may go on being written, and is never closed.
        """
        raise Unsupported(f"{self.format} images have no internal snapshots")

    async def fill_snapshots(self, fills: Sequence[Fill]) -> None:
        """Have snapshots hold themselves, in whole clusters, what they take from below; all of them or none."""
        raise Unsupported(f"{self.format} images have no internal snapshots")

    async def show_snapshot(self, text: str) -> None:
        """Be, from now on and read-only, the disk as of the snapshot with an id or name. Raises `NotFound`."""
        raise Unsupported(f"{self.format} images have no internal snapshots")

    async def create_snapshot(self, name: str, date: tuple[int, int]) -> None:
        """Keep the disk as it is now; ``date`` in seconds since the epoch and nanoseconds."""
        raise Unsupported(f"{self.format} images have no internal snapshots")

    async def apply_snapshot(self, text: str) -> None:
        """Make the disk what it was, size included, at the snapshot with an id or name. Raises `NotFound`."""
        raise Unsupported(f"{self.format} images have no internal snapshots")

    async def delete_snapshot(self, name: str) -> None:
        """Forget the first snapshot with a name. Raises `NotFound`."""
        raise Unsupported(f"{self.format} images have no internal snapshots")

    async def details(self) -> dict[str, Any]:
        """Facts for ``info``: the ``data`` object of ``qemu-img info --output=json`` under ``format-specific``."""
        return {}

    async def close(self) -> None:
        """Flush what is dirty, if writable, and close the storage, also if flushing fails."""
        try:
            if not self.storage.read_only:
                await self.flush()
                await self.settle()
        finally:
            await self.close_storages()

    async def close_storages(self) -> None:
        """Let go of all files, without flushing."""
        for storage in self.storages:
            await storage.close()
