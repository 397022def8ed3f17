"""``.cowfs/version``: the version of the server."""

from cowfs import __version__
from cowfs.fuse.control.file import ControlFile
from cowfs.fuse.images import Mount


async def render(mount: Mount) -> str:
    """Return the version alone on a line."""
    return f"{__version__}\n"


FILE = ControlFile("version", "version of the server", render)
