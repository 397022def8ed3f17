"""A storage in memory, whose operations a test can hold up, watch, and let fail."""

from collections import defaultdict

import trio
from slowstorage import Holding

from cowfs.storage.base import ReadBuffers, Region, Storage, WriteBuffers


class Gate:
    """Holds operations up: `arrived` tells that one waits, `open` lets it and all later ones go."""

    def __init__(self) -> None:
        self.arrived = trio.Event()
        self._opened = trio.Event()
        self.waiting = 0

    def open(self) -> None:
        self._opened.set()

    async def pass_through(self) -> None:
        self.waiting += 1
        self.arrived.set()
        try:
            await self._opened.wait()
        finally:
            self.waiting -= 1


class MemoryStorage(Storage):
    """Bytes in memory. ``cold`` declines the ``…_now`` operations, as a network does.

    ``gates`` maps an operation's name (read, write, flush, regions) to a gate that it has to pass; ``log`` has every
    operation that writes or waits in order, with offset and length where it has them. ``failures`` lists, for an
    operation's name, what its next calls raise; None lets one succeed. ``holding`` holds operations before and after
    they take effect, and has the ``…_now`` operations declined.
    """

    holding: Holding | None = None

    def __init__(self, name: str, content: bytes = b"", *, cold: bool = False, read_only: bool = False) -> None:
        self.name = name
        self.content = bytearray(content)
        self.read_only = read_only
        self.cold = cold
        self.closings = 0
        self.gates: dict[str, Gate] = {}
        self.failures: dict[str, list[Exception | None]] = defaultdict(list)
        self.log: list[tuple[str, int, int]] = []

    @property
    def length(self) -> int:  # type: ignore[override]
        return len(self.content)

    @property
    def allocated(self) -> int:
        return len(self.content)

    @property
    def _declines(self) -> bool:
        return self.cold or (self.holding is not None and self.holding.declines())

    def read_now(self, offset: int, buffers: ReadBuffers) -> bool:
        if self._declines:
            return False
        self._fill(offset, buffers)
        return True

    async def read(self, offset: int, buffers: ReadBuffers) -> None:
        await self._step("read", offset, sum(map(len, buffers)))
        self._fill(offset, buffers)
        await self._pause()

    def write_now(self, offset: int, buffers: WriteBuffers) -> bool:
        if self._declines:
            return False
        self.log.append(("write", offset, sum(map(len, buffers))))
        self._fail("write")
        self._store(offset, buffers)
        return True

    async def write(self, offset: int, buffers: WriteBuffers) -> None:
        await self._step("write", offset, sum(map(len, buffers)))
        self._store(offset, buffers)
        await self._pause()

    async def flush(self) -> None:
        await self._step("flush", 0, 0)
        await self._pause()

    async def truncate(self, length: int) -> None:
        await self._step("truncate", length, 0)
        self._cut(length)
        await self._pause()

    async def punch(self, offset: int, length: int) -> None:
        await self._step("punch", offset, length)
        self._make_hole(offset, length)
        await self._pause()

    async def preallocate(self, length: int, *, full: bool) -> None:
        await self.truncate(max(length, len(self.content)))

    def take_space(self, offset: int, length: int) -> None:
        self.content.extend(bytes(max(0, offset + length - len(self.content))))

    async def regions(self, offset: int, length: int) -> list[Region]:
        if "regions" in self.gates:
            await self.gates["regions"].pass_through()
        await self._pause()
        return [Region(offset, length, hole=False)]

    async def reopen(self, *, writable: bool) -> None:
        self.read_only = not writable

    async def close(self) -> None:
        self.closings += 1

    async def _step(self, operation: str, offset: int, length: int) -> None:
        self.log.append((operation, offset, length))
        await trio.lowlevel.checkpoint()
        if operation in self.gates:
            await self.gates[operation].pass_through()
        await self._pause()
        self._fail(operation)

    async def _pause(self) -> None:
        if self.holding is not None:
            await self.holding.pause()

    def _fail(self, operation: str) -> None:
        failure = self.failures[operation].pop(0) if self.failures[operation] else None
        if failure is not None:
            raise failure

    def _fill(self, offset: int, buffers: ReadBuffers) -> None:
        for view in buffers:
            part = self.content[offset : offset + len(view)]
            view[:] = part.ljust(len(view), b"\0")
            offset += len(view)

    def _store(self, offset: int, buffers: WriteBuffers) -> None:
        data = b"".join(buffers)
        self.content.extend(bytes(max(0, offset + len(data) - len(self.content))))
        self.content[offset : offset + len(data)] = data

    def _cut(self, length: int) -> None:
        del self.content[length:]
        self.content.extend(bytes(length - len(self.content)))

    def _make_hole(self, offset: int, length: int) -> None:
        end = min(offset + length, len(self.content))
        if offset < end:
            self.content[offset:end] = bytes(end - offset)
