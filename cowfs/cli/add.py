"""``cowfs add``: show more images in a mount."""

import click

from cowfs.cli.live import command_mount, require_mount
from cowfs.errors import UsageError
from cowfs.formats.registry import format_named
from cowfs.fuse.images import Source


@click.command()
@click.option("-f", "--format", metavar="FMT", help="Format of the images; told from their first bytes if not given.")
@click.option("-r", "--read-only", is_flag=True, help="The disks cannot be written.")
@click.argument("mount_point", metavar="MOUNTPOINT")
@click.argument("images", metavar="[NAME=]IMAGE…", nargs=-1, required=True)
def command(mount_point: str, images: tuple[str, ...], format: str | None, read_only: bool) -> None:
    """Show each IMAGE, with all its backing files, as one more flat file of a mount.

    The file is called NAME, by default as the image without its extension. The first image that is refused
    ends the command; those before it stay in the mount.

    \b
    Examples:
      cowfs add /mnt/disks vm2.qcow2
      cowfs add -r /mnt/disks old=/backup/vm1.qcow2
    """
    where = require_mount(mount_point)
    if format is not None:
        format_named(format)
    for text in images:
        source = Source.parse(text)._replace(format=format).absolute()
        options = [*([f"format={source.format}"] if source.format else []), *(["ro"] if read_only else [])]
        if not source.path or source.path != source.path.rstrip() or "\n" in source.path:
            # commands are lines, and what stands around them counts for nothing
            raise UsageError("this file name cannot be written to a control file; give the file another one", file=text)
        named = source.path if source.name is None else f"{source.name}={source.path}"
        command_mount(where, " ".join(["add", *options, "--", named]), file=source.path)
