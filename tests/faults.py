"""Storages that get into trouble at one operation out of all, and what the kernel makes of it."""

from errno import EIO

from storages import MemoryStorage

from cowfs.errors import StorageError
from cowfs.storage.base import ReadBuffers, WriteBuffers

SECTOR = 512


class Trouble:
    """Strikes once, at one storage operation out of all that are made; may be shared by several storages."""

    def __init__(self, at: int, error: int = EIO, *, short: bool = False) -> None:
        self.left = at
        self.error = error
        #: whether a write that fails has written a part
        self.short = short
        #: operation that it struck
        self.struck = ""

    def strike(self, operation: str) -> None:
        """Count an operation, and raise if it is the one."""
        self.left -= 1
        if self.left == -1:
            self.struck = operation
            self.hit(operation)

    def hit(self, operation: str) -> None:
        """What the trouble is."""
        raise StorageError(f"cannot {operation}", errno=self.error)


class FaultyStorage(MemoryStorage):
    """A storage in ``trouble``, if it has one. After a flush that failed every later one fails."""

    trouble: Trouble | None = None
    flush_error: StorageError | None = None

    def _strike(self, operation: str) -> None:
        if self.trouble is not None:
            self.trouble.strike(operation)

    def _strike_write(self, offset: int, buffers: WriteBuffers) -> None:
        try:
            self._strike("write")
        except StorageError:
            if self.trouble is not None and self.trouble.short:
                data = b"".join(buffers)
                self._store(offset, [data[: len(data) // 2 // SECTOR * SECTOR]])
            raise

    def read_now(self, offset: int, buffers: ReadBuffers) -> bool:
        if not self.cold:
            self._strike("read")
        return super().read_now(offset, buffers)

    async def read(self, offset: int, buffers: ReadBuffers) -> None:
        self._strike("read")
        await super().read(offset, buffers)

    def write_now(self, offset: int, buffers: WriteBuffers) -> bool:
        if not self.cold:
            self._strike_write(offset, buffers)
        return super().write_now(offset, buffers)

    async def write(self, offset: int, buffers: WriteBuffers) -> None:
        self._strike_write(offset, buffers)
        await super().write(offset, buffers)

    async def flush(self) -> None:
        if self.flush_error is not None:
            raise self.flush_error
        try:
            self._strike("flush")
        except StorageError as error:
            self.flush_error = error
            raise
        await super().flush()

    def take_space(self, offset: int, length: int) -> None:
        self._strike("take space")
        super().take_space(offset, length)

    async def truncate(self, length: int) -> None:
        self._strike("truncate")
        await super().truncate(length)

    async def punch(self, offset: int, length: int) -> None:
        self._strike("punch")
        await super().punch(offset, length)
