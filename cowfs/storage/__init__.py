"""Where an image's bytes live."""

from cowfs.storage.base import Storage
from cowfs.storage.file import FileStorage, sync_directory
from cowfs.storage.nbd.address import is_address, parse_address
from cowfs.storage.nbd.storage import NbdStorage
from cowfs.storage.network import DEFAULT_NETWORK, Network

__all__ = [
    "DEFAULT_NETWORK",
    "FileStorage",
    "Network",
    "Storage",
    "create_storage",
    "is_remote",
    "open_storage",
    "parse_address",
    "sync_directory",
]


def is_remote(name: str) -> bool:
    """Whether a name stands for something that is reached over a network, and for no path."""
    return is_address(name)


async def open_storage(
    name: str, *, writable: bool, locking: bool = True, network: Network = DEFAULT_NETWORK
) -> Storage:
    """Open what a name stands for: an export of an NBD server, or else a local file or block device.

    See `NbdStorage.open`, which has no locks, and `FileStorage.open`.
    """
    if is_remote(name):
        return await NbdStorage.open(name, writable=writable, network=network)
    return FileStorage.open(name, writable=writable, locking=locking)


async def create_storage(name: str, *, exclusive: bool = False) -> Storage:
    """Make an empty storage of a name; ``exclusive`` refuses one that exists. An export is there, or is not."""
    if is_remote(name):
        return await NbdStorage.open(name, writable=True)
    return FileStorage.create(name, exclusive=exclusive)
