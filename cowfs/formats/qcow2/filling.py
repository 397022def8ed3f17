"""Having internal snapshots hold themselves what they took from a backing file.

All of it is one `overhaul`: the data goes to free clusters, L2 tables and L1 tables of the snapshots are written anew
beside the old ones, and one write of the header switches over. Of what several snapshots take from the backing file
alike there is one copy, and tables that they shared they go on sharing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from cowfs.block.alignment import align_up
from cowfs.block.snapshots import Fill
from cowfs.errors import CorruptImage
from cowfs.formats.qcow2.counts import Clusters
from cowfs.formats.qcow2.layout import OFFSET_MASK, SUBCLUSTERS, ZERO
from cowfs.formats.qcow2.overhaul import Entries, Overhaul, overhaul

if TYPE_CHECKING:
    import numpy as np

    from cowfs.formats.qcow2.image import Qcow2Image
else:
    from cowfs.lazy import np

#: bytes that are read at once, if that is whole clusters
STEP = 2 << 20
#: bitmap of an extended entry whose subclusters are all allocated; the same, moved up, if all read as zeros
_ALLOCATED = (1 << SUBCLUSTERS) - 1
_ZEROS = _ALLOCATED << SUBCLUSTERS


async def fill_snapshots(image: Qcow2Image, fills: Sequence[Fill]) -> None:
    """See `Image.fill_snapshots`."""

    async def work(change: Overhaul) -> None:
        filler = _Filler(change)
        for fill in fills:
            await filler.fill(fill)
        await change.set_copied()

    await overhaul(image, work)


@dataclass(frozen=True)
class _Moved:
    """A table that was written anew: its host offset; host clusters that its entries refer to newly, and no longer."""

    offset: int
    taken: Clusters
    left: Clusters


class _Filler:
    """Changes the tables of one snapshot after the other."""

    def __init__(self, change: Overhaul) -> None:
        self._change = change
        # by where the table lay, its index in L1, its clusters, and the end of the disk in it
        self._moved: dict[tuple[int, int, tuple[int, ...], int], _Moved] = {}
        # what nothing but the backing file gives, by the cluster's number and its bytes within the disk
        self._copies: dict[tuple[int, int], int] = {}

    async def fill(self, fill: Fill) -> None:
        """Have one snapshot hold the clusters that its areas touch."""
        change = self._change
        number = self._find(fill)
        snapshot = change.snapshots[number]
        old = await change.read_words(snapshot.l1_offset, snapshot.l1_entries * 8)
        l1 = old.copy()
        per_table = change.span >> change.bits
        for index, clusters in groupby(_clusters(fill, change.bits), lambda cluster: cluster // per_table):
            if index >= len(l1):
                raise CorruptImage(f"the L1 table of the snapshot '{fill.snapshot.name}' is too small for its disk")
            l1[index] = await self._move(int(l1[index]) & OFFSET_MASK, index, tuple(clusters), fill)
        place = await change.write_table(l1)
        change.counts.add_area(snapshot.l1_offset, old.nbytes, change.bits, -1)
        change.snapshots[number] = replace(snapshot, l1_offset=place)

    def _find(self, fill: Fill) -> int:
        """Return the index in the table of the first snapshot of an id, which is the one that was looked at."""
        wanted = fill.snapshot.id.encode("utf-8", "surrogateescape")
        return next(number for number, found in enumerate(self._change.snapshots) if found.id == wanted)

    async def _move(self, offset: int, index: int, clusters: tuple[int, ...], fill: Fill) -> int:
        """Return the host offset of a table that holds some clusters too, referred to once more."""
        change = self._change
        key = (offset, index, clusters, min(fill.snapshot.disk_size, (index + 1) * change.span))
        moved = self._moved.get(key)
        if moved is None or not self._can_be_shared([moved.offset >> change.bits, *moved.taken.tolist()]):
            moved = self._moved[key] = await self._write(offset, clusters, fill)
        else:
            change.counts.add_area(moved.offset, change.size, change.bits, 1)
            change.counts.add(moved.taken, 1)
        if offset:
            change.counts.add_area(offset, change.size, change.bits, -1)
        change.counts.add(moved.left, -1)
        return moved.offset

    async def _write(self, offset: int, clusters: tuple[int, ...], fill: Fill) -> _Moved:
        change = self._change
        table = (await change.read_table(offset)).copy() if offset else np.zeros(change.size // 8, np.uint64)
        per_table = change.span >> change.bits
        taken: list[int] = []
        left: list[Clusters] = []
        for first, count in _runs(clusters, max(1, STEP >> change.bits)):
            start = first << change.bits
            end = min(first + count << change.bits, fill.snapshot.disk_size)
            data = memoryview(await fill.read(start, end - start))
            for cluster in range(first, first + count):
                place = cluster % per_table * change.words
                entry = table[place : place + change.words]
                left.append(change.clusters_of(entry))
                content = data[(cluster - first) << change.bits :][: change.size]
                host = await self._copy(cluster, content, shared=not entry.any())
                self._enter(entry, host)
                if host:
                    taken.append(host >> change.bits)
        place = await change.write_table(table)
        return _Moved(place, np.array(taken, np.int64), np.concatenate(left))

    async def _copy(self, cluster: int, content: memoryview, *, shared: bool) -> int:
        """Return the host offset of a cluster with some content, referred to once more; 0 if the entry says zeros."""
        change = self._change
        if change.header.version >= 3 and not any(content):
            return 0
        key = (cluster, len(content))
        if shared and key in self._copies and self._can_be_shared([self._copies[key] >> change.bits]):
            change.counts.add_area(self._copies[key], change.size, change.bits, 1)
            return self._copies[key]
        host = await change.write_area(bytes(content))
        if shared:
            self._copies[key] = host
        return host

    def _can_be_shared(self, clusters: Sequence[int]) -> bool:
        """Whether the counts of host clusters go as far as one more."""
        most = (1 << (1 << self._change.header.refcount_order)) - 1
        return int(self._change.counts.of(np.array(clusters, np.int64)).max()) < most

    def _enter(self, entry: Entries, host: int) -> None:
        if self._change.words == 2:
            entry[0], entry[1] = host, _ALLOCATED if host else _ZEROS
        else:
            entry[0] = host or ZERO


def _clusters(fill: Fill, bits: int) -> Iterator[int]:
    """Numbers of the clusters that areas touch, each once."""
    done = 0
    for start, end in fill.areas:
        first = max(done, start >> bits)
        done = max(done, align_up(end, 1 << bits) >> bits)
        yield from range(first, done)


def _runs(clusters: Sequence[int], longest: int) -> Iterator[tuple[int, int]]:
    """Adjacent clusters: number of the first, and how many."""
    first, count = clusters[0], 0
    for cluster in clusters:
        if cluster != first + count or count == longest:
            yield first, count
            first, count = cluster, 0
        count += 1
    yield first, count
