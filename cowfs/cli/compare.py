"""``cowfs compare``: tell whether two images hold the same disk."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import click
import trio

from cowfs.block.alignment import align_up
from cowfs.block.disk import Disk
from cowfs.block.extent import NO_OFFSET, Extent, Kind
from cowfs.block.joined import SECTOR
from cowfs.block.owners import Piece
from cowfs.cli.meter import Meter
from cowfs.cli.options import cache_option, force_share_option, quiet_option
from cowfs.formats.chain import Opening, open_disk

#: bytes of the disks whose mapping is looked up at once
WINDOW = 1 << 30
#: bytes that are read and compared at once
CHUNK = 2 << 20

_ZEROS = bytes(CHUNK)
DIFFERENT = 1


class _Range(NamedTuple):
    """A stretch that each disk either knows to be zeros or may hold anything in; bytes."""

    start: int
    end: int
    first_is_zero: bool
    second_is_zero: bool
    alike: bool


@click.command()
@click.option("-f", "--format", "format", metavar="FMT", help="Format of A; told from its first bytes if not given.")
@click.option("-F", "--second-format", metavar="FMT", help="Format of B; told from its first bytes if not given.")
@click.option("-s", "--strict", is_flag=True, help="Sizes, and which parts are allocated, must be the same too.")
@click.option("-p", "--progress", is_flag=True, help="Show how far it is.")
@force_share_option
@cache_option("-T", "--source-cache", "of both")
@quiet_option
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
def command(
    first: str,
    second: str,
    format: str | None,
    second_format: str | None,
    strict: bool,
    progress: bool,
    opening: Opening,
    quiet: bool,
) -> int:
    """Tell whether the images A and B hold the same disk, each with its backing files.

    Their formats and the way they store it do not matter. If one disk is larger, what it has more must be zeros.

    \b
    Exit codes:
      0  the disks are the same
      1  they differ
      2  they could not be compared

    \b
    Example:
      cowfs compare vm1.qcow2 copy-of-vm1.raw
    """
    meter = Meter("compare", shown=progress and not quiet)
    same, lines = trio.run(_compare, (first, format), (second, second_format), strict, meter, opening)
    if not quiet:
        click.echo("\n".join(lines))
    return 0 if same else DIFFERENT


async def _compare(
    first: tuple[str, str | None], second: tuple[str, str | None], strict: bool, meter: Meter, opening: Opening
) -> tuple[bool, list[str]]:
    """Open both; whether they are the same, and the lines that say so."""
    a = await open_disk(*first, opening=opening)
    try:
        b = await open_disk(*second, opening=opening)
        try:
            return await _verdict(a, b, strict, meter)
        finally:
            await b.close()
    finally:
        meter.end()
        await a.close()


async def _verdict(a: Disk, b: Disk, strict: bool, meter: Meter) -> tuple[bool, list[str]]:
    # a raw disk counts as whole sectors, as when it is converted
    common, total = sorted(align_up(disk.size, SECTOR) for disk in (a, b))
    if strict and common != total:
        return False, ["Strict mode: Image size mismatch!"]
    lines: list[str] = []
    difference = await _difference(a, b, 0, common, strict, meter)
    if difference is None and total > common:
        # beyond its end a disk reads as zeros here
        lines.append("Warning: Image size mismatch!")
        difference = await _difference(a, b, common, total, strict, meter)
    return difference is None, [*lines, difference or "Images are identical."]


async def _difference(a: Disk, b: Disk, start: int, end: int, strict: bool, meter: Meter) -> str | None:
    """Return the sentence that tells the first difference; None if there is none."""
    for position in range(start, end, WINDOW):
        length = min(WINDOW, end - position)
        pieces = [await disk.resolve(position, length, holes=True) for disk in (a, b)]
        for part in _overlaps(*pieces):
            if strict and not part.alike:
                return f"Strict mode: Offset {part.start} block status mismatch!"
            if not (part.first_is_zero and part.second_is_zero):
                for chunk in _chunks(part):
                    if (found := await _mismatch(a, b, chunk)) is not None:
                        return f"Content mismatch at offset {found}!"
                    meter.show(chunk.end, end)
            meter.show(part.end, end)
    return None


def _overlaps(first: Sequence[Piece], second: Sequence[Piece]) -> Iterator[_Range]:
    """Cut a range, mapped by both disks, where the mapping of either changes."""
    i = j = 0
    while i < len(first) and j < len(second):
        one, two = first[i].extent, second[j].extent
        start, end = max(one.offset, two.offset), min(one.end, two.end)
        yield _Range(start, end, _is_zero(one.kind), _is_zero(two.kind), _status(one) == _status(two))
        i += one.end == end
        j += two.end == end


def _is_zero(kind: Kind) -> bool:
    return kind in (Kind.ZERO, Kind.UNALLOCATED)


def _status(extent: Extent) -> tuple[Kind, bool]:
    """Return what strict mode compares: how a range is held, and whether it has a place in the file."""
    return Kind.DATA if extent.kind is Kind.SHARED else extent.kind, extent.host_offset == NO_OFFSET


def _chunks(part: _Range) -> Iterator[_Range]:
    for start in range(part.start, part.end, CHUNK):
        yield part._replace(start=start, end=min(start + CHUNK, part.end))


async def _mismatch(a: Disk, b: Disk, part: _Range) -> int | None:
    """Return the offset of the first sector of a chunk that differs; None if there is none."""
    size = part.end - part.start
    one = _ZEROS[:size] if part.first_is_zero else await a.read(part.start, size)
    two = _ZEROS[:size] if part.second_is_zero else await b.read(part.start, size)
    if one == two:
        return None
    return next(
        part.start + place
        for place in range(0, size, SECTOR)
        if one[place : place + SECTOR] != two[place : place + SECTOR]
    )
