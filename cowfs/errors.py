"""The one tree of errors: each carries the errno that the caller of a system call sees.

An error's text is one sentence without a full stop, fit to follow ``cowfs: FILE: ``.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class CowfsError(Exception):
    """Root of every error that cowfs raises knowingly.

    ``errno`` is what a FUSE request or a control file write that ends in this error answers.
    ``file`` names the image or file that is at fault, where one is.
    """

    errno: int = errno.EIO

    def __init__(self, message: str, *, file: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.file = file

    def __str__(self) -> str:
        return f"{self.file}: {self.message}" if self.file else self.message


class UsageError(CowfsError):
    """The caller asked for something that makes no sense: unknown verb, bad value, bad option."""

    errno = errno.EINVAL


class NotFound(CowfsError):
    """A file, layer, image or job that was named does not exist."""

    errno = errno.ENOENT


class NotPermitted(CowfsError):
    """The operation is not allowed on this object, whoever asks."""

    errno = errno.EPERM


class Busy(CowfsError):
    """The object is in use by a job or a process that excludes this operation."""

    errno = errno.EBUSY


class ReadOnly(CowfsError):
    """A write to something that was opened, or can only be, read-only."""

    errno = errno.EROFS


class Unsupported(CowfsError):
    """The image, or the request, needs a feature that cowfs does not have."""

    errno = errno.ENOTSUP


class InvalidImage(CowfsError):
    """The file is not an image of the format it is said to be, or its header makes no sense."""

    errno = errno.EINVAL


class CorruptImage(CowfsError):
    """Metadata contradicts itself; what it describes cannot be read or written safely."""

    errno = errno.EIO


class Stale(CowfsError):
    """An image or layer no longer shows the disk that it did."""

    errno = errno.ESTALE


class BaseChanged(Stale):
    """A backing file is not what it was when the image was put on it."""


class OutOfRange(CowfsError):
    """A request reaches beyond the end of the disk, as on a block device."""

    errno = errno.EFBIG


class StorageError(CowfsError):
    """The host refused or failed an operation; ``errno`` is the host's."""

    def __init__(self, message: str, *, errno: int, file: str | None = None) -> None:
        super().__init__(message, file=file)
        self.errno = errno

    @classmethod
    def from_os(cls, error: OSError, *, file: str, doing: str) -> "StorageError":
        """Say which operation on ``file`` the operating system refused, in its own words."""
        number = error.errno or cls.errno
        return cls(f"{doing}: {os.strerror(number)}", errno=number, file=file)


def first_error(error: BaseException) -> BaseException:
    """Return the error that came first out of the groups that trio's nurseries wrap around errors."""
    while parts := getattr(error, "exceptions", ()):
        error = parts[0]
    return error


@contextmanager
def blaming(file: str) -> Iterator[None]:
    """Let errors that name no file name this one."""
    try:
        yield
    except CowfsError as error:
        error.file = error.file or file
        raise
