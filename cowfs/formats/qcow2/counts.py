"""All reference counts of an image at once ("Host cluster management"), for changes that touch everything.

What is on disk stays as it is; changes are kept beside it, so that both are known until the new state is written.
Clusters are host cluster numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from cowfs.errors import CorruptImage, Unsupported
from cowfs.formats.qcow2.blocks import unpack_counts
from cowfs.formats.qcow2.layout import REFCOUNT_BLOCK_MASK, Header
from cowfs.storage.base import Storage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    from cowfs.lazy import np

Clusters: TypeAlias = "npt.NDArray[np.int64]"

#: host clusters; more cannot be held in reasonable memory
MAX_CLUSTERS = 1 << 30
#: clusters by which the arrays grow, at least
_GROWTH = 4096


class CountChanges:
    """The counts on disk, and what is added to each and taken from it."""

    def __init__(self, stored: npt.NDArray[np.unsignedinteger], order: int) -> None:
        self._order = order
        self._stored = stored
        self._delta = np.zeros(len(stored), np.int32)
        self._singles: list[int] = []

    @classmethod
    async def read(cls, storage: Storage, header: Header, table: npt.NDArray[np.uint64]) -> CountChanges:
        """Read all blocks of a refcount table. Raises `CorruptImage` for one that is in no place for it."""
        per_block = 8 * header.cluster_size >> header.refcount_order
        blocks: dict[int, npt.NDArray[np.unsignedinteger]] = {}
        # a device ends where it does, whatever of it was ever in use
        length = -(-storage.length >> header.cluster_bits) if storage.limit is None else 0
        for index in np.flatnonzero(table & np.uint64(REFCOUNT_BLOCK_MASK)).tolist():
            offset = int(table[index]) & REFCOUNT_BLOCK_MASK
            if offset % header.cluster_size or offset >= storage.length:
                raise CorruptImage(f"refcount block {index} is at offset {offset:#x}, where none can be")
            counts = unpack_counts(await storage.read_bytes(offset, header.cluster_size), header.refcount_order)
            used = np.flatnonzero(counts)
            if len(used):
                length = max(length, index * per_block + int(used[-1]) + 1)
                blocks[index] = counts
        if length > MAX_CLUSTERS:
            raise Unsupported(f"has {length} clusters, too many for this")
        stored = np.zeros(length, np.dtype(f"u{max(1, 1 << header.refcount_order >> 3)}"))
        for index, counts in blocks.items():
            start = index * per_block
            stored[start : start + per_block] = counts[: length - start]
        return cls(stored, header.refcount_order)

    # -- what there is

    def of(self, clusters: Clusters) -> Clusters:
        """Counts as they will be. Raises `CorruptImage` for clusters that cannot be there."""
        if len(clusters) and int(clusters.max()) >= len(self._stored):
            raise CorruptImage(f"host cluster {int(clusters.max())} is in use but lies beyond the end of the file")
        counts: Clusters = self._stored[clusters].astype(np.int64) + self._delta[clusters]
        return counts

    def area(self, first: int, count: int) -> Clusters:
        """Counts of a stretch as they will be; 0 beyond all that is known."""
        known = np.arange(first, max(first, min(first + count, len(self._stored))))
        counts = np.zeros(count, np.int64)
        counts[: len(known)] = self.of(known)
        return counts

    def changed(self) -> Clusters:
        """Clusters whose count changes."""
        return np.flatnonzero(self._delta).astype(np.int64)

    def freed(self) -> Clusters:
        """Clusters that are in use now and will not be."""
        changed = self.changed()
        freed: Clusters = changed[(self.of(changed) == 0) & (self._stored[changed] > 0)]
        return freed

    @property
    def end(self) -> int:
        """First cluster after all that will be in use."""
        used = np.flatnonzero(self._stored.astype(np.int64) + self._delta)
        return int(used[-1]) + 1 if len(used) else 0

    # -- changing

    def add(self, clusters: Clusters, by: int) -> None:
        """Add to the counts of clusters that are in use; one that comes twice gets it twice."""
        if (self.of(clusters) <= 0).any():
            raise CorruptImage("a host cluster is in use but its reference count is 0; check the image")
        np.add.at(self._delta, clusters, by)

    def add_area(self, offset: int, length: int, cluster_bits: int, by: int) -> None:
        """`add`, for the clusters of a table; bytes."""
        self.add(np.arange(offset >> cluster_bits, -(-(offset + length) >> cluster_bits)), by)

    def take(self, count: int = 1, references: int = 1) -> int:
        """Take adjacent clusters that are free now and were so before; returns the first."""
        while True:
            first = self._find(count)
            if first is not None:
                self._delta[first : first + count] = references
                return first
            grown = max(_GROWTH, count, len(self._stored) >> 3)
            self._stored = np.concatenate([self._stored, np.zeros(grown, self._stored.dtype)])
            self._delta = np.concatenate([self._delta, np.zeros(grown, np.int32)])

    def _find(self, count: int) -> int | None:
        if count == 1:
            while self._singles:
                if not self._delta[cluster := self._singles.pop()]:
                    return cluster
        free = np.flatnonzero((self._stored == 0) & (self._delta == 0))
        if count == 1:
            self._singles = free[::-1].tolist()
            return self._singles.pop() if self._singles else None
        # the start of a run of free ones is as far from its end as in the list of all free ones
        starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
        return int(free[starts[0]]) if len(starts) else None

    def verify(self) -> None:
        """Raise `CorruptImage` or `Unsupported` if a count would not be what it can be."""
        counts = self.of(self.changed())
        if (counts < 0).any():
            raise CorruptImage("a host cluster has more references than its count says; check the image")
        if self._order < 6 and (counts >= 1 << (1 << self._order)).any():
            raise Unsupported(f"reference counts of {1 << self._order} bits are too narrow for one more snapshot")
