"""Refcount blocks as arrays of counts ("Host cluster management"), whatever the width of a count is."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    from cowfs.lazy import np

Counts: TypeAlias = "npt.NDArray[np.unsignedinteger]"


def unpack_counts(block: bytes, order: int) -> Counts:
    """Reference counts of a block as it stands on disk, each 2^order bits wide."""
    if order >= 3:
        return np.frombuffer(block, f">u{1 << order - 3}")
    width = 1 << order
    packed = np.frombuffer(block, np.uint8)
    return np.stack([packed >> shift & (1 << width) - 1 for shift in range(0, 8, width)], axis=1).reshape(-1)


def pack_counts(counts: Counts, order: int) -> bytes:
    """Opposite of `unpack_counts`; the number of counts fills whole bytes."""
    if order >= 3:
        return counts.astype(f">u{1 << order - 3}").tobytes()
    width = 1 << order
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    parts = counts.astype(np.uint8).reshape(-1, len(shifts)) << shifts
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(parts, axis=1).astype(np.uint8)
    return packed.tobytes()
