"""The two requests that pyfuse3 does not pass on: fallocate and lseek.

Without them fstrim, the discards of a loop device and SEEK_HOLE end at the mount. ``interpose.c``, built with the
package, completes the table of operations that pyfuse3 gives to libfuse; ``requests.py`` has what its functions call.
All of it is in this directory, but for `load` in ``cowfs/fuse/__init__.py`` and the use of `Requests` in the server.
It goes the day that pyfuse3 calls `fallocate` and `lseek` of `cowfs.fuse.operations.Operations` itself.

Where it was not built, or does not fit, mounts work without, and say so in the log. The control file ``discard``
does what fallocate would.
"""

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

#: operations that pyfuse3 does not know of
ADDED = ("fallocate", "lseek")


@cache
def load() -> ctypes.CDLL | str:
    """Put the object in pyfuse3's way; returns it, or why there is none.

    To be called before pyfuse3 is imported for the first time.
    """
    for path in (Path(__file__).with_name(f"interpose{suffix}") for suffix in EXTENSION_SUFFIXES):
        if path.exists():
            try:
                return ctypes.CDLL(str(path), mode=os.RTLD_GLOBAL | os.RTLD_NOW)
            except OSError as error:
                return str(error)
    return "cowfs was built without a C compiler or the headers of libfuse"
