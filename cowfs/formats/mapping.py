"""The map of a chain, entry by entry as ``qemu-img map --output=json`` prints it."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cowfs.block.chain import Piece
from cowfs.block.disk import Disk
from cowfs.block.extent import NO_OFFSET, Kind
from cowfs.block.layer import Layer

#: bytes of the disk that are looked up at once; bounds the memory that a large, fragmented disk takes
WINDOW = 1 << 30

_WITH_OFFSET = (Kind.DATA, Kind.SHARED, Kind.ZERO)


class MapEntry(NamedTuple):
    """A stretch of the disk, in bytes, that is held alike: ``depth`` 0 is the active layer.

    ``present`` tells what a layer says of itself from what is nowhere in the chain; ``offset`` is the place in
    that layer's file, None where there is none (compressed clusters, zeros without space).
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return the keys in the order of ``qemu-img``; without ``offset`` if there is none."""
        facts = self._asdict()
        if self.offset is None:
            del facts["offset"]
        return facts


async def map_entries(disk: Disk, start: int = 0, length: int | None = None) -> list[MapEntry]:
    """Map ``[start, start + length)``, by default to the end of the disk, neighbours alike merged.

    Holes that the host knows of count as zeros. Raises what reading the metadata raises.
    """
    end = disk.size if length is None else min(start + length, disk.size)
    entries: list[MapEntry] = []
    with disk.readers.inside():
        for position in range(start, end, WINDOW):
            layers = disk.layers
            for piece in await disk.resolve(position, min(WINDOW, end - position), holes=True):
                for entry in _entries(layers, piece):
                    _append(entries, entry)
    return entries


def render_json(entries: Sequence[MapEntry]) -> str:
    """Return the text that ``qemu-img map --output=json`` prints, line for line."""
    lines = ",\n".join("{ " + json.dumps(entry.as_dict())[1:] for entry in entries)
    return f"[{lines}]\n"


def _entries(layers: Sequence[Layer], piece: Piece) -> Iterator[MapEntry]:
    """One piece as entries: two where it reaches beyond the end of its layer.

    What lies there is charged, as QEMU does, to the layer above, which does not have it either.
    """
    depth, (kind, start, length, host) = piece
    inside = max(0, min(length, layers[depth].size - start)) if depth else length
    if inside:
        unallocated = kind is Kind.UNALLOCATED
        zero = kind is Kind.ZERO or unallocated
        offset = host if kind in _WITH_OFFSET and host != NO_OFFSET else None
        yield MapEntry(start, inside, depth, not unallocated, zero, not zero, offset)
    if inside < length:
        yield MapEntry(start + inside, length - inside, depth - 1, False, True, False, None)


def _append(entries: list[MapEntry], entry: MapEntry) -> None:
    if entries and _continues(entries[-1], entry):
        last = entries.pop()
        entry = last._replace(length=last.length + entry.length)
    entries.append(entry)


def _continues(first: MapEntry, second: MapEntry) -> bool:
    alike = first[2:6] == second[2:6]
    if first.offset is None or second.offset is None:
        return alike and first.offset is second.offset
    return alike and first.offset + first.length == second.offset
