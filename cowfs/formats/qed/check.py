"""Check of a QED image: every cluster is referenced once and only once; section "Consistency checking".

What is counted, and how, is what ``qemu-img check`` does. Besides the table that is looked at, only one bit a
cluster of the file is kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import trio

from cowfs.block.check import CheckResult
from cowfs.errors import Unsupported
from cowfs.formats.qed.layout import ZERO_CLUSTER
from cowfs.formats.qed.space import Space

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cowfs.formats.qed.image import QedImage
else:
    from cowfs.lazy import np

#: entries of a table: host offsets in bytes
Entries: TypeAlias = "npt.NDArray[np.uint64]"
#: cluster numbers
Clusters: TypeAlias = "npt.NDArray[np.int64]"
Runs = list[tuple[int, int]]

#: host clusters; more cannot be kept track of in reasonable memory
MAX_CLUSTERS = 1 << 33
#: bytes of the bitmap that are unpacked at once
_WINDOW = 1 << 16


def entries_of(table: array[int]) -> Entries:
    """View a table's entries as numpy does, without copying."""
    return np.frombuffer(table, np.uint64)


class ClusterSet:
    """A set of the clusters of a file: one bit for each."""

    def __init__(self, end: int) -> None:
        self.end = end
        self._bits = np.zeros(-(-end // 8), np.uint8)

    def add(self, clusters: Clusters) -> int:
        """Add clusters; returns how many of them were in already, or come twice."""
        ordered = clusters if (np.diff(clusters) > 0).all() else np.sort(clusters)
        unique = ordered[np.diff(ordered, prepend=-1) > 0]
        if not len(unique):
            return 0
        byte, bit = unique >> 3, np.uint8(1) << (unique & 7).astype(np.uint8)
        again = np.count_nonzero(self._bits[byte] & bit)
        # those in one byte follow each other
        firsts = np.flatnonzero(np.diff(byte, prepend=-1))
        self._bits[byte[firsts]] |= np.bitwise_or.reduceat(bit, firsts)
        return len(clusters) - len(unique) + int(again)

    def add_range(self, first: int, count: int) -> int:
        """Add adjacent clusters; returns how many of them were in already."""
        return self.add(np.arange(first, first + count, dtype=np.int64))

    def free(self, end: int) -> Iterator[Clusters]:
        """Clusters below ``end`` that are not in, in ascending order, some at a time."""
        for start in range(0, -(-end // 8), _WINDOW):
            flags = np.unpackbits(self._bits[start : start + _WINDOW], bitorder="little")
            yield np.flatnonzero(flags[: end - start * 8] == 0) + start * 8

    def count_free(self) -> int:
        """How many are not in."""
        return sum(len(clusters) for clusters in self.free(self.end))

    def cut(self) -> None:
        """Let the set end with the last cluster that is in."""
        used = np.flatnonzero(self._bits)
        self.end = int(used[-1]) * 8 + int(self._bits[used[-1]]).bit_length() if len(used) else 0

    def space(self, limit: int | None) -> Space:
        """Return what may be handed out when these clusters are in use, of a storage with room for ``limit``."""
        space = Space(self.end, limit)
        for clusters in self.free(self.end):
            for first, count in runs(clusters):
                space.give(first, count)
        return space


def runs(clusters: Clusters) -> Runs:
    """Join clusters that follow each other: (first, count)."""
    if not len(clusters):
        return []
    breaks = np.flatnonzero(np.diff(clusters) != 1) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((starts, [len(clusters)])))
    return [(int(clusters[start]), int(count)) for start, count in zip(starts, counts, strict=True)]


class Scan(NamedTuple):
    """Outcome of a walk over all tables.

    ``empty`` are L1 indices of L2 tables without any entry. ``dangling`` says how many of the corruptions are
    entries that point to whole clusters beyond the end of the file: what a crash leaves of a file that grew.
    """

    result: CheckResult
    used: ClusterSet
    empty: list[int]
    dangling: int


async def check(image: QedImage) -> CheckResult:
    """Look for what ``qemu-img check`` looks for; changes nothing."""
    storage = image.storage
    end = storage.length >> image.cluster_bits if storage.read_only else image.space.end
    found = await scan(image, end)
    leaks = found.used.count_free()
    if leaks:
        found.result.leak(f"{leaks} clusters, which nothing refers to", leaks)
    return found.result


async def scan(image: QedImage, end: int) -> Scan:
    """Walk over all tables of an image whose file has ``end`` whole clusters. Nothing else may be under way."""
    walk = _Walk(image, end)
    await walk.run()
    if image.limit is not None:
        # what a device has behind all that is in use was never part of the image
        walk.used.cut()
    return Scan(walk.result, walk.used, walk.empty, walk.dangling)


class _Walk:
    def __init__(self, image: QedImage, end: int) -> None:
        self.image = image
        self.bits = image.cluster_bits
        self.end = end
        self.first = image.header.header_size
        self.table_size = image.header.table_size
        if end > MAX_CLUSTERS:
            raise Unsupported(f"has {end} clusters, too many to check", file=image.storage.name)
        self.used = ClusterSet(end)
        self.empty: list[int] = []
        self.dangling = 0
        self.result = CheckResult(total_clusters=-(-image.size >> self.bits))

    async def run(self) -> None:
        l1 = self.image.l1
        self.used.add_range(0, self.first)
        self.used.add_range(l1.offset >> self.bits, min(self.table_size, self.end - (l1.offset >> self.bits)))
        entries = entries_of(l1.entries)
        present = np.flatnonzero(entries)
        inside = are_inside(self.image, entries[present], self.table_size, self.end)
        self._count_dangling(entries[present[~inside]])
        if wrong := len(present) - int(np.count_nonzero(inside)):
            self.result.corrupt(f"{wrong} L1 entries point to where no table can be", wrong)
        overlapping = 0
        for index in present[inside]:
            overlapping += await self._visit(int(index), int(entries[index]))
            # a large image is walked for long, mostly from the page cache
            await trio.lowlevel.checkpoint()
        if overlapping:
            self.result.corrupt(f"{overlapping} clusters of L2 tables are used for something else too", overlapping)

    async def _visit(self, index: int, offset: int) -> int:
        """Account for one L2 table, and for what it refers to unless it lies where something else is.

        Returns how many of the table's clusters were used before.
        """
        overlapping = self.used.add_range(offset >> self.bits, self.table_size)
        if overlapping:
            return overlapping
        table = await self.image.peek_table(offset)
        data = table[table > ZERO_CLUSTER]
        if not table.any():
            self.empty.append(index)
        self._count(data)
        inside = are_inside(self.image, data, 1, self.end)
        self._count_dangling(data[~inside])
        if wrong := len(data) - int(np.count_nonzero(inside)):
            self.result.corrupt(f"{wrong} entries of the L2 table at {offset:#x} point to where no data can be", wrong)
        again = self.used.add(self._clusters(data[inside]))
        if again:
            self.result.corrupt(f"{again} entries of the L2 table at {offset:#x} point to clusters in use", again)
        return 0

    def _count(self, data: Entries) -> None:
        self.result.allocated_clusters += len(data)
        jumps = data[1:] != data[:-1] + np.uint64(self.image.cluster_size)
        self.result.fragmented_clusters += int(np.count_nonzero(jumps))

    def _count_dangling(self, outside: Entries) -> None:
        """Count those of some wrong offsets that are wrong only because the file is too short."""
        behind_header = outside >= np.uint64(self.image.header.header_bytes)
        aligned = outside & np.uint64(self.image.cluster_size - 1) == 0
        self.dangling += int(np.count_nonzero(behind_header & aligned))

    def _clusters(self, offsets: Entries) -> Clusters:
        return (offsets >> np.uint64(self.bits)).astype(np.int64)


def are_inside(image: QedImage, offsets: Entries, size: int, end: int) -> npt.NDArray[np.bool_]:
    """Which offsets are aligned, with ``size`` clusters between the header and the cluster ``end``."""
    clusters = (offsets >> np.uint64(image.cluster_bits)).astype(np.int64)
    inside: npt.NDArray[np.bool_] = (clusters >= image.header.header_size) & (clusters <= end - size)
    inside &= offsets & np.uint64(image.cluster_size - 1) == 0
    return inside
