"""From trio to the event loop of asyncio, in a thread of its own, that ``fsspec`` runs its requests in."""

import asyncio
import importlib
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from types import ModuleType
from typing import Any, TypeVar

import trio

from cowfs.errors import Unsupported

T = TypeVar("T")

#: what the extra has; packages for the rarer stores are not in it
_EXTRA = ("fsspec", "aiohttp", "s3fs")


def require_module(name: str, what: str) -> ModuleType:
    """Import a module of the extra. Raises `Unsupported` if it is not there; ``what`` needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or name).partition(".")[0]
        packages = "cowfs[remote]" if missing in _EXTRA else f"cowfs[remote] {missing}"
        raise Unsupported(f"{what} needs '{missing}', which is not installed: pip install {packages}") from None


async def in_loop(work: Coroutine[Any, Any, T]) -> T:
    """Have a coroutine of asyncio run there, and return what it returns; it is cancelled if this is."""
    loop: asyncio.AbstractEventLoop = importlib.import_module("fsspec.asyn").get_loop()
    token = trio.lowlevel.current_trio_token()
    done = trio.Event()

    def finished(_: Future[T]) -> None:
        # nobody is there any more if the program ends meanwhile
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(done.set)

    future = asyncio.run_coroutine_threadsafe(work, loop)
    future.add_done_callback(finished)
    try:
        await done.wait()
    except BaseException:
        future.cancel()
        raise
    try:
        return future.result()
    except CancelledError:
        raise RuntimeError("the request was broken off in the loop of fsspec") from None
