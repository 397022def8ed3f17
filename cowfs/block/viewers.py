"""Internal snapshots as viewers of a chain: what one does not hold itself it takes from below, as the disk does.

Who takes layers away from below an image, or changes them, sees to it that the disk stays what it was. The image's
internal snapshots are other disks, which hold nothing in other places. So whoever is about to do that calls
`keep_snapshots` first, and says what will be different. Where nobody uses the disk, snapshots are given what they would
lose; where that cannot be, it is refused before anything has changed.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from cowfs.block.alignment import Area, align_down, align_up, common, joined
from cowfs.block.extent import Kind
from cowfs.block.layer import Layer
from cowfs.block.snapshots import Fill, InternalSnapshot
from cowfs.errors import Busy, blaming

#: bytes of the disk whose mapping is looked up, and whose content is compared, at once
WINDOW = 256 << 20
#: snapshots that a sentence names
_MAX_NAMED = 8

#: tells which parts of a range, ``[start, end)``, of what lies below a layer will read as something else
Lost = Callable[[int, int], Awaitable[list[Area]]]
#: gives the content of a range: offset and length
Read = Callable[[int, int], Awaitable[bytearray]]


class Risk(NamedTuple):
    """A layer whose internal snapshots may lose something; all of them are lost with it if ``lost`` is None.

    ``below`` gives what lies below the layer now, where its snapshots may be given that: nobody uses the disk. Where
    they may not, ``way_out`` ends the sentence that says so.
    """

    layer: Layer
    lost: Lost | None
    below: Read | None = None
    way_out: str = ""


async def keep_snapshots(risks: Sequence[Risk]) -> None:
    """Have internal snapshots hold what they would lose; raises `Busy`, naming them, where that cannot be done.

    Refuses before anything is changed. Costs nothing where there are no snapshots; otherwise what is there of them is
    walked, and compared where `Risk.lost` has to.
    """
    fills: list[tuple[Layer, list[Fill]]] = []
    for layer, lost, below, way_out in risks:
        snapshots = await layer.image.snapshots()
        if lost is None and snapshots:
            them = _named(snapshots)
            raise Busy(f"is left behind by this, and {them} with it; {_advice(snapshots)}", file=layer.name)
        if lost is None or not snapshots:
            continue
        views = [Layer(await layer.image.snapshot_view(snapshot)) for snapshot in snapshots]
        areas = await _lost_areas(layer, lost, views, all_of_it=below is not None)
        if below is not None:
            fills.append((layer, [Fill(snapshots[n], areas[n], _reader(views[n], below)) for n in sorted(areas)]))
        elif areas:
            losers = [snapshots[number] for number in sorted(areas)]
            what = _verb(losers, "it takes", "they take")
            raise Busy(
                f"{_named(losers)} would lose what {what} from its backing file; {_advice(losers)}{way_out}",
                file=layer.name,
            )
    for layer, given in fills:
        if given:
            with blaming(layer.name):
                await layer.image.fill_snapshots(given)


async def _lost_areas(layer: Layer, lost: Lost, views: Sequence[Layer], *, all_of_it: bool) -> Mapping[int, list[Area]]:
    """What each view, by its index, takes from below a layer where that will be lost, in whole units; only who does.

    Unless ``all_of_it`` is asked for, it ends with the first part of each.
    """
    found: dict[int, list[Area]] = {}
    for start in range(0, max(view.size for view in views), WINDOW):
        gaps = {
            number: await gaps_of(view, start, min(start + WINDOW, view.size))
            for number, view in enumerate(views)
            if start < view.size and (all_of_it or number not in found)
        }
        changed: list[Area] = []
        # what several of them take from below is looked at once
        for first, last in joined(sorted(area for areas in gaps.values() for area in areas)):
            changed += await lost(first, last)
        for number, areas in gaps.items():
            for first, last in common(areas, changed):
                unit = layer.unit
                before = found.setdefault(number, [])
                begin = align_down(first, unit)
                if before and begin <= before[-1][1]:
                    begin = before.pop()[0]
                before.append((begin, min(align_up(last, unit), views[number].size)))
    return found


def _reader(view: Layer, below: Read) -> Read:
    """Read the disk of a snapshot."""

    async def read(offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        for extent in await view.map(offset, length):
            part = memoryview(buffer)[extent.offset - offset : extent.end - offset]
            if extent.kind is Kind.UNALLOCATED:
                part[:] = await below(extent.offset, extent.length)
            else:
                await view.read(extent, part)
        return buffer

    return read


async def gaps_of(layer: Layer, start: int, end: int) -> list[Area]:
    """Parts of a range of which a layer holds nothing."""
    extents = await layer.map(start, end - start)
    return [(extent.offset, extent.end) for extent in extents if extent.kind is Kind.UNALLOCATED]


async def held_of(layer: Layer, start: int, end: int) -> list[Area]:
    """Parts of a range that a layer holds, data or zeros, up to its end."""
    end = min(end, layer.size)
    if start >= end:
        return []
    found = await layer.map(start, end - start)
    return joined([(extent.offset, extent.end) for extent in found if extent.kind is not Kind.UNALLOCATED])


async def no_content(offset: int, length: int) -> bytearray:
    """Read what lies below an image without a backing file."""
    return bytearray(length)


def _named(snapshots: Sequence[InternalSnapshot]) -> str:
    names = [f"'{_printable(snapshot.name or snapshot.id)}'" for snapshot in snapshots[:_MAX_NAMED]]
    more = f" and {len(snapshots) - _MAX_NAMED} more" if len(snapshots) > _MAX_NAMED else ""
    return f"{_verb(snapshots, 'its internal snapshot', 'its internal snapshots')} {', '.join(names)}{more}"


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _verb(snapshots: Sequence[InternalSnapshot], one: str, several: str) -> str:
    return one if len(snapshots) == 1 else several


def _advice(snapshots: Sequence[InternalSnapshot]) -> str:
    them = _verb(snapshots, "it", "them")
    what = _verb(snapshots, "an image of its own", "images of their own")
    return f"delete {them} first, or make {what} of {them} with 'cowfs convert -l', and delete {them} then"
