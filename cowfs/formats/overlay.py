"""Putting a new overlay on top of a disk that is in use: an external snapshot."""

import os.path

import trio

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.errors import Unsupported, UsageError
from cowfs.formats.chain import Opening, backing_name, open_image
from cowfs.formats.create import create_image, remove_image
from cowfs.formats.registry import format_named
from cowfs.storage import is_json_name, is_remote, local_path


async def put_overlay(disk: Disk, file: str, format: str, opening: Opening) -> None:
    """Make an image and let it be the active layer; what was it before is durable, and only read from now on.

    A relative ``file`` lies beside the active layer. It must not exist: `UsageError`. Raises what creating and
    opening it raises too; then the disk is as it was, and the file is gone.
    """
    active = disk.layers[0]
    path = path_beside(active, file)
    if not format_named(format).has_backing:
        raise UsageError(f"{format} images cannot have a backing file", file=path)
    await require_new(path, opening)
    active.require_writable()
    backing = Backing(backing_name(active.name, path), active.format)
    # what the layers below are is known; nobody could open the active one now
    await create_image(path, format, disk.size, backing, trust_backing=True)
    try:
        image = await open_image(path, format, writable=True, opening=opening)
        try:
            await disk.push(Layer(image))
        except BaseException:
            with trio.CancelScope(shield=True):
                await image.close_storages()
            raise
    except BaseException:
        remove_image(path, {})
        raise


def path_beside(active: Layer, file: str) -> str:
    """Return the path of a file that is to be made; relative ones lie beside the active layer.

    Raises `Unsupported`, or `UsageError`.
    """
    if is_remote(file) or is_json_name(file):
        raise Unsupported("cannot be made: a server makes no exports for others", file=file)
    if is_remote(active.name) and not file.startswith("/"):
        raise UsageError(f"lies beside no file, as {active.name} is none; write the whole path", file=file)
    return os.path.join(os.path.dirname(local_path(active.name) or ""), file)  # noqa: PTH118, PTH120


async def require_new(path: str, opening: Opening) -> None:
    """Raise `UsageError` if a file exists, or what ``opening`` has against it."""
    if await trio.to_thread.run_sync(os.path.lexists, path):
        raise UsageError("exists already", file=path)
    if opening.vet is not None:
        await opening.vet(path)
