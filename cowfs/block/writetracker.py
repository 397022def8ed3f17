"""Which parts of a disk were written since a job looked at them."""

from cowfs.block.alignment import Area, align_down, align_up


class WriteTracker:
    """A set of chunks, each ``chunk`` bytes of the guest's disk, that were written after they were cleared."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self._written: set[int] = set()

    def mark(self, offset: int, length: int) -> None:
        """Note a write. Called before the write is made, under the range lock or in one breath with it."""
        self._written.update(range(offset // self.chunk, (offset + length - 1) // self.chunk + 1))

    def clear(self, offset: int, length: int) -> None:
        """Forget the writes to the chunks of a range."""
        self._written.difference_update(range(offset // self.chunk, -(-(offset + length) // self.chunk)))

    def restart(self) -> None:
        """Forget everything."""
        self._written.clear()

    def touched(self, offset: int, end: int, unit: int) -> list[Area]:
        """Whole units of a range in which anything was written, in order; ``offset`` and ``end`` lie between units."""
        first, last = offset // self.chunk, -(-end // self.chunk)
        if self._written.isdisjoint(range(first, last)):
            return []
        found: list[Area] = []
        for number in sorted(number for number in self._written if first <= number < last):
            start = max(offset, align_down(number * self.chunk, unit))
            stop = min(end, align_up((number + 1) * self.chunk, unit))
            if found and start <= found[-1][1]:
                start = found.pop()[0]
            found.append((start, stop))
        return found
