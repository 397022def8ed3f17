"""``cowfs mount``: show chains of images as flat files."""

import os
from functools import partial

import click

from cowfs.errors import UsageError
from cowfs.fuse.daemon import in_background
from cowfs.fuse.images import Source
from cowfs.fuse.logs import start_logging
from cowfs.fuse.options import SWITCHES, VALUES, parse_options
from cowfs.fuse.server import Request, serve
from cowfs.fuse.stale import prepare_mount_point
from cowfs.storage import local_path


class _MountCommand(click.Command):
    """Lists the mount options after the others."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, help) for name, (_, help) in SWITCHES.items()]
        rows += [(f"{name}=…", help) for name, (_, _, help) in VALUES.items()]
        with formatter.section("Mount options (-o)"):
            formatter.write_dl(rows)


@click.command(cls=_MountCommand)
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground, with messages on the terminal.")
@click.option("-o", "--options", metavar="OPT,…", multiple=True, help="Mount options, see below.")
@click.argument("words", metavar="[NAME=]IMAGE… MOUNTPOINT", nargs=-1, required=True)
def command(words: tuple[str, ...], options: tuple[str, ...], foreground: bool) -> int | None:
    """Show each IMAGE, with all its backing files, as one flat file in the directory MOUNTPOINT.

    The flat file is called NAME, by default as the image without its extension. It can be read, written, made
    larger (truncate), given to a virtual machine or to a loop device ('cowfs attach'). What is written goes
    into IMAGE; its backing files stay as they are. MOUNTPOINT/.cowfs holds files to watch and steer it with,
    see cowfs-control(5). The command returns once the mount answers.

    \b
    Examples:
      cowfs mount vm1.qcow2 /mnt/disks
      cowfs mount web=a.qcow2 db=b.qed -o allow_other,mode=660,gid=107 /mnt/disks
      cowfs mount -o ro,no-copy-on-read backup.qcow2 /mnt/disks

    \b
    In /etc/fstab, with this program in /usr/local/bin:
      /images/vm1.qcow2  /mnt/disks  fuse.cowfs  allow_other,mode=660  0 0
    """
    *images, directory = words
    if not images:
        raise click.UsageError("Missing argument 'MOUNTPOINT'.", click.get_current_context())
    settings = parse_options(options)
    sources = [Source.parse(text).absolute() for text in images]
    mount_point = prepare_mount_point(directory)
    for source in sources:
        path = local_path(source.path)
        if path is not None and os.path.realpath(path).startswith(mount_point.rstrip("/") + "/"):
            raise UsageError(f"lies in {mount_point}, where the mount would hide it", file=source.path)
    request = Request(sources, mount_point, settings)
    start_logging(settings.log, foreground=foreground)
    if foreground:
        return serve(request, lambda: None)
    in_background(partial(serve, request))
    return None
