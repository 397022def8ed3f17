"""``chain``: the layers of one image."""

from cowfs.fuse.control.file import ControlFile, one_line
from cowfs.fuse.images import Served


async def render(served: Served) -> str:
    """Return a line for each layer, active layer first; numbers as in ``layers``, size of its disk in bytes."""
    layers = served.disk.layers
    lines = [
        f"{len(layers) - 1 - depth} {layer.format} {layer.size} {one_line(layer.name)}\n"
        for depth, layer in enumerate(layers)
    ]
    return "".join(lines)


FILE = ControlFile("chain", "a line for each layer, active layer first: INDEX FORMAT SIZE FILE", render)
