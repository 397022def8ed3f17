"""qcow2 with an external data file (incompatible bit 2): metadata in one file, the guest's data in another.

Every guest cluster has its place in the data file, at the same offset. So nothing is searched for, counted or
given back there: allocating a cluster means no more than to enter that its data is valid. QEMU takes images
that have it otherwise for corrupt.

With raw external data (autoclear bit 1) the data file can also be read without the image. So it always holds
what the guest sees: zeros are punched into it, and no cluster that has been zeroed is entered as anything but data.
"""

from cowfs.block.alignment import align_up
from cowfs.block.extent import NO_OFFSET, Extent, Kind
from cowfs.block.image import Backing
from cowfs.block.metacache import Table
from cowfs.errors import CorruptImage, Unsupported
from cowfs.formats.qcow2.extended import ExtendedImage
from cowfs.formats.qcow2.image import Qcow2Image
from cowfs.formats.qcow2.layout import AUTOCLEAR_RAW_DATA, COMPRESSED, COPIED
from cowfs.storage.base import Storage

#: bytes of the disk whose mapping is looked up at once
WINDOW = 1 << 30


class ExternalDataImage(Qcow2Image):
    """A qcow2 image with an external data file, raw or not."""

    # the last cluster of the data file is no longer than the disk, so that raw readers see its true size
    writes_past_end = False
    kept_autoclear = AUTOCLEAR_RAW_DATA
    packs = False

    _data: Storage | None = None

    @property
    def is_raw(self) -> bool:
        """Whether the data file can be read without the image."""
        return bool(self.header.autoclear & AUTOCLEAR_RAW_DATA)

    @property
    def data_storage(self) -> Storage:
        """The data file; whoever opens the image has attached it."""
        assert self._data is not None, "an image with a data file is of no use without it"
        return self._data

    @property
    def storages(self) -> tuple[Storage, ...]:
        """The image, and the data file once it is attached."""
        return (self.storage,) if self._data is None else (self.storage, self._data)

    def attach_data(self, storage: Storage) -> None:
        """From now on, flushes make the data file durable first."""
        self._data = self.tables.data_storage = storage

    # -- entries

    def decode(self, entry: int) -> tuple[Kind, int]:
        """Offset 0 is a place like any other, told from none by the copied flag; nothing is compressed."""
        if entry == COPIED:
            return Kind.DATA, 0
        if entry & COMPRESSED:
            raise CorruptImage("an image with an external data file has a compressed cluster", file=self.storage.name)
        return super().decode(entry)

    def place(self, offset: int, length: int) -> int:
        """Left to `lookup`, which sees that guest and host offsets are the same."""
        return NO_OFFSET

    def _lookup_span(self, offset: int, length: int) -> list[Extent] | None:
        """Guest and host offsets are the same."""
        extents = super()._lookup_span(offset, length)
        for extent in extents or ():
            if extent.host_offset not in (NO_OFFSET, extent.offset):
                raise CorruptImage(
                    f"guest offset {extent.offset:#x} has its data at offset {extent.host_offset:#x} of the data file",
                    file=self.storage.name,
                )
        return extents

    # -- space

    async def allocate_data(self, offset: int, count: int) -> tuple[int, int]:
        """All of it, where the guest has it."""
        return offset, count

    def take_now(self, offset: int) -> int:
        """Whoever reads the data file by itself wants whole clusters there."""
        return NO_OFFSET

    def _vet_table(self, table: Table) -> None:
        """No metadata lies among the data."""

    async def free_entry(self, entry: int) -> None:
        """A place in the data file belongs to its guest cluster for ever."""

    async def write_zeroes(self, offset: int, length: int) -> bool:
        """Punch a hole into the data file first: that is right whatever the tables say of it after a crash."""
        await self.data_storage.punch(offset, length)
        if self.is_raw:
            await self._claim(offset, length)
            return True
        return await super().write_zeroes(offset, length)

    async def deallocate(self, offset: int, length: int) -> None:
        """Below a raw data file there is nothing that could shine through. Space is given back by `compact`."""
        if self.is_raw:
            await self.write_zeroes(offset, length)
        else:
            await super().deallocate(offset, length)

    async def discard(self, offset: int, length: int, *, bare: bool) -> bool:
        """Punch a hole into the data file first, as `write_zeroes` does."""
        if self.is_raw or not bare:
            return await self.write_zeroes(offset, length)
        await self.data_storage.punch(offset, length)
        return await super().discard(offset, length, bare=True)

    async def _claim(self, offset: int, length: int) -> None:
        """Enter that the data file is valid for whole units."""
        end = align_up(min(offset + length, self.size), self.unit)
        for extent in await self.map(offset, end - offset):
            if extent.kind is not Kind.DATA:
                self.link(await self.reserve(extent.offset, extent.length))

    async def compact(self) -> None:
        """Punch holes where the image says nothing, or zeros."""
        await self.readers.gone()
        for start in range(0, self.size, WINDOW):
            for extent in await self.map(start, min(WINDOW, self.size - start)):
                if extent.kind is not Kind.DATA:
                    await self.data_storage.punch(extent.offset, extent.length)

    # -- the image as a whole

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Holes of the data file read as zeros."""
        return await self.split_at_holes(await self.map(offset, length))

    async def grow(self, size: int, zeroed_until: int) -> None:
        """The data file grows too; what a longer one has there already is no part of the disk."""
        old = self.size
        await self.data_storage.punch(old, size - old)
        if self.data_storage.length < size:
            await self.data_storage.truncate(size)
        await super().grow(size, zeroed_until)
        if self.is_raw:
            start = align_up(old, self.unit)
            for position in range(start, size, WINDOW):
                await self._claim(position, min(WINDOW, size - position))
                await self.flush()

    async def set_backing(self, backing: Backing | None) -> None:
        """Who reads a raw data file does not see what lies below the image."""
        if self.is_raw and backing is not None:
            raise Unsupported("an image whose external data file is raw cannot have a backing file")
        await super().set_backing(backing)


class ExternalExtendedImage(ExternalDataImage, ExtendedImage):
    """A qcow2 image with an external data file and extended L2 entries."""
