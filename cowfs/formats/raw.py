"""Raw: the guest's bytes as they are. What a format must supply at the least can be read here."""

from collections.abc import Mapping

from cowfs.block.extent import Extent, Kind
from cowfs.block.image import Backing, Image
from cowfs.errors import UsageError
from cowfs.formats.options import parse_choice, refuse_unknown
from cowfs.storage.base import Storage


class RawImage(Image):
    """A storage, byte for byte."""

    format = "raw"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.size = storage.length

    def lookup(self, offset: int, length: int) -> list[Extent]:
        """Everything is data, where the guest sees it."""
        return [Extent(Kind.DATA, offset, length, offset)]

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Holes of the host file read as zeros."""
        return [
            Extent(Kind.ZERO if region.hole else Kind.DATA, region.offset, region.length, region.offset)
            for region in await self.storage.regions(offset, length)
        ]

    async def write_zeroes(self, offset: int, length: int) -> bool:
        """Punch a hole."""
        await self.storage.punch(offset, length)
        return True

    async def grow(self, size: int, zeroed_until: int) -> None:
        """Lengthen the file; nothing can be below it."""
        await self.storage.truncate(size)
        await self.storage.flush()
        self.size = size


OPTIONS = {
    "size": "size of the disk in bytes, with an optional suffix",
    "preallocation": "off, falloc or full",
}


async def open_image(storage: Storage) -> RawImage:
    """Any storage will do."""
    return RawImage(storage)


def probe(head: bytes) -> bool:
    """Whatever nothing else claims is raw."""
    return True


async def create(storage: Storage, size: int, backing: Backing | None, options: Mapping[str, str]) -> None:
    """Make a file of ``size`` bytes of zeros."""
    refuse_unknown("raw", options, OPTIONS)
    if backing is not None:
        raise UsageError("raw images cannot have a backing file")
    preallocation = parse_choice(options, "preallocation", ("off", "falloc", "full"))
    await storage.truncate(size)
    if preallocation != "off":
        await storage.preallocate(size, full=preallocation == "full")
