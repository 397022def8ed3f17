"""The handlers of FUSE requests: thin, each finds its node or handle and asks it.

Reads and writes of flat files are the hot path. They call the disk directly, and where it can answer on the
spot, they answer without suspending.
"""

import errno
import logging
import os
from collections.abc import Callable
from itertools import count
from typing import Any, NoReturn

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from cowfs.errors import CowfsError, NotPermitted, OutOfRange, ReadOnly
from cowfs.fuse.attributes import Attributes
from cowfs.fuse.guard import guarded
from cowfs.fuse.handles import Handle, open_handle
from cowfs.fuse.images import Mount, Served
from cowfs.fuse.tree import ControlNode, Directory, FlatFile, LayerFile, Node, Tree

log = logging.getLogger(__name__)

#: bytes; the largest read that the kernel sends
MAX_READ = 1 << 20

_WRITING = os.O_WRONLY | os.O_RDWR


@guarded
class Operations(pyfuse3.Operations):
    """One mount as pyfuse3 sees it. Names and times are the kernel's: bytes and nanoseconds."""

    supports_dot_lookup = True

    def __init__(self, mount: Mount) -> None:
        super().__init__()
        self.enable_writeback_cache = mount.settings.writeback_cache
        self.tree = Tree(mount)
        #: called with a flat file that was written beyond its end
        self.on_overrun: Callable[[Node], None] = lambda node: None
        #: whether the write that is being handled comes from the kernel's cache; to be asked before it first suspends
        self.is_writeback: Callable[[], bool] = lambda: self.enable_writeback_cache
        #: ids of threads of ours that have the kernel ask for a size that is only to be told, in the reply
        self.correctors: set[int] = set()
        self._mount = mount
        self._attributes = Attributes(mount.settings)
        self._handles: dict[int, Handle] = {}
        self._numbers = count(1)
        # one for all reads that are answered without suspending: pyfuse3 sends the reply before anything else runs
        self._scratch = memoryview(bytearray(MAX_READ))

    # -- what the guard and the server call

    def report(self, error: CowfsError, number: int | None, *, by_handle: bool) -> None:
        """Keep the sentence of a request that failed where its image's ``error`` file shows it, and log it.

        ``number`` is the inode or the handle that the request was about.
        """
        if by_handle:
            handle = self._handles.get(number or 0)
            node = handle.node if handle else None
        else:
            node = self.tree.get(number or 0)
        served = node.served if node is not None else None
        log.error("%s: %s", served.name if served else self._mount.mount_point, error)
        subject: Mount | Served = served or self._mount
        subject.error = str(error)
        subject.changes.happened()

    # -- the tree

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name in a directory."""
        node = self.tree.find(parent_inode, os.fsdecode(name))
        if node is None:
            raise FUSEError(errno.ENOENT)
        return self._attributes.of(node)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Tell a node's attributes."""
        return self._attributes.of(self.tree[inode])

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Change the size of a disk, or times. Modes and owners are the mount's, and stay."""
        node = self.tree[inode]
        if fields.update_size and not (self.correctors and ctx.pid in self.correctors):
            await self._resize(node, attr.st_size)
        now = self._attributes.of(node)
        if (
            (fields.update_mode and attr.st_mode & 0o7777 != now.st_mode & 0o7777)
            or (fields.update_uid and attr.st_uid != now.st_uid)
            or (fields.update_gid and attr.st_gid != now.st_gid)
        ):
            raise NotPermitted("owner and mode are set when mounting, with -o uid=, gid= and mode=")
        if fields.update_atime:
            node.atime_ns = attr.st_atime_ns
        if fields.update_mtime:
            node.mtime_ns = attr.st_mtime_ns
        if fields.update_ctime:
            node.ctime_ns = attr.st_ctime_ns
        return self._attributes.of(node)

    async def _resize(self, node: Node, size: int) -> None:
        if isinstance(node, FlatFile):
            if size != node.served.disk.size:
                await node.served.resize(size)
                node.touch()
        elif not isinstance(node, ControlNode) or size:
            raise NotPermitted("its size cannot be changed")

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory."""
        return self._new_handle(Handle(self.tree[inode]))

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """List a directory in the order of inode numbers, which are never used twice."""
        children = sorted((node.inode, name, node) for name, node in self.tree.children(self._handles[fh].node))
        for inode, name, node in children:
            if inode > start_id and not pyfuse3.readdir_reply(
                token, os.fsencode(name), self._attributes.of(node), inode
            ):
                break

    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        del self._handles[fh]

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Nothing in a directory is ever stored."""

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Leave it to the kernel, which checks modes itself (``default_permissions``)."""
        return True

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Tell the host's space; loop devices take the size of their discards from ``f_bsize``."""
        data = StatvfsData()
        data.f_namemax = 255
        data.f_bsize = data.f_frsize = 4096
        found = await self._mount.free_space()
        if found is not None:
            host, cluster = found
            unit = data.f_bsize = data.f_frsize = max(cluster, 4096)
            data.f_blocks = host.f_blocks * host.f_frsize // unit
            data.f_bfree = host.f_bfree * host.f_frsize // unit
            data.f_bavail = host.f_bavail * host.f_frsize // unit
        return data

    # -- files

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file. Flat files keep the kernel's cache, all others are read anew each time."""
        node = self.tree[inode]
        writable = bool(flags & _WRITING)
        if isinstance(node, FlatFile):
            if writable and node.served.disk.read_only:
                raise ReadOnly("is open read-only", file=node.served.file)
            if flags & os.O_TRUNC:
                raise NotPermitted("a disk cannot be emptied by opening it (O_TRUNC)", file=node.served.file)
        elif isinstance(node, Directory):
            raise FUSEError(errno.EISDIR)
        elif writable and (isinstance(node, LayerFile) or (isinstance(node, ControlNode) and not node.file.command)):
            raise NotPermitted("can only be read")
        handle = self._new_handle(open_handle(node, writable=writable))
        flat = isinstance(node, FlatFile)
        # the kernel would take what is appended into its cache, and tell only when it is closed that there is no room
        appends = flags & (os.O_ACCMODE | os.O_APPEND) == os.O_WRONLY | os.O_APPEND
        return FileInfo(fh=handle, direct_io=not flat or appends, keep_cache=flat)

    def _new_handle(self, handle: Handle) -> int:
        number = next(self._numbers)
        self._handles[number] = handle
        return number

    def read_now(self, fh: int, off: int, size: int) -> memoryview | None:
        """Read from a disk what is in memory; the answer is to be used before the next one is asked for."""
        disk = self._handles[fh].disk
        if disk is not None:
            length = min(size, disk.size - off)
            if 0 < length <= MAX_READ:
                view = self._scratch[:length]
                if disk.readinto_now(off, view):
                    return view
        return None

    async def read(self, fh: int, off: int, size: int) -> Any:
        """Read up to the end of the file; any buffer will do, whatever pyfuse3's stub says."""
        handle = self._handles[fh]
        disk = handle.disk
        if disk is None:
            return await handle.read(off, size)
        view = memoryview(bytearray(max(0, min(size, disk.size - off))))
        if view:
            await disk.readinto(off, view)
        return view

    def write_now(self, fh: int, off: int, buf: bytes) -> int | None:
        """Write to a disk, if that takes no more than a moment."""
        handle = self._handles[fh]
        if handle.disk is None:
            return None
        try:
            if not handle.disk.write_now(off, buf):
                return None
        except OutOfRange:
            self.on_overrun(handle.node)
            raise
        except CowfsError as error:
            if self.is_writeback():
                handle.lost.add(off, len(buf), error)
            raise
        if handle.lost:
            handle.lost.rewritten(off, len(buf))
        return len(buf)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write all of it."""
        handle = self._handles[fh]
        if handle.disk is None:
            await handle.write(off, buf)
            return len(buf)
        is_writeback = self.is_writeback()
        try:
            await handle.disk.write(off, buf)
        except OutOfRange:
            raise
        except CowfsError as error:
            if is_writeback:
                handle.lost.add(off, len(buf), error)
            raise
        handle.lost.rewritten(off, len(buf))
        return len(buf)

    async def flush(self, fh: int) -> None:
        """Flush at each close(2) of a descriptor that could write."""
        await self._handles[fh].flush()

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make durable what was written to the disk, through whatever handle."""
        served = self._handles[fh].node.served
        if served is not None and self._handles[fh].disk is not None:
            await served.flush()

    async def fallocate(self, fh: int, offset: int, length: int, mode: int) -> None:
        """Make holes and zeros; called by way of `cowfs.fuse.shim`."""
        await self._handles[fh].fallocate(offset, length, mode)

    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        """Find data and holes; called by way of `cowfs.fuse.shim`."""
        return await self._handles[fh].seek(offset, whence)

    async def release(self, fh: int) -> None:
        """Close a file."""
        self._handles.pop(fh).close()

    async def poll(self, inode: int, fh: int, poll_handle: pyfuse3.PollHandle | None, ctx: RequestContext) -> int:
        """Wait on a control file; everything else is always ready."""
        return self._handles[fh].poll(poll_handle)

    # -- what is made and removed with the images alone

    async def _refuse(self, *args: object) -> NoReturn:
        raise NotPermitted("files come and go with the images; write 'add' or 'remove' to .cowfs/control")

    _refused: Any = _refuse
    create = mknod = mkdir = symlink = link = unlink = rmdir = rename = _refused
