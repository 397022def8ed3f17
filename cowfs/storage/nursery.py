"""Tasks side by side of which the first error comes out, as itself."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from cowfs.errors import first_error

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


@asynccontextmanager
async def side_by_side() -> AsyncIterator[trio.Nursery]:
    """Open a nursery that raises the first error of its tasks and its body, instead of a group of all of them.

    The others, and cancellations, came of the first one. If nothing but cancellations ends it, they are raised as ever.
    """
    error: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        errors = group.split(trio.Cancelled)[1]
        if errors is None:
            raise
        error = first_error(errors)
    # outside of the handler, so that the group is not its context
    if error is not None:
        raise error
