"""Buffers that stand for one after the other."""

from collections.abc import Sequence

Views = Sequence[memoryview]


def part_of(views: Views, start: int, length: int) -> list[memoryview]:
    """Return the ``length`` bytes from ``start`` of buffers that stand for one after the other."""
    found: list[memoryview] = []
    for view in views:
        if length <= 0:
            break
        size = len(view)
        if start >= size:
            start -= size
            continue
        piece = view[start : start + length] if start or length < size else view
        found.append(piece)
        length -= len(piece)
        start = 0
    return found
