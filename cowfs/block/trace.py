"""Access traces: which ranges of a disk were fetched from below its active layer, in the order of their first reads.

The file is text, so that it can be looked at and cut with ordinary tools: ``cowfs-trace: 1``, ``size: BYTES``, and then
a line ``OFFSET LENGTH`` for each range, in bytes. Lines that begin with ``#`` are comments. Whoever reads it takes it
for a hint: ranges may lie anywhere in the disk, overlap, or be of no use.
"""

from typing import NamedTuple

from cowfs.errors import UsageError

#: ranges of a trace, and clusters that are told apart while one is recorded
MAX_RANGES = 1 << 16
MAX_CLUSTERS = 1 << 20
#: bytes of the file: enough for the most ranges of the largest numbers, and some comments
MAX_BYTES = 4 << 20

_FIRST = "cowfs-trace: 1"


class Trace(NamedTuple):
    """Bytes of the disk, and offset and length of ranges, in the order in which they are wanted."""

    size: int
    ranges: list[tuple[int, int]]

    def render(self) -> bytes:
        """Return the file's content."""
        lines = [_FIRST, f"size: {self.size}", *(f"{offset} {length}" for offset, length in self.ranges)]
        return "".join(f"{line}\n" for line in lines).encode()

    @classmethod
    def parse(cls, data: bytes) -> "Trace":
        """Read a file's content. Raises `UsageError`, with the line that is wrong."""
        lines = data.decode("ascii", "replace").split("\n")
        if lines[0].rstrip() != _FIRST:
            raise UsageError("is no trace that this program knows: it does not begin with 'cowfs-trace: 1'")
        size: int | None = None
        ranges: list[tuple[int, int]] = []
        for number, line in enumerate(lines[1:], start=2):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if size is None:
                size = _number(words[1]) if len(words) == 2 and words[0] == "size:" else None
                if size is None:
                    raise UsageError(f"line {number}: is not 'size: BYTES'")
                continue
            values = [_number(word) for word in words]
            if len(values) != 2 or values[0] is None or values[1] is None or not 0 < values[1] <= size - values[0]:
                raise UsageError(f"line {number}: is not OFFSET LENGTH of a part of the disk")
            ranges.append((values[0], values[1]))
            if len(ranges) > MAX_RANGES:
                raise UsageError(f"has more than {MAX_RANGES} ranges")
        if size is None:
            raise UsageError("does not say the size of the disk")
        return cls(size, ranges)


def _number(word: str) -> int | None:
    return int(word) if word.isascii() and word.isdecimal() and len(word) < 20 and int(word) < 1 << 63 else None


class Recording:
    """A trace in the making. ``unit`` is the bytes of a cluster; ranges that are noted are whole clusters."""

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._seen: set[int] = set()
        self.ranges: list[tuple[int, int]] = []
        self.bytes = 0
        #: whether there was more than it takes
        self.is_full = False

    def note(self, start: int, end: int) -> None:
        """Clusters were fetched; those that were before are left out."""
        for number in range(start // self._unit, end // self._unit):
            if number in self._seen:
                continue
            offset = number * self._unit
            follows = bool(self.ranges) and sum(self.ranges[-1]) == offset
            if len(self._seen) >= MAX_CLUSTERS or (not follows and len(self.ranges) >= MAX_RANGES):
                self.is_full = True
                return
            self._seen.add(number)
            self.bytes += self._unit
            if follows:
                self.ranges[-1] = (self.ranges[-1][0], self.ranges[-1][1] + self._unit)
            else:
                self.ranges.append((offset, self._unit))

    def trace(self, size: int) -> Trace:
        """Return what has been recorded of a disk of so many bytes."""
        inside = [(offset, min(length, size - offset)) for offset, length in self.ranges if offset < size]
        return Trace(size, inside)
