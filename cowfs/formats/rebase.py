"""Putting an overlay onto another backing file.

What would change for whoever reads the overlay is copied into it first, so its content stays as it was. Only when
that is durable does the header name the new backing file. A run that was broken off changes nothing that can be
seen; the next one takes it up.
"""

import os.path
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import trio

from cowfs.block.alignment import align_up
from cowfs.block.chain import Chain
from cowfs.block.differences import SECTOR, STEP, View, differing, differing_runs, unlike
from cowfs.block.disk import Disk
from cowfs.block.extent import Extent, Kind
from cowfs.block.identity import remember
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.block.viewers import Risk, keep_snapshots, no_content
from cowfs.errors import InvalidImage, UsageError, blaming
from cowfs.formats.chain import Opening, backing_source, open_chain, open_disk, open_image, require_storable
from cowfs.formats.registry import format_named
from cowfs.storage import host, is_remote, local_path

#: bytes of the disk whose mapping is looked up at once
WINDOW = 1 << 30

Progress = Callable[[int, int], None]


async def relabel(name: str, format: str | None, backing: Backing | None) -> None:
    """Record another backing file, or none, without looking at any: the disk's content may change.

    Raises `UsageError` for a backing file without a format, or with one that does not exist.
    """
    with blaming(name):
        _check(backing)
        layer = Layer(await open_image(name, format, writable=True))
        try:
            await layer.set_backing(backing)
        finally:
            with trio.CancelScope(shield=True):
                await layer.close()


async def rebase(name: str, format: str | None, backing: Backing | None, progress: Progress) -> None:
    """Put an image onto another backing file, or on none, with the disk's content as it is.

    The backing's name is taken relative to the directory of ``name``. Raises `UsageError` as `relabel` does, and
    what opening either chain raises.
    """
    with blaming(name):
        _check(backing)
        async with AsyncExitStack() as stack:
            disk = await open_disk(name, format, writable=True, copy_on_read=False)
            stack.push_async_callback(_close, disk)
            below = await stack.enter_async_context(_opened(name, disk, backing)) if backing else None
            await _keep_snapshots(disk, below)
            await _Rebase(disk, below, progress).run()
            await disk.flush()
            await disk.layers[0].set_backing(backing)
            if below is not None:
                await remember(disk.layers[0], below.layers[0])


async def _keep_snapshots(disk: Disk, below: Chain | None) -> None:
    """Have snapshots hold themselves what they take from below, as far as that is not the same in both chains."""
    old = View(disk, 1) if len(disk.layers) > 1 else None
    new = View(below, 0) if below is not None else None
    await keep_snapshots([Risk(disk.layers[0], partial(differing, old, new), old.read if old else no_content)])


def _check(backing: Backing | None) -> None:
    if backing is not None:
        if backing.format is None:
            raise UsageError("the format of the backing file must be given too, with -F")
        require_storable(backing.name)
        format_named(backing.format)


async def _close(disk: Disk) -> None:
    with trio.CancelScope(shield=True):
        await disk.close()


@asynccontextmanager
async def _opened(name: str, disk: Disk, backing: Backing) -> AsyncIterator[Chain]:
    """Open the chain that is to lie below."""
    source = backing_source(name, backing)

    async def refuse_own(path: str) -> None:
        if any([await host.ask(_is_same, path, storage.name, file=path) for storage in disk.layers[0].storages]):
            raise InvalidImage("cannot be its own backing file, nor that of its backing file", file=name)

    layers = await open_chain(source.name, source.format, opening=Opening(vet=refuse_own))
    try:
        yield Chain(layers)
    finally:
        with trio.CancelScope(shield=True):
            for layer in layers:
                await layer.close()


def _is_same(path: str, name: str) -> bool:
    file = local_path(name)
    if is_remote(path) or file is None:
        return path == name
    return os.path.exists(path) and os.path.samefile(path, file)  # noqa: PTH110, PTH121


class _Rebase:
    """Copies up what the old backing chain has and the new one has not."""

    def __init__(self, disk: Disk, below: Chain | None, progress: Progress) -> None:
        self.disk = disk
        self.progress = progress
        self.unit = max(disk.unit, SECTOR)
        self.old = View(disk, 1) if len(disk.layers) > 1 else None
        self.new = View(below, 0) if below is not None else None

    async def run(self) -> None:
        """All of the disk."""
        size = self.disk.size
        self.progress(0, size)
        for start in range(0, size, WINDOW):
            length = min(WINDOW, size - start)
            for extent in await self.disk.layers[0].map(start, length):
                if extent.kind is Kind.UNALLOCATED:
                    await self._keep(extent)
                self.progress(extent.end, size)

    async def _keep(self, extent: Extent) -> None:
        """Let a part that the overlay does not hold keep its content."""
        if self.old is None:
            await self._keep_zeros(extent)
            return
        step = align_up(STEP, self.unit)
        for first, last, is_zero in await unlike(self.old, self.new, extent.offset, extent.length):
            if is_zero:
                await self._hide(first, last)
                continue
            for start in range(first - first % step, last, step):
                begin, end = max(first, start), min(last, start + step)
                await self._compare(begin, end - begin)
                self.progress(end, self.disk.size)

    async def _keep_zeros(self, extent: Extent) -> None:
        """Without an old backing file, what is not allocated reads as zeros."""
        if self.new is not None:
            for first, last, _ in await unlike(self.new, None, extent.offset, extent.length):
                await self._hide(first, last)

    async def _hide(self, start: int, end: int) -> None:
        """Make a range read as zeros where the new backing file has other content there."""
        step = align_up(STEP, self.unit)
        assert self.new is not None, "only a new backing file has content to be hidden"
        for position in range(start, end, step):
            length = min(step, end - position)
            found = await self.new.read(position, length)
            for first, last in differing_runs(found, bytes(length), self.unit):
                await self.disk.zero_layer(0, position + first, last - first)

    async def _compare(self, start: int, length: int) -> None:
        """Copy up the parts of a range that differ."""
        assert self.old is not None
        content = await self.old.read(start, length)
        other = bytes(length) if self.new is None else await self.new.read(start, length)
        if content != other:
            for first, last in differing_runs(content, other, self.unit):
                await self.disk.write_layer(0, start + first, memoryview(content)[first:last])
