"""Copying a disk, or several end to end, into another one: of any formats, and no more than it takes.

What reads as zeros is not written where the target reads as zeros anyway. Stretches are read, searched for
zeros and packed side by side, and written in order, so that an empty target fills from its start to its end.
"""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import trio

from cowfs.block.alignment import align_up
from cowfs.block.chain import Chain
from cowfs.block.extent import Kind
from cowfs.block.inorder import in_order
from cowfs.block.joined import Area, Held, Joined, rounded
from cowfs.block.zeros import find_zeros
from cowfs.errors import blaming

#: bytes of the disk whose mapping is looked up at once; whole clusters of every format
WINDOW = 1 << 30
#: bytes that are read, packed and written at once, if that is whole clusters
STEP = 2 << 20
#: how many steps are read or packed at a time, if nothing else is said
PARALLEL = 4
#: bytes; zeros are looked for in pieces of this size, smaller ones if asked for, or whole clusters
GRAIN = 4096

Progress = Callable[[int, int], None]


@dataclass
class CopyOptions:
    """How to copy. ``sparse``: bytes of zeros that are worth finding, 0 for none; zeros are then written out."""

    sparse: int = GRAIN
    #: write clusters packed where that makes them shorter
    compress: bool = False
    #: the target reads as zeros, whatever its mapping says
    blank: bool = False
    #: leave out what the active layers of the sources do not say
    top_only: bool = False
    #: steps that are read or packed at a time
    parallel: int = PARALLEL
    #: bytes a second that are written at most; 0 is no limit
    speed: int = 0


class _Write(NamedTuple):
    """Something to do to the target. No ``data`` stands for zeros."""

    start: int
    end: int
    data: memoryview | bytes | None
    packed: bool = False


class _Step(NamedTuple):
    """What one area comes down to, and the buffer in which its data lies until it is written."""

    writes: list[_Write]
    buffer: bytearray | None
    end: int


async def copy(source: Joined, target: Chain, options: CopyOptions, progress: Progress) -> None:
    """Make the start of ``target`` hold what ``source`` does. The caller flushes.

    ``progress`` is told bytes done and bytes in all.
    """
    await _Copier(source, target, options, progress).run()


class _Copier:
    def __init__(self, source: Joined, target: Chain, options: CopyOptions, progress: Progress) -> None:
        self.source = source
        self.target = target
        self.options = options
        self.progress = progress
        self.unit = target.cluster_size
        self.step = align_up(STEP, self.unit)
        self._buffers: list[bytearray] = []
        self._not_before = 0.0

    async def run(self) -> None:
        """Copy all of it."""
        self.progress(0, self.source.size)
        await in_order(self._steps(), self._prepare, self._carry_out, limit=self.options.parallel)

    # -- what there is to do

    async def _steps(self) -> AsyncGenerator[Area, None]:
        """Areas of the source, data in steps."""
        for position in range(0, self.source.size, WINDOW):
            length = min(WINDOW, self.source.size - position)
            for area in self._shaped(await self.source.areas(position, length, top_only=self.options.top_only)):
                if area.held is not Held.DATA:
                    yield area
                    continue
                start = area.start
                while start < area.end:
                    end = min(start - start % self.step + self.step, area.end)
                    yield Area(start, end, Held.DATA)
                    start = end

    def _shaped(self, areas: list[Area]) -> list[Area]:
        """Let data be whole clusters, where it matters not which layer of the target its neighbours are read from."""
        if not self.options.sparse:
            areas = [area._replace(held=Held.DATA) if area.held is Held.ZERO else area for area in areas]
        if self.options.top_only and not self.options.compress:
            return areas
        return rounded(areas, self.unit)

    # -- side by side

    async def _prepare(self, area: Area) -> _Step:
        if area.held is Held.BELOW:
            return _Step([], None, area.end)
        if area.held is Held.ZERO:
            return _Step([_Write(area.start, area.end, None)], None, area.end)
        buffer = self._buffers.pop() if self._buffers else bytearray(self.step)
        view = memoryview(buffer)[: area.end - area.start]
        await self.source.readinto(area.start, view)
        if self.options.compress:
            writes = await self._packed(area.start, view, memoryview(buffer))
        elif self.options.sparse:
            writes = self._sparse(area.start, view)
        else:
            writes = [_Write(area.start, area.end, view)]
        return _Step(writes, buffer, area.end)

    def _sparse(self, start: int, view: memoryview) -> list[_Write]:
        grain = max(min(GRAIN, 1 << self.options.sparse.bit_length() - 1), self.unit)
        # grains lie where clusters do, also for a range that starts inside of one
        head = min(-start % grain, len(view))
        parts = [(0, head), (head, len(view))]
        return [
            _Write(start + begin + a, start + begin + b, None if is_zero else view[begin + a : begin + b])
            for begin, end in parts
            if begin < end
            for a, b, is_zero in find_zeros(view[begin:end], grain, self.options.sparse)
        ]

    async def _packed(self, start: int, view: memoryview, buffer: memoryview) -> list[_Write]:
        """Pack cluster by cluster, in a worker thread; ``view`` is the start of ``buffer`` and starts at a cluster."""
        padded = buffer[: align_up(len(view), self.unit)]
        padded[len(view) :] = bytes(len(padded) - len(view))
        return await trio.to_thread.run_sync(partial(self._pack, start, view, padded))

    def _pack(self, start: int, view: memoryview, padded: memoryview) -> list[_Write]:
        pack, sparse = self.target.layers[0].image.pack, self.options.sparse
        zeros = bytes(self.unit)
        writes: list[_Write] = []
        for begin in range(0, len(view), self.unit):
            end = min(begin + self.unit, len(view))
            cluster = padded[begin : begin + self.unit]
            if sparse and cluster == zeros:
                writes.append(_Write(start + begin, start + end, None))
            elif (packed := pack(cluster)) is not None:
                writes.append(_Write(start + begin, start + end, packed, packed=True))
            else:
                writes.append(_Write(start + begin, start + end, view[begin:end]))
        return writes

    # -- in order

    async def _carry_out(self, step: _Step) -> None:
        top = self.target.layers[0]
        with blaming(top.name):
            for start, end, data, packed in step.writes:
                if data is None:
                    await self._zero(start, end)
                elif packed:
                    await top.write_packed(start, bytes(data))
                else:
                    await self.target.write_layer(0, start, memoryview(data))
        if step.buffer is not None:
            self._buffers.append(step.buffer)
        self.progress(step.end, self.source.size)
        await self._slow_down(sum(end - start for start, end, data, _ in step.writes if data is not None))

    async def _slow_down(self, written: int) -> None:
        """Wait until what has been written is no more than the limit allows."""
        if self.options.speed:
            self._not_before = max(self._not_before, trio.current_time()) + written / self.options.speed
            await trio.sleep_until(self._not_before)

    async def _zero(self, start: int, end: int) -> None:
        """Make a range of the target read as zeros, if it does not yet."""
        if self.options.blank:
            return
        layers = self.target.layers
        # beyond a backing file that is too short, what is not allocated reads as zeros
        floor = layers[1].size if len(layers) > 1 else 0
        for extent in await layers[0].block_status(start, end - start):
            first = extent.offset
            if extent.kind is Kind.ZERO:
                continue
            last = min(extent.end, floor) if extent.kind is Kind.UNALLOCATED else extent.end
            if first < last:
                await self.target.zero_layer(0, first, last - first)
