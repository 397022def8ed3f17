"""The mounts of cowfs: what their type is, and taking them away."""

import ctypes
import os
import subprocess

from cowfs.errors import Busy, CowfsError, StorageError

#: as it stands in ``/proc/self/mountinfo``
FSTYPE = "fuse.cowfs"

MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def resolve(path: str) -> str:
    """Make a path absolute, its symbolic links followed, without asking the last directory, which may be dead."""
    parent, name = os.path.split(os.path.abspath(path))  # noqa: PTH100
    return os.path.join(os.path.realpath(parent), name) if name else parent  # noqa: PTH118


def unmount(mount_point: str, *, lazy: bool = False) -> None:
    """Unmount; ``lazy`` takes it out of sight even if it is in use or dead. Raises `Busy` or `StorageError`."""
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(mount_point), MNT_DETACH if lazy else 0) == 0:
            return
        number = ctypes.get_errno()
        if number == Busy.errno:
            raise Busy("cannot unmount: it is in use", file=mount_point)
        raise StorageError(f"cannot unmount: {os.strerror(number)}", errno=number, file=mount_point)
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mount_point]
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CowfsError("cannot unmount: fusermount3 is not installed", file=mount_point) from None
    if outcome.returncode:
        if "busy" in outcome.stderr:
            raise Busy("cannot unmount: it is in use", file=mount_point)
        raise CowfsError(f"cannot unmount: {outcome.stderr.strip()}", file=mount_point)
