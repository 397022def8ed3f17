"""How large a new image would be: what every format's ``measure`` is given and gives back."""

from collections.abc import AsyncIterator
from typing import NamedTuple

from cowfs.block.alignment import align_down, align_up
from cowfs.block.disk import Disk
from cowfs.block.joined import Held, Joined

#: bytes of the disk whose mapping is looked up at once
WINDOW = 1 << 30


class Measured(NamedTuple):
    """Bytes of the file: as made by a conversion, once every cluster is written to, and for bitmaps of the source.

    ``bitmaps`` is None where the source, or the new image, can have none. They are not part of the other two.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None


def disk_size(disk: Disk) -> int:
    """Bytes of a disk, in whole sectors, as it is copied."""
    return Joined([disk]).size


async def data_runs(disk: Disk, unit: int) -> AsyncIterator[tuple[int, int]]:
    """Yield the clusters of ``unit`` bytes that a copy of a disk has data in: [start, end) in bytes, ascending."""
    source = Joined([disk])
    seen = 0
    for start in range(0, source.size, WINDOW):
        for area in await source.areas(start, min(WINDOW, source.size - start), top_only=False):
            if area.held is Held.DATA and area.end > seen:
                first, seen = max(align_down(area.start, unit), seen), align_up(area.end, unit)
                yield first, seen
