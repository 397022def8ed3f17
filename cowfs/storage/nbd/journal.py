"""Writes that a server has answered but not yet flushed: if it goes away, it may have lost them.

An answered write must be durable after the next flush that succeeds, and that flush may be made by another server
than the one that has answered: the first may have crashed meanwhile. So what has been written since the last flush is
kept, and written again before anything else happens on a new connection.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cowfs.storage.nbd.request import Request

#: bytes that are kept; whoever writes more flushes first
BOUND = 32 << 20
#: bytes that an entry counts for at the least
_ENTRY = 512


class Journal:
    """Belongs to one export that can be written and flushed."""

    def __init__(self) -> None:
        self._entries: deque[tuple[int, Request]] = deque()
        #: number of the last entry
        self.mark = 0
        #: bytes of memory, nearly
        self.size = 0
        #: bytes of writes that are under way, and will be kept
        self._expected = 0

    def has_room(self, length: int) -> bool:
        """Whether a write of so many bytes can be kept."""
        taken = self.size + self._expected
        return taken + length <= BOUND or not taken

    @contextmanager
    def expecting(self, length: int) -> Iterator[None]:
        """Keep room for a write that is made in the context."""
        self._expected += length
        try:
            yield
        finally:
            self._expected -= length

    def record(self, requests: Sequence[Request]) -> None:
        """Keep what the server has just answered, with copies of what was written."""
        for request in requests:
            self.mark += 1
            data = [memoryview(b"".join(request.data))] if request.data else []
            kept = Request(request.command, request.offset, request.length, data=data)
            self._entries.append((self.mark, kept))
            self.size += _cost(kept)

    def forget(self, mark: int) -> None:
        """Let go of the entries up to a number: they are durable."""
        while self._entries and self._entries[0][0] <= mark:
            self.size -= _cost(self._entries.popleft()[1])

    def batches(self, most: int) -> Iterator[list[Request]]:
        """All entries in order, in batches of which each can be written in any order."""
        batch: list[Request] = []
        for _, entry in self._entries:
            if len(batch) == most or any(_overlap(entry, other) for other in batch):
                yield batch
                batch = []
            # anew each time: nobody knows what becomes of one that is under way when its connection is lost
            batch.append(Request(entry.command, entry.offset, entry.length, data=entry.data))
        if batch:
            yield batch


def _cost(request: Request) -> int:
    return max(sum(map(len, request.data)), _ENTRY)


def _overlap(one: Request, other: Request) -> bool:
    return one.offset < other.offset + other.length and other.offset < one.offset + one.length
