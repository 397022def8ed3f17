"""File descriptors: every file of every chain takes one, and a mount may have hundreds of chains."""

import errno
import os
import resource

from cowfs.errors import StorageError

#: descriptors that no image may take, since the server needs some for itself
RESERVE = 32


def raise_limit() -> None:
    """Allow this process as many open files as it may allow itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def require_room(file: str) -> None:
    """Raise `too_many` if the images that are open, ``file`` the last of them, leave the server too few."""
    try:
        # always the lowest number that is free
        lowest = os.open("/", os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError.from_os(error, file=file, doing="cannot be served") from error
    os.close(lowest)
    if lowest >= _limit() - RESERVE:
        raise too_many(file)


def too_many(file: str) -> StorageError:
    """Return the error for an image that is one too many."""
    return StorageError(
        f"is one image too many: the server may have no more than {_limit()} files open; 'ulimit -Hn' sets that limit",
        errno=errno.EMFILE,
        file=file,
    )


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft
