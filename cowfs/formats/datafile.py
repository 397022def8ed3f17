"""Data files: the file beside an image that holds its guest's data, as the image's header names it.

The policy for such names is here and nowhere else. A header is written by whoever made the image, and a data file
is read, and written, with the rights of whoever opens it. So a header may name a file in the directory of the image
or below it, with all symbolic links followed, and a regular file only. Relative names are meant from the directory
of the image, as those of backing files are. Everything else is refused, by name; and any name in the header of an
image that comes from a server.
"""

import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from cowfs.errors import InvalidImage, NotPermitted, Unsupported, UsageError
from cowfs.storage import Storage, create_storage, host, is_remote, local_path, sync_directory


def data_path(image: str, name: str) -> str:
    """Return the path of the data file that the header of the file ``image`` names. Blocks.

    Raises `NotPermitted` for a file elsewhere, `InvalidImage` for the image itself, `Unsupported` for odd files.
    """
    if is_remote(image):
        raise NotPermitted(f"comes from a server, and may not have the file '{name}' as its data file", file=image)
    file = local_path(image) or image
    folder = os.path.dirname(file)  # noqa: PTH120
    path = os.path.join(folder, name)  # noqa: PTH118
    real, inside = os.path.realpath(path), os.path.realpath(folder)
    if not real.startswith(inside.rstrip("/") + "/"):
        raise NotPermitted(
            f"its data file '{name}' lies outside of the image's own directory, where a header may not lead", file=image
        )
    if real == os.path.realpath(file):
        raise InvalidImage("names itself as its data file", file=image)
    if os.path.exists(real) and not stat.S_ISREG(os.stat(real).st_mode):  # noqa: PTH110, PTH116
        raise Unsupported(f"its data file '{name}' is not a regular file", file=image)
    return path


def new_data_path(image: str, name: str) -> str:
    """Return `data_path` for an image that is about to be made; `UsageError` if the data file exists already. Blocks.

    What exists may be anybody's, the new image's backing file for one; so it is not replaced.
    """
    path = data_path(image, name)
    if os.path.lexists(path):
        raise UsageError(f"the data file '{name}' exists already, and is not replaced")
    return path


@asynccontextmanager
async def new_data_file(path: str) -> AsyncIterator[Storage]:
    """Make the file that `new_data_path` has returned; durable after the context, gone after an error in it."""
    storage = await create_storage(path, exclusive=True)
    try:
        try:
            yield storage
            await storage.flush()
        finally:
            await storage.close()
        await trio.to_thread.run_sync(sync_directory, path)
    except BaseException:
        with trio.CancelScope(shield=True):
            await host.ask(os.unlink, path, file=path)
        raise
