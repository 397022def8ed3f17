"""``cowfs map``: show where a disk's content lies."""

from collections.abc import Sequence

import click
import trio

from cowfs.cli.options import file_argument, force_share_option, format_option, output_options, parse_size_for
from cowfs.errors import Unsupported, UsageError
from cowfs.formats.chain import Opening, open_disk
from cowfs.formats.mapping import MapEntry, map_entries, render_json


@click.command()
@format_option
@force_share_option
@click.option("-s", "--start-offset", metavar="OFFSET", help="Start there, instead of at 0.")
@click.option("-l", "--max-length", metavar="LENGTH", help="Stop after so many bytes, instead of at the end.")
@output_options
@file_argument
def command(
    file: str,
    format: str | None,
    opening: Opening,
    start_offset: str | None,
    max_length: str | None,
    output: str,
) -> None:
    """Show which part of the disk FILE lies where, in which file of its chain.

    For people, the parts that hold data are listed. In JSON every part of the disk is there: 'start' and
    'length' in bytes; 'depth', the layer that decides, 0 being FILE; 'present', whether any layer says
    something; 'zero', whether it reads as zeros; 'data', whether it has bytes of its own; 'offset', their place
    in that layer's file.

    \b
    Examples:
      cowfs map vm1.qcow2
      cowfs map --json --start-offset 1G --max-length 64M vm1.qcow2
    """
    start = parse_size_for(file, start_offset) or 0
    length = parse_size_for(file, max_length)
    entries, names = trio.run(_map, file, format, opening, start, length)
    click.echo(render_json(entries) if output == "json" else _table(file, entries, names), nl=False)


async def _map(
    file: str, format: str | None, opening: Opening, start: int, length: int | None
) -> tuple[list[MapEntry], list[str]]:
    """Return the map, and the names of the chain's files, active layer first."""
    disk = await open_disk(file, format, opening=opening)
    try:
        if start > disk.size:
            raise UsageError(f"the disk ends at {disk.size} bytes, before the start offset", file=file)
        entries = await map_entries(disk, start, length)
        return entries or [_nothing(start)], [layer.data_storage.name for layer in disk.layers]
    finally:
        await disk.close()


def _nothing(start: int) -> MapEntry:
    """Return what there is of no bytes: one entry all the same, as with ``qemu-img``."""
    return MapEntry(start, 0, 0, False, False, False, None)


def _table(file: str, entries: Sequence[MapEntry], names: Sequence[str]) -> str:
    rows = [("Offset", "Length", "Mapped to", "File")]
    for entry in entries:
        if not entry.data or entry.zero:
            continue
        if entry.offset is None:
            raise Unsupported("has compressed clusters, which have no place of their own; use --json", file=file)
        rows.append((_hex(entry.start), _hex(entry.length), _hex(entry.offset), names[entry.depth]))
    return "".join(f"{offset:<16}{length:<16}{place:<16}{name}\n" for offset, length, place, name in rows)


def _hex(number: int) -> str:
    """Like C's ``%#x``, which leaves the prefix off a zero."""
    return f"{number:#x}" if number else "0"
