"""The one guard around every FUSE handler: whatever a handler raises becomes an errno, never the end of the mount."""

import errno
import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import pyfuse3

from cowfs.errors import CowfsError
from cowfs.fuse import shim

log = logging.getLogger(__name__)

OperationsType = TypeVar("OperationsType", bound=type[pyfuse3.Operations])
Handler = Callable[..., Any]

#: every handler that pyfuse3 calls and awaits, and those that it does not know of
HANDLERS = [name for name, member in vars(pyfuse3.Operations).items() if inspect.iscoroutinefunction(member)]
HANDLERS += shim.ADDED


def guarded(operations: OperationsType) -> OperationsType:
    """Put the guard around all handlers of a class, also those that it inherits.

    A `CowfsError` answers its errno, and is passed with the handler's arguments to the class's ``report``;
    an `OSError` answers its own. `FUSEError` passes, cancellation too. Anything else is a bug: it goes to the
    log with its traceback, and the caller gets EIO.

    A handler may have a function beside it, by its name with ``_now``, which is asked first: what that returns is the
    answer, unless it is None.
    """
    for name in HANDLERS:
        if hasattr(operations, name):
            handler, at_once = getattr(operations, name), getattr(operations, f"{name}_now", None)
            setattr(operations, name, _guard(handler) if at_once is None else _quick_guard(handler, at_once))
    return operations


def _guard(handler: Handler) -> Handler:
    translate = _translator(handler)

    @wraps(handler)
    async def guard(self: Any, *args: Any) -> Any:
        try:
            return await handler(self, *args)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise translate(error, self, args) from error

    return guard


def _quick_guard(handler: Handler, at_once: Handler) -> Handler:
    """One coroutine less where there is an answer at once: that is the hot path."""
    translate = _translator(handler)

    @wraps(handler)
    async def guard(self: Any, *args: Any) -> Any:
        try:
            found = at_once(self, *args)
            return found if found is not None else await handler(self, *args)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise translate(error, self, args) from error

    return guard


def _translator(handler: Handler) -> Callable[[Exception, Any, tuple[Any, ...]], pyfuse3.FUSEError]:
    by_handle = next(iter(list(inspect.signature(handler).parameters)[1:]), "") == "fh"

    def translate(error: Exception, operations: Any, args: tuple[Any, ...]) -> pyfuse3.FUSEError:
        if isinstance(error, CowfsError):
            operations.report(error, args[0] if args else None, by_handle=by_handle)
            return pyfuse3.FUSEError(error.errno)
        if isinstance(error, OSError):
            log.error("%s: %s", handler.__name__, error)
            return pyfuse3.FUSEError(error.errno or errno.EIO)
        log.error("%s: internal error", handler.__name__, exc_info=error)
        return pyfuse3.FUSEError(errno.EIO)

    return translate
