"""Commit: merge layers down into one below them.

What lies between the merged layers' base and the layer above them is copied into the base first, and taken out of the
chain by one header write of the layer above. If the active layer is to be merged, its own content follows: it is
drained, cluster by cluster, and stays on top empty, or is left behind (``pivot``).

A cluster is dropped from the active layer only when its copy below is durable, and only if no guest wrote to
it since it was copied. So a crash at any moment leaves the disk's content as it was, and running the job
again ends in the same result.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from functools import partial

import trio

from cowfs.block.alignment import Area, align_down, align_up, common, joined
from cowfs.block.differences import View, differing
from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.block.merged import mark_layer
from cowfs.block.stack import Span
from cowfs.block.viewers import Risk, held_of
from cowfs.block.writetracker import WriteTracker
from cowfs.errors import CowfsError, UsageError
from cowfs.formats.backingnames import BackingNames, name_below
from cowfs.jobs.job import Job, OnError, log
from cowfs.storage import host

#: bytes copied at once, at the least, where each step is made durable with guests held off it
FIRM_STEP = 1 << 20
#: bytes copied before the base is flushed and the copies are dropped above, and seconds after which less will do
BATCH = 64 << 20
BATCH_SECONDS = 5.0
#: bytes; formats have disks of whole sectors only
SECTOR = 512
#: bytes of the disk whose mapping is looked up at once
WINDOW = 256 << 20
#: times that the disk is gone through with guests left alone, before they are held off what is left, step by step
GENTLE_PASSES = 2

#: what is left to do of an active layer: all that it holds
DRAINED = Span(0, 0, 1)


class Pivot(str, Enum):
    """What becomes of the active layer once it is drained."""

    #: it stays, empty
    NO = "no"
    #: it is left behind, and its base is the active layer
    YES = "yes"
    #: the job is ready then, and pivots when it is told to complete
    WAIT = "wait"


class Commit(Job):
    """Merge the layers from ``top`` (the active one) down into ``base`` (what is below ``top``).

    ``alone`` says that nobody writes to the disk meanwhile. With ``keep``, which needs that, they are copied and all
    stay as they are.
    """

    verb = "commit"

    def __init__(
        self,
        disk: Disk,
        *,
        top: Layer | None = None,
        base: Layer | None = None,
        pivot: Pivot = Pivot.NO,
        keep: bool = False,
        names: BackingNames = BackingNames.KEEP,
        alone: bool = False,
        speed: int = 0,
        on_error: OnError = OnError.REPORT,
    ) -> None:
        super().__init__(disk, alone=alone or keep, speed=speed, on_error=on_error)
        layers = disk.layers
        if len(layers) == 1:
            raise UsageError("there is no backing file to commit into", file=layers[0].name)
        self._top = layers[0] if top is None else top
        below = layers[layers.index(self._top) + 1 :]
        if not below:
            raise UsageError("there is no layer below it to commit into", file=self._top.name)
        self._base = below[0] if base is None else base
        if self._base not in below:
            raise UsageError(
                f"does not lie below {self._top.name}, and nothing is committed upwards", file=self._base.name
            )
        self._is_active = self._top is layers[0]
        self.length = self._top.size
        if not self._is_active and pivot is not Pivot.NO:
            raise UsageError(f"pivot={pivot.value} is for commits of the active layer", file=self._top.name)
        if pivot is not Pivot.NO:
            self._check_size()
        self._pivot = pivot
        self._keep = keep
        self._names = names
        #: whether what is between is merged first, and then the active layer drained: each is half of the way
        self._has_halves = False
        #: bytes; steps are whole ones of these
        self._unit = max(layer.cluster_size for layer in layers)

    @property
    def layers(self) -> tuple[Layer, Layer]:
        """The layer that is merged, the first of them if there are several, and that into which."""
        return self._top, self._base

    @property
    def keeps(self) -> bool:
        """Whether all layers stay as they are."""
        return self._keep

    def risks(self) -> Sequence[Risk]:
        """Snapshots of who is put on the base take from it what was hidden from the disk; others are left behind."""
        layers = self.disk.layers
        if self._keep:
            return [self.risk(depth, partial(self._lost_below, depth)) for depth in range(self._depth)]
        above = max(0, layers.index(self._top) - 1)
        left = layers[above + 1 : self._depth] if self._pivot is Pivot.NO else layers[: self._depth]
        viewer = self.risk(above, partial(self._lost_above, above))
        return [*(Risk(layer, None) for layer in left), viewer]

    async def _lost_below(self, depth: int, start: int, end: int) -> list[Area]:
        """What a layer takes from the base where any above that one have other content to copy there."""
        disk = self.disk
        taken = await disk.taken(Span(0, 0, self._depth), start, end - start)
        pieces = await disk.resolve(start, end - start, depth + 1)
        seen = [(extent.offset, extent.end) for found, extent in pieces if found >= self._depth]
        return common(joined([(extent.offset, extent.end) for extent in taken]), joined(seen))

    async def _lost_above(self, above: int, start: int, end: int) -> list[Area]:
        """What will be another below the layer that is put on the base, or drained into it.

        If nothing is drained, the base becomes what lay below that layer, but for what it has behind the end of that.
        If something is, the base becomes what that layer shows: nothing is lost where it holds nothing itself.
        """
        disk, layer = self.disk, self.disk.layers[above]
        before, base = View(disk, above + 1), View(disk, self._depth)
        if not self._is_active:
            behind = max(start, disk.layers[above + 1].size)
            return await differing(before, base, behind, end) if behind < end else []
        if not self.alone:
            # guests may write anywhere yet, and make the disk larger
            return [(start, end)]
        lost: list[Area] = []
        for first, last in await held_of(layer, start, end):
            lost += await differing(before, View(disk, above), first, last)
        behind = max(start, layer.size)
        return [*lost, *await differing(before, base, behind, end)] if behind < end else lost

    async def work(self) -> None:
        """Copy, relink, drain, pivot; as far as that is asked for."""
        self.disk.layers[0].require_writable()
        with self.disk.copying_on_read_held():
            async with self._base_open():
                if self._keep:
                    await self._copy(Span(0, 0, self._depth))
                    self.require_no_errors()
                    return
                await self._merge_between()
                if self._is_active:
                    await self._drain()
        if self._is_active and self._pivot is Pivot.NO:
            await self.disk.flush()
            await self.disk.compact()

    @property
    def _depth(self) -> int:
        return self.disk.layers.index(self._base)

    @asynccontextmanager
    async def _base_open(self) -> AsyncIterator[None]:
        """Have the base open for writing as long as this needs it; whoever looks sees it become what it will be."""
        disk = self.disk
        wanted: frozenset[Layer] | None = disk.remembering(self._depth)
        await disk.set_layer_writable(self._depth, True)
        try:
            yield
            wanted = None
        finally:
            with trio.CancelScope(shield=True):
                if self._depth:
                    await disk.set_layer_writable(self._depth, False)
                if not self._keep:
                    # what shows no disk any more shall not say that it does
                    await disk.remember_below(self._depth, None if wanted is None else wanted - disk.spoiled)

    # -- layers between the base and the one that is put on it

    async def _merge_between(self) -> None:
        disk = self.disk
        first = 1 if self._is_active else disk.layers.index(self._top)
        between = disk.layers[first : self._depth]
        if not between:
            return
        self._has_halves = self._is_active
        span = Span(0 if self._is_active else first, first, self._depth)
        heir = self._base if first == 1 else None
        # what has no name is better refused now than when everything is copied
        await self._new_backing(first - 1)
        async with self._prepared(span, between), disk.about_to_lie_on(heir):
            done = 0
            relinked = False
            while not relinked:
                # the disk may grow at any time
                size = disk.layers[first - 1].size
                await self._copy(span, done)
                done = self.length
                await self.attempt(self._base.flush)
                self.require_no_errors()
                await self.resumed()
                relinked = await self._relink(first - 1, size)

    @asynccontextmanager
    async def _prepared(self, span: Span, between: tuple[Layer, ...]) -> AsyncIterator[None]:
        """Have all layers open for writing that will be written to at the end: nothing must stand in the way then."""
        disk, above = self.disk, self.disk.layers[span.top - 1]
        opened: list[Layer] = []
        try:
            if span.top > 1:
                await disk.set_layer_writable(span.top - 1, True)
            for layer in between:
                await layer.reopen(writable=True)
                opened.append(layer)
            # on the base as it becomes, the deeper ones of them make no disk, also if this comes to nothing
            disk.spoiled |= set(between[1:])
            yield
        finally:
            with trio.CancelScope(shield=True):
                for layer in opened:
                    if layer in disk.layers:
                        await layer.reopen(writable=False)
                if span.top > 1 and not above.storage.read_only:
                    await disk.set_layer_writable(span.top - 1, False)

    async def _new_backing(self, above: int) -> Backing:
        """What the header of the layer at depth ``above`` says when it is put on the base."""
        name = await host.ask(
            name_below, self.disk.layers, above, self._depth, self._names, file=self.disk.layers[above].name
        )
        return Backing(name, self._base.format)

    async def _relink(self, above: int, size: int) -> bool:
        """Put the layer at depth ``above`` on the base, and mark what lay between as of no use.

        False, and nothing has changed, if that layer has not ``size`` bytes any more.
        """
        disk = self.disk
        await self._hide_tail(above)
        backing = await self._new_backing(above)
        removed = await disk.cut_out(above, self._depth, backing, size)
        if removed is None:
            return False
        with trio.CancelScope(shield=True):
            for old in removed:
                await self._retire(old)
        return True

    async def _hide_tail(self, above: int) -> None:
        """What ends before the layer above does is seen with zeros after that; a longer base has other bytes there."""
        disk = self.disk
        layer, below = disk.layers[above], disk.layers[above + 1]
        for start in range(below.size, min(layer.size, self._base.size), WINDOW):
            if not self._is_active:
                await disk.hide(above, start, min(start + WINDOW, layer.size, self._base.size), self._depth)

    async def _retire(self, layer: Layer) -> None:
        """Mark a layer that is out of the chain, and close it."""
        try:
            try:
                await mark_layer(layer, self._base.name)
            finally:
                await layer.close()
        except CowfsError as error:
            # the merge is done, whatever becomes of its leftovers
            self.error = f"could not be marked as merged, and must not be used: {error}"
            log.error("%s: %s", self.verb, self.error)

    # -- copying

    async def _copy(self, span: Span, begin: int = 0) -> None:
        """Copy what a span's viewer takes from it, from about an offset on.

        Nobody else writes to those layers, so once is enough.
        """
        disk = self.disk
        begin = align_down(begin, self._unit)
        await self._make_room(disk.layers[span.viewer].size)
        for start in range(begin, self.length, WINDOW):
            end = min(start + WINDOW, self.length)
            for first, last in self._steps(await self._held(span, start, end), self._unit):
                copied = await self.attempt(partial(disk.copy_down, first, last - first, span))
                await self.advance(self._way(last), copied or 0)
            await self.advance(self._way(end), 0)

    def _way(self, position: int) -> int:
        """How far a job is that has come to a position while it copies what lies between."""
        return position // 2 if self._has_halves else position

    def _way_on(self, position: int) -> int:
        """The same while the active layer is drained."""
        return (self.length + position) // 2 if self._has_halves else position

    async def _make_room(self, size: int) -> None:
        """The base must be as large as what is merged into it; a larger one stays as it is."""
        self.length = size
        if self._base.size < size:
            await self.disk.grow_layer(self._depth, align_up(size, SECTOR))

    async def _held(self, span: Span, start: int, end: int) -> list[Area]:
        """Parts of a range in which a span holds anything: [start, end), whole units but for the end of the range."""
        found = await self.disk.taken(span, start, end - start)
        unit = self._unit
        return joined([(align_down(each.offset, unit), min(align_up(each.end, unit), end)) for each in found])

    def _steps(self, areas: Iterable[Area], unit: int) -> Iterator[Area]:
        """Cut areas into steps, each as large as guests leave room for when its turn comes."""
        for start, end in areas:
            while start < end:
                stop = min(end, start + self.step(unit))
                yield start, stop
                start = stop

    # -- emptying the active layer

    def _check_size(self) -> None:
        if self._base.size > self.disk.size:
            raise UsageError(
                f"has {self._base.size} bytes, more than the disk's {self.disk.size}: with a pivot the disk would grow;"
                " resize it first, or commit with pivot=no",
                file=self._base.name,
            )

    async def _drain(self) -> None:
        disk = self.disk
        await self._make_room(disk.size)
        await disk.open_sink()
        try:
            await self._empty()
            if self._pivot is Pivot.WAIT:
                await self.ready()
            if self._pivot is not Pivot.NO:
                await self._leave_top()
        finally:
            with trio.CancelScope(shield=True):
                await disk.close_sink()

    async def _leave_top(self) -> None:
        disk = self.disk
        while True:
            with trio.CancelScope(shield=True):
                top = await disk.leave_top()
                if top is not None:
                    await self._retire(top)
                    return
            await self._empty()

    async def _empty(self) -> None:
        """Go through the disk until the active layer holds nothing; guests write next to nothing to it meanwhile."""
        disk = self.disk
        with disk.track_writes(max(disk.cluster_size, 4096)) as tracker:
            number = 0
            while await self._pass(tracker if number < GENTLE_PASSES else None):
                number += 1
                if number > GENTLE_PASSES:
                    # what fails again and again is left out in the end
                    self.require_no_errors()
        self.require_no_errors()

    async def _pass(self, tracker: WriteTracker | None) -> bool:
        """Go through the disk once; False if the active layer holds nothing, and has held nothing all along."""
        disk = self.disk
        if disk.sink is not None:
            disk.sink.strayed = False
        # if it grows meanwhile, the sink says that there is more to do
        size = disk.size
        await self._make_room(size)
        found = False
        position = 0
        while position < size:
            end = min(position + WINDOW, size)
            areas = await self._held(DRAINED, position, end)
            found = found or bool(areas)
            if tracker is not None:
                await self._copy_batches(areas, tracker)
            else:
                for start, stop in self._steps(areas, align_up(FIRM_STEP, self._unit)):
                    copied = await self.attempt(partial(disk.push_down, start, stop - start))
                    await self.advance(self._way_on(stop), copied or 0)
            position = end
            await self.advance(self._way_on(position), 0)
        return found or (disk.sink is not None and disk.sink.strayed)

    async def _copy_batches(self, areas: Iterable[Area], tracker: WriteTracker) -> None:
        batch: list[Area] = []
        size = 0
        begun = trio.current_time()
        for start, stop in self._steps(areas, self._unit):
            # the end of the disk may not be one any more
            end = align_up(stop, self._unit)
            if not batch:
                begun = trio.current_time()
                tracker.restart()
            tracker.clear(start, end - start)
            copied = await self.attempt(partial(self.disk.copy_down, start, end - start, DRAINED))
            if copied is not None:
                batch.append((start, end))
                size += end - start
            if size >= BATCH or trio.current_time() >= begun + BATCH_SECONDS:
                await self.attempt(partial(self._drop, batch, tracker))
                batch, size = [], 0
            await self.advance(self._way_on(stop), copied or 0)
        await self.attempt(partial(self._drop, batch, tracker))

    async def _drop(self, batch: list[Area], tracker: WriteTracker) -> None:
        """Make a batch durable below, then forget above what has not been written again since."""
        if batch:
            await self._base.flush()
            for start, end in batch:
                await self.disk.drop(start, end - start, tracker)
