"""What a storage is: the place where one image's bytes live. It knows nothing of formats.

Every operation has two forms where speed asks for it. The ``…_now`` form answers on the spot, without
suspending, or says that it cannot; the awaitable form always completes. Buffers are filled and written in
full: a short transfer never leaves this layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, MutableMapping, Sequence
from typing import Any, NamedTuple

#: bytes copied at once
COPY_CHUNK = 1 << 20

ReadBuffers = Sequence[memoryview]
WriteBuffers = Sequence[bytes | bytearray | memoryview]


class Region(NamedTuple):
    """A stretch of a storage, in bytes; ``hole`` says that it reads as zeros and takes no space."""

    offset: int
    length: int
    hole: bool


class Move(NamedTuple):
    """Bytes to be copied from another storage, or zeros to be written if that is None."""

    source: "Storage | None"
    source_offset: int
    offset: int
    length: int


def in_two(moves: Sequence[Move]) -> tuple[list[Move], list[Move]]:
    """Cut moves into two parts of about as many bytes, at a multiple of 64 KiB of the target within a move."""
    left = sum(move.length for move in moves) // 2
    parts: tuple[list[Move], list[Move]] = [], []
    for source, source_offset, offset, length in moves:
        first = length if length <= left else max(0, (offset + left & -(64 << 10)) - offset)
        if first:
            parts[0].append(Move(source, source_offset, offset, first))
        if first < length:
            parts[1].append(Move(source, source_offset + first, offset + first, length - first))
        left = left - length if length <= left else 0
    return parts


class Storage(ABC):
    """A flat, growable array of bytes.

    Reads past the end give zeros, as the block layer of QEMU does: an image's last cluster may be cut short.
    Callers that must know compare with ``length`` first. All errors are `cowfs.errors.StorageError`.
    """

    #: what the user calls it; goes into messages
    name: str
    #: bytes
    length: int
    read_only: bool
    #: whether it may go away for a while, and come back
    is_remote: bool = False
    #: what those who have the same bytes open for reading make of them, kept once for all of them, as long as any of
    #: them uses it; None where it cannot be known that the bytes are the same and do not change
    common: MutableMapping[Hashable, Any] | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        """What two storages over the same bytes have in common; tells shared layers and cycles."""
        return (self.name,)

    @property
    def extent(self) -> tuple[int, int | None]:
        """Which part it is of what has its `identity`: offset and bytes, None for all to the end."""
        return 0, None

    def overlaps(self, other: "Storage") -> bool:
        """Whether the two have bytes in common."""
        (start, size), (other_start, other_size) = self.extent, other.extent
        begins_before_end = other_size is None or start < other_start + other_size
        return self.identity == other.identity and begins_before_end and (size is None or other_start < start + size)

    @property
    def keeps_old_bytes(self) -> bool:
        """Whether making it anew leaves what was there before, as on a block device; else it starts out empty."""
        return False

    @property
    def limit(self) -> int | None:
        """Bytes that it can have at the most, whatever else is free: all of a device. None where it can grow."""
        return self.length if self.keeps_old_bytes else None

    @property
    def version(self) -> str:
        """What a store calls the version of its bytes, the same as long as they are; '' where nobody says that."""
        return ""

    @property
    def place(self) -> str:
        """Where that version was said; two of different places say nothing of each other, unless they are the same."""
        return ""

    @property
    @abstractmethod
    def allocated(self) -> int:
        """Bytes of the host's space that it takes, as ``st_blocks`` tells."""

    @property
    def modified_ns(self) -> int:
        """When its bytes were last changed, in nanoseconds since the epoch; 0 if nobody knows."""
        return 0

    @abstractmethod
    def read_now(self, offset: int, buffers: ReadBuffers) -> bool:
        """Fill ``buffers`` from ``offset`` without blocking; False if that is not possible, buffers undefined."""

    @abstractmethod
    async def read(self, offset: int, buffers: ReadBuffers) -> None:
        """Fill ``buffers`` from ``offset``; bytes past the end are zeros."""

    @abstractmethod
    def write_now(self, offset: int, buffers: WriteBuffers) -> bool:
        """Write all of ``buffers`` at ``offset`` without blocking; False if that is not possible."""

    @abstractmethod
    async def write(self, offset: int, buffers: WriteBuffers) -> None:
        """Write all of ``buffers`` at ``offset``, growing the storage where they reach past its end."""

    @abstractmethod
    async def flush(self) -> None:
        """Make durable every write that returned before this call.

        After one failure every later flush fails too: what the first one lost cannot be told.
        """

    @abstractmethod
    async def truncate(self, length: int) -> None:
        """Set the length; bytes that this adds are zeros."""

    @abstractmethod
    async def punch(self, offset: int, length: int) -> None:
        """Make a range read as zeros and give its space back where the host can."""

    async def discard(self, offset: int, length: int) -> None:
        """Give back the space of a range that nobody will read before it is written; it may read as anything."""
        await self.punch(offset, length)

    @abstractmethod
    async def preallocate(self, length: int, *, full: bool) -> None:
        """Take the host's space for the first ``length`` bytes now; ``full`` writes zeros there."""

    def free_space(self) -> int | None:
        """Bytes that the host could still give this storage; None where nobody knows, or there is nothing to give."""
        return None

    def take_space(self, offset: int, length: int) -> None:
        """Take the host's space for a range on the spot, so that writing there later cannot fail for want of it.

        Nothing where the host has no quick way to do so. Bytes keep their values; the storage grows if it ends before.
        """

    @abstractmethod
    async def regions(self, offset: int, length: int) -> list[Region]:
        """Data and holes of a range, in order and without gaps; all data where the host cannot tell."""

    def stop_holding(self) -> None:
        """Let requests fail that are held, and all later ones, if a server is away: the program is to end."""

    @abstractmethod
    async def reopen(self, *, writable: bool) -> None:
        """Change between reading and writing in place; requests under way are not disturbed."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of it. Does not flush. Closing twice is harmless."""

    async def copy_in(self, moves: Sequence[Move]) -> None:
        """Write copies of what other storages hold; nothing is said of the order."""
        for source, source_offset, offset, length in moves:
            for done in range(0, length, COPY_CHUNK):
                buffer = bytearray(min(COPY_CHUNK, length - done))
                if source is not None and not source.read_now(source_offset + done, [memoryview(buffer)]):
                    await source.read(source_offset + done, [memoryview(buffer)])
                if not self.write_now(offset + done, [buffer]):
                    await self.write(offset + done, [buffer])

    async def read_bytes(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``, zeros past the end."""
        buffer = bytearray(length)
        if not self.read_now(offset, [memoryview(buffer)]):
            await self.read(offset, [memoryview(buffer)])
        return bytes(buffer)

    async def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Offsets and lengths, each as `read_bytes` reads it; side by side where that saves time."""
        return [await self.read_bytes(offset, length) for offset, length in ranges]
