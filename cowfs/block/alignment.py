"""Whole clusters out of byte ranges: the one place where a request is rounded or split."""

from typing import NamedTuple


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
