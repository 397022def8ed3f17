"""``status``: one image at a glance."""

from cowfs.fuse.control.file import ControlFile, key_values
from cowfs.fuse.images import Served
from cowfs.jobs.control import KINDS, progress


async def render(served: Served) -> str:
    """Return what the image is, and the state of its jobs; sizes in bytes."""
    disk = served.disk
    return key_values(
        {
            "file": served.file,
            "format": disk.layers[0].format,
            "size": disk.size,
            "depth": len(disk.layers),
            "read-only": disk.read_only,
            "copy-on-read": disk.copy_on_read,
            **{verb: progress(served.jobs.jobs.get(verb))["state"] for verb in KINDS},
        }
    )


FILE = ControlFile("status", "file, format, size, depth of the chain, copy-on-read, states of the jobs", render)
