"""The map of a chain, entry by entry as ``qemu-img map --output=json`` prints it."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from cowfs.block.alignment import align_up
from cowfs.block.disk import Disk
from cowfs.block.extent import NO_OFFSET, Extent, Kind
from cowfs.block.joined import SECTOR
from cowfs.block.layer import Layer

#: bytes of the disk that are looked up at once; bounds the memory that a large, fragmented disk takes
WINDOW = 1 << 30


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

    As with QEMU, all layers have whole sectors, and holes that the host knows of read as zeros; they count as data too
    if the layer's own metadata say so. Raises what reading the metadata raises.
    """
    end = _sectors(disk.layers[0])
    if length is not None:
        end = min(start + length, end)
    entries: list[MapEntry] = []
    with disk.readers.inside():
        for position in range(start, end, WINDOW):
            for entry in await _walk(disk.layers, 0, position, min(WINDOW, end - position)):
                _append(entries, entry)
    return entries


def render_json(entries: Sequence[MapEntry]) -> str:
    """Return the text that ``qemu-img map --output=json`` prints, line for line."""
    lines = ",\n".join("{ " + json.dumps(entry.as_dict())[1:] for entry in entries)
    return f"[{lines}]\n"


def _sectors(layer: Layer) -> int:
    """Bytes of a layer's disk, in whole sectors."""
    return align_up(layer.size, SECTOR)


async def _walk(layers: Sequence[Layer], depth: int, start: int, length: int) -> list[MapEntry]:
    """Entries of a range as seen from a layer, which reaches that far."""
    layer = layers[depth]
    entries: list[MapEntry] = []
    for extent in await layer.map(start, length):
        if extent.kind is not Kind.UNALLOCATED:
            entries += await _held(layer, depth, extent)
            continue
        below = _sectors(layers[depth + 1]) if depth + 1 < len(layers) else 0
        split = min(max(extent.offset, below), extent.end)
        if extent.offset < split:
            entries += await _walk(layers, depth + 1, extent.offset, split - extent.offset)
        if split < extent.end:
            # beyond the end of the layer below, it is this one that says nothing
            entries.append(_entry(depth, _tail(extent, split), zero=True, data=False)._replace(present=False))
    return entries


async def _held(layer: Layer, depth: int, extent: Extent) -> list[MapEntry]:
    """One extent that a layer holds, cut where the host has holes."""
    image = layer.image
    if extent.kind is Kind.ZERO:
        # the rest of the last sector of a flat file lies where it would be
        place = extent.offset if image.is_flat else extent.host_offset
        return [_entry(depth, extent._replace(host_offset=place), zero=True, data=False)]
    if extent.kind is Kind.COMPRESSED or not await image.has_holes():
        return [_entry(depth, extent, zero=False, data=True)]
    return [
        _entry(depth, part, zero=part.kind is Kind.ZERO, data=part.kind is not Kind.ZERO or not image.is_flat)
        for part in await image.split_at_holes([extent])
    ]


def _tail(extent: Extent, start: int) -> Extent:
    """Return what an extent has from ``start`` on."""
    host = extent.host_offset if extent.host_offset == NO_OFFSET else extent.host_offset + start - extent.offset
    return Extent(extent.kind, start, extent.end - start, host)


def _entry(depth: int, extent: Extent, *, zero: bool, data: bool) -> MapEntry:
    has_place = extent.kind is not Kind.COMPRESSED and extent.host_offset != NO_OFFSET
    offset = extent.host_offset if has_place else None
    return MapEntry(extent.offset, extent.length, depth, True, zero, data, offset)


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
