"""Making an image of any format out of others, or copying into one that exists."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import trio

from cowfs.block.chain import Chain
from cowfs.block.copying import CopyOptions, Progress, copy
from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.joined import Joined
from cowfs.errors import InvalidImage, Unsupported, UsageError
from cowfs.formats.chain import PLAIN, Opening, Source, open_disk
from cowfs.formats.create import create_image, existing_identity, remove_image
from cowfs.formats.registry import format_named
from cowfs.storage import host


@dataclass(frozen=True)
class Target:
    """What to write into. ``exists``: an image that is there already, of the same size or larger, is overwritten.

    Only of one that exists can it be said that it is blank, see `CopyOptions`.
    """

    name: str
    format: str
    backing: Backing | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    exists: bool = False


async def convert(
    sources: Sequence[Source], target: Target, options: CopyOptions, progress: Progress, opening: Opening = PLAIN
) -> None:
    """Copy the disks of ``sources``, one after the other, into ``target``, durably.

    ``opening`` says how the sources are opened. If this fails, nothing has changed, or a file that was new is gone
    again; one that was there before is an incomplete image. Errors name the file at fault.
    """
    if options.compress:
        _check_compression(target)
    async with AsyncExitStack() as stack:
        disks = [await stack.enter_async_context(_opened(source, opening)) for source in sources]
        await _refuse_own_source(disks, target)
        source = Joined(disks)
        if target.exists:
            await _copy(source, target, options, progress)
            return
        is_new = await existing_identity(target.name) is None
        await create_image(target.name, target.format, source.size, target.backing, target.options)
        try:
            await _copy(source, target, options, progress)
        except BaseException:
            if is_new:
                with trio.CancelScope(shield=True):
                    await host.ask(remove_image, target.name, target.options, file=target.name)
            raise


def _check_compression(target: Target) -> None:
    if not format_named(target.format).packs:
        raise Unsupported(f"{target.format} has no compressed clusters", file=target.name)
    if target.options.get("preallocation", "off") != "off":
        raise UsageError("compression and preallocation exclude each other", file=target.name)


@asynccontextmanager
async def _opened(source: Source, opening: Opening) -> AsyncIterator[Disk]:
    disk = await open_disk(source.name, source.format, opening=opening, snapshot=source.snapshot)
    try:
        yield disk
    finally:
        with trio.CancelScope(shield=True):
            await disk.close()


async def _refuse_own_source(disks: Sequence[Chain], target: Target) -> None:
    """Nothing that is read may be what is written."""
    identity = await existing_identity(target.name)
    for disk in disks:
        for layer in disk.layers:
            if identity in [storage.identity for storage in layer.image.storages]:
                role = "one of the sources" if layer is disk.layers[0] else "a backing file of a source"
                raise InvalidImage(f"is {role}, and cannot be written at the same time", file=target.name)


async def _copy(source: Joined, target: Target, options: CopyOptions, progress: Progress) -> None:
    disk = await open_disk(target.name, target.format, writable=True, copy_on_read=False)
    try:
        if disk.size < source.size:
            raise UsageError(
                f"its disk has {disk.size} bytes, which is less than the {source.size} to be copied", file=target.name
            )
        if options.compress and not disk.layers[0].image.packs:
            raise Unsupported("has no compressed clusters, as it keeps its data in another file", file=target.name)
        has_below = len(disk.layers) > 1
        if options.blank and has_below:
            raise UsageError("has a backing file, so it does not read as zeros", file=target.name)
        if not target.exists and not has_below:
            options.blank = not disk.layers[0].data_storage.keeps_old_bytes
        await copy(source, disk, options, progress)
        await disk.flush()
    finally:
        with trio.CancelScope(shield=True):
            await disk.close()
