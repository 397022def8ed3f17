"""Where an image's bytes live."""

import os
from functools import partial

from cowfs.errors import InvalidImage, ReadOnly, Unsupported
from cowfs.storage import host
from cowfs.storage.base import Storage
from cowfs.storage.blockoptions import is_json_name
from cowfs.storage.file import FileStorage, sync_directory
from cowfs.storage.jsonname import FILE, HOST_DEVICE, Place, as_path, place_of
from cowfs.storage.nbd import address as nbd
from cowfs.storage.nbd.kept import KeptNbdStorage
from cowfs.storage.network import DEFAULT_NETWORK, Network
from cowfs.storage.remote import address as remote
from cowfs.storage.remote.address import shown
from cowfs.storage.remote.storage import RemoteStorage
from cowfs.storage.window import WindowStorage

__all__ = [
    "DEFAULT_NETWORK",
    "FileStorage",
    "Network",
    "RemoteStorage",
    "Storage",
    "as_path",
    "create_storage",
    "is_json_name",
    "is_remote",
    "local_path",
    "open_storage",
    "parse_address",
    "shown",
    "sync_directory",
]


def is_remote(name: str) -> bool:
    """Whether a name stands for something that is reached over a network, and for no path."""
    return local_path(name) is None


def local_path(name: str) -> str | None:
    """Return the path of the local file or device that a name leads to; None for what is reached over a network.

    A ``json:`` name that makes no sense counts as a path: opening it says what is wrong.
    """
    if is_json_name(name):
        try:
            target = place_of(name).target
        except Unsupported:
            return name
        return target if isinstance(target, str) else None
    return None if nbd.is_address(name) or remote.is_address(name) else name


def parse_address(name: str) -> nbd.Address | remote.Address:
    """Read a name that `is_remote`. Raises `UsageError`, or `Unsupported`, with the name."""
    if is_json_name(name):
        target = place_of(name).target
        assert isinstance(target, nbd.Address), "the name is remote"
        return target
    return remote.parse_address(name) if remote.is_address(name) else nbd.parse_address(name)


async def open_storage(
    name: str,
    *,
    writable: bool,
    locking: bool = True,
    network: Network = DEFAULT_NETWORK,
    fleeting: bool = False,
) -> Storage:
    """Open what a name stands for: an export of an NBD server, an object, or else a local file or block device.

    ``fleeting`` takes links to objects that expire: nothing of them is to be recorded. See `KeptNbdStorage.open` and
    `RemoteStorage.open`, which have no locks, and `FileStorage.open`.
    """
    if is_json_name(name):
        return await _open_place(name, writable=writable, locking=locking, network=network)
    if remote.is_address(name):
        return await RemoteStorage.open(name, writable=writable, network=network, fleeting=fleeting)
    if nbd.is_address(name):
        await _look_for_socket(name)
        return await KeptNbdStorage.open(name, writable=writable, network=network)
    call = partial(FileStorage.open, name, writable=writable, locking=locking)
    return await host.ask(call, file=name, undo=FileStorage.close_now)


async def _look_for_socket(name: str) -> None:
    """Find out that the file system of an export's Unix socket answers: connecting follows its path on the spot."""
    path = nbd.parse_address(name).socket
    if path is not None:
        await host.ask(os.path.realpath, path, file=name)


async def _open_place(name: str, *, writable: bool, locking: bool, network: Network) -> Storage:
    """Open what a ``json:`` name stands for; only a part of something is called by that name."""
    try:
        place = place_of(name)
    except Unsupported as error:
        error.file = error.file or name
        raise
    if writable and place.read_only:
        raise ReadOnly("is to be opened read-only, as its name says", file=name)
    whole = await open_storage(place.target_name, writable=writable, locking=locking, network=network)
    try:
        _require_kind(whole, place)
        return whole if place.window is None else WindowStorage(name, whole, *place.window)
    except BaseException:
        await whole.close()
        raise


def _require_kind(storage: Storage, place: Place) -> None:
    """Refuse a device where a file is meant, and the other way round, as QEMU does."""
    if isinstance(storage, FileStorage) and place.driver == (FILE if storage.is_device else HOST_DEVICE):
        kind = "a block device" if storage.is_device else "a regular file"
        raise InvalidImage(f"is {kind}, which the driver '{place.driver}' does not open", file=storage.name)


async def create_storage(name: str, *, exclusive: bool = False) -> Storage:
    """Make an empty storage of a name; ``exclusive`` refuses one that exists. An export is there, or is not.

    After a cancellation, a file that was made exclusively does not stay.
    """
    if is_json_name(name):
        raise Unsupported("is the name of something that is there already; give the path of a new image", file=name)
    if remote.is_address(name):
        return await RemoteStorage.open(name, writable=True)
    if nbd.is_address(name):
        await _look_for_socket(name)
        return await KeptNbdStorage.open(name, writable=True)

    def undo(storage: FileStorage) -> None:
        if exclusive:
            os.unlink(name)  # noqa: PTH108
        storage.close_now()

    return await host.ask(partial(FileStorage.create, name, exclusive=exclusive), file=name, undo=undo)
