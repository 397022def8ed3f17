"""``cowfs measure``: tell how large an image would be."""

import json

import click
import trio

from cowfs.block.snapshots import SnapshotKey
from cowfs.cli.creation import asks_for_help, creation_options, list_options, parse_options, split_options
from cowfs.cli.options import force_share_option, output_options, parse_size_for, parse_snapshot_for, snapshot_option
from cowfs.errors import UsageError, blaming
from cowfs.formats.chain import Opening, open_disk
from cowfs.formats.measuring import Measured
from cowfs.formats.registry import Format, format_named


@click.command()
@click.option("-f", "--format", "format", metavar="FMT", help="Format of FILE; told from its first bytes if not given.")
@click.option(
    "-O",
    "--target-format",
    "target_format",
    metavar="FMT",
    default="raw",
    help="Format of the new image; raw if not given.",
)
@creation_options
@force_share_option
@snapshot_option
@click.option("--size", metavar="SIZE", help="Measure an image whose disk has SIZE bytes, instead of a copy of FILE.")
@output_options
@click.argument("file", metavar="[FILE]", required=False)
def command(
    file: str | None,
    format: str | None,
    target_format: str,
    options: tuple[str, ...],
    opening: Opening,
    snapshot: str | None,
    size: str | None,
    output: str,
) -> None:
    """Tell how many bytes the file of a new image would have: an empty one, or one that FILE was converted to.

    'required' is its size when it is made, 'fully allocated' its size once everything on its disk has been
    written to. For qcow2 both count metadata generously; compression, and host space that holes do not take,
    count for nothing. An overlay (-o backing_file=…) counts as if it shared nothing with its backing file.

    \b
    Examples:
      cowfs measure -O qcow2 disk.raw
      cowfs measure -O qcow2 -o cluster_size=2M --size 10G --output json
    """
    target = format_named(target_format)
    words = split_options(options)
    if asks_for_help(words):
        list_options(target)
        return
    if (file is None) == (size is None):
        raise click.UsageError("Give either a FILE or --size.", click.get_current_context())
    if file is None and (format is not None or snapshot is not None):
        raise UsageError(f"{'-l' if format is None else '-f'} tells something of a FILE, and none is given")
    chosen = parse_options(words, file or target.name)
    chosen.pop("size", None)
    wanted = parse_size_for(file or "--size", size) or 0
    shown = parse_snapshot_for(file or "", snapshot)
    measured = trio.run(_measure, target, file, format, opening, shown, wanted, chosen)
    click.echo(_render_json(measured) if output == "json" else _render(measured))


async def _measure(
    target: Format,
    file: str | None,
    format: str | None,
    opening: Opening,
    snapshot: str | SnapshotKey | None,
    size: int,
    options: dict[str, str],
) -> Measured:
    if file is None:
        return await target.measure(size, None, options)
    disk = await open_disk(file, format, opening=opening, snapshot=snapshot)
    try:
        with blaming(file):
            return await target.measure(0, disk, options)
    finally:
        with trio.CancelScope(shield=True):
            await disk.close()


def _render_json(measured: Measured) -> str:
    facts = {"bitmaps": measured.bitmaps} if measured.bitmaps is not None else {}
    return json.dumps({**facts, "required": measured.required, "fully-allocated": measured.fully_allocated}, indent=4)


def _render(measured: Measured) -> str:
    lines = [f"required size: {measured.required}", f"fully allocated size: {measured.fully_allocated}"]
    if measured.bitmaps is not None:
        lines.append(f"bitmaps size: {measured.bitmaps}")
    return "\n".join(lines)
