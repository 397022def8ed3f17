"""Raw: the guest's bytes as they are. What a format must supply at the least can be read here."""

from collections.abc import Callable, Mapping

from cowfs.block.alignment import align_up
from cowfs.block.disk import Disk
from cowfs.block.extent import Extent, Kind
from cowfs.block.image import Backing, Image
from cowfs.block.joined import SECTOR
from cowfs.block.metacache import DEFAULT_BOUND
from cowfs.errors import NotPermitted, Unsupported, UsageError
from cowfs.formats.measuring import Measured, disk_size
from cowfs.formats.options import parse_choice, refuse_unknown
from cowfs.storage.base import Storage


class RawImage(Image):
    """A storage, byte for byte."""

    format = "raw"
    is_flat = True

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.size = storage.length
        self._refusal: Callable[[bytes], str | None] = lambda head: None

    def guard_head(self, length: int, refusal: Callable[[bytes], str | None]) -> None:
        """Let ``refusal`` see the first ``length`` bytes before they change; a sentence from it refuses that.

        For an image whose format was guessed: a guest that writes another format's header into it would have
        it taken for an image of that format the next time, with a backing file of the guest's choice.
        """
        self.vetted, self._refusal = length, refusal

    def vet_head(self, head: bytes) -> None:
        """Ask whoever guards the start of the disk."""
        if sentence := self._refusal(head):
            raise NotPermitted(sentence, file=self.storage.name)

    def place(self, offset: int, length: int) -> int:
        """Where the guest sees it."""
        return offset

    def lookup(self, offset: int, length: int) -> list[Extent]:
        """Everything is data, where the guest sees it."""
        return [Extent(Kind.DATA, offset, length, offset)]

    async def has_holes(self) -> bool:
        """There is nothing else to tell zeros from data by."""
        return True

    async def write_zeroes(self, offset: int, length: int) -> bool:
        """Punch a hole."""
        await self.storage.punch(offset, length)
        return True

    async def discard(self, offset: int, length: int, *, bare: bool) -> bool:
        """The same: nothing can be below, and there is nothing to enter."""
        return await self.write_zeroes(offset, length)

    async def grow(self, size: int, zeroed_until: int) -> None:
        """Lengthen the file; nothing can be below it."""
        await self.storage.truncate(size)
        await self.storage.flush()
        self.size = size

    async def shrink(self, size: int) -> None:
        """Cut the file off."""
        await self.storage.truncate(size)
        await self.storage.flush()
        if self.storage.length != size:
            raise Unsupported("keeps its size, whatever is in it", file=self.storage.name)
        self.size = size


OPTIONS = {
    "size": "size of the disk in bytes, with an optional suffix",
    "preallocation": "off, falloc or full",
}
_PREALLOCATION = ("off", "falloc", "full")


async def open_image(storage: Storage, *, cache_size: int = DEFAULT_BOUND, for_repair: bool = False) -> RawImage:
    """Any storage will do; there are no tables to keep and nothing to repair."""
    return RawImage(storage)


def probe(head: bytes) -> bool:
    """Whatever nothing else claims is raw."""
    return True


async def create(storage: Storage, size: int, backing: Backing | None, options: Mapping[str, str]) -> None:
    """Make a file of ``size`` bytes of zeros."""
    refuse_unknown("raw", options, OPTIONS)
    if backing is not None:
        raise UsageError("raw images cannot have a backing file")
    preallocation = parse_choice(options, "preallocation", _PREALLOCATION)
    await storage.truncate(size)
    if preallocation != "off":
        await storage.preallocate(size, full=preallocation == "full")


async def measure(size: int, source: Disk | None, options: Mapping[str, str]) -> Measured:
    """Measure a file of ``size`` bytes, or one with the content of ``source``; holes count like data."""
    refuse_unknown("raw", options, OPTIONS)
    parse_choice(options, "preallocation", _PREALLOCATION)
    size = align_up(size, SECTOR) if source is None else disk_size(source)
    return Measured(size, size)
