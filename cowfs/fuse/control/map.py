"""``map``: where each part of the disk lies."""

from cowfs.formats.mapping import map_entries, render_json
from cowfs.fuse.control.file import ControlFile
from cowfs.fuse.images import Served


async def render(served: Served) -> str:
    """Return what ``cowfs map --json`` prints."""
    return render_json(await map_entries(served.disk))


FILE = ControlFile("map", "which parts of the disk lie where in which layer, as cowfs map --json", render)
