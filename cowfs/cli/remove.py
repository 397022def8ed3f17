"""``cowfs remove``: take disks out of a mount."""

import click

from cowfs.cli.live import command_mount, require_live


@click.command()
@click.argument("paths", metavar="MOUNT/NAME…", nargs=-1, required=True)
def command(paths: tuple[str, ...]) -> None:
    """Take disks out of a mount: what was written to them is flushed, and their images are closed.

    When the command returns, the images are complete on disk and free for other programs. A disk that somebody
    has open, or that has an active job, is left as it is, and ends the command. A mount can do without any disk.

    \b
    Example:
      cowfs remove /mnt/disks/vm1 /mnt/disks/vm2
    """
    for path in paths:
        live = require_live(path)
        command_mount(live.mount_point, f"remove {live.name}", file=live.path)
