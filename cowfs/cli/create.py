"""``cowfs create``: make a new image."""

from collections.abc import Mapping
from functools import partial

import click
import trio

from cowfs.block.image import Backing
from cowfs.cli.creation import (
    asks_for_help,
    creation_options,
    explaining_disks,
    list_options,
    parse_options,
    split_options,
    take_backing,
)
from cowfs.cli.options import parse_size_for, quiet_option
from cowfs.cli.streams import tell
from cowfs.errors import UsageError
from cowfs.formats.create import create_image
from cowfs.formats.registry import format_named
from cowfs.jobs.journal import forget_jobs
from cowfs.storage import is_remote


@click.command()
@click.option(
    "-f", "--format", "format", metavar="FMT", default="raw", help="Format of the new image; raw if not given."
)
@click.option(
    "-b", "--backing", metavar="BACKING", help="What the new image starts out as; it must not change any more."
)
@click.option("-F", "--backing-format", metavar="BFMT", help="Format of the backing file; -b needs it.")
@click.option("-u", "--unsafe", is_flag=True, help="Do not look at the backing file; it need not exist yet.")
@creation_options
@quiet_option
@click.argument("file", metavar="FILE", required=False)
@click.argument("size", metavar="[SIZE]", required=False)
def command(
    format: str,
    backing: str | None,
    backing_format: str | None,
    unsafe: bool,
    options: tuple[str, ...],
    quiet: bool,
    file: str | None,
    size: str | None,
) -> None:
    """Make a new disk image FILE whose disk has SIZE bytes.

    SIZE takes the suffixes k, M, G, T, P and E (powers of 1024), and is the size of the backing file's disk if
    left out. A relative name of a backing file is meant from the directory of FILE, wherever the command is
    run. An existing FILE is replaced, but only once everything else is known to be right; if the command
    fails, no new file is left behind.

    \b
    Examples:
      cowfs create disk.raw 10G
      cowfs create -f qcow2 -b disk.raw -F raw overlay.qcow2
      cowfs create -f qcow2 -o cluster_size=128k,lazy_refcounts=on big.qcow2 1T
      cowfs create -f qcow2 -o help
    """
    words = split_options(options)
    if asks_for_help(words):
        list_options(format_named(format))
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE'.", click.get_current_context())
    chosen = parse_options(words, file)
    link = take_backing(file, backing, backing_format, chosen)
    if size is not None and "size" in chosen:
        raise UsageError("the size is given twice", file=file)
    wanted = parse_size_for(file, chosen.pop("size", size))
    with explaining_disks(file):
        made = trio.run(partial(create_image, file, format, wanted, link, chosen, trust_backing=unsafe))
    if not is_remote(file):
        forget_jobs(file)
    if not quiet:
        tell(_summary(file, format, made, link, chosen))


def _summary(file: str, format: str, size: int, backing: Backing | None, options: Mapping[str, str]) -> str:
    facts = {"fmt": format, "size": str(size)}
    if backing is not None:
        facts["backing_file"] = backing.name
        if backing.format is not None:
            facts["backing_fmt"] = backing.format
    return f"Formatting '{file}', " + " ".join(f"{key}={value}" for key, value in {**facts, **options}.items())
