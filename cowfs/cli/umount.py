"""``cowfs umount``: flush and take a mount away."""

import errno
import os
import select
import signal
from contextlib import ExitStack, suppress

import click

from cowfs.cli.live import read_mount
from cowfs.errors import StorageError, UsageError
from cowfs.fuse.kernel import flush_pages
from cowfs.fuse.mounts import FSTYPE, resolve, unmount
from cowfs.fuse.stale import is_dead
from cowfs.storage.mounts import mount_at

_STAYS = "cannot flush, so it stays mounted"
_LOST = "was unmounted, and not all that was written is stored"


@click.command()
@click.option("-f", "--force", is_flag=True, help="Unmount also if not all that was written can be stored.")
@click.argument("mount_point", metavar="MOUNTPOINT")
def command(mount_point: str, force: bool) -> None:
    """Flush all disks of a mount, unmount it, and wait until its server has gone.

    When the command returns, the images are complete on disk and free for other programs. Jobs that are
    active go on with the next mount. A mount that is in use is left as it is, and so is one that cannot be
    flushed, unless that is forced: then it ends all the same, with what can be stored, and what is lost is an
    error. One whose server has died is cleared away.

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
        failures = _flush(where, [image["name"] for image in facts["images"]])
        if failures and not force:
            failures[0].message += "; make room, or what else it takes, and try again, or give it up with --force"
            raise failures[0]
        unmount(where)
        if server is not None:
            if failures:
                # it waits for nobody that is away any more; if it has not ended yet
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(server, signal.SIGTERM)
            select.select([server], [], [])
    if failures:
        failures[0].message = failures[0].message.replace(_STAYS, _LOST)
        raise failures[0]


def _open_process(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        # the server runs where its number means nothing to us, or is just ending
        return None


def _flush(mount_point: str, names: list[str]) -> list[StorageError]:
    """Flush all disks of a mount; returns why some could not be."""
    failures = []
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
            failures.append(StorageError.from_os(error, file=f"{mount_point}/{name}", doing=_STAYS))
    return failures
