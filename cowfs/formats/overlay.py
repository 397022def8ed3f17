"""Putting a new overlay on top of a disk that is in use: an external snapshot."""

import os
import stat
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from cowfs.block.disk import Disk
from cowfs.block.extent import Kind
from cowfs.block.image import Backing, Image
from cowfs.block.layer import Layer
from cowfs.errors import Busy, InvalidImage, Unsupported, UsageError
from cowfs.formats.backingnames import BackingNames, name_of_active
from cowfs.formats.chain import Opening, backing_source, open_image
from cowfs.formats.create import create_image, remove_image
from cowfs.formats.registry import format_named
from cowfs.storage import Storage, host, is_json_name, is_remote, local_path
from cowfs.storage.jsonname import Place, place_of

#: bytes of the disk whose mapping is looked up at once
WINDOW = 1 << 30


@dataclass(frozen=True)
class NewLayer:
    """What is to be put on top: a file, its format, and what it calls the layer below.

    A file must not exist, a block device is formatted. With ``reuse`` it is an overlay that somebody has prepared, and
    its name for the layer below stays, if it has one.
    """

    file: str
    format: str = "qcow2"
    reuse: bool = False
    names: BackingNames = BackingNames.KEEP


async def put_overlay(disk: Disk, new: NewLayer, opening: Opening, others: Callable[[], Collection[Storage]]) -> str:
    """Let an image be the active layer, new or prepared; returns its path.

    What was active before is durable, and only read from now on. A relative file lies beside it. ``others`` are files
    that other disks use. Raises `UsageError` for what exists, `Busy` for what is in use, `InvalidImage` for an overlay
    that does not fit, and what creating and opening it raises too; then the disk is as it was, and so is the image,
    but for a block device that has been formatted.
    """
    active = disk.layers[0]
    path = path_beside(active, new.file)
    if not format_named(new.format).has_backing:
        raise UsageError(f"{new.format} images cannot have a backing file", file=path)
    if not new.reuse and not await host.ask(_is_block_device, path, file=path):
        await require_new(path, opening)
    elif opening.vet is not None:
        await opening.vet(path)
    active.require_writable()
    used = [*others(), *(storage for layer in disk.layers for storage in layer.storages)]
    async with (_prepared if new.reuse else _made)(disk, path, new, opening, used) as image:
        await disk.push(Layer(image))
    return path


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)  # noqa: PTH116
    except OSError:
        # whether that matters is said by whoever makes the file
        return False


@asynccontextmanager
async def _made(
    disk: Disk, path: str, new: NewLayer, opening: Opening, used: Collection[Storage]
) -> AsyncIterator[Image]:
    """Make an image, and open it; after an error in the context it is closed, and gone if it was made as a file."""
    active = disk.layers[0]
    is_device = await host.ask(_is_block_device, path, file=path)
    if is_device:
        await _require_unused(path, used)
    name = await host.ask(name_of_active, active, path, new.names, file=path)
    # what the layers below are is known; nobody could open the active one now
    await create_image(path, new.format, disk.size, Backing(name, active.format), trust_backing=True)
    try:
        image = await open_image(path, new.format, writable=True, opening=opening)
        async with _closed_on_error(image):
            yield image
    except BaseException:
        if not is_device:
            with trio.CancelScope(shield=True):
                await host.ask(remove_image, path, {}, file=path)
        raise


@asynccontextmanager
async def _prepared(
    disk: Disk, path: str, new: NewLayer, opening: Opening, used: Collection[Storage]
) -> AsyncIterator[Image]:
    """Open an overlay that was prepared, having seen that it is one of the disk and holds nothing.

    After an error in the context it is closed, and names what it named before.
    """
    await _require_unused(path, used)
    image = await open_image(path, new.format, writable=True, opening=opening)
    async with _closed_on_error(image):
        layer = Layer(image)
        layer.require_writable()
        if any(storage.overlaps(other) for storage in image.storages for other in used):
            raise Busy("is part of a disk already", file=path)
        await _require_empty(layer, disk.size)
        before = image.backing
        wanted = await _backing_of(layer, disk.layers[0], new.names, opening)
        if wanted != before:
            await layer.set_backing(wanted)
        try:
            yield image
        except BaseException:
            if wanted != before:
                with trio.CancelScope(shield=True):
                    await layer.set_backing(before)
            raise


@asynccontextmanager
async def _closed_on_error(image: Image) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        with trio.CancelScope(shield=True):
            await image.close_storages()
        raise


async def _require_unused(path: str, used: Collection[Storage]) -> None:
    """Raise `Busy` if a file that exists is part of a disk; locks say the same where there are any."""
    for storage in used:
        known = local_path(storage.name)
        if known is not None and await host.ask(_is_same, path, known, file=path):
            raise Busy("is part of a disk already", file=path)


def _is_same(path: str, other: str) -> bool:
    try:
        first, second = os.stat(path), os.stat(other)  # noqa: PTH116
    except OSError:
        # what is not there is said by whoever opens it
        return False
    if stat.S_ISBLK(first.st_mode) and stat.S_ISBLK(second.st_mode):
        return first.st_rdev == second.st_rdev
    return os.path.samestat(first, second)


async def _require_empty(layer: Layer, size: int) -> None:
    """Refuse a prepared overlay of another size, or one that holds anything."""
    if layer.size != size:
        raise InvalidImage(
            f"has a disk of {layer.size} bytes, and not of {size} like the one it is for", file=layer.name
        )
    if await layer.image.snapshots():
        raise InvalidImage("has internal snapshots, so it is no new overlay", file=layer.name)
    for start in range(0, size, WINDOW):
        found = await layer.map(start, min(WINDOW, size - start))
        if any(extent.kind is not Kind.UNALLOCATED for extent in found):
            raise InvalidImage("holds something already, so it is no new overlay", file=layer.name)


async def _backing_of(layer: Layer, active: Layer, names: BackingNames, opening: Opening) -> Backing:
    """Return what a prepared overlay is to say of the active layer, which is what it says if it says anything."""
    known = layer.backing
    if known is None:
        name = await host.ask(name_of_active, active, layer.name, names, file=layer.name)
        return Backing(name, active.format)
    if known.format not in (None, active.format):
        raise InvalidImage(
            f"says that its backing file '{known.name}' is {known.format}, and {active.name} is {active.format}",
            file=layer.name,
        )
    if not await _leads_to(layer, known, active, opening):
        raise InvalidImage(f"has the backing file '{known.name}', which is not {active.name}", file=layer.name)
    return known._replace(format=active.format)


async def _leads_to(layer: Layer, backing: Backing, active: Layer, opening: Opening) -> bool:
    """Whether the name of a backing file is one of the active layer's."""
    named, known = (
        place_of(name) if is_json_name(name) else Place(name)
        for name in (backing_source(layer.name, backing, opening).name, active.name)
    )
    if named.window != known.window:
        return False
    if named.target == known.target:
        return True
    path, other = local_path(named.target_name), local_path(known.target_name)
    return path is not None and other is not None and await host.ask(_is_same, path, other, file=path)


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
    if opening.vet is not None:
        await opening.vet(path)
    if await host.ask(os.path.lexists, path, file=path):
        raise UsageError("exists already", file=path)
