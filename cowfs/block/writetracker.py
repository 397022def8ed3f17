"""Which parts of a disk were written since a job looked at them."""


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

    def touched(self, offset: int, length: int) -> bool:
        """Whether any chunk of a range was written."""
        return not self._written.isdisjoint(range(offset // self.chunk, -(-(offset + length) // self.chunk)))
