"""Marking images as merged that are not part of any open chain; see `cowfs.block.merged`."""

import trio

from cowfs.block.layer import Layer
from cowfs.block.merged import mark_layer
from cowfs.formats.chain import PLAIN, Opening, open_image


async def mark_merged(name: str, format: str, into: str, opening: Opening = PLAIN) -> None:
    """Mark an image that is not open. Raises what opening it for writing does."""
    layer = Layer(await open_image(name, format, writable=True, opening=opening))
    try:
        await mark_layer(layer, into)
    finally:
        with trio.CancelScope(shield=True):
            await layer.close()
