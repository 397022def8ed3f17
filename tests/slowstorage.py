"""Hosts on which any operation may take seconds, while everything else goes on: which of them do, and for how long.

`Holding` decides that, by a seed. Storages in memory ask it before and after each operation takes effect, and so do
files whose threads run in the loop (`files_in_the_loop`). Nothing sleeps: what is held is let go once nothing else can
go on, or once so many other operations have begun, or, where a test makes calls from outside of the loop, some calls
later.
"""

import os
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import trio
from trio.testing import wait_all_tasks_blocked

from cowfs.storage.base import ReadBuffers, WriteBuffers
from cowfs.storage.file import FileStorage

T = TypeVar("T")

#: operations that begin until the one that is held is let go, at most
OVERTAKEN = 60
#: calls from outside that one outlasts, at most
OUTLASTED = 6


class _Held:
    """An operation that is held: until how many have begun, and how many calls from outside it has yet to outlast."""

    def __init__(self, until: int, calls: int) -> None:
        self.until = until
        self.calls = calls
        self.released = trio.Event()


class Holding:
    """Which operations are held, and until when. Belongs to one trio thread.

    Where an operation could be held, one in so many is, as the seed says. ``on_hold`` is called each time, and may do
    at once whatever does not wait. Of operations that answer at once or not at all, `declines` says which do not.
    """

    def __init__(self, seed: object) -> None:
        self._chooser = random.Random(f"slow host {seed}")
        self._share = self._chooser.choice([0.1, 0.25, 0.25, 0.6])
        self._begun = 0
        self._held: list[_Held] = []
        self._is_watching = False
        # how many calls from outside wait for an answer; None where all is one call
        self._calls: int | None = None
        self._released = 0
        self._changed = trio.Event()
        self.on_hold: Callable[[], None] = lambda: None
        #: how many were held so far
        self.count = 0

    @property
    def holds_any(self) -> bool:
        """Whether anything is held."""
        return bool(self._held)

    def declines(self) -> bool:
        """Whether an operation that could be answered at once is not."""
        return self._chooser.random() < 0.5

    def short(self, length: int) -> int:
        """How many of so many bytes are done by one call of the kernel."""
        return self._chooser.randint(1, length) if length > 1 and self._chooser.random() < 0.3 else length

    async def pause(self) -> None:
        """An operation is here, and may be held. Like a thread, it is not called off."""
        self._begun += 1
        for held in [held for held in self._held if held.until <= self._begun]:
            self._release(held)
        if self._chooser.random() >= self._share:
            return
        calls = self._chooser.randint(1, OUTLASTED) if self._chooser.random() < 0.3 else 0
        held = _Held(self._begun + self._chooser.randint(1, OVERTAKEN), calls)
        self._held.append(held)
        self.count += 1
        if not self._is_watching:
            self._is_watching = True
            trio.lowlevel.spawn_system_task(self._watch)
        self._change()
        self.on_hold()
        with trio.CancelScope(shield=True):
            await held.released.wait()

    def _release(self, held: _Held) -> None:
        self._held.remove(held)
        self._released += 1
        held.released.set()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _releasable(self) -> list[_Held]:
        """Those that may go next; those that outlast calls go last, and only while somebody waits."""
        soon = [held for held in self._held if not held.calls]
        return soon or ([] if self._calls == 0 else self._held)

    async def _watch(self) -> None:
        """Whenever nothing can go on, let go of one."""
        try:
            while self._held:
                await wait_all_tasks_blocked()
                if choice := self._releasable():
                    self._release(self._chooser.choice(choice))
                elif self._held:
                    await self._changed.wait()
        finally:
            self._is_watching = False

    async def held_again(self) -> None:
        """Wait until something more is held."""
        await self._changed.wait()

    def let_go(self) -> None:
        """The loop is to end: nothing outlasts anything any more."""
        self._calls = None
        self._change()

    async def answer(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Make a call from outside of the loop; when it returns, nothing goes on but what outlasts it."""
        self._calls = (self._calls or 0) + 1
        self._change()
        try:
            result = await function(*args)
        finally:
            self._calls -= 1
        for held in self._held:
            held.calls = max(0, held.calls - 1)
        self._change()
        seen = -1
        while seen != self._released or self._releasable():
            seen = self._released
            await wait_all_tasks_blocked()
        return result


def files_in_the_loop(
    detour: Callable[[], Awaitable[None]], declines: Callable[[], bool], short: Callable[[int], int] | None = None
) -> ExitStack:
    """Have what would run in threads run in the loop, until the stack is closed.

    Each call makes a ``detour`` before and after. Reads and writes of files are made at once unless ``declines`` says
    so, and the kernel does so many of the bytes that it is asked for as ``short`` says.
    """
    stack = ExitStack()
    read_now, write_now = FileStorage.read_now, FileStorage.write_now

    async def run_here(function: Callable[..., T], *args: object, **_: object) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        # like a thread, it is not called off once it has begun
        with trio.CancelScope(shield=True):
            await detour()
            result = function(*args)
            await detour()
        return result

    def read_perhaps(storage: FileStorage, offset: int, buffers: ReadBuffers) -> bool:
        return not declines() and read_now(storage, offset, buffers)

    def write_perhaps(storage: FileStorage, offset: int, buffers: WriteBuffers) -> bool:
        return not declines() and write_now(storage, offset, buffers)

    async def write(storage: FileStorage, offset: int, buffers: WriteBuffers) -> None:
        with trio.CancelScope(shield=True):
            await detour()
            write_now(storage, offset, buffers)
            await detour()

    put = stack.enter_context
    put(patch.object(trio.to_thread, "run_sync", run_here))
    put(patch.object(FileStorage, "read_now", read_perhaps))
    put(patch.object(FileStorage, "write_now", write_perhaps))
    put(patch.object(FileStorage, "write", write))
    if short is not None:
        put(_short_calls(short))
    return stack


@contextmanager
def _short_calls(short: Callable[[int], int]) -> Iterator[None]:
    """Have the kernel do less than it is asked for, and the caller ask again."""
    preadv, pwrite, pwritev, copy = os.preadv, os.pwrite, os.pwritev, os.copy_file_range

    def read(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        return preadv(fd, _cut(buffers, short), offset, flags)

    def write(fd: int, data: bytes, offset: int) -> int:
        return pwrite(fd, memoryview(data)[: short(len(data))], offset)

    def write_all(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        return pwritev(fd, _cut(buffers, short), offset, flags)

    def copy_range(source: int, target: int, count: int, *offsets: int) -> int:
        return copy(source, target, short(count), *offsets)

    with patch.multiple(os, preadv=read, pwrite=write, pwritev=write_all, copy_file_range=copy_range):
        yield


def _cut(buffers: Sequence[memoryview], short: Callable[[int], int]) -> list[memoryview]:
    left = short(sum(map(len, buffers)))
    parts = []
    for buffer in buffers:
        parts.append(memoryview(buffer)[:left])
        left -= len(parts[-1])
    return parts
