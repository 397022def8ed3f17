"""Commit: merge the active layer down into its backing; the layer is emptied and stays on top.

A cluster is dropped from the active layer only when its copy below is durable, and only if no guest wrote to
it since it was copied. So a crash at any moment leaves the disk's content as it was, and running the job
again ends in the same result.
"""

from collections.abc import Iterable

import trio

from cowfs.block.alignment import align_down, align_up
from cowfs.block.extent import Kind
from cowfs.block.writetracker import WriteTracker
from cowfs.errors import UsageError
from cowfs.jobs.job import Job

#: bytes copied between two looks at pause, speed and cancel
STEP = 1 << 20
#: bytes copied before the base is flushed and the copies are dropped above
BATCH = 64 << 20
#: bytes; formats have disks of whole sectors only
SECTOR = 512
#: bytes of the disk whose mapping is looked up at once
WINDOW = 256 << 20

Area = tuple[int, int]


class Commit(Job):
    """Copy down what the active layer holds, batch by batch, and drop it there."""

    verb = "commit"

    async def work(self) -> None:
        """One pass that leaves guests alone, then one over what they wrote meanwhile, cluster by cluster."""
        disk = self.disk
        if len(disk.layers) == 1:
            raise UsageError("there is no backing file to commit into", file=disk.layers[0].name)
        disk.layers[0].require_writable()
        self._step = max(STEP, *(layer.cluster_size for layer in disk.layers[:2]))
        with disk.copying_on_read_held():
            await disk.set_layer_writable(1, True)
            try:
                await self._merge()
            finally:
                with trio.CancelScope(shield=True):
                    await disk.set_layer_writable(1, False)
            await disk.flush()
            await disk.compact()

    async def _merge(self) -> None:
        disk = self.disk
        with disk.track_writes(self._step) as tracker:
            position = 0
            while position < disk.size:
                await self._make_room()
                end = min(position + WINDOW, disk.size)
                await self._copy_batches(await self._held(position, end), tracker)
                position = end
                await self.advance(position, 0)
        for start in range(0, disk.size, WINDOW):
            await self._make_room()
            for area in await self._held(start, min(start + WINDOW, disk.size)):
                copied = await disk.push_down(area[0], area[1] - area[0])
                await self.advance(area[1], copied)

    async def _make_room(self) -> None:
        """The base must be as large as the disk; a larger one stays as it is."""
        self.length = self.disk.size
        if self.disk.layers[1].size < self.length:
            await self.disk.grow_layer(1, align_up(self.length, SECTOR))

    async def _held(self, start: int, end: int) -> list[Area]:
        """Steps of a range in which the active layer holds anything: [start, end), aligned to steps."""
        areas: list[Area] = []
        for extent in await self.disk.layers[0].map(start, end - start):
            if extent.kind is Kind.UNALLOCATED:
                continue
            first = max(align_down(extent.offset, self._step), areas[-1][1] if areas else 0)
            for position in range(first, min(align_up(extent.end, self._step), end), self._step):
                areas.append((position, min(position + self._step, end)))
        return areas

    async def _copy_batches(self, areas: Iterable[Area], tracker: WriteTracker) -> None:
        batch: list[Area] = []
        size = 0
        for start, end in areas:
            tracker.clear(start, end - start)
            copied = await self.disk.copy_down(start, end - start)
            batch.append((start, end))
            size += end - start
            if size >= BATCH:
                await self._drop(batch, tracker)
                batch, size = [], 0
            await self.advance(end, copied)
        await self._drop(batch, tracker)

    async def _drop(self, batch: list[Area], tracker: WriteTracker) -> None:
        """Make a batch durable below, then forget above what has not been written again since."""
        if batch:
            await self.disk.layers[1].flush()
            for start, end in batch:
                await self.disk.drop(start, end - start, tracker)
