"""``cowfs detach``: take the loop device of a mounted disk away."""

import click

from cowfs.cli.live import require_live
from cowfs.cli.loops import devices_of, losetup
from cowfs.errors import Busy, NotFound


@click.command()
@click.argument("path", metavar="MOUNT/NAME")
def command(path: str) -> None:
    """Take away all loop devices that stand on a disk of a mount. File systems on them must not be mounted.

    \b
    Example:
      cowfs detach /mnt/disks/vm1
    """
    live = require_live(path)
    devices = devices_of(live)
    if not devices:
        raise NotFound("no loop device stands on it", file=path)
    for device in devices:
        losetup(live, "--detach", device)
    left = devices_of(live)
    if left:
        raise Busy(f"{', '.join(left)} is still in use, and goes away with its last user", file=path)
