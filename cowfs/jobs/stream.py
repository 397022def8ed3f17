"""Stream: fill the active layer from its backing until it needs none, or no more than a layer further down.

Streaming is copy-on-read walked along the disk by a loop. It knows nothing of any format.
"""

from collections.abc import Sequence
from functools import partial

import trio

from cowfs.block.differences import View, differing
from cowfs.block.disk import Disk
from cowfs.block.extent import Kind
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.block.viewers import Risk
from cowfs.errors import UsageError
from cowfs.formats.backingnames import BackingNames, name_below
from cowfs.jobs.job import Job, OnError
from cowfs.jobs.trace import TraceFile
from cowfs.storage import host

#: bytes of the disk whose mapping is looked up at once, so that empty stretches cost nothing
WINDOW = 256 << 20


class Stream(Job):
    """Copy up everything that the layers below hold, down to ``base`` or all of them, then let go of them."""

    verb = "stream"

    def __init__(
        self,
        disk: Disk,
        *,
        base: Layer | None = None,
        trace: TraceFile | None = None,
        names: BackingNames = BackingNames.KEEP,
        alone: bool = False,
        speed: int = 0,
        on_error: OnError = OnError.REPORT,
    ) -> None:
        super().__init__(disk, alone=alone, speed=speed, on_error=on_error)
        if base is disk.layers[0]:
            raise UsageError("the base of a stream lies below the active layer", file=base.name)
        self._base = base
        self._names = names
        self._first = [] if trace is None else trace.trace.ranges

    @property
    def base(self) -> Layer | None:
        """The layer that will be below the active one; None if there will be none."""
        return self._base

    def risks(self) -> Sequence[Risk]:
        """The active layer's snapshots take from what lies between it and the base where it holds something itself."""
        disk = self.disk
        end = self._end
        if end == 1:
            return ()
        old, new = View(disk, 1), View(disk, end) if end < len(disk.layers) else None
        return [self.risk(0, partial(differing, old, new))]

    @property
    def _end(self) -> int:
        """Depth of the base; where there is none, the number of layers."""
        return len(self.disk.layers) if self._base is None else self.disk.layers.index(self._base)

    async def work(self) -> None:
        """Follow the trace if there is one, and walk the disk. What guests do meanwhile only makes the work less."""
        disk = self.disk
        end = self._end
        if end == 1:
            return
        disk.layers[0].require_writable()
        # what has no name is better refused now than when everything is copied
        await self._new_backing()
        async with disk.about_to_lie_on(self._base):
            await self._fill(end)

    async def _fill(self, end: int) -> None:
        """Copy up from above depth ``end``, and let go of it."""
        disk = self.disk
        for offset, length in self._first:
            stop = min(offset + length, disk.size)
            if offset < stop:
                for first, last in await self.attempt(partial(self._below, offset, stop, end)) or ():
                    await self._copy(first, last, end, 0)
        position = 0
        while True:
            while position < disk.size:
                self.length = disk.size
                stop = min(position + WINDOW, disk.size)
                for first, last in await self.attempt(partial(self._below, position, stop, end)) or ():
                    await self._copy(first, last, end)
                position = stop
                await self.advance(position, 0)
            await self.attempt(disk.flush)
            self.require_no_errors()
            await self.resumed()
            if await self._let_go(end, position):
                return

    async def _below(self, start: int, stop: int, end: int) -> list[tuple[int, int]]:
        """Ranges that the layers between the active one and depth ``end`` hold; zeros count if something is below."""
        empty = {Kind.UNALLOCATED} if self._base is not None else {Kind.UNALLOCATED, Kind.ZERO}
        return [
            (piece.extent.offset, piece.extent.end)
            for piece in await self.disk.resolve(start, stop - start, holes=True)
            if 0 < piece.depth < end and piece.extent.kind not in empty
        ]

    async def _copy(self, start: int, stop: int, end: int, reached: int | None = None) -> None:
        """Copy a range; ``reached`` is how far into the disk the job is then, if not to the end of what was copied."""
        while start < stop:
            size = min(self.step(self.disk.cluster_size), stop - start)
            copied = await self.attempt(partial(self.disk.copy_up, start, size, end))
            start += size
            await self.advance(start if reached is None else reached, copied or 0)

    async def _new_backing(self) -> Backing | None:
        """What the active layer's header says at the end."""
        if self._base is None:
            return None
        layers = self.disk.layers
        name = await host.ask(name_below, layers, 0, layers.index(self._base), self._names, file=layers[0].name)
        return Backing(name, self._base.format)

    async def _let_go(self, end: int, size: int) -> bool:
        """Take what is not needed any more out of the chain; False if the disk has grown beyond ``size`` meanwhile."""
        disk, base = self.disk, self._base
        backing = await self._new_backing()
        removed = await disk.cut_out(0, None if base is None else end, backing, size)
        if removed is None:
            return False
        with trio.CancelScope(shield=True):
            for layer in removed:
                await layer.close()
            if base is not None:
                await disk.remember_below(1)
        return True
