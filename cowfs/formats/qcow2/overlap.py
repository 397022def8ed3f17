"""Data in the place of metadata: writing the one would destroy the other, so nothing is written there.

QEMU compares the place of every write with that of the metadata; here every L2 table is compared as it comes into
memory, since what is entered later comes from an allocator that hands nothing out twice.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, TypeAlias

from cowfs.formats.qcow2.layout import COMPRESSED, OFFSET_MASK, Header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    from cowfs.lazy import np

Clusters: TypeAlias = "npt.NDArray[np.int64]"


def complaint(table: array[int], header: Header, metadata: Clusters) -> str | None:
    """Say what is wrong with an L2 table; ``metadata`` are clusters that hold some, in ascending order."""
    clusters = _data_clusters(np.frombuffer(table, np.uint64)[:: header.entry_words], header.cluster_bits)
    if not len(clusters):
        return None
    # metadata lies mostly elsewhere
    first, last = np.searchsorted(metadata, (clusters.min(), clusters.max() + 1))
    near = metadata[first:last]
    shared = near[np.isin(near, clusters)]
    if not len(shared):
        return None
    return f"has data in host cluster {int(shared[0])}, which holds metadata; repair it with 'cowfs check -r all'"


def _data_clusters(entries: npt.NDArray[np.uint64], cluster_bits: int) -> Clusters:
    """Host clusters of data that is not compressed, by the descriptors of an L2 table; misaligned ones left out."""
    hosts = entries & np.uint64(OFFSET_MASK)
    inside = hosts & np.uint64((1 << cluster_bits) - 1)
    placed = (hosts != 0) & (inside == 0) & (entries & np.uint64(COMPRESSED) == 0)
    clusters: Clusters = (hosts[placed] >> np.uint64(cluster_bits)).astype(np.int64)
    return clusters
