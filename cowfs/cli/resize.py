"""``cowfs resize``: change the size of a disk."""

import click
import trio

from cowfs.cli.live import Live, find_live
from cowfs.cli.options import quiet_option
from cowfs.cli.streams import tell
from cowfs.errors import NotPermitted, UsageError
from cowfs.formats.chain import open_disk
from cowfs.units import parse_new_size

#: bytes; disks of all formats but raw are whole numbers of sectors, as with ``qemu-img``
SECTOR = 512


# a size that begins with a minus is no option
@click.command(context_settings={"ignore_unknown_options": True})
@click.option("-f", "--format", metavar="FMT", help="Format of an image FILE; told from its first bytes if not given.")
@click.option("--shrink", is_flag=True, help="The disk may become smaller; what lies behind its new end is lost.")
@quiet_option
@click.argument("file", metavar="MOUNT/NAME|FILE")
@click.argument("size", metavar="[+|-]SIZE")
def command(file: str, format: str | None, shrink: bool, quiet: bool, size: str) -> None:
    """Give a disk SIZE bytes, or so many more (+) or less (-); suffixes k, M, G and T are powers of 1024.

    What a disk gains reads as zeros, whatever a backing file has there. Given the flat file of a mount, this
    happens under whoever uses the disk; a loop device on it is told with 'losetup -c'. Given an image file,
    nothing else may use that meanwhile. After a crash the disk has its old size and content or the new.

    \b
    Examples:
      cowfs resize vm1.qcow2 +10G
      cowfs resize --shrink vm1.qcow2 20G
      cowfs resize /mnt/disks/vm1 64G
    """
    if size.startswith("-") and not size[1:2].isdigit():
        raise click.UsageError(f"No such option: {size}", click.get_current_context())
    live = find_live(file)
    try:
        if live is None:
            trio.run(_resize, file, format, size, shrink)
        elif format is not None:
            raise UsageError("--format is for image files; this disk is open already")
        else:
            _resize_live(live, size, shrink)
    except UsageError as error:
        error.file = error.file or file
        raise
    if not quiet:
        tell("Image resized.")


def _resize_live(live: Live, size: str, shrink: bool) -> None:
    current = int(live.read("resize"))
    wanted = parse_new_size(size, current)
    _check_shrink(live.path, current, wanted, shrink)
    live.command("resize", f"{wanted} shrink" if shrink else str(wanted))


async def _resize(file: str, format: str | None, size: str, shrink: bool) -> None:
    disk = await open_disk(file, format, writable=True, copy_on_read=False)
    try:
        wanted = parse_new_size(size, disk.size)
        _check_shrink(file, disk.size, wanted, shrink)
        if wanted % SECTOR and disk.layers[0].format != "raw":
            raise UsageError(
                f"{wanted} bytes is no multiple of {SECTOR}, as sizes of {disk.layers[0].format} images are"
            )
        if wanted < disk.size:
            await disk.shrink(wanted)
        elif wanted > disk.size:
            await disk.grow(wanted)
    finally:
        with trio.CancelScope(shield=True):
            await disk.close()


def _check_shrink(file: str, current: int, wanted: int, shrink: bool) -> None:
    if wanted < current and not shrink:
        raise NotPermitted(
            f"cutting the disk from {current} to {wanted} bytes loses what lies behind; --shrink allows it", file=file
        )
