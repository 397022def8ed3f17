"""Saying where the bytes of a guest's range lie, and how they get into host space, so that the host can copy them.

What is said in moves need not pass through this process: `Storage.copy_in` has the host's kernel copy it, or share it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cowfs.storage.base import Move, Storage

#: bytes
SECTOR = 512


class Source(NamedTuple):
    """Where the content of a guest range lies; no storage stands for zeros. Bytes."""

    offset: int
    length: int
    storage: Storage | None
    host_offset: int

    @property
    def end(self) -> int:
        """Guest offset of the first byte after it."""
        return self.offset + self.length


def moves_into(
    host_offset: int, start: int, end: int, gaps: Iterable[tuple[int, int]], sources: Sequence[Source], *, blank: bool
) -> list[Move]:
    """Moves that fill gaps, [first, last) each, of the guest's range from ``start`` to ``end`` in host space.

    ``sources`` cover the gaps, in order. ``blank`` says that the space has never been written to and reads as zeros:
    none are written there then, but for what keeps the file from ending inside of it.
    """
    to_host = host_offset - start
    moves = []
    left = iter(gaps)
    gap = next(left, None)
    for source in sources:
        while gap is not None and gap[0] < source.end:
            first, last = max(gap[0], source.offset), min(gap[1], source.end)
            if source.storage is not None:
                place = source.host_offset + first - source.offset
                moves.append(Move(source.storage, place, first + to_host, last - first))
            elif not blank:
                moves.append(Move(None, 0, first + to_host, last - first))
            elif last == end:
                length = min(SECTOR, last - first)
                moves.append(Move(None, 0, last - length + to_host, length))
            if gap[1] > source.end:
                break
            gap = next(left, None)
    return moves
