"""From libfuse to the handlers of `cowfs.fuse.operations`, and back."""

import ctypes
import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Protocol

import pyfuse3
import trio

from cowfs.fuse import shim
from cowfs.storage import host

log = logging.getLogger(__name__)

# request, inode, handle; mode, offset, length, or offset, whence
_FALLOCATE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
)
_LSEEK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64, ctypes.c_int)


class Handlers(Protocol):
    """What answers the requests; raises `pyfuse3.FUSEError`, and nothing else."""

    async def fallocate(self, fh: int, offset: int, length: int, mode: int) -> None:
        """Do what fallocate(2) says."""

    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        """Return what lseek(2) does for ``SEEK_DATA`` and ``SEEK_HOLE``."""


class Requests:
    """The requests of one mount, from libfuse to the handlers and back."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._nursery: trio.Nursery | None = None
        # kept, since ctypes does not keep them
        self._callbacks = _FALLOCATE(self._on_fallocate), _LSEEK(self._on_lseek)
        self._libfuse: ctypes.CDLL
        self._session: int | None = None
        self._is_writeback: ctypes.c_int | None = None

    def offer(self) -> None:
        """Have the next session that pyfuse3 makes call this one."""
        interposed = shim.load()
        if isinstance(interposed, ctypes.CDLL):
            for name, callback in zip(shim.ADDED, self._callbacks, strict=True):
                place = ctypes.c_void_p.in_dll(interposed, f"cowfs_on_{name}")
                place.value = ctypes.cast(callback, ctypes.c_void_p).value

    def take(self) -> str | None:
        """Have what pyfuse3 has made; the reason why the requests will not arrive, None if they will."""
        interposed = shim.load()
        if isinstance(interposed, str):
            return interposed
        self._session = ctypes.c_void_p.in_dll(interposed, "cowfs_session").value
        if self._session is None:
            return "pyfuse3 does not call libfuse as it did"
        self._is_writeback = ctypes.c_int.in_dll(interposed, "cowfs_is_writeback")
        # leads to the library that pyfuse3 is linked with
        self._libfuse = ctypes.CDLL(pyfuse3.__file__)
        self._libfuse.fuse_reply_err.argtypes = (ctypes.c_void_p, ctypes.c_int)
        self._libfuse.fuse_reply_lseek.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        self._libfuse.fuse_lowlevel_notify_inval_inode.argtypes = (
            *(ctypes.c_void_p, ctypes.c_uint64),
            *(ctypes.c_int64, ctypes.c_int64),
        )
        return None

    def serve(self, nursery: trio.Nursery) -> None:
        """Answer requests in tasks of a nursery that ends before the session does."""
        self._nursery = nursery

    def is_writeback(self) -> bool:
        """Whether the write that is being handled was written to the kernel's cache before, and answered then.

        To be asked before its handler first suspends. If nobody knows, it may have been.
        """
        return self._is_writeback is None or bool(self._is_writeback.value)

    async def launder(self, inode: int, offset: int, length: int) -> None:
        """Have the kernel write what it keeps of a range of a file, and forget it.

        It does not do so by itself before it asks where data is. Raises OSError.
        """
        result = await trio.to_thread.run_sync(
            self._libfuse.fuse_lowlevel_notify_inval_inode,
            *(self._session, inode, offset, length),
            abandon_on_cancel=True,
            limiter=host.THREADS,
        )
        if result not in (0, -errno.ENOENT):
            raise OSError(-result, os.strerror(-result))

    # -- called by libfuse, in the middle of a task of pyfuse3

    def _on_fallocate(self, request: int, inode: int, fh: int, mode: int, offset: int, length: int) -> None:
        self._start(request, self._handlers.fallocate, fh, offset, length, mode)

    def _on_lseek(self, request: int, inode: int, fh: int, offset: int, whence: int) -> None:
        self._start(request, self._handlers.lseek, fh, offset, whence)

    def _start(self, request: int, handler: Callable[..., Awaitable[int | None]], *args: int) -> None:
        try:
            assert self._nursery is not None, "nothing arrives before it is served"
            self._nursery.start_soon(self._answer, request, handler, args)
        except Exception:
            # ctypes would print it, and the caller wait for ever
            log.exception("internal error")
            self._reply(request, errno.EIO)

    async def _answer(self, request: int, handler: Callable[..., Awaitable[int | None]], args: tuple[int, ...]) -> None:
        number, position = errno.EIO, None
        try:
            position = await handler(*args)
            number = 0
        except pyfuse3.FUSEError as error:
            number = error.errno
        finally:
            # also when the mount ends before the handler does
            self._reply(request, number, position)

    def _reply(self, request: int, number: int, position: int | None = None) -> None:
        if position is None:
            # of all requests of a kind, ENOSYS would be the last
            result = self._libfuse.fuse_reply_err(request, errno.EIO if number == errno.ENOSYS else number)
        else:
            result = self._libfuse.fuse_reply_lseek(request, position)
        if result and result != -errno.ENOENT:
            log.error("cannot reply: %s", os.strerror(-result))
