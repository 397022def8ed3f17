"""Copy-on-read behind the reader's back: the reader is answered first, the overlay populated after."""

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import trio

from cowfs.block.alignment import split
from cowfs.errors import CowfsError

log = logging.getLogger(__name__)

#: bytes that may be waiting to be copied up; a reader that finds more waits for room before its next read
QUEUE_BYTES = 64 << 20
#: bytes copied up in one step
STEP_BYTES = 1 << 20


class Populator:
    """A bounded queue of clusters that were read through the active layer, and the loop that copies them up.

    Only the numbers of clusters are kept; the copy looks at the state of things again, under the range lock.
    """

    def __init__(self, unit: int, copy_up: Callable[[int, int], Awaitable[int]], on_error: Callable[[], None]) -> None:
        self._on_error = on_error
        #: bytes of a cluster
        self.unit = max(unit, 4096)
        self._copy_up = copy_up
        self._bound = max(1, QUEUE_BYTES // self.unit)
        self._waiting: OrderedDict[int, None] = OrderedDict()
        self._arrived = trio.Event()
        self._progress = trio.Event()
        self._busy = False
        self._failing = False
        #: told of the clusters, from and to, that are offered, while somebody wants to know
        self.note: Callable[[int, int], None] | None = None

    @property
    def has_room(self) -> bool:
        """Whether another read may be offered without waiting."""
        return len(self._waiting) < self._bound

    def offer(self, offset: int, length: int) -> None:
        """Queue the clusters of a range."""
        start, end, _, _ = split(offset, length, self.unit)
        if self.note is not None:
            self.note(start, end)
        for number in range(start // self.unit, end // self.unit):
            self._waiting[number] = None
        self._arrived.set()

    def clear(self) -> None:
        """Forget what is queued."""
        self._waiting.clear()
        self._progressed()

    async def room(self) -> None:
        """Wait until `has_room`."""
        while not self.has_room:
            await self._progress.wait()

    async def drained(self) -> None:
        """Wait until nothing is queued or being copied."""
        while self._waiting or self._busy:
            await self._progress.wait()

    async def run(self) -> None:
        """Copy up what is offered, for ever."""
        while True:
            while not self._waiting:
                self._arrived = trio.Event()
                await self._arrived.wait()
            self._busy = True
            try:
                await self._copy(*self._next())
            finally:
                self._busy = False
                self._progressed()

    def _next(self) -> tuple[int, int]:
        """Take the oldest cluster, with the neighbours behind it that wait too."""
        first, _ = self._waiting.popitem(last=False)
        end = first + 1
        while end in self._waiting and (end - first) * self.unit < STEP_BYTES:
            del self._waiting[end]
            end += 1
        return first * self.unit, (end - first) * self.unit

    async def _copy(self, offset: int, length: int) -> None:
        try:
            await self._copy_up(offset, length)
            self._failing = False
        except Exception as error:
            # the reader has had its answer; the overlay merely stays as sparse as it was
            self._on_error()
            if not isinstance(error, CowfsError):
                log.exception("copy-on-read: internal error")
            elif not self._failing:
                log.warning("copy-on-read: %s", error)
            self._failing = True

    def _progressed(self) -> None:
        self._progress.set()
        self._progress = trio.Event()
