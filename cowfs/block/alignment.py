"""Whole clusters out of byte ranges: the one place where a request is rounded or split."""

from collections.abc import Sequence
from typing import NamedTuple

#: a range: first byte, and the one after the last
Area = tuple[int, int]


def align_down(value: int, unit: int) -> int:
    """Largest multiple of ``unit`` that is not above ``value``."""
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    """Smallest multiple of ``unit`` that is not below ``value``."""
    return value + -value % unit


class Split(NamedTuple):
    """A byte range in terms of clusters.

    ``start`` and ``end`` are the range rounded out to whole clusters; ``head`` bytes lie before the range in
    its first cluster, ``tail`` bytes after it in its last.
    """

    start: int
    end: int
    head: int
    tail: int


def split(offset: int, length: int, unit: int) -> Split:
    """Round ``[offset, offset + length)`` out to multiples of ``unit``."""
    start = align_down(offset, unit)
    end = align_up(offset + length, unit)
    return Split(start, end, offset - start, end - offset - length)


def without(start: int, end: int, holes: Sequence[Area]) -> list[Area]:
    """Return what is left of a range; ``holes`` are in order and do not overlap."""
    left: list[Area] = []
    for first, last in holes:
        if start < first:
            left.append((start, min(first, end)))
        start = max(start, last)
        if start >= end:
            return left
    left.append((start, end))
    return left


def joined(areas: Sequence[Area]) -> list[Area]:
    """Join what overlaps or follows without a gap; ``areas`` are in order of their starts."""
    found: list[Area] = []
    for start, end in areas:
        if found and start <= found[-1][1]:
            start, last = found.pop()
            end = max(end, last)
        found.append((start, end))
    return found


def common(areas: Sequence[Area], others: Sequence[Area]) -> list[Area]:
    """Return what both cover; each is in order and does not overlap itself."""
    found: list[Area] = []
    mine, theirs = iter(areas), iter(others)
    area, other = next(mine, None), next(theirs, None)
    while area is not None and other is not None:
        start, end = max(area[0], other[0]), min(area[1], other[1])
        if start < end:
            found.append((start, end))
        if area[1] < other[1]:
            area = next(mine, None)
        else:
            other = next(theirs, None)
    return found
