"""The control files of a mount, under ``.cowfs``. All of them are in these two tables."""

from cowfs.fuse.control import (
    chain,
    commit,
    copy_on_read,
    discard,
    error,
    map,
    mount_control,
    mount_status,
    resize,
    snapshot,
    stats,
    status,
    status_json,
    stream,
    trace,
    version,
)
from cowfs.fuse.control.file import ControlFile
from cowfs.fuse.images import Mount, Served

#: in ``.cowfs``
MOUNT_FILES: dict[str, ControlFile[Mount]] = {
    file.name: file for file in (mount_control.FILE, mount_status.FILE, version.FILE, error.MOUNT_FILE)
}

#: in ``.cowfs/NAME``
IMAGE_FILES: dict[str, ControlFile[Served]] = {
    file.name: file
    for file in (
        status.FILE,
        status_json.FILE,
        chain.FILE,
        map.FILE,
        stats.FILE,
        copy_on_read.FILE,
        resize.FILE,
        discard.FILE,
        stream.FILE,
        commit.FILE,
        snapshot.FILE,
        trace.FILE,
        error.FILE,
    )
}
