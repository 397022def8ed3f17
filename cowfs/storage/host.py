"""Looks at the host's files by their names, which may take for ever.

Whatever a name leads to may not answer: a server of NFS that is gone, a FUSE file system that hangs, or the very mount
that this process serves. So nothing that follows a name is called on the trio thread. `ask` calls it in a worker thread
and gives up on it when it is cancelled, or when the program's `patience` has run out.
"""

import errno
import math
import os
import threading
from collections.abc import Callable, Collection
from contextvars import ContextVar
from functools import partial
from typing import Generic, TypeVar

import trio

from cowfs.errors import StorageError

T = TypeVar("T")

#: seconds that a look may take; a command waits as long as it takes, the server of a mount does not
patience: ContextVar[float] = ContextVar("patience", default=math.inf)
#: for looks, and for calls that the program's own mount answers. Without a bound: those that hang, or wait for an
#: answer, must not keep the threads from those that read and write
THREADS = trio.CapacityLimiter(math.inf)
#: symbolic links that the kernel follows in one path
_MOST_LINKS = 40


class _Question(Generic[T]):
    """One call in a worker thread, and what becomes of its result if nobody waits for that any more."""

    def __init__(self, call: Callable[[], T], undo: Callable[[T], object] | None) -> None:
        self._call = call
        self._undo = undo
        self._lock = threading.Lock()
        self._is_abandoned = False
        self._results: list[T] = []

    def run(self) -> T:
        result = self._call()
        with self._lock:
            self._results.append(result)
            is_abandoned = self._is_abandoned
        if is_abandoned and self._undo is not None:
            self._undo(result)
        return result

    def abandon(self) -> None:
        with self._lock:
            self._is_abandoned = True
            results = self._results
        if self._undo is not None:
            for result in results:
                # which may hang as well
                trio.lowlevel.start_thread_soon(partial(self._undo, result), lambda outcome: None)


async def ask(call: Callable[..., T], *args: object, file: str, undo: Callable[[T], object] | None = None) -> T:
    """Call something that follows names of the host's files, in a worker thread, and return its result.

    If this is cancelled, the thread is left to itself; ``undo`` is then called with its result, in a thread, once there
    is one. Raises what the call does, and `StorageError`, `ETIMEDOUT`, that names ``file`` after `patience` seconds.
    """
    question = _Question(partial(call, *args), undo)
    seconds = patience.get()
    with trio.move_on_after(seconds) as scope:
        try:
            return await trio.to_thread.run_sync(question.run, abandon_on_cancel=True, limiter=THREADS)
        except trio.Cancelled:
            question.abandon()
            raise
    assert scope.cancelled_caught
    raise StorageError(
        f"the file system that it lies in has not answered for {seconds:g} seconds", errno=errno.ETIMEDOUT, file=file
    )


def leads_into(path: str, points: Collection[str]) -> bool:
    """Whether an absolute path leads to or through one of some directories, themselves resolved, which are not asked.

    Follows the path as the kernel does, link by link, and stops at the first of them. Blocks.
    """
    rest = path.split("/")[::-1]
    current = "/"
    links = 0
    while rest:
        name = rest.pop()
        if name in ("", "."):
            continue
        current = os.path.normpath(os.path.join(current, name))  # noqa: PTH118
        if current in points:
            return True
        try:
            # of a directory only its parent is asked, which lies in none of them
            target = os.readlink(current)  # noqa: PTH115
        except OSError:
            # no link; what is not there leads nowhere either
            continue
        links += 1
        if links > _MOST_LINKS:
            return False
        rest += target.split("/")[::-1]
        current = "/" if target.startswith("/") else os.path.dirname(current)  # noqa: PTH120
    return False
