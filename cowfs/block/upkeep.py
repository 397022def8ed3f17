"""What goes on behind a disk's back while it is in use: clusters are completed, and flushes come without being asked.

Errors end nothing here: what could not be done stays to be done, and a guest's own fsync reports it.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

import trio

from cowfs.block.heap import HEAP
from cowfs.block.layer import Layer
from cowfs.block.partial import PartialClusters
from cowfs.errors import CowfsError

log = logging.getLogger(__name__)

#: seconds without a read or a write after which a disk counts as idle, or twice that
IDLE = 20.0


class Stats(Protocol):
    """Counters by which it is told whether a disk is in use."""

    reads: int
    writes: int


class Kept(Protocol):
    """What the periodic flush needs of a disk."""

    #: active layer first
    layers: tuple[Layer, ...]
    #: whether there may be something to write
    changed: bool

    async def sync(self) -> None:
        """Make durable what was written before, to whatever layer."""

    async def settle(self) -> None:
        """Take marks of use off the active layer."""


async def complete_clusters(partial: PartialClusters, patience: float) -> None:
    """Complete partial clusters whenever the guest is quiet, until there can be no more of them.

    After an error, ``patience`` seconds pass before the next attempt.
    """
    while not partial.is_closed:
        try:
            await partial.complete_in_background()
        except Exception as error:
            if isinstance(error, CowfsError):
                log.error("copy-on-write: %s", error)
            else:
                log.exception("copy-on-write: internal error")
            await trio.sleep(patience)


async def flush_periodically(disk: Kept, interval: float) -> None:
    """Bound what a crash can lose; once nothing changes any more, take marks of use off the image."""
    settled = True
    while True:
        await trio.sleep(interval)
        try:
            if disk.changed or disk.layers[0].image.owes_space:
                disk.changed = settled = False
                await disk.sync()
            elif not settled:
                await disk.settle()
                settled = True
        except Exception as error:
            disk.changed = True
            if isinstance(error, CowfsError):
                log.error("periodic flush: %s", error)
            else:
                log.exception("periodic flush: internal error")


async def rest_when_idle(stats: Stats, layers: Callable[[], Iterable[Layer]]) -> None:
    """Have a disk that nobody reads or writes take little memory, since it may be one of hundreds."""
    seen = None
    while True:
        await trio.sleep(IDLE)
        if seen == (seen := (stats.reads, stats.writes)):
            await HEAP.give_back(sum(layer.image.rest() for layer in layers()))
