"""What the commands share that talk to a running mount through its control files."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from cowfs.errors import CowfsError, StorageError, UsageError
from cowfs.fuse.mounts import FSTYPE, resolve
from cowfs.storage import is_json_name, is_remote
from cowfs.storage.mounts import list_mounts


class Live(NamedTuple):
    """A disk in a mount, by the path of its flat file."""

    mount_point: str
    name: str

    @property
    def path(self) -> str:
        """The flat file."""
        return f"{self.mount_point}/{self.name}"

    def control(self, file: str) -> str:
        """Path of one of its control files."""
        return f"{self.mount_point}/.cowfs/{self.name}/{file}"

    def command(self, file: str, text: str) -> None:
        """Write a command; raises the sentence that the mount gives for refusing it."""
        _command(self.control(file), text, file=self.path)

    def read(self, file: str) -> str:
        """Read a control file."""
        try:
            return Path(self.control(file)).read_text(errors="surrogateescape")
        except OSError as error:
            raise StorageError.from_os(error, file=self.control(file), doing="cannot read") from error

    def status(self) -> dict[str, Any]:
        """Return what its ``status.json`` says."""
        facts: dict[str, Any] = json.loads(self.read("status.json"))
        return facts


def command_mount(mount_point: str, text: str, *, file: str) -> None:
    """Write a command to ``.cowfs/control`` of a mount; raises why it is refused, blaming ``file``."""
    _command(f"{mount_point}/.cowfs/control", text, file=file)


def _command(control: str, text: str, *, file: str) -> None:
    try:
        descriptor = os.open(control, os.O_WRONLY)
    except OSError as error:
        raise StorageError.from_os(error, file=control, doing="cannot write") from error
    try:
        # in one piece, since each write is a command
        os.write(descriptor, text.encode(errors="surrogateescape"))
    except OSError as error:
        raise _refusal(control, error, file) from error
    finally:
        os.close(descriptor)


def _refusal(control: str, error: OSError, file: str) -> CowfsError:
    try:
        sentence = Path(control).with_name("error").read_text(errors="surrogateescape").strip()
    except OSError:
        sentence = ""
    # the sentence names the file by itself where one is at fault
    said = (sentence or os.strerror(error.errno or 0)).removeprefix(f"{file}: ")
    return StorageError(said, errno=error.errno or StorageError.errno, file=file)


def mount_points() -> list[str]:
    """Return where cowfs is mounted."""
    return [entry.mount_point for entry in list_mounts() if entry.fstype == FSTYPE]


def find_live(path: str) -> Live | None:
    """Return the disk of a mount that a path stands for, or None if it does not lie in a mount.

    Raises `UsageError` for a path in a mount that is no flat file.
    """
    if is_json_name(path) or is_remote(path):
        return None
    full = resolve(path)
    mount_point = next((point for point in mount_points() if full == point or full.startswith(f"{point}/")), None)
    if mount_point is None:
        return None
    name = full[len(mount_point) + 1 :]
    if not name or "/" in name or name == ".cowfs":
        raise UsageError("is no disk of the mount; name one, as MOUNTPOINT/NAME", file=path)
    if not Path(full).exists():
        raise UsageError(f"there is no such disk in the mount {mount_point}", file=path)
    return Live(mount_point, name)


def require_live(path: str) -> Live:
    """Like `find_live`; a path outside of any mount is an error too."""
    live = find_live(path)
    if live is None:
        raise UsageError("does not lie in a cowfs mount", file=path)
    return live


def require_mount(path: str) -> str:
    """Return the mount point that a path is. Raises `UsageError` if it is none of a cowfs mount."""
    points = mount_points()
    # the name as given first: looking behind it asks the file system that may lie there
    where = resolve(path)
    if where not in points and (where := os.path.realpath(path)) not in points:
        raise UsageError("is not the mount point of a cowfs mount", file=path)
    return where


def read_mount(mount_point: str) -> dict[str, Any]:
    """Return what ``.cowfs/status.json`` of a mount says. Raises `StorageError`, `ENOTCONN` if the server is dead."""
    path = f"{mount_point}/.cowfs/status.json"
    try:
        facts: dict[str, Any] = json.loads(Path(path).read_text(errors="surrogateescape"))
    except OSError as error:
        raise StorageError.from_os(error, file=mount_point, doing="the server does not answer") from error
    return facts
