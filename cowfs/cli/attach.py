"""``cowfs attach``: make a mounted disk a loop device."""

import os
from pathlib import Path

import click

from cowfs.cli.live import require_live
from cowfs.cli.loops import find_partitions, losetup


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
    except BaseException:
        losetup(live, "--detach", device)
        raise
    click.echo(device)
