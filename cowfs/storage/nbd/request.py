"""Requests of the transmission phase, and what has come back of them."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

import trio

from cowfs.storage.buffers import Views, part_of
from cowfs.storage.nbd import protocol as nbd
from cowfs.storage.nbd.transport import MisbehavedError

#: where bytes go that nobody waits for any more
_SCRATCH = memoryview(bytearray(64 << 10))
#: chunks that a reply may have beside one for each sector
_SPARE_CHUNKS = 16
_SECTOR = 512


class Request:
    """One command. ``views`` is what a read fills; ``data``, what a write sends; offsets and lengths in bytes."""

    __slots__ = (
        "_chunks",
        "_covered",
        "abandoned",
        "command",
        "data",
        "deadline",
        "done",
        "error",
        "extents",
        "failure",
        "is_late",
        "is_sent",
        "length",
        "offset",
        "operation",
        "views",
    )

    def __init__(self, command: int, offset: int, length: int, *, views: Views = (), data: Views = ()) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.views = views
        self.data = data
        self.operation: Operation | None = None
        self.reset()

    def reset(self) -> None:
        """Be as if never sent."""
        self.done = False
        self.abandoned = False
        #: whether some of it may have left
        self.is_sent = False
        #: number that the server has answered, and its text
        self.error: tuple[int, str] | None = None
        #: what has become of the connection before there was an answer
        self.failure: Exception | None = None
        #: what a block status has found, from the start: `DESCRIPTOR` after `DESCRIPTOR`
        self.extents = memoryview(b"")
        self.deadline = 0.0
        #: whether somebody has been told that the deadline has passed
        self.is_late = False
        # disjoint, in order; bytes within the request that have come
        self._covered: list[tuple[int, int]] = []
        self._chunks = 0

    @property
    def is_change(self) -> bool:
        """Whether it changes the export, and so matters even if nobody waits for it."""
        return self.command in nbd.CHANGES

    def own(self) -> None:
        """Copy what is to be written: its buffers go back to whoever has lent them."""
        self.data = [memoryview(b"".join(self.data))] if self.data else ()

    def let_go(self) -> None:
        """Give back the buffers that are written, unless that is copied and still matters."""
        if not self.abandoned or self.done or not self.is_sent:
            self.data = ()

    # -- what comes back of a read

    def expect(self, offset: int, length: int) -> int:
        """Take note that a part comes, in offsets of the export; where in the request. Raises `MisbehavedError`."""
        start = offset - self.offset
        end = start + length
        if length <= 0 or start < 0 or end > self.length:
            raise MisbehavedError("sends bytes that were not asked for")
        self.count_chunk()
        covered = self._covered
        index = bisect_left(covered, (start, start))
        if (index and covered[index - 1][1] > start) or (index < len(covered) and covered[index][0] < end):
            raise MisbehavedError("sends the same bytes twice")
        # neighbours become one
        if index < len(covered) and covered[index][0] == end:
            end = covered.pop(index)[1]
        first = start
        if index and covered[index - 1][1] == start:
            index -= 1
            first = covered.pop(index)[0]
        covered.insert(index, (first, end))
        return start

    def count_chunk(self) -> None:
        """Keep a reply from going on for ever. Raises `MisbehavedError`."""
        self._chunks += 1
        if self._chunks > self.length // _SECTOR + _SPARE_CHUNKS:
            raise MisbehavedError("never comes to an end with a reply")

    @property
    def is_complete(self) -> bool:
        """Whether every byte of a read has come."""
        return self._covered == [(0, self.length)]

    def place(self, start: int, length: int) -> list[memoryview]:
        """Buffers for a part of the request; others if nobody waits for it any more."""
        if self.abandoned:
            return [_SCRATCH[:length]]
        return part_of(self.views, start, length)

    # -- the end

    def finish(self, failure: Exception | None = None) -> None:
        """Nothing more comes; wakes up who waits once that is so for all of its operation."""
        self.done = True
        self.failure = failure
        if self.operation is not None and not self.abandoned:
            self.operation.finished_one(self)


class Operation:
    """Some requests that somebody waits for.

    ``on_success`` is called, before anything else happens, when the server has done all of it.
    """

    def __init__(self, requests: Sequence[Request], on_success: Callable[[], None] | None = None) -> None:
        self.requests = requests
        self.finished = trio.Event()
        #: whether it has finished only since it was waited for long enough
        self.is_given_up = False
        self._on_success = on_success
        self._left = len(requests)
        for request in requests:
            request.reset()
            request.operation = self

    def finished_one(self, request: Request) -> None:
        """Count one request that has come to its end."""
        self._left -= 1
        if self._left:
            return
        if self._on_success is not None and all(r.failure is None and r.error is None for r in self.requests):
            self._on_success()
        self.finished.set()
