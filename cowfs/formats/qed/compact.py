"""Compaction: leaving no free cluster inside a QED file.

What lies behind the place where the file could end moves into what is free before it. Nothing is overwritten
or cut off that is referred to on disk, or that a reader may have looked up: data is copied and made durable,
then the entry is switched and made durable, and only when the readers have left is the old place used again.
A crash at any moment leaves leaks at most, and the need-check bit with them.

L2 tables need adjacent clusters, so they go first, each into a window that data moves out of. Memory holds one
bit a cluster, and a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import trio

from cowfs.errors import CorruptImage
from cowfs.formats.qed.check import Clusters, ClusterSet, Scan, entries_of, scan
from cowfs.formats.qed.space import Space

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cowfs.formats.qed.image import QedImage
else:
    from cowfs.lazy import np

#: bytes copied at once
COPY_BYTES = 1 << 20


async def compact(image: QedImage) -> None:
    """Leave no free clusters; nothing else but readers is under way.

    Raises `CorruptImage`, changing nothing, if the image is damaged.
    """
    await image.quiesce()
    found = await _scan(image)
    if not found.empty and not found.used.count_free():
        return
    await image.prepare()
    # until the end is reached nobody can say what is free; nothing of it must be handed out
    image.knows_free = False
    image.space = Space(image.space.end, image.limit)
    await _Compaction(image).run(found.empty)
    space = (await _scan(image)).used.space(image.limit)
    space.cut()
    end = space.end << image.cluster_bits
    if end < image.storage.length:
        await image.storage.truncate(end)
    image.space = space
    image.knows_free = True


async def _scan(image: QedImage) -> Scan:
    found = await scan(image, image.space.end)
    if found.result.corruptions:
        raise CorruptImage(
            f"has {found.result.corruptions} errors in its tables; repair it with 'cowfs check -r all'",
            file=image.storage.name,
        )
    return found


class _Compaction:
    def __init__(self, image: QedImage) -> None:
        self.image = image
        self.bits = image.cluster_bits
        self.table_size = image.header.table_size

    async def run(self, empty: list[int]) -> None:
        """Unlink, move tables, move data."""
        for index in empty:
            self.image.l1.set(index, 0)
        await self._quiesce()
        await self._place_tables()
        used = (await _scan(self.image)).used
        goal = self._goal(used)
        holes = _Taker(used.free(goal))
        await self._move_data(lambda clusters: clusters >= goal, holes.take)
        await self._quiesce()

    async def _quiesce(self) -> None:
        """Make everything durable, and wait for the readers who may have looked up what was before."""
        await self.image.tables.flush()
        await self.image.readers.gone()

    def _goal(self, used: ClusterSet) -> int:
        """Cluster that the file could end before."""
        return used.end - used.count_free()

    # -- tables

    async def _place_tables(self) -> None:
        """Bring all L2 tables before the goal."""
        goal = self._goal((await _scan(self.image)).used)
        late = self._tables_behind(goal - self.table_size)
        windows = list(islice(self._windows(goal), len(late)))
        if len(windows) < len(late):
            # what is between the tables is too narrow: take them out of the way, to the end of the file
            await self._move_tables(self._tables_behind(self._first_gap()), self._append_table)
            late = self._tables_behind(goal - self.table_size)
            windows = list(islice(self._windows(goal), len(late)))
        starts = np.array(windows, np.int64)
        if not len(starts):
            return

        def in_window(clusters: Clusters) -> npt.NDArray[np.bool_]:
            nearest = np.maximum(np.searchsorted(starts, clusters, "right") - 1, 0)
            distance = clusters - starts[nearest]
            inside: npt.NDArray[np.bool_] = (distance >= 0) & (distance < self.table_size)
            return inside

        await self._move_data(in_window, self._append)
        await self._quiesce()
        await self._move_tables(late[: len(windows)], iter(windows).__next__)

    def _present(self) -> list[int]:
        """L1 indices of all L2 tables."""
        indices: list[int] = np.flatnonzero(entries_of(self.image.l1.entries)).tolist()
        return indices

    def _tables(self) -> list[tuple[int, int]]:
        """All L2 tables in file order: (first cluster, L1 index)."""
        entries = self.image.l1.entries
        return sorted((entries[index] >> self.bits, index) for index in self._present())

    def _tables_behind(self, cluster: int) -> list[int]:
        """L1 indices of the tables that start after a cluster, in file order."""
        return [index for first, index in self._tables() if first > cluster]

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """Ranges between header and tables, [start, end); the last goes on to the end of the file."""
        header = self.image.header
        fixed = sorted([header.l1_offset >> self.bits, *(first for first, _ in self._tables())])
        position = header.header_size
        for first in (*fixed, self.image.space.end):
            if first > position:
                yield position, first
            position = first + self.table_size

    def _first_gap(self) -> int:
        return next((start for start, _ in self._gaps()), self.image.space.end)

    def _windows(self, goal: int) -> Iterator[int]:
        """Places before the goal that could take an L2 table once no data is there."""
        for start, end in self._gaps():
            yield from range(start, min(end, goal) - self.table_size + 1, self.table_size)

    def _append_table(self) -> int:
        return self.image.space.append(self.table_size)

    async def _move_tables(self, indices: list[int], place: Callable[[], int]) -> None:
        """Write L2 tables anew where ``place`` says, and switch L1 over."""
        image = self.image
        for index in indices:
            old = await image.load_table(image.l1.entries[index])
            new = image.make_table(place() << self.bits, old)
            image.l1.set(index, new.offset)
            image.tables.forget(old)
            await image.tables.relieve()
        await self._quiesce()

    # -- data

    def _append(self, count: int) -> Clusters:
        first = self.image.space.append(count)
        return np.arange(first, first + count, dtype=np.int64)

    async def _move_data(
        self, chosen: Callable[[Clusters], npt.NDArray[np.bool_]], take: Callable[[int], Clusters]
    ) -> None:
        """Move the data clusters that ``chosen`` picks to clusters that ``take`` gives."""
        image = self.image
        for l1_index in self._present():
            offset = image.l1.entries[l1_index]
            # entries 0 and 1 are no clusters, and nothing moves out of the header
            clusters = (await image.peek_table(offset) >> np.uint64(self.bits)).astype(np.int64)
            indices = np.flatnonzero((clusters > 0) & chosen(clusters))
            if len(indices):
                sources, targets = clusters[indices], take(len(indices))
                await self._copy(sources, targets)
                table = await image.load_table(offset)
                for index, target in zip(indices.tolist(), targets.tolist(), strict=True):
                    table.set(index, target << self.bits)
            await image.tables.relieve()
            await trio.lowlevel.checkpoint()

    async def _copy(self, sources: Clusters, targets: Clusters) -> None:
        """Copy clusters, those that are adjacent on both sides together."""
        jumps = (np.diff(sources) != 1) | (np.diff(targets) != 1)
        bounds = [0, *(np.flatnonzero(jumps) + 1).tolist(), len(sources)]
        step = max(COPY_BYTES >> self.bits, 1)
        storage = self.image.storage
        for begin, end in pairwise(bounds):
            for start in range(begin, end, step):
                length = min(step, end - start) << self.bits
                data = await storage.read_bytes(int(sources[start]) << self.bits, length)
                await storage.write(int(targets[start]) << self.bits, [data])


class _Taker:
    """Hands out what an iterator of arrays yields, in the numbers asked for."""

    def __init__(self, source: Iterator[Clusters]) -> None:
        self._source = source
        self._rest: Clusters = np.empty(0, np.int64)

    def take(self, count: int) -> Clusters:
        """Return the next ``count``; the source must have them."""
        parts = [self._rest]
        while (total := sum(map(len, parts))) < count:
            parts.append(next(self._source))
        joined = np.concatenate(parts) if len(parts) > 1 else self._rest
        assert total >= count
        self._rest = joined[count:]
        return joined[:count]
