"""``cowfs rebase``: put an overlay onto another backing file."""

import click
import trio

from cowfs.block.image import Backing
from cowfs.cli.meter import Meter
from cowfs.cli.options import cache_option, file_argument, format_option, quiet_option
from cowfs.errors import UsageError
from cowfs.formats.rebase import rebase, relabel


@click.command()
@format_option
@click.option("-b", "--backing", metavar="BACKING", help="The new backing file; '' for none.")
@click.option("-F", "--backing-format", metavar="BFMT", help="Format of the new backing file, which must be given.")
@click.option("-u", "--unsafe", is_flag=True, help="Change the header alone: the disk's content may change.")
@cache_option("-t", "--cache", "of FILE")
@cache_option("-T", "--source-cache", "of the backing files")
@click.option("-p", "--progress", is_flag=True, help="Show how far it is.")
@quiet_option
@file_argument
def command(
    file: str,
    format: str | None,
    backing: str | None,
    backing_format: str | None,
    unsafe: bool,
    progress: bool,
    quiet: bool,
) -> None:
    """Put the image FILE onto another backing file, or on none.

    The disk holds what it held before: where the old and the new backing file differ, FILE takes over what the
    old one has. With -b '' it takes over everything, and needs no backing file any more. A relative name is
    meant from the directory of FILE. A run that was broken off changes nothing that can be seen.

    With -u no backing file is looked at, and none need exist: for one that was moved or renamed. Without -b it
    drops the backing file.

    \b
    Examples:
      cowfs rebase -b golden-2.qcow2 -F qcow2 vm1.qcow2
      cowfs rebase -b '' vm1.qcow2
      cowfs rebase -u -b /new/place/golden.qcow2 -F qcow2 vm1.qcow2
    """
    if backing is None and not unsafe:
        raise click.UsageError("Give the new backing file (-b), or -u to drop it.", click.get_current_context())
    if backing_format is not None and not backing:
        raise UsageError("a backing format makes no sense without a backing file", file=file)
    link = Backing(backing, backing_format) if backing else None
    if unsafe:
        trio.run(relabel, file, format, link)
        return
    meter = Meter("rebase", shown=progress and not quiet)
    try:
        trio.run(rebase, file, format, link, meter.show)
    finally:
        meter.end()
