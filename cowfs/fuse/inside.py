"""What of the host is the mount itself: its server must not wait for its own answer."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from cowfs.errors import NotPermitted
from cowfs.storage import Storage, host, is_remote, parse_address
from cowfs.storage.mounts import mount_points
from cowfs.storage.nbd.address import Address as NbdAddress


class OwnMount:
    """Refuses files that lie in the mount that this process serves, or on a block device that stands on it.

    ``device`` is the mount's ``st_dev``, set once there is one.
    """

    def __init__(self, mount_point: str) -> None:
        self.mount_point = mount_point
        self.device: int | None = None

    async def vet(self, path: str) -> None:
        """Refuse a name that leads into the mount, or whose file comes from it. Raises `NotPermitted`."""
        file = path
        if is_remote(path):
            address = parse_address(path)
            if not isinstance(address, NbdAddress) or address.socket is None:
                return
            file = address.socket
        reason = await host.ask(self._reason, file, file=path)
        if reason is not None:
            raise NotPermitted(f"{reason} the mount {self.mount_point}, which cannot serve it to itself", file=path)

    def vet_open(self, storage: Storage) -> None:
        """Refuse an open file of the mount: there are names that tell nothing, as of descriptors in ``/proc``."""
        if self.device is not None and storage.identity[0] == self.device:
            raise NotPermitted(
                f"lies inside the mount {self.mount_point}, which cannot serve it to itself", file=storage.name
            )

    def _reason(self, path: str) -> str | None:
        points = {self.mount_point} if self.device is None else set(mount_points(self.device))
        if host.leads_into(path, points):
            return "lies inside"
        if self.device is None:
            return None
        status = _stat(path) or _stat(os.path.dirname(path))  # noqa: PTH120
        if status is None:
            # opening it says better what is wrong with it
            return None
        devices = [status.st_dev, *([status.st_rdev] if stat.S_ISBLK(status.st_mode) else [])]
        files = (file for device in devices for file in _files_below(_sysfs(device)))
        return "stands on" if any(host.leads_into(file, points) for file in files) else None


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116
    except OSError:
        return None


def _sysfs(device: int) -> Path:
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


def _files_below(device: Path) -> Iterator[str]:
    """Files that a block device, by its directory in sysfs, stands on: of loop devices, below whatever there is."""
    if not device.exists():
        # no block device, as the devices of tmpfs and FUSE are none
        return
    device = device.resolve()
    if (device / "partition").exists():
        device = device.parent
    backing = device / "loop" / "backing_file"
    if backing.exists():
        yield backing.read_text(errors="surrogateescape").rstrip("\n")
    slaves = device / "slaves"
    for slave in slaves.iterdir() if slaves.exists() else ():
        yield from _files_below(slave)
