"""The other side of the mount: calls on our own files, which the loop in this process answers.

All of them block until the loop has answered, and so must run in a thread.
"""

import logging
import os
from pathlib import Path
from time import time_ns

from cowfs.storage.mounts import mount_at

log = logging.getLogger(__name__)

#: KiB; with the kernel's default of 128 buffered sequential reads have a quarter of the speed
READ_AHEAD = 1024
#: requests under way that no process waits for (read-ahead, writeback); the default is 12
MAX_BACKGROUND = 64


def tune(mount_point: str) -> None:
    """Set what only sysfs can set. Not being allowed to is harmless."""
    entry = mount_at(mount_point)
    if entry is None:
        return
    connection = f"/sys/fs/fuse/connections/{entry.device.partition(':')[2]}"
    for name, value in (
        (f"/sys/class/bdi/{entry.device}/read_ahead_kb", READ_AHEAD),
        (f"{connection}/max_background", MAX_BACKGROUND),
        (f"{connection}/congestion_threshold", MAX_BACKGROUND * 3 // 4),
    ):
        try:
            Path(name).write_text(str(value))
        except OSError as error:
            log.debug("cannot tune %s: %s", name, error)


def flush_pages(mount_point: str, name: str) -> None:
    """Have the kernel write back what it holds of a flat file. Raises OSError."""
    descriptor = os.open(f"{mount_point}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def touch(mount_point: str, name: str) -> None:
    """Move a flat file's modification time: with its writeback cache the kernel does not ask for it. Raises OSError."""
    path = Path(f"{mount_point}/{name}")
    os.utime(path, ns=(path.stat().st_atime_ns, time_ns()))


def correct_size(mount_point: str, name: str, size: int) -> None:
    """Set the kernel's idea of a flat file's size right.

    With its writeback cache it takes a buffered write beyond the end for one that makes the file longer.
    Raises OSError.
    """
    os.truncate(f"{mount_point}/{name}", size)
