"""Commit: merge the active layer down into its backing; the layer is emptied and stays on top.

Into a base further down, or if asked to, all layers above it are merged and left as they are: the disk's content is the
same, whichever of them it is read from.

A cluster is dropped from the active layer only when its copy below is durable, and only if no guest wrote to
it since it was copied. So a crash at any moment leaves the disk's content as it was, and running the job
again ends in the same result.
"""

from collections.abc import Iterable
from functools import partial

import trio

from cowfs.block.alignment import align_down, align_up
from cowfs.block.disk import Disk
from cowfs.block.writetracker import WriteTracker
from cowfs.errors import UsageError
from cowfs.jobs.job import Job, OnError

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
    """Copy down what the active layer holds, batch by batch, and drop it there.

    With ``keep``, which a ``base`` deeper than layer 1 needs, nothing is dropped, and nobody may write to the disk.
    """

    verb = "commit"

    def __init__(
        self,
        disk: Disk,
        *,
        speed: int = 0,
        on_error: OnError = OnError.REPORT,
        base: int = 1,
        keep: bool = False,
    ) -> None:
        assert keep or base == 1, "what several layers hold cannot be dropped in one"
        super().__init__(disk, speed=speed, on_error=on_error)
        self._base = base
        self._keep = keep
        self._step = max(STEP, *(layer.cluster_size for layer in disk.layers[: base + 1]))

    async def work(self) -> None:
        """One pass that leaves guests alone, then one over what they wrote meanwhile, cluster by cluster."""
        disk = self.disk
        if len(disk.layers) == 1:
            raise UsageError("there is no backing file to commit into", file=disk.layers[0].name)
        disk.layers[0].require_writable()
        with disk.copying_on_read_held():
            await disk.set_layer_writable(self._base, True)
            try:
                await (self._copy_all() if self._keep else self._merge())
                self.require_no_errors()
            finally:
                with trio.CancelScope(shield=True):
                    await disk.set_layer_writable(self._base, False)
            if not self._keep:
                await disk.flush()
                await disk.compact()

    async def _copy_all(self) -> None:
        await self._make_room()
        for position in range(0, self.disk.size, WINDOW):
            end = min(position + WINDOW, self.disk.size)
            for start, stop in await self._held(position, end):
                copied = await self.attempt(partial(self.disk.copy_down, start, stop - start, self._base))
                await self.advance(stop, copied or 0)
            await self.advance(end, 0)

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
                copied = await self.attempt(partial(disk.push_down, area[0], area[1] - area[0]))
                await self.advance(area[1], copied or 0)

    async def _make_room(self) -> None:
        """The base must be as large as the disk; a larger one stays as it is."""
        self.length = self.disk.size
        if self.disk.layers[self._base].size < self.length:
            await self.disk.grow_layer(self._base, align_up(self.length, SECTOR))

    async def _held(self, start: int, end: int) -> list[Area]:
        """Steps of a range in which a layer above the base holds anything: [start, end), aligned to steps."""
        areas: list[Area] = []
        for extent in await self.disk.held_above(self._base, start, end - start):
            first = max(align_down(extent.offset, self._step), areas[-1][1] if areas else 0)
            for position in range(first, min(align_up(extent.end, self._step), end), self._step):
                areas.append((position, min(position + self._step, end)))
        return areas

    async def _copy_batches(self, areas: Iterable[Area], tracker: WriteTracker) -> None:
        batch: list[Area] = []
        size = 0
        for start, end in areas:
            tracker.clear(start, end - start)
            copied = await self.attempt(partial(self.disk.copy_down, start, end - start))
            if copied is not None:
                batch.append((start, end))
                size += end - start
            if size >= BATCH:
                await self.attempt(partial(self._drop, batch, tracker))
                batch, size = [], 0
            await self.advance(end, copied or 0)
        await self.attempt(partial(self._drop, batch, tracker))

    async def _drop(self, batch: list[Area], tracker: WriteTracker) -> None:
        """Make a batch durable below, then forget above what has not been written again since."""
        if batch:
            await self.disk.layers[1].flush()
            for start, end in batch:
                await self.disk.drop(start, end - start, tracker)
