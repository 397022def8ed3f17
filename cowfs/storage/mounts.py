"""What is mounted where, as the kernel tells it: no file system is asked."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: types of file systems that are served by somebody else, beside all whose names begin with "fuse"
_SERVED = frozenset(
    (
        *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "gfs2", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2"),
        *("orangefs", "prl_fs", "smb3", "smbfs", "vboxsf", "virtiofs"),
    )
)


class MountEntry(NamedTuple):
    """One line of ``/proc/self/mountinfo``; ``device`` as ``MAJOR:MINOR``."""

    mount_point: str
    fstype: str
    source: str
    device: str
    id: str

    @property
    def number(self) -> int:
        """The device as ``st_dev`` has it."""
        return os.makedev(*map(int, self.device.split(":")))

    @property
    def is_served(self) -> bool:
        """Whether somebody else serves the file system, over a network or with a program, who may not answer."""
        return self.fstype in _SERVED or self.fstype.startswith("fuse")

    @property
    def is_memory(self) -> bool:
        """Whether the file system is nothing but memory, where no read ever waits."""
        return self.fstype in ("tmpfs", "ramfs")


def list_mounts() -> list[MountEntry]:
    """Return all mounts that this process sees, in the order in which they were made."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [_parse(line) for line in file]


def _parse(line: str) -> MountEntry:
    fields = line.rstrip("\n").split(" ")
    rest = fields[fields.index("-") + 1 :]
    return MountEntry(_unescape(fields[4]), rest[0], _unescape(rest[1]), fields[2], fields[0])


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mount_at(mount_point: str) -> MountEntry | None:
    """Return what is mounted on a directory, the uppermost if several; the path must be absolute and resolved."""
    return next((entry for entry in reversed(list_mounts()) if entry.mount_point == mount_point), None)


def mount_of(fd: int, device: int) -> MountEntry | None:
    """Return the mount that an open file lies in, or another one of the same device; None if none can be seen.

    ``device`` is its ``st_dev``.
    """
    try:
        facts = Path(f"/proc/self/fdinfo/{fd}").read_text()
        mounts = list_mounts()
    except FileNotFoundError:
        # there is no /proc here
        return None
    ids = [line.split()[1] for line in facts.splitlines() if line.startswith("mnt_id:")]
    found = [entry for entry in mounts if entry.id in ids] or [entry for entry in mounts if entry.number == device]
    return found[-1] if found else None


def mount_points(device: int) -> Iterator[str]:
    """Directories and files where a device, or a part of it, is mounted, and nothing on top of it."""
    seen: set[str] = set()
    for entry in reversed(list_mounts()):
        if entry.mount_point not in seen:
            seen.add(entry.mount_point)
            if entry.number == device:
                yield entry.mount_point
