"""What the kernel has taken for a disk, and could not hand over.

A program that writes through the kernel's cache is answered before cowfs sees the bytes. If cowfs then cannot store
them, the kernel says so to one fsync, and takes its pages for written: the next fsync would succeed, and later the old
content come back. So it is remembered here what is missing, and every fsync fails until that has been written again.
"""

from cowfs.block.freespace import FreeRuns
from cowfs.errors import CowfsError, StorageError

#: runs that are told apart; beyond that, what lies between the first and the last is missing too
MAX_RUNS = 1 << 16


class LostWrites:
    """Byte ranges of one disk that were written, are not stored, and are not in the kernel's cache for long either."""

    def __init__(self) -> None:
        self._runs = FreeRuns()
        self._why: CowfsError | None = None

    def __bool__(self) -> bool:
        """Whether anything is missing."""
        return self._runs.total > 0

    def add(self, offset: int, length: int, why: CowfsError) -> None:
        """Remember that a range could not be stored."""
        self._runs.discard(offset, offset + length)
        self._runs.add(offset, length)
        self._why = why
        if len(self._runs) > MAX_RUNS:
            runs = list(self._runs)
            start, end = runs[0][0], sum(runs[-1])
            self._runs = FreeRuns()
            self._runs.add(start, end - start)

    def rewritten(self, offset: int, length: int) -> None:
        """Something else was stored in a range, or it is no part of the disk any more."""
        self._runs.discard(offset, offset + length)

    def require_none(self) -> None:
        """Raise `StorageError`, with the errno of the last write that failed, if anything is missing."""
        if self._why is not None and self:
            raise StorageError(
                f"{self._runs.total} bytes that were written before are lost, until they are written again:"
                f" {self._why.message}",
                errno=self._why.errno,
                file=self._why.file,
            )
