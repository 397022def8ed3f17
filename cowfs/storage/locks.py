"""Image locks: how the processes that have an image open tell each other what they do with it.

They are QEMU's: bytes of the file that stand for permissions, and locks of the open file description on them
(``fcntl(2)``, ``F_OFD_SETLK``), all shared ones. Byte 100 + N: somebody makes use of permission N. Byte 200 + N:
somebody does not want others to. Who wants to use an image first takes his locks, then looks whether anybody has
one that goes against them. Closing the file lets go of them, however a process ends.
"""

import errno
import fcntl
import math
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cowfs.errors import Busy, StorageError

#: ``struct flock``: type, whence, start, length, process
_FLOCK = struct.Struct("@hhqqi4x")
_USED = 100
_FORBIDDEN = 200
#: QEMU's permissions, those that matter between processes
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3


class Use(NamedTuple):
    """What one process does with an image, and what it does not let others do; permissions by their numbers."""

    used: tuple[int, ...]
    forbidden: tuple[int, ...]

    @property
    def taken(self) -> Iterator[int]:
        """Bytes to lock."""
        yield from (_USED + number for number in self.used)
        yield from (_FORBIDDEN + number for number in self.forbidden)

    @property
    def opposed(self) -> Iterator[int]:
        """Bytes that nobody else may have locked."""
        yield from (_FORBIDDEN + number for number in self.used)
        yield from (_USED + number for number in self.forbidden)


#: the content must not change meanwhile
READING = Use((_CONSISTENT_READ,), (_WRITE, _RESIZE))
WRITING = Use((_CONSISTENT_READ, _WRITE, _RESIZE), (_WRITE, _RESIZE))


def take(fd: int, use: Use, name: str) -> None:
    """Take the locks for ``use``. They keep others out from now on; whether others keep us out, `check` tells.

    Raises `StorageError` where the file system has no such locks.
    """
    try:
        for byte in use.taken:
            _call(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            # none of QEMU's, which are all shared
            raise Busy("is locked by another process", file=name) from error
        raise StorageError.from_os(error, file=name, doing="cannot be locked") from error


def check(fd: int, use: Use, name: str) -> None:
    """Raise `Busy` if somebody's locks go against ``use``, naming the process where that can be known."""
    for byte in use.opposed:
        if _call(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK:
            raise Busy(_refusal(fd, byte), file=name)


def unlock(fd: int) -> None:
    """Let go of all that the open file has."""
    for byte in WRITING.taken:
        _call(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)


def _call(fd: int, command: int, kind: int, byte: int) -> int:
    answer = fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    return int(_FLOCK.unpack(answer)[0])


def _refusal(fd: int, byte: int) -> str:
    holder = _holder(fd, byte)
    if holder == os.getpid():
        who = "another disk of this process"
    elif holder is None:
        who = "another process"
    else:
        who = f"process {holder} ({_command(holder)})"
    if byte >= _FORBIDDEN:
        return f"is in use by {who}, and cannot be written to meanwhile"
    return f"is being written to by {who}"


def _holder(fd: int, byte: int) -> int | None:
    """Process with a lock on a byte of an open file, which has locks of its own; None if this process may not know.

    Reads nothing but ``/proc``, and no file system is asked: stat(2) of a descriptor of another process would ask the
    one that it is open in, which may be dead, or wait for this very process.
    """
    own = os.getpid()
    # device and inode as the kernel writes them, which on some file systems are not those of stat(2)
    file = next((lock.file for lock in _locks(own, str(fd))), None)
    for process in _processes():
        for number in _names(f"/proc/{process}/fdinfo"):
            if (process, number) == (own, str(fd)):
                continue
            if any(lock.file == file and lock.first <= byte <= lock.last for lock in _locks(process, number)):
                return process
    return None


def _processes() -> Iterable[int]:
    return sorted(int(name) for name in _names("/proc") if name.isdigit())


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208
    except OSError:
        # ended meanwhile, or another user's
        return []


class _Lock(NamedTuple):
    """A lock of an open file description: device and inode as ``/proc`` has them, first and last byte."""

    file: str
    first: int
    last: float


def _locks(process: int, number: str) -> list[_Lock]:
    """Locks of a descriptor: lines as "lock: 1: OFDLCK  ADVISORY  READ -1 00:1f:77 100 100" of its ``fdinfo``."""
    try:
        text = Path(f"/proc/{process}/fdinfo/{number}").read_text()
    except OSError:
        # closed meanwhile
        return []
    found = []
    for words in map(str.split, text.splitlines()):
        if words[:1] == ["lock:"] and "OFDLCK" in words:
            file, first, last = words[-3:]
            found.append(_Lock(file, int(first), math.inf if last == "EOF" else int(last)))
    return found


def _command(process: int) -> str:
    try:
        return Path("/proc", str(process), "comm").read_text().strip()
    except OSError:
        return "ended meanwhile"
