"""What a store is: it tells an object's size and version, and gives ranges of that version, or an error."""

import errno
from abc import ABC, abstractmethod
from typing import NamedTuple

from cowfs.errors import NotFound, StorageError

#: bytes that have to come within the deadline of a request, again and again
PIECE = 256 << 10


class AwayError(Exception):
    """A store does not answer, or not as it should, and might do better later. Its text has no URL in it."""


class Facts(NamedTuple):
    """An object as it was when it was opened: bytes, and what changes when its content does; '' if nothing does.

    Versions can be compared that come from the same ``place``; '' is where the name leads by itself.
    """

    size: int
    version: str
    place: str = ""


class Store(ABC):
    """One object. Errors are `StorageError` and other `CowfsError`, which are final, or `AwayError`."""

    #: whether what it calls versions changes although the content does not
    is_fickle = False

    @abstractmethod
    async def look(self, length: int) -> tuple[Facts, bytes]:
        """Return what the object is, and perhaps its first ``length`` bytes, or as many as it has."""

    @abstractmethod
    async def fetch(self, facts: Facts, start: int, end: int) -> bytes:
        """Return a range, which lies inside of the object. Raises `StorageError`, ESTALE, if that has changed."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of connections."""


def changed(what: str) -> StorageError:
    """Return the error for an object that is not what it was; ``what`` is a half-sentence."""
    return StorageError(
        f"the object has changed since it was opened ({what}); nothing more is read of it", errno=errno.ESTALE
    )


def require_same(known: Facts, now: Facts) -> None:
    """Raise `StorageError`, ESTALE, unless an object is what it was."""
    if now.size != known.size:
        raise changed(f"it had {known.size} bytes, and now has {now.size}")
    if now.version != known.version:
        raise changed("the store calls it another version")


def refused(status: int) -> Exception:
    """Return the error that a status of HTTP stands for."""
    if status in (401, 403, 407):
        return StorageError(
            f"the server does not allow it (status {status}); credentials come from the configuration of fsspec,"
            " from ~/.netrc, or from the store's own configuration",
            errno=errno.EACCES,
        )
    if status in (404, 410):
        return NotFound("there is no such object")
    if status in (408, 425, 429) or status >= 500:
        return AwayError(f"it answers with status {status}")
    return StorageError(f"the server answers with status {status}", errno=errno.EIO)


def misbehaved(what: str) -> StorageError:
    """Return the error for an answer that makes no sense."""
    return StorageError(f"the server {what}", errno=errno.EIO)
