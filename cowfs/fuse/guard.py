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
    """
    for name in HANDLERS:
        if hasattr(operations, name):
            setattr(operations, name, _guard(getattr(operations, name)))
    return operations


def _guard(handler: Handler) -> Handler:
    by_handle = next(iter(list(inspect.signature(handler).parameters)[1:]), "") == "fh"

    @wraps(handler)
    async def guard(self: Any, *args: Any) -> Any:
        try:
            return await handler(self, *args)
        except pyfuse3.FUSEError:
            raise
        except CowfsError as error:
            self.report(error, args[0] if args else None, by_handle=by_handle)
            raise pyfuse3.FUSEError(error.errno) from error
        except OSError as error:
            log.error("%s: %s", handler.__name__, error)
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
        except Exception as error:
            log.exception("%s: internal error", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return guard
