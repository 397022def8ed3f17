"""``cowfs convert``: copy disks into an image of any format."""

import click
import trio

from cowfs.block.copying import PARALLEL, CopyOptions
from cowfs.cli.creation import (
    asks_for_help,
    creation_options,
    explaining_disks,
    list_options,
    parse_options,
    split_options,
    take_backing,
)
from cowfs.cli.meter import Meter
from cowfs.cli.options import (
    cache_option,
    force_share_option,
    parse_size_for,
    parse_snapshot_for,
    quiet_option,
    snapshot_option,
)
from cowfs.errors import UsageError
from cowfs.formats.chain import Opening, Source
from cowfs.formats.convert import Target, convert
from cowfs.formats.registry import format_named

#: bytes; limits that ``qemu-img`` keeps for ``-S``
SECTOR = 512
MAX_SPARSE = 16 << 20


@click.command()
@click.option("-f", "--format", "format", metavar="FMT", help="Format of SRC; told from its first bytes if not given.")
@click.option(
    "-O", "--target-format", "target_format", metavar="FMT", default="raw", help="Format of DST; raw if not given."
)
@creation_options
@click.option("-c", "--compress", is_flag=True, help="Write clusters compressed (qcow2).")
@click.option("-B", "--backing", metavar="BACKING", help="Make DST an overlay on BACKING, of what SRC itself holds.")
@click.option("-F", "--backing-format", metavar="BFMT", help="Format of the backing file; -B needs it.")
@click.option("-n", "--no-create", is_flag=True, help="Write into DST, an image that exists.")
@click.option("--target-is-zero", is_flag=True, help="DST, which exists, reads as zeros all over: write none (-n).")
@snapshot_option
@click.option(
    "-S",
    "--sparse",
    metavar="SIZE",
    default="4k",
    help="Shortest run of zeros to leave out; 0 writes all (default 4k).",
)
@click.option("-r", "--speed", metavar="SIZE", default="0", help="Bytes a second that are written at most; 0: any.")
@click.option("-m", "--parallel", metavar="N", type=click.IntRange(1, 16), help="Steps that are read at a time.")
@click.option(
    "-W", "--out-of-order", is_flag=True, expose_value=False, help="As in qemu-img; DST is written in order anyway."
)
@cache_option("-t", "--cache", "of DST")
@cache_option("-T", "--source-cache", "of SRC")
@click.option("-p", "--progress", is_flag=True, help="Show how far it is.")
@force_share_option
@quiet_option
@click.argument("files", metavar="SRC… DST", nargs=-1)
def command(
    files: tuple[str, ...],
    format: str | None,
    target_format: str,
    options: tuple[str, ...],
    compress: bool,
    backing: str | None,
    backing_format: str | None,
    no_create: bool,
    target_is_zero: bool,
    snapshot: str | None,
    sparse: str,
    speed: str,
    parallel: int | None,
    progress: bool,
    opening: Opening,
    quiet: bool,
) -> None:
    """Copy the disk of image SRC, with all its backing files, into a new image DST.

    Several sources are copied one behind the other. What reads as zeros takes no space in DST. If the command
    fails, no new file is left behind.

    With -l, SRC is taken as it was, content and size, when a snapshot inside it was made.
    With -B, DST becomes an overlay, and only what SRC itself holds is copied: BACKING must hold what the
    backing file of SRC does. With -n, DST must be at least as large as what is copied; what it has more is left
    alone.

    \b
    Examples:
      cowfs convert -O qcow2 disk.raw disk.qcow2
      cowfs convert -c -O qcow2 -o compression_type=zstd vm1.qcow2 archive.qcow2
      cowfs convert -O qcow2 -B golden.qcow2 -F qcow2 vm1.qcow2 moved.qcow2
      cowfs convert -n vm1.qcow2 /dev/vg0/vm1
      cowfs convert -l before-upgrade -O qcow2 vm1.qcow2 old.qcow2
    """
    words = split_options(options)
    if asks_for_help(words):
        list_options(format_named(target_format))
        return
    if len(files) < 2:
        missing = "DST" if files else "SRC"
        raise click.UsageError(f"Missing argument '{missing}'.", click.get_current_context())
    *sources, name = files
    if no_create and words:
        raise UsageError("creation options mean nothing to an image that exists", file=name)
    chosen = parse_options(words, name)
    # the size is that of the sources, whatever is said, as with qemu-img
    chosen.pop("size", None)
    link = take_backing(name, backing, backing_format, chosen)
    if link is not None and len(sources) > 1:
        raise UsageError("several sources one behind the other cannot share a backing file", file=name)
    if snapshot is not None and len(sources) > 1:
        raise UsageError("-l is for one source; there are several", file=name)
    if target_is_zero and not no_create:
        raise UsageError("--target-is-zero needs -n: it tells something of an image that exists", file=name)
    target = Target(name, format_named(target_format).name, None if no_create else link, chosen, no_create)
    copying = CopyOptions(
        _parse_sparse(name, sparse),
        compress,
        blank=target_is_zero,
        top_only=link is not None,
        parallel=parallel or PARALLEL,
        speed=parse_size_for(name, speed) or 0,
    )
    shown = parse_snapshot_for(sources[0], snapshot)
    meter = Meter("convert", shown=progress and not quiet)
    try:
        inputs = [Source(file, format, shown) for file in sources]
        with explaining_disks(name):
            trio.run(convert, inputs, target, copying, meter.show, opening)
    finally:
        meter.end()


def _parse_sparse(file: str, text: str) -> int:
    size = parse_size_for(file, text) or 0
    if size % SECTOR or size > MAX_SPARSE:
        raise UsageError(f"-S takes multiples of {SECTOR} up to {MAX_SPARSE}, or 0 to write zeros out", file=file)
    return size
