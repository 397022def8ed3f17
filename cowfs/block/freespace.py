"""Host clusters that were let go of and may be handed out again."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from itertools import islice

#: runs of similar length that are looked at for one that fits
_PATIENCE = 64


class FreeRuns:
    """A set of cluster numbers, kept as maximal runs in ascending order.

    Runs are found by length too: those with the same number of binary digits in their lengths are kept together.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._lengths: dict[int, int] = {}
        self._classes: list[list[int]] = []
        self.total = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Runs in ascending order: (start, count)."""
        return iter([(start, self._lengths[start]) for start in self._starts])

    def __len__(self) -> int:
        """How many runs there are."""
        return len(self._starts)

    def _insert(self, start: int, count: int) -> None:
        insort(self._starts, start)
        self._lengths[start] = count
        while len(self._classes) <= count.bit_length():
            self._classes.append([])
        insort(self._classes[count.bit_length()], start)
        self.total += count

    def _delete(self, start: int) -> int:
        """Take a run out; returns its length."""
        count = self._lengths.pop(start)
        self._starts.pop(bisect_left(self._starts, start))
        alike = self._classes[count.bit_length()]
        alike.pop(bisect_left(alike, start))
        self.total -= count
        return count

    def add(self, start: int, count: int) -> None:
        """Put ``count`` clusters from ``start`` in; they must not be in yet."""
        if start + count in self._lengths:
            count += self._delete(start + count)
        before = self.around(start - 1)
        if before is not None:
            start, count = before[0], count + self._delete(before[0])
        self._insert(start, count)

    def around(self, cluster: int) -> tuple[int, int] | None:
        """Return the run that a cluster is in: (start, count)."""
        place = bisect_right(self._starts, cluster) - 1
        if place < 0:
            return None
        start = self._starts[place]
        return (start, self._lengths[start]) if cluster < start + self._lengths[start] else None

    def fitting(self, count: int) -> int | None:
        """Return the start of a run of at least ``count`` clusters, not much longer than that if there is one."""
        alike = self._classes[count.bit_length()] if count.bit_length() < len(self._classes) else []
        for start in islice(alike, _PATIENCE):
            if self._lengths[start] >= count:
                return start
        for longer in self._classes[count.bit_length() + 1 :]:
            if longer:
                return longer[0]
        return None

    def longest(self) -> tuple[int, int] | None:
        """Return one of the longest runs: (start, count)."""
        for alike in reversed(self._classes):
            if alike:
                start = max(islice(alike, _PATIENCE), key=lambda start: self._lengths[start])
                return start, self._lengths[start]
        return None

    def peek(self, count: int) -> tuple[int, int] | None:
        """Return a run that holds ``count`` clusters, or else one of the longest: (start, how many of them)."""
        start = self.fitting(count)
        return self.longest() if start is None else (start, count)

    def take(self, start: int, count: int) -> None:
        """Take ``count`` clusters out, which must all be in one run."""
        run = self.around(start)
        assert run is not None and start + count <= sum(run), "not free"
        first, length = run
        self._delete(first)
        if first < start:
            self._insert(first, start - first)
        if start + count < first + length:
            self._insert(start + count, first + length - start - count)

    def discard(self, start: int, end: int) -> None:
        """Take out whatever is in from ``start`` up to ``end``."""
        while start < end:
            run = self.around(start)
            if run is None:
                place = bisect_left(self._starts, start)
                if place == len(self._starts):
                    return
                start = self._starts[place]
                continue
            stop = min(end, sum(run))
            self.take(start, stop - start)
            start = stop

    def take_last_before(self, end: int) -> int | None:
        """Take out the run that ends right at ``end``, if there is one, and return its start."""
        run = self.around(end - 1)
        if run is None or sum(run) != end:
            return None
        self._delete(run[0])
        return run[0]
