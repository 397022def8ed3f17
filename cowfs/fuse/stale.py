"""Mount points: which can be used, and cleaning up after a server that died."""

import errno
import os
import stat

from cowfs.errors import Busy, NotFound, StorageError, UsageError
from cowfs.fuse.mounts import FSTYPE, resolve, unmount
from cowfs.storage.mounts import mount_at

#: how a mount whose server is gone answers
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)


def is_dead(mount_point: str) -> bool:
    """Whether a mount is still there although its server is not."""
    try:
        # stat(2) would be answered from the kernel's cache
        os.statvfs(mount_point)
    except OSError as error:
        return error.errno in _DEAD
    return False


def prepare_mount_point(path: str) -> str:
    """Return the resolved path of a directory that can be mounted on; a dead mount on it is taken away first.

    Raises `Busy` if a live server of ours is mounted there, `NotFound`, `UsageError` or `StorageError`.
    """
    mount_point = resolve(path)
    entry = mount_at(mount_point)
    while entry is not None and entry.fstype == FSTYPE and is_dead(mount_point):
        unmount(mount_point, lazy=True)
        entry = mount_at(mount_point)
    mount_point = os.path.realpath(path)
    entry = mount_at(mount_point)
    if entry is not None and entry.fstype == FSTYPE:
        raise Busy("cowfs is mounted there already", file=path)
    try:
        mode = os.stat(mount_point).st_mode  # noqa: PTH116
    except FileNotFoundError:
        raise NotFound("the mount point does not exist", file=path) from None
    except OSError as error:
        raise StorageError.from_os(error, file=path, doing="cannot use the mount point") from error
    if not stat.S_ISDIR(mode):
        raise UsageError("the mount point is not a directory", file=path)
    return mount_point
