"""Where an image's bytes live."""

from cowfs.storage.base import Storage
from cowfs.storage.file import FileStorage, sync_directory

__all__ = ["FileStorage", "Storage", "create_storage", "open_storage", "sync_directory"]


async def open_storage(name: str, *, writable: bool, locking: bool = True) -> Storage:
    """Open what a name stands for: today, a local file or block device; see `FileStorage.open`."""
    return FileStorage.open(name, writable=writable, locking=locking)


async def create_storage(name: str, *, exclusive: bool = False) -> Storage:
    """Make an empty storage of a name; ``exclusive`` refuses one that exists."""
    return FileStorage.create(name, exclusive=exclusive)
