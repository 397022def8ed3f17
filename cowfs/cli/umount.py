"""``cowfs umount``: flush and take a mount away."""

import errno
import os
import select
from contextlib import ExitStack

import click

from cowfs.cli.live import read_mount
from cowfs.errors import StorageError, UsageError
from cowfs.fuse.kernel import flush_pages
from cowfs.fuse.mounts import FSTYPE, mount_at, resolve, unmount
from cowfs.fuse.stale import is_dead


@click.command()
@click.argument("mount_point", metavar="MOUNTPOINT")
def command(mount_point: str) -> None:
    """Flush all disks of a mount, unmount it, and wait until its server has gone.

    When the command returns, the images are complete on disk and free for other programs. Jobs that are
    active go on with the next mount. A mount that is in use is left as it is. One whose server has died is
    cleared away.

    \b
    Example:
      cowfs umount /mnt/disks
    """
    where = resolve(mount_point)
    entry = mount_at(where) or mount_at(where := os.path.realpath(mount_point))
    if entry is None or entry.fstype != FSTYPE:
        raise UsageError("is not the mount point of a cowfs mount", file=mount_point)
    if is_dead(where):
        unmount(where, lazy=True)
        return
    facts = read_mount(where)
    with ExitStack() as stack:
        server = _open_process(facts["pid"])
        if server is not None:
            stack.callback(os.close, server)
        _flush(where, [image["name"] for image in facts["images"]])
        unmount(where)
        if server is not None:
            select.select([server], [], [])


def _open_process(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        # the server runs where its number means nothing to us, or is just ending
        return None


def _flush(mount_point: str, names: list[str]) -> None:
    for name in names:
        try:
            try:
                flush_pages(mount_point, name)
            except OSError as error:
                if error.errno != errno.EFBIG:
                    raise
                # somebody wrote beyond the end of the disk; the kernel tells of it once, and it is no part of the disk
                flush_pages(mount_point, name)
        except OSError as error:
            raise StorageError.from_os(
                error, file=f"{mount_point}/{name}", doing="cannot flush, so it stays mounted"
            ) from error
