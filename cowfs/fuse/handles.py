"""Open files and directories."""

import errno
import os
import select
from contextlib import nullcontext

import pyfuse3

from cowfs.block.detectzeroes import ZeroDetector
from cowfs.block.disk import Disk
from cowfs.block.seek import next_data, next_hole
from cowfs.errors import NotFound, NotPermitted, OutOfRange, Stale, Unsupported, UsageError
from cowfs.fuse.lostwrites import LostWrites
from cowfs.fuse.tree import ControlNode, FlatFile, LayerFile, Node

#: what poll(2) says of a file that is always ready
READY = select.POLLIN | select.POLLOUT | select.POLLRDNORM | select.POLLWRNORM
#: added when a control file has changed since it was read, as on sysfs
CHANGED = select.POLLERR | select.POLLPRI
#: bytes of a command; no path is longer
MAX_COMMAND = 8192
#: modes of fallocate(2), ``<linux/falloc.h>``
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
#: bytes behind the start of a hole that are asked of the kernel first, whether there is data for them by now
LAUNDERED = 64 << 10


class Handle:
    """One open file or directory."""

    #: set for flat files, which are read and written past this class
    disk: Disk | ZeroDetector | None = None
    #: of a flat file's disk
    lost: LostWrites

    def __init__(self, node: Node) -> None:
        self.node = node

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Up to ``size`` bytes from ``offset``."""
        raise NotPermitted("cannot be read")

    async def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data``."""
        raise NotPermitted("cannot be written")

    async def flush(self) -> None:
        """Make durable what was written."""

    async def fallocate(self, offset: int, length: int, mode: int) -> None:
        """Do what fallocate(2) says."""
        raise NotPermitted("takes no space that could be given back")

    async def seek(self, offset: int, whence: int) -> int:
        """Find data or a hole, as lseek(2) does; what has no size has neither."""
        raise pyfuse3.FUSEError(errno.ENXIO)

    def poll(self, waiter: pyfuse3.PollHandle | None) -> int:
        """Return the events of poll(2) that are there; ``waiter`` is told of the next one."""
        return READY

    def close(self) -> None:
        """Let go of it."""


class FlatHandle(Handle):
    """A flat file that is open."""

    def __init__(self, node: FlatFile, *, writable: bool) -> None:
        super().__init__(node)
        self.served = node.served
        self.disk = self.served.guest_disk
        self.lost = self.served.lost
        self._writable = writable
        self.served.open_files += 1
        self.served.writers += writable

    async def flush(self) -> None:
        """Flush the disk, unless nothing can have been written through this handle."""
        if self._writable:
            await self.served.flush()

    async def fallocate(self, offset: int, length: int, mode: int) -> None:
        """Discard, or zero; space is not taken before something is written, but asking for it is no fault."""
        disk, end = self.served.disk, offset + length
        if mode & ~(KEEP_SIZE | PUNCH_HOLE | ZERO_RANGE):
            raise Unsupported("of fallocate, disks know holes and zeros", file=self.served.file)
        if end > disk.size and not mode & KEEP_SIZE:
            raise OutOfRange(f"space beyond the end of the disk at {disk.size} bytes", file=self.served.file)
        length = min(length, disk.size - offset)
        if length > 0 and mode & PUNCH_HOLE:
            await self.served.discard_here(offset, length)
        elif length > 0 and mode & ZERO_RANGE:
            await self.served.zero(offset, length)

    async def seek(self, offset: int, whence: int) -> int:
        """Look again where the kernel had something to write: it asks for holes without having told of that."""
        disk, written = self.served.disk, self.served.disk.stats.writes
        found = await _seek(disk, offset, whence)
        if not self.served.writers:
            return _present(found)
        if whence == os.SEEK_DATA:
            end = disk.size if found is None else found
            if offset < end and await self._launder(offset, end - offset, written):
                found = await _seek(disk, offset, whence)
            return _present(found)
        hole, length = _present(found), LAUNDERED
        while hole < disk.size and await self._launder(hole, length, written):
            written = disk.stats.writes
            found = await next_hole(disk, hole)
            if found == hole:
                break
            hole, length = found, 2 * length
        return hole

    async def _launder(self, offset: int, length: int, written: int) -> bool:
        """Have the kernel write what it keeps of a range; whether there were writes, wherever, beyond so many."""
        await self.served.launder(self.node.inode, offset, length)
        return self.served.disk.stats.writes != written

    def close(self) -> None:
        """The image may be removed once nobody has it open."""
        self.served.open_files -= 1
        self.served.writers -= self._writable


