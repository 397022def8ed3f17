"""Open files and directories."""

import select

import pyfuse3

from cowfs.block.disk import Disk
from cowfs.errors import NotFound, NotPermitted, Stale, UsageError
from cowfs.fuse.tree import ControlNode, FlatFile, LayerFile, Node

#: what poll(2) says of a file that is always ready
READY = select.POLLIN | select.POLLOUT | select.POLLRDNORM | select.POLLWRNORM
#: added when a control file has changed since it was read, as on sysfs
CHANGED = select.POLLERR | select.POLLPRI
#: bytes of a command; no path is longer
MAX_COMMAND = 8192


class Handle:
    """One open file or directory."""

    #: set for flat files, which are read and written past this class
    disk: Disk | None = None

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
        self.disk = self.served.disk
        self._writable = writable
        self.served.open_files += 1

    async def flush(self) -> None:
        """Flush the disk, unless nothing can have been written through this handle."""
        if self._writable:
            await self.served.disk.flush()

    def close(self) -> None:
        """The image may be removed once nobody has it open."""
        self.served.open_files -= 1


class LayerHandle(Handle):
    """A layer's view that is open."""

    def __init__(self, node: LayerFile) -> None:
        super().__init__(node)
        self.served = node.served
        self._layer = node.layer
        self.served.open_files += 1

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Read as of this layer; `Stale` once it has left the chain, or shows no disk any more."""
        disk = self.served.disk
        if self._layer not in disk.layers:
            raise Stale("is no longer a layer of the chain", file=self._layer.name)
        if self._layer in disk.spoiled:
            raise Stale("is being merged into a layer below it, by a commit", file=self._layer.name)
        length = min(size, self._layer.size - offset)
        return await disk.read(offset, length, disk.layers.index(self._layer)) if length > 0 else b""

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


def open_handle(node: Node, *, writable: bool) -> Handle:
    """Make the handle that a node's kind has; directories have none of their own."""
    if isinstance(node, FlatFile):
        return FlatHandle(node, writable=writable)
    if isinstance(node, LayerFile):
        return LayerHandle(node)
    if isinstance(node, ControlNode):
        return ControlHandle(node)
    return Handle(node)
