"""Which clusters of a QED file may be handed out.

The format has no record of free space: clusters come from the end of the file, or from what was let go of
since the image was opened. What is free inside the file when it is closed is a leak.
"""

import errno

from cowfs.block.freespace import FreeRuns
from cowfs.errors import StorageError


class Space:
    """Free clusters; all numbers count clusters. Everything is reserved on return, in one breath."""

    def __init__(self, end: int, limit: int | None = None) -> None:
        """``limit`` is what the storage can hold, if it cannot grow."""
        #: the cluster after the last one that is in use or handed out
        self.end = end
        self.free = FreeRuns()
        self._limit = limit

    def take(self, count: int) -> tuple[int, int]:
        """Take up to ``count`` adjacent clusters, first from what is free: (first, how many).

        Like all that take, it raises `StorageError` at the end of a storage that cannot grow.
        """
        run = self.free.peek(count)
        if run is None:
            if self._limit is not None:
                count = max(1, min(count, self._limit - self.end))
            return self.append(count), count
        self.free.take(*run)
        return run

    def take_all(self, count: int) -> int:
        """Take exactly ``count`` adjacent clusters; returns the first."""
        run = self.free.peek(count)
        if run is None or run[1] < count:
            return self.append(count)
        self.free.take(*run)
        return run[0]

    def append(self, count: int) -> int:
        """Take ``count`` clusters at the end of the file; returns the first."""
        if self._limit is not None and self.end + count > self._limit:
            raise StorageError("is full", errno=errno.ENOSPC)
        first = self.end
        self.end += count
        return first

    def give(self, first: int, count: int) -> None:
        """Take clusters back that nothing on disk or in memory refers to."""
        self.free.add(first, count)

    def cut(self) -> None:
        """Let the file end with the last cluster in use."""
        first = self.free.take_last_before(self.end)
        if first is not None:
            self.end = first
