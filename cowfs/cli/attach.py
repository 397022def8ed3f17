"""``cowfs attach``: make a mounted disk a loop device."""

import os
from pathlib import Path

import click

from cowfs.cli.live import Live, require_live
from cowfs.cli.loops import find_partitions, losetup
from cowfs.cli.streams import tell

#: bytes; the unit of sizes in sysfs
SECTOR = 512


@click.command()
@click.argument("path", metavar="MOUNT/NAME")
def command(path: str) -> None:
    """Make a disk of a mount a block device, with its partitions as /dev/loopNpM, and print its name.

    The device reads and writes past the page cache of the mount, so that data is not held in memory twice.
    It is read-only if the disk is.

    \b
    Example:
      cowfs attach /mnt/disks/vm1
      mount /dev/loop0p1 /mnt/root
    """
    live = require_live(path)
    read_only = [] if os.access(Path(live.path), os.W_OK) else ["--read-only"]
    (device,) = losetup(live, "--find", "--partscan", "--show", "--direct-io=on", *read_only, live.path)
    try:
        find_partitions(live, device)
        _warn_of_rest(live, device)
        # nobody would know what to detach
        click.echo(device)
    except BaseException:
        losetup(live, "--detach", device)
        raise


def _warn_of_rest(live: Live, device: str) -> None:
    """Say what a loop device, which has whole sectors, does not show of a disk."""
    shown = int(Path("/sys/block", Path(device).name, "size").read_text()) * SECTOR
    rest = Path(live.path).stat().st_size - shown
    if rest:
        lack = f"has whole sectors, and does not show the last {rest} bytes of the disk"
        tell(f"cowfs: {live.path}: warning: {device} {lack}", err=True)
