"""What is mounted, and taking it away."""

import ctypes
import os
import re
import subprocess
from typing import NamedTuple

from cowfs.errors import Busy, CowfsError, StorageError

#: as it stands in ``/proc/self/mountinfo``
FSTYPE = "fuse.cowfs"

MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


class MountEntry(NamedTuple):
    """One line of ``/proc/self/mountinfo``; ``device`` as ``MAJOR:MINOR``."""

    mount_point: str
    fstype: str
    source: str
    device: str


def list_mounts() -> list[MountEntry]:
    """Return all mounts that this process sees, in the order in which they were made."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [_parse(line) for line in file]


def _parse(line: str) -> MountEntry:
    fields = line.rstrip("\n").split(" ")
    rest = fields[fields.index("-") + 1 :]
    return MountEntry(_unescape(fields[4]), rest[0], _unescape(rest[1]), fields[2])


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mount_at(mount_point: str) -> MountEntry | None:
    """Return what is mounted on a directory, the uppermost if several; the path must be absolute and resolved."""
    return next((entry for entry in reversed(list_mounts()) if entry.mount_point == mount_point), None)


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