class LayerHandle(Handle):
    """A layer's view that is open."""

    def __init__(self, node: LayerFile) -> None:
        super().__init__(node)
        self.served = node.served
        self._layer = node.layer
        self.served.open_files += 1

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Read as of this layer; `Stale` once it has left the chain, or shows no disk any more."""
        depth = self._depth()
        length = min(size, self._layer.size - offset)
        if length <= 0:
            return b""
        data = await self.served.disk.read(offset, length, depth)
        # a commit may have begun meanwhile
        self._depth()
        return data

    async def seek(self, offset: int, whence: int) -> int:
        """Look at what this layer and those below it hold."""
        return _present(await _seek(self.served.disk, offset, whence, self._depth()))

    def _depth(self) -> int:
        disk = self.served.disk
        if self._layer not in disk.layers:
            raise Stale("is no longer a layer of the chain", file=self._layer.name)
        if self._layer in disk.spoiled:
            raise Stale("shows no disk while a commit is changing it, or what lies below it", file=self._layer.name)
        return disk.layers.index(self._layer)

    def close(self) -> None:
        """The image may be removed once nobody has it open."""
        self.served.open_files -= 1


class ControlHandle(Handle):
    """A control file that is open: one snapshot of its text, taken when its beginning is read."""

    def __init__(self, node: ControlNode) -> None:
        super().__init__(node)
        self._file, self._subject = node.file, node.subject
        self._text: bytes | None = None
        self._seen: int | None = None

    async def read(self, offset: int, size: int) -> bytes:
        """Read the snapshot; from offset 0, a new one."""
        self._require_presence()
        if offset == 0 or self._text is None:
            self._seen = self._file.changes(self._subject).count
            text: str = await self._file.render(self._subject)
            self._text = text.encode(errors="surrogateescape")
        return self._text[offset : offset + size]

    async def write(self, offset: int, data: bytes) -> None:
        """Obey one command."""
        self._require_presence()
        if self._file.command is None:
            raise NotPermitted(f"{self._file.name} takes no commands")
        if len(data) > MAX_COMMAND:
            raise UsageError(f"a command has at most {MAX_COMMAND} bytes")
        text = data.decode(errors="surrogateescape").strip()
        if "\n" in text:
            raise UsageError("one command a write, on one line")
        with self.node.served.kept() if self.node.served is not None else nullcontext():
            await self._file.command(self._subject, text)
        if self._subject.error:
            self._subject.error = ""
            self._subject.changes.happened()

    def _require_presence(self) -> None:
        if self.node.served is not None and self.node.served.is_removed:
            raise NotFound(f"the disk '{self.node.served.name}' is no longer part of the mount")

    def poll(self, waiter: pyfuse3.PollHandle | None) -> int:
        """Changed since it was read last, or never read: an event, as on sysfs."""
        changes = self._file.changes(self._subject)
        if changes.count != self._seen:
            return READY | CHANGED
        if waiter is not None:
            changes.call_once(self, waiter.notify)
        return READY

    def close(self) -> None:
        """Nobody waits on it any more."""
        self._file.changes(self._subject).forget(self)


async def _seek(disk: Disk, offset: int, whence: int, depth: int = 0) -> int | None:
    """Find data or a hole as seen from a layer; None if there is none."""
    if not 0 <= offset < disk.layers[depth].size:
        return None
    return await (next_data if whence == os.SEEK_DATA else next_hole)(disk, offset, depth)


def _present(found: int | None) -> int:
    if found is None:
        raise pyfuse3.FUSEError(errno.ENXIO)
    return found


def open_handle(node: Node, *, writable: bool) -> Handle:
    """Make the handle that a node's kind has; directories have none of their own."""
    if isinstance(node, FlatFile):
        return FlatHandle(node, writable=writable)
    if isinstance(node, LayerFile):
        return LayerHandle(node)
    if isinstance(node, ControlNode):
        return ControlHandle(node)
    return Handle(node)
