"""``chain``: the layers of one image."""

from cowfs.fuse.control.file import ControlFile, one_line
from cowfs.fuse.images import Served


async def render(served: Served) -> str:
    """Return a line for each layer, active layer first; size of its disk in bytes."""
    lines = [
        f"{index} {layer.format} {layer.size} {one_line(layer.name)}\n"
        for index, layer in enumerate(served.disk.layers)
    ]
    return "".join(lines)


FILE = ControlFile("chain", "a line for each layer, active layer first: INDEX FORMAT SIZE FILE", render)
