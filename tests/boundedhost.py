"""Hosts that have only so much room: a file system of so many bytes, and a block device of one size."""

import errno

from powercut import RecordingStorage

from cowfs.block.alignment import align_down, align_up
from cowfs.errors import StorageError
from cowfs.storage.base import WriteBuffers

#: bytes that a file system gives, or takes back, at once
BLOCK = 4096


class FullFileSystem(RecordingStorage):
    """The only file of a file system of ``room`` bytes: ENOSPC, with a part of a write made, beyond it."""

    def __init__(self, name: str, room: int, *, cold: bool = False) -> None:
        self.room = align_up(room, BLOCK)
        self.error = errno.ENOSPC
        self.blocks: set[int] = set()
        super().__init__(name, cold=cold)

    @property
    def allocated(self) -> int:
        return len(self.blocks) * BLOCK

    def free_space(self) -> int | None:
        return self.room - self.allocated

    def _take(self, offset: int, length: int) -> int:
        """Take blocks for a range; the bytes from its start for which there is room."""
        for number in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
            if number not in self.blocks:
                if self.allocated >= self.room:
                    return max(0, number * BLOCK - offset)
                self.blocks.add(number)
        return length

    def _store(self, offset: int, buffers: WriteBuffers) -> None:
        data = b"".join(buffers)
        done = self._take(offset, len(data))
        super()._store(offset, [data[:done]])
        if done < len(data):
            raise StorageError("cannot write: no space", errno=self.error, file=self.name)

    def take_space(self, offset: int, length: int) -> None:
        before = set(self.blocks)
        if self._take(offset, length) < length:
            # as of fallocate: all or nothing
            self.blocks = before
            raise StorageError("cannot take space", errno=self.error, file=self.name)
        super().take_space(offset, length)

    def _make_hole(self, offset: int, length: int) -> None:
        super()._make_hole(offset, length)
        self.blocks -= set(range(-(-offset // BLOCK), (offset + length) // BLOCK))

    def _cut(self, length: int) -> None:
        super()._cut(length)
        self.blocks = {number for number in self.blocks if number * BLOCK < length}


class Device(RecordingStorage):
    """A block device, which has one size for ever, and nothing but garbage in it to begin with."""

    def __init__(self, name: str, size: int, *, cold: bool = False) -> None:
        super().__init__(name, b"\xa5" * align_down(size, 512), cold=cold)

    @property
    def keeps_old_bytes(self) -> bool:
        return True

    def _store(self, offset: int, buffers: WriteBuffers) -> None:
        data = b"".join(buffers)
        done = min(len(data), max(0, self.length - offset))
        if done:
            super()._store(offset, [data[:done]])
        if done < len(data):
            raise StorageError("cannot write: no space", errno=errno.ENOSPC, file=self.name)

    def take_space(self, offset: int, length: int) -> None:
        pass

    async def truncate(self, length: int) -> None:
        if length > self.length:
            raise StorageError("the device is too small", errno=errno.ENOSPC, file=self.name)
