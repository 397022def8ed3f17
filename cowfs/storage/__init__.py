"""Where an image's bytes live."""

import os
from functools import partial

from cowfs.storage import host
from cowfs.storage.base import Storage
from cowfs.storage.file import FileStorage, sync_directory
from cowfs.storage.nbd import address as nbd
from cowfs.storage.nbd.kept import KeptNbdStorage
from cowfs.storage.network import DEFAULT_NETWORK, Network
from cowfs.storage.remote import address as remote
from cowfs.storage.remote.address import shown
from cowfs.storage.remote.storage import RemoteStorage

__all__ = [
    "DEFAULT_NETWORK",
    "FileStorage",
    "Network",
    "RemoteStorage",
    "Storage",
    "create_storage",
    "is_remote",
    "open_storage",
    "parse_address",
    "shown",
    "sync_directory",
]


def is_remote(name: str) -> bool:
    """Whether a name stands for something that is reached over a network, and for no path."""
    return nbd.is_address(name) or remote.is_address(name)


def parse_address(name: str) -> nbd.Address | remote.Address:
    """Read a name that `is_remote`. Raises `UsageError`, or `Unsupported`, with the name."""
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


async def create_storage(name: str, *, exclusive: bool = False) -> Storage:
    """Make an empty storage of a name; ``exclusive`` refuses one that exists. An export is there, or is not.

    After a cancellation, a file that was made exclusively does not stay.
    """
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
