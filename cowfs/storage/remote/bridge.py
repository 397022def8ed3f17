"""From trio to the event loop of asyncio, in a thread of its own, that ``fsspec`` runs its requests in."""

import asyncio
import importlib
from collections.abc import Coroutine
from contextlib import suppress
from types import ModuleType
from typing import Any, TypeVar

import trio

from cowfs.errors import Unsupported

T = TypeVar("T")

#: what the extra has; packages for the rarer stores are not in it
_EXTRA = ("fsspec", "aiohttp", "s3fs")
#: seconds that a request gets to end in once it is cancelled
PATIENCE = 5.0


def require_module(name: str, what: str) -> ModuleType:
    """Import a module of the extra. Raises `Unsupported` if it is not there; ``what`` needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or name).partition(".")[0]
        packages = "cowfs[remote]" if missing in _EXTRA else f"cowfs[remote] {missing}"
        raise Unsupported(f"{what} needs '{missing}', which is not installed: pip install {packages}") from None


async def in_loop(work: Coroutine[Any, Any, T]) -> T:
    """Have a coroutine of asyncio run there, and return what it returns.

    If this is cancelled, so is the coroutine, and this waits until it has ended: nothing of it goes on behind the back
    of whoever closes what it uses. One that does not end is left alone after `PATIENCE`.
    """
    loop: asyncio.AbstractEventLoop = importlib.import_module("fsspec.asyn").get_loop()
    token = trio.lowlevel.current_trio_token()
    ended = trio.Event()
    task: asyncio.Task[T] | None = None

    def begin() -> None:
        nonlocal task
        task = loop.create_task(work)
        task.add_done_callback(end)

    def end(task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            # which asyncio takes for being looked at
            task.exception()
        # nobody is there any more if the program ends meanwhile
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(ended.set)

    def cancel() -> None:
        # calls are made in order, so it has begun
        assert task is not None
        task.cancel()

    loop.call_soon_threadsafe(begin)
    try:
        await ended.wait()
    except BaseException:
        loop.call_soon_threadsafe(cancel)
        with trio.move_on_after(PATIENCE, shield=True):
            await ended.wait()
        raise
    assert task is not None
    try:
        return task.result()
    except asyncio.CancelledError:
        raise RuntimeError("the request was broken off in the loop of fsspec") from None
