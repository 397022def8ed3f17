"""Stream: fill the active layer from its backing until it needs none.

Streaming is copy-on-read walked along the disk by a loop. It knows nothing of any format.
"""

from functools import partial

from cowfs.block.extent import Kind
from cowfs.jobs.job import Job

#: bytes copied between two looks at pause, speed and cancel
STEP = 1 << 20
#: bytes of the disk whose mapping is looked up at once, so that empty stretches cost nothing
WINDOW = 256 << 20


class Stream(Job):
    """Copy up everything that the layers below hold, then drop the backing link."""

    verb = "stream"

    async def work(self) -> None:
        """Walk the disk once. What guests write or read meanwhile only makes the work less."""
        disk = self.disk
        if len(disk.layers) == 1:
            return
        disk.layers[0].require_writable()
        position = 0
        while position < disk.size:
            self.length = disk.size
            end = min(position + WINDOW, disk.size)
            for start, stop in await self.attempt(partial(self._below, position, end)) or ():
                await self._copy(start, stop)
            position = end
            await self.advance(position, 0)
        await self.attempt(disk.flush)
        self.require_no_errors()
        await disk.drop_backing()

    async def _below(self, start: int, end: int) -> list[tuple[int, int]]:
        """Ranges that hold data in a layer below the active one."""
        return [
            (piece.extent.offset, piece.extent.end)
            for piece in await self.disk.resolve(start, end - start, holes=True)
            if piece.depth and piece.extent.kind not in (Kind.ZERO, Kind.UNALLOCATED)
        ]

    async def _copy(self, start: int, end: int) -> None:
        step = max(STEP, self.disk.cluster_size)
        for position in range(start, end, step):
            size = min(step, end - position)
            copied = await self.attempt(partial(self.disk.copy_up, position, size))
            await self.advance(position + size, copied or 0)
