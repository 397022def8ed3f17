"""Images whose content a commit has merged into one below: they show nothing of use any more, and say so.

What lay between a commit's base and the layer that is put on it was made to lie on the old base. On the new one it
would show a disk that never was. So the name of its backing file gives way to a sentence: cowfs refuses the image with
it, and so does every other program that looks for a backing file of that name. The image's own data stays as it is,
and ``rebase -u`` gives it another backing file, for whoever knows better.
"""

import os.path

from cowfs.block.layer import Layer
from cowfs.errors import Stale, Unsupported
from cowfs.storage import local_path

_MARK = "merged by a commit"
_INTO = _MARK + " into "


def require_unmerged(layer: Layer) -> None:
    """Raise `Stale` for an image that is marked as merged."""
    name = layer.backing.name if layer.backing else ""
    if name.startswith(_MARK):
        into = name.removeprefix(_INTO) if name.startswith(_INTO) else "the image below it"
        raise Stale(f"was merged into {into} by a commit, and is no disk of its own any more", file=layer.name)


async def mark_layer(layer: Layer, into: str) -> None:
    """Mark an open image, durably. One that says so already stays as it is."""
    if layer.backing is None or layer.backing.name.startswith(_MARK):
        return
    if layer.storage.read_only:
        await layer.set_writable(True)
    try:
        name = os.path.basename(local_path(into) or into)  # noqa: PTH119
        await layer.set_backing(layer.backing._replace(name=_INTO + name))
    except Unsupported:
        # no room in the header for that much
        await layer.set_backing(layer.backing._replace(name=_MARK))
