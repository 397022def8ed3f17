"""Reading what is far away and does not change: in whole blocks, which are kept for a while, and ahead of readers.

Neighbours are fetched together, several such stretches at a time. Who reads what is already under way waits for that.
"""

import errno
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import trio

from cowfs.errors import CowfsError, StorageError
from cowfs.storage.ahead import Ahead
from cowfs.storage.base import ReadBuffers
from cowfs.storage.buffers import part_of
from cowfs.storage.cache import BLOCK, Block, Blocks

log = logging.getLogger(__name__)

#: blocks that are fetched at once at most: 2 MiB
CHUNK = 32
#: stretches under way for those who will want them
MAX_AHEAD = 12
#: blocks that one reader collects at a time: 8 MiB
TURN = 128

#: returns the blocks from an offset up to another one, inside of what there is, of which the last block may be shorter;
#: told whether nobody waits for them yet
Fetch = Callable[[int, int, bool], Awaitable[Sequence[Block]]]


class _Stretch:
    """Blocks from ``first`` up to ``stop`` that are under way."""

    def __init__(self, first: int, stop: int) -> None:
        self.first, self.stop = first, stop
        self.blocks: dict[int, Block] = {}
        self.error: CowfsError | None = None
        self.done = trio.Event()


class Fetcher:
    """Reads ``length`` bytes of something. ``may_look_ahead`` is asked before anything is fetched ahead."""

    def __init__(self, name: str, length: int, fetch: Fetch, may_look_ahead: Callable[[], bool]) -> None:
        self._name = name
        self._length = length
        self._fetch = fetch
        self._may_look_ahead = may_look_ahead
        self._blocks = Blocks()
        self._ahead = Ahead()
        self._under_way: dict[int, _Stretch] = {}
        self._count_ahead = 0
        self._scopes: set[trio.CancelScope] = set()
        self._is_closed = False
        #: bytes that have been fetched
        self.fetched_bytes = 0

    def keep(self, start: Block) -> None:
        """Keep the first block, or all there is if that is less, which has come in by the way."""
        self._blocks.put(0, start)

    def measured(self, size: int, seconds: float) -> None:
        """So many bytes have come in so long: how far it is worth to look ahead."""
        self._ahead.measured(size, seconds)

    # -- reading

    def read_now(self, offset: int, buffers: ReadBuffers) -> bool:
        """From what has come in lately."""
        total = sum(map(len, buffers))
        first, stop = self._span(offset, total)
        if stop - first > TURN or not all(number in self._blocks for number in range(first, stop)):
            return False
        found = {number: data for number in range(first, stop) if (data := self._blocks.get(number)) is not None}
        _fill(buffers, offset, found)
        self._read_ahead(first, stop)
        return True

    async def read(self, offset: int, buffers: ReadBuffers) -> None:
        """Fetch what is missing, several parts at a time; zeros past the end."""
        views = [view for view in buffers if len(view)]
        total = sum(map(len, views))
        first, stop = self._span(offset, total)
        for start in range(first, stop, TURN):
            found = await self._collect(start, min(start + TURN, stop))
            begin, end = max(offset, start * BLOCK), min(offset + total, (start + TURN) * BLOCK)
            _fill(part_of(views, begin - offset, end - begin), begin, found)
        inside = max(0, min(total, self._length - offset))
        for view in part_of(views, inside, total - inside):
            view[:] = bytes(len(view))

    def missing(self, ranges: Sequence[tuple[int, int]]) -> int:
        """Bytes that have to be fetched for offsets and lengths."""
        return BLOCK * sum(number not in self._blocks for number in self._touched(ranges))

    async def prepare(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch offsets and lengths all at once, as far as they can be kept."""
        wanted = self._touched(ranges)
        for start in range(0, len(wanted), TURN):
            self._request(wanted[start : start + TURN])
            await self._gather(wanted[start : start + TURN])

    def _touched(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        return sorted({number for offset, length in ranges for number in range(*self._span(offset, length))})

    def _span(self, offset: int, length: int) -> tuple[int, int]:
        """Blocks that a range touches."""
        end = min(offset + length, self._length)
        return (offset // BLOCK, -(-end // BLOCK)) if offset < end else (0, 0)

    async def _collect(self, first: int, stop: int) -> dict[int, Block]:
        """Return blocks, and see to it that the next ones come too if they are wanted in order."""
        numbers = range(first, stop)
        self._request(numbers)
        self._read_ahead(first, stop)
        return await self._gather(numbers)

    async def _gather(self, numbers: Iterable[int]) -> dict[int, Block]:
        """Wait for blocks that are here or under way. Raises the error of the first that does not come."""
        found: dict[int, Block] = {}
        stretches: list[_Stretch] = []
        for number in numbers:
            data = self._blocks.get(number)
            if data is not None:
                found[number] = data
            elif (stretch := self._under_way[number]) not in stretches[-1:]:
                stretches.append(stretch)
        for stretch in stretches:
            await stretch.done.wait()
            if stretch.error is not None:
                raise copied(stretch.error)
            found.update(stretch.blocks)
        return found

    # -- what is under way

    def _request(self, numbers: Iterable[int]) -> None:
        """Begin to fetch those blocks that are neither here nor under way."""
        for first, stop in _runs(n for n in numbers if n not in self._blocks and n not in self._under_way):
            self._begin(first, stop)

    def _read_ahead(self, first: int, stop: int) -> None:
        begin, end = self._ahead.wanted(first, stop)
        end = min(end, -(-self._length // BLOCK))
        # small stretches only at the beginning, when there is nothing else
        if begin >= end or (self._count_ahead and end - begin < CHUNK and end * BLOCK < self._length):
            self._ahead.lag(begin)
            return
        missing = (n for n in range(begin, end) if n not in self._blocks and n not in self._under_way)
        for start, last in _runs(missing):
            if self._count_ahead >= MAX_AHEAD or not self._may_look_ahead():
                self._ahead.lag(start)
                return
            self._begin(start, last, is_ahead=True)

    def _begin(self, first: int, stop: int, *, is_ahead: bool = False) -> None:
        stretch = _Stretch(first, stop)
        self._under_way |= dict.fromkeys(range(first, stop), stretch)
        self._count_ahead += is_ahead
        trio.lowlevel.spawn_system_task(self._run, stretch, is_ahead, name=f"fetch from {self._name}")

    async def _run(self, stretch: _Stretch, is_ahead: bool) -> None:
        """Fetch, and tell those who wait, whatever happens."""
        stretch.error = StorageError("was closed", errno=errno.EBADF, file=self._name)
        try:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                if not self._is_closed:
                    await self._bring(stretch, is_ahead)
                    stretch.error = None
        except CowfsError as error:
            error.file = self._name
            stretch.error = error
        except Exception:
            log.exception("%s: internal error", self._name)
            text = "internal error; the log has the details"
            stretch.error = StorageError(text, errno=errno.EIO, file=self._name)
        finally:
            self._scopes.discard(scope)
            self._count_ahead -= is_ahead
            for number in range(stretch.first, stretch.stop):
                del self._under_way[number]
            stretch.done.set()

    async def _bring(self, stretch: _Stretch, is_ahead: bool) -> None:
        start, end = stretch.first * BLOCK, min(stretch.stop * BLOCK, self._length)
        blocks = await self._fetch(start, end, is_ahead)
        self.fetched_bytes += end - start
        for number, block in enumerate(blocks, stretch.first):
            stretch.blocks[number] = block
            self._blocks.put(number, block)

    async def close(self) -> None:
        """End what is under way, and forget what has come in."""
        self._is_closed = True
        for scope in self._scopes:
            scope.cancel()
        with trio.CancelScope(shield=True):
            for stretch in set(self._under_way.values()):
                await stretch.done.wait()
        self._blocks.clear()


def copied(error: CowfsError) -> StorageError:
    """Return an error anew: several may get it, and each adds to its text."""
    return StorageError(error.message, errno=error.errno, file=error.file)


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbours among ascending numbers, in runs that are fetched at once."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number and number - runs[-1][0] < CHUNK:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _fill(views: ReadBuffers, offset: int, blocks: Mapping[int, Block]) -> None:
    """Fill buffers, which begin at ``offset``, from blocks; zeros past the last."""
    position = offset
    for view in views:
        done = 0
        while done < len(view):
            number, inside = divmod(position, BLOCK)
            part = memoryview(blocks.get(number, b""))[inside : inside + len(view) - done]
            if not part:
                view[done:] = bytes(len(view) - done)
                position += len(view) - done
                break
            view[done : done + len(part)] = part
            done += len(part)
            position += len(part)
