"""Making a new image of any format, with or without a backing file.

Everything that can be refused is refused before the file is touched: an existing file keeps its content, and
a failure after that leaves no half-made new one.
"""

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn, cast

import trio

from cowfs.block.alignment import align_up
from cowfs.block.image import Backing
from cowfs.errors import CowfsError, InvalidImage, StorageError, UsageError
from cowfs.formats.chain import backing_source, open_chain, open_disk, remember_base, require_storable
from cowfs.formats.datafile import data_path
from cowfs.formats.registry import Format, format_named
from cowfs.storage import Storage, create_storage, host, open_storage, sync_directory

#: bytes; disks are whole numbers of sectors, as with ``qemu-img``
SECTOR = 512

Identity = tuple[object, ...]


async def create_image(
    name: str,
    format: str,
    size: int | None = None,
    backing: Backing | None = None,
    options: Mapping[str, str] | None = None,
    *,
    trust_backing: bool = False,
) -> int:
    """Make the image ``name``, durably; returns the bytes of its disk.

    ``size`` None is the backing's. The backing's name is taken relative to the directory of ``name``;
    ``trust_backing`` records it without looking at it. Raises `UsageError`, the errors of opening the backing,
    or `StorageError`; each names the file at fault.
    """
    options = options or {}
    try:
        driver = format_named(format)
        if backing is not None:
            require_storable(backing.name)
        existing = await existing_identity(name)
        if backing is not None and backing.format is not None:
            format_named(backing.format)
        if backing is not None and not trust_backing:
            size = await _check_backing(name, existing, backing, size)
        if size is None:
            raise UsageError("a new image needs a size")
        size = align_up(size, SECTOR)
        await _dry_run(driver, name, size, backing, options)
        await _make(name, driver, size, backing, options, is_new=existing is None)
        if backing is not None and not trust_backing:
            disk = await open_disk(name, format, writable=True)
            try:
                await remember_base(disk)
            finally:
                await disk.close()
    except CowfsError as error:
        if error.file is None:
            error.file = name
        raise
    return size


async def existing_identity(name: str) -> Identity | None:
    """Return what an existing file is, having seen that it can be written; None if there is none."""
    try:
        # whether anybody uses it is asked when it is opened to be changed
        storage = await open_storage(name, writable=True, locking=False)
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    await storage.close()
    return storage.identity


def remove_image(name: str, options: Mapping[str, str]) -> None:
    """Take back an image that `create_image` has just made where there was none, with its data file. Blocks."""
    names = [name, data_path(name, options["data_file"])] if "data_file" in options else [name]
    for made in names:
        with suppress(FileNotFoundError):
            os.unlink(made)  # noqa: PTH108


async def _check_backing(name: str, existing: Identity | None, backing: Backing, size: int | None) -> int:
    """Open the whole chain that is to lie below; the size that the new disk gets."""
    source = backing_source(name, backing)
    layers = await open_chain(source.name, source.format)
    try:
        if backing.format is None:
            found = layers[0].format
            raise UsageError(f"backing file given without its format; it looks like {found}: add -F {found}")
        if existing in [storage.identity for layer in layers for storage in layer.storages]:
            raise InvalidImage("cannot be made anew: its backing file would be, or need, itself")
        return layers[0].size if size is None else size
    finally:
        for layer in layers:
            await layer.close()


async def _dry_run(driver: Format, name: str, size: int, backing: Backing | None, options: Mapping[str, str]) -> None:
    """Let the format refuse what it has to, with nothing there that could be changed."""
    try:
        await driver.create(cast(Storage, _Untouched(name)), size, backing, options)
    except _TouchedError:
        return


async def _make(
    name: str, driver: Format, size: int, backing: Backing | None, options: Mapping[str, str], *, is_new: bool
) -> None:
    storage = await create_storage(name, exclusive=is_new)
    try:
        try:
            await driver.create(storage, size, backing, options)
            await storage.flush()
        finally:
            await storage.close()
        if is_new:
            await trio.to_thread.run_sync(sync_directory, name)
    except BaseException:
        if is_new:
            with trio.CancelScope(shield=True):
                await host.ask(os.unlink, name, file=name)
        raise


class _TouchedError(Exception):
    """A format has found nothing to refuse, and goes for its first change."""


class _Untouched:
    """Stands for an empty storage of some name, and stops whoever does anything with it.

    A format's ``create`` looks at all that it is given before its first change, so running it on this tells
    whether it would refuse.
    """

    length = 0
    read_only = False

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> NoReturn:
        raise _TouchedError
