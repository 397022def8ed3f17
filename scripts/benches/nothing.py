"""A mount that does nothing but answer: what FUSE, pyfuse3 and the loop cost by themselves.

``python nothing.py DIRECTORY SIZE`` shows one file of so many bytes, which reads as zeros and forgets what is written.
"""

import os
import stat
import sys

import pyfuse3
import trio

from cowfs.fuse.loop import Loop

_DISK = 2
_ZEROS = bytes(1 << 20)


class Nothing(pyfuse3.Operations):
    """Handlers that return at once, with the reader's buffer made beforehand."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext | None = None) -> pyfuse3.EntryAttributes:
        """The root, or the one file."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        is_root = inode == pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFDIR | 0o700 if is_root else stat.S_IFREG | 0o600
        entry.st_nlink = 1
        entry.st_size = 0 if is_root else self._size
        entry.attr_timeout = entry.entry_timeout = 3600
        return entry

    async def setattr(self, inode: int, *rest: object) -> pyfuse3.EntryAttributes:
        """Nothing changes."""
        return await self.getattr(inode)

    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Whatever the name is, it is the file."""
        return await self.getattr(_DISK)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """One handle for all."""
        return pyfuse3.FileInfo(fh=_DISK, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Zeros."""
        return _ZEROS if size == len(_ZEROS) else _ZEROS[:size]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Forgotten."""
        return len(buf)


def serve() -> None:
    """Serve until unmounted."""
    pyfuse3.init(Nothing(int(sys.argv[2])), os.fspath(sys.argv[1]), {"fsname=nothing"})
    try:
        trio.run(Loop().serve)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    serve()
