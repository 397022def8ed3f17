"""Which clusters of a QED file may be handed out.

The format has no record of free space: clusters come from the end of the file, or from what was let go of
since the image was opened. What is free inside the file when it is closed is a leak.
"""

from cowfs.block.freespace import FreeRuns


class Space:
    """Free clusters; all numbers count clusters. Everything is reserved on return, in one breath."""

    def __init__(self, end: int) -> None:
        #: the cluster after the last one that is in use or handed out
        self.end = end
        self.free = FreeRuns()

    def take(self, count: int) -> tuple[int, int]:
        """Take up to ``count`` adjacent clusters, first from what is free: (first, how many)."""
        run = self.free.peek(count)
        if run is None:
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
