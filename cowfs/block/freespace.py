"""Host clusters that were let go of and may be handed out again."""

from bisect import bisect_left
from collections.abc import Iterator


class FreeRuns:
    """A set of cluster numbers, kept as maximal runs in ascending order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._lengths: dict[int, int] = {}
        self.total = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Runs in ascending order: (start, count)."""
        return iter([(start, self._lengths[start]) for start in self._starts])

    def add(self, start: int, count: int) -> None:
        """Put ``count`` clusters from ``start`` in; they must not be in yet."""
        self.total += count
        place = bisect_left(self._starts, start)
        if place < len(self._starts) and self._starts[place] == start + count:
            count += self._lengths.pop(self._starts.pop(place))
        if place and self._starts[place - 1] + self._lengths[self._starts[place - 1]] == start:
            self._lengths[self._starts[place - 1]] += count
            return
        self._starts.insert(place, start)
        self._lengths[start] = count

    def peek(self, count: int) -> tuple[int, int] | None:
        """Return the first run that holds ``count`` clusters, or else the longest: (start, how many of them)."""
        best: tuple[int, int] | None = None
        for start in self._starts:
            length = self._lengths[start]
            if length >= count:
                return start, count
            if best is None or length > best[1]:
                best = start, length
        return best

    def take(self, start: int, count: int) -> None:
        """Take ``count`` clusters out from the start of the run that begins at ``start``."""
        place = bisect_left(self._starts, start)
        length = self._lengths.pop(self._starts.pop(place))
        self.total -= count
        if length > count:
            self._starts.insert(place, start + count)
            self._lengths[start + count] = length - count

    def take_last_before(self, end: int) -> int | None:
        """Take out the run that ends right at ``end``, if there is one, and return its start."""
        if not self._starts:
            return None
        start = self._starts[-1]
        if start + self._lengths[start] != end:
            return None
        self._starts.pop()
        self.total -= self._lengths.pop(start)
        return start
