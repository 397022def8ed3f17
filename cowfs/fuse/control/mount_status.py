"""``.cowfs/status.json``: the mount, for programs."""

import json
import os

from cowfs import __version__
from cowfs.fuse.control import status_json
from cowfs.fuse.control.file import ControlFile
from cowfs.fuse.images import Mount


async def render(mount: Mount) -> str:
    """Return the server's process id, its version, the mount point, and every image's status."""
    facts = {
        "pid": os.getpid(),
        "version": __version__,
        "mount-point": mount.mount_point,
        "read-only": mount.settings.read_only,
        "images": [status_json.facts(served) for served in mount.images.values()],
    }
    return json.dumps(facts, indent=4) + "\n"


FILE = ControlFile("status.json", "process id of the server, version, mount point, images; for programs", render)
