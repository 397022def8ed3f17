"""A part of another storage as a storage of its own: ``offset`` and ``size`` of QEMU's raw driver."""

import errno
from collections.abc import Sequence

from cowfs.errors import InvalidImage, ReadOnly, StorageError
from cowfs.storage.base import Move, ReadBuffers, Region, Storage, WriteBuffers


class WindowStorage(Storage):
    """What another storage has from ``offset`` on, and nothing else of it: for reading, writing, and giving space back.

    With a ``size`` it has so many bytes for good, else it ends where the whole does, and grows and shrinks with it.
    """

    def __init__(self, name: str, whole: Storage, offset: int, size: int | None) -> None:
        """Take over a storage, which is closed with this one. Raises `InvalidImage` where it has no such part."""
        end = offset + (size or 0)
        if end > whole.length:
            raise InvalidImage(
                f"has {whole.length} bytes, and no part that reaches from {offset} to {end}", file=whole.name
            )
        self.name = name
        self.whole = whole
        self.offset = offset
        self._size = size
        self.read_only = whole.read_only
        self.is_remote = whole.is_remote
        self._look()

    def _look(self) -> None:
        """See how long it is after the whole may have changed."""
        self.length = self._size if self._size is not None else max(self.whole.length - self.offset, 0)

    @property
    def identity(self) -> tuple[object, ...]:
        """That of the whole: who writes there may write here."""
        return self.whole.identity

    @property
    def extent(self) -> tuple[int, int | None]:
        """Where it lies in the whole."""
        return self.offset, self._size

    @property
    def keeps_old_bytes(self) -> bool:
        """Nobody empties a part."""
        return True

    @property
    def limit(self) -> int | None:
        """Its size, or what the whole can have behind where it begins."""
        if self._size is not None or self.whole.limit is None:
            return self._size
        return self.whole.limit - self.offset

    @property
    def place(self) -> str:
        """That of the whole."""
        return self.whole.place

    @property
    def version(self) -> str:
        """That of the whole."""
        return self.whole.version

    @property
    def allocated(self) -> int:
        """What the whole takes, as with QEMU."""
        return self.whole.allocated

    @property
    def modified_ns(self) -> int:
        """Nobody knows: what the whole tells may be about what lies outside."""
        return 0

    # -- reading

    def read_now(self, offset: int, buffers: ReadBuffers) -> bool:
        """As the whole does; what lies behind the end are zeros, whatever the whole has there."""
        inside, rest = self._cut(offset, buffers)
        if inside and not self.whole.read_now(self.offset + offset, inside):
            return False
        _zero(rest)
        return True

    async def read(self, offset: int, buffers: ReadBuffers) -> None:
        """See `read_now`."""
        inside, rest = self._cut(offset, buffers)
        if inside:
            await self.whole.read(self.offset + offset, inside)
        _zero(rest)

    async def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """As the whole does where all of that is inside."""
        if all(offset + length <= self.length for offset, length in ranges):
            return await self.whole.read_each([(self.offset + offset, length) for offset, length in ranges])
        return await super().read_each(ranges)

    def _cut(self, offset: int, buffers: ReadBuffers) -> tuple[ReadBuffers, list[memoryview]]:
        """Buffers for what is inside, and those for what is behind the end."""
        room = max(self.length - offset, 0)
        total = sum(map(len, buffers))
        if total <= room:
            return buffers, []
        inside: list[memoryview] = []
        rest: list[memoryview] = []
        for buffer in buffers:
            size = min(len(buffer), room)
            room -= size
            if size:
                inside.append(buffer[:size])
            if size < len(buffer):
                rest.append(buffer[size:])
        return inside, rest

    # -- writing

    def _require_inside(self, end: int) -> None:
        if self.read_only:
            raise ReadOnly("is open read-only", file=self.name)
        if self._size is not None and end > self._size:
            raise StorageError(
                f"has {self._size} bytes, as its name says, and no place for more", errno=errno.ENOSPC, file=self.name
            )

    def write_now(self, offset: int, buffers: WriteBuffers) -> bool:
        """As the whole does, but never behind the end of a window that has one."""
        self._require_inside(offset + sum(map(len, buffers)))
        try:
            return self.whole.write_now(self.offset + offset, buffers)
        finally:
            self._look()

    async def write(self, offset: int, buffers: WriteBuffers) -> None:
        """See `write_now`."""
        self._require_inside(offset + sum(map(len, buffers)))
        try:
            await self.whole.write(self.offset + offset, buffers)
        finally:
            self._look()

    async def copy_in(self, moves: Sequence[Move]) -> None:
        """As the whole does."""
        for move in moves:
            self._require_inside(move.offset + move.length)
        try:
            await self.whole.copy_in([move._replace(offset=self.offset + move.offset) for move in moves])
        finally:
            self._look()

    async def flush(self) -> None:
        """Flush the whole."""
        await self.whole.flush()

    async def truncate(self, length: int) -> None:
        """Set the end of the whole, without a size; with one, it keeps that, as a device does."""
        self._require_inside(length)
        if self._size is None:
            try:
                await self.whole.truncate(self.offset + length)
            finally:
                self._look()

    async def punch(self, offset: int, length: int) -> None:
        """As the whole does, inside."""
        length = min(length, self.length - offset)
        if length > 0:
            await self.whole.punch(self.offset + offset, length)

    async def discard(self, offset: int, length: int) -> None:
        """As the whole does, inside."""
        length = min(length, self.length - offset)
        if length > 0:
            await self.whole.discard(self.offset + offset, length)

    async def preallocate(self, length: int, *, full: bool) -> None:
        """Take the space of the first ``length`` bytes; ``full`` writes zeros there."""
        self._require_inside(length)
        if full:
            await self.copy_in([Move(None, 0, 0, length)])
        else:
            self.take_space(0, length)

    def free_space(self) -> int | None:
        """That of the whole."""
        return self.whole.free_space()

    def take_space(self, offset: int, length: int) -> None:
        """As the whole does."""
        self._require_inside(offset + length)
        try:
            self.whole.take_space(self.offset + offset, length)
        finally:
            self._look()

    # -- the rest

    async def regions(self, offset: int, length: int) -> list[Region]:
        """Those of the whole; behind the end is a hole."""
        inside = max(min(length, self.length - offset), 0)
        found = await self.whole.regions(self.offset + offset, inside) if inside else []
        found = [region._replace(offset=region.offset - self.offset) for region in found]
        if inside < length:
            found.append(Region(offset + inside, length - inside, hole=True))
        return found

    def stop_holding(self) -> None:
        """As the whole does."""
        self.whole.stop_holding()

    async def reopen(self, *, writable: bool) -> None:
        """As the whole does."""
        await self.whole.reopen(writable=writable)
        self.read_only = self.whole.read_only

    async def close(self) -> None:
        """Close the whole."""
        await self.whole.close()


def _zero(buffers: Sequence[memoryview]) -> None:
    for buffer in buffers:
        buffer[:] = bytes(len(buffer))
