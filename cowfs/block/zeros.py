"""Finding the zeros in data, fast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    from cowfs.lazy import np


class Stretch(NamedTuple):
    """Bytes ``start`` to ``end`` of a buffer that are all zeros, or that are to be taken for data."""

    start: int
    end: int
    is_zero: bool


def is_zero(data: bytes | bytearray | memoryview) -> bool:
    """Whether there is nothing but zeros in a buffer."""
    whole = len(data) - len(data) % 8
    return not (any(data[whole:]) or np.frombuffer(data, np.uint64, whole // 8).any())


def find_zeros(view: memoryview, grain: int, shortest: int) -> Iterator[Stretch]:
    """Cut a buffer into zeros and data, in order.

    It is looked at in grains, multiples of 8 bytes, the last of which may be short; grains that are all zeros
    are reported as zeros if they, together with such neighbours, come to at least ``shortest`` bytes, a short last
    grain counted in full.
    """
    flags = _zero_grains(view, grain)
    edges = np.flatnonzero(flags[1:] != flags[:-1]) + 1
    start, is_zero = 0, False
    for first, last in zip([0, *edges.tolist()], [*edges.tolist(), len(flags)], strict=True):
        begin = first * grain
        zero = bool(flags[first]) and last * grain - begin >= shortest
        if zero != is_zero:
            if begin > start:
                yield Stretch(start, begin, is_zero)
            start, is_zero = begin, zero
    if start < len(view):
        yield Stretch(start, len(view), is_zero)


def _zero_grains(view: memoryview, grain: int) -> npt.NDArray[np.bool_]:
    """Tell for each grain whether all of its bytes are zero."""
    whole = len(view) - len(view) % grain
    flags = np.zeros(-(-len(view) // grain), np.bool_)
    words = np.frombuffer(view[:whole], np.uint64).reshape(-1, grain // 8)
    # most data tells itself by its first word
    suspects = np.flatnonzero(words[:, 0] == 0)
    if len(suspects) == len(words):
        flags[: len(words)] = ~words.any(axis=1)
    elif len(suspects):
        flags[suspects] = ~words[suspects].any(axis=1)
    if whole < len(view):
        flags[-1] = not any(view[whole:])
    return flags
