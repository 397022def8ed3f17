"""Power cuts: what a storage may hold when the power goes, from a record of what was done to it.

Everything that a flush covered is there. Of the rest any part may be there, in any order: a write may be lost while a
later one was made, and of one write any sectors may have been made.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storages import MemoryStorage

from cowfs.block.alignment import align_down, align_up
from cowfs.storage.base import WriteBuffers

#: bytes that a disk writes whole or not at all
SECTOR = 512


@dataclass(frozen=True)
class Flushed:
    """A flush was answered: the first ``covered`` steps of its storage are durable."""

    covered: int


#: offset and bytes of a write or a hole, in whole sectors; or a length to cut the file to; or a flush
Step = tuple[int, bytes] | int | Flushed
Change = tuple[int, bytes] | int
#: steps of several storages in order, by name
Journal = list[tuple[str, Step]]


class RecordingStorage(MemoryStorage):
    """``start`` is the content at the last `begin`, ``steps`` what was done since.

    ``journal`` may be shared by several storages, to keep their order.
    """

    def __init__(
        self,
        name: str,
        content: bytes = b"",
        *,
        cold: bool = False,
        read_only: bool = False,
        journal: Journal | None = None,
    ) -> None:
        super().__init__(name, content, cold=cold, read_only=read_only)
        self.journal: Journal = [] if journal is None else journal
        self.begin()

    def begin(self) -> None:
        """Forget what was done so far."""
        self.start = bytes(self.content)
        self.steps: list[Step] = []
        self.journal[:] = [entry for entry in self.journal if entry[0] != self.name]

    def _record(self, step: Step) -> None:
        self.steps.append(step)
        self.journal.append((self.name, step))

    def _store(self, offset: int, buffers: WriteBuffers) -> None:
        super()._store(offset, buffers)
        # the page cache writes whole sectors, with what earlier writes left in them
        start, end = align_down(offset, SECTOR), align_up(offset + sum(map(len, buffers)), SECTOR)
        self._record((start, bytes(self.content[start:end])))

    async def flush(self) -> None:
        covered = len(self.steps)
        await super().flush()
        self._record(Flushed(covered))

    def _cut(self, length: int) -> None:
        super()._cut(length)
        self._record(length)

    def take_space(self, offset: int, length: int) -> None:
        before = len(self.content)
        super().take_space(offset, length)
        if len(self.content) > before:
            self._record(len(self.content))

    def _make_hole(self, offset: int, length: int) -> None:
        super()._make_hole(offset, length)
        end = min(offset + length, len(self.content))
        if offset < end:
            start, end = align_down(offset, SECTOR), align_up(end, SECTOR)
            self._record((start, bytes(self.content[start:end])))

    def prefixes(self) -> Iterator[bytes]:
        """Content after each step that changed it, in order, beginning with none."""
        left = Remains(self.start)
        yield left.with_all()
        for step in self.steps:
            left.add(step)
            if not isinstance(step, Flushed):
                yield left.with_all()

    def cuts(self, chooser: random.Random, count: int) -> Iterator[bytes]:
        """Before each flush, and at the end, ``count`` times: some of what no flush covers yet."""
        left = Remains(self.start)
        for step in [*self.steps, Flushed(0)]:
            if isinstance(step, Flushed):
                for _ in range(count):
                    yield left.with_some(chooser)
            left.add(step)


class Remains:
    """What is left of one storage if the power goes now."""

    def __init__(self, start: bytes) -> None:
        self._durable = bytearray(start)
        self._covered = 0
        #: changes that no flush covers; None stands for a flush, so that steps can be counted
        self._pending: list[Change | None] = []

    def add(self, step: Step) -> None:
        """The next step is made."""
        if not isinstance(step, Flushed):
            self._pending.append(step)
            return
        self._pending.append(None)
        count = step.covered - self._covered
        if count > 0:
            _apply(self._durable, self._pending[:count])
            del self._pending[:count]
            self._covered = step.covered

    def with_all(self) -> bytes:
        """Content if everything was made."""
        return self._with(self._pending)

    def with_some(self, chooser: random.Random) -> bytes:
        """Content if each change that no flush covers was made, lost, or made in part, as ``chooser`` decides."""
        odds = chooser.choice([0.1, 0.5, 0.9])
        made: list[Change] = []
        for change in self._pending:
            if change is None or chooser.random() >= odds:
                continue
            made += _torn(change, chooser) if chooser.random() < 0.3 else [change]
        return self._with(made)

    def with_each(self) -> Iterator[bytes]:
        """Content if all was made; all but one; one alone; all but the end of one; or none. Each once."""
        pending = [change for change in self._pending if change is not None]
        yield from dict.fromkeys(map(self._with, _subsets(pending)))

    def _with(self, changes: Sequence[Change | None]) -> bytes:
        content = bytearray(self._durable)
        _apply(content, changes)
        return bytes(content)


def after_cut(start: bytes, steps: Sequence[Step], losing: random.Random | None) -> bytes:
    """Content if the power goes after ``steps``; with ``losing``, which decides, some of what no flush covers."""
    left = Remains(start)
    for step in steps:
        left.add(step)
    return left.with_all() if losing is None else left.with_some(losing)


def every_cut(storage: RecordingStorage) -> Iterator[tuple[int, bytes]]:
    """Content if the power goes before, in or after any step: (steps that were begun, content), see `with_each`."""
    left = Remains(storage.start)
    seen: set[bytes] = set()
    for begun in range(len(storage.steps) + 1):
        if begun:
            left.add(storage.steps[begun - 1])
            if isinstance(storage.steps[begun - 1], Flushed):
                seen.clear()
        for content in left.with_each():
            if content not in seen:
                seen.add(content)
                yield begun, content


def _torn(change: Change, chooser: random.Random) -> list[Change]:
    """Some sectors of a write: its start, its end, or any."""
    if isinstance(change, int):
        return [change]
    offset, data = change
    borders = [*range(0, len(data), SECTOR), len(data)]
    sectors = list(itertools.pairwise(borders))
    at = chooser.randrange(len(sectors) + 1)
    kind = chooser.randrange(3)
    if kind == 2:
        sectors = [sector for sector in sectors if chooser.random() < 0.5]
    else:
        sectors = sectors[:at] if kind else sectors[at:]
    return [(offset + first, data[first:last]) for first, last in sectors]


def _subsets(pending: list[Change]) -> Iterator[list[Change]]:
    yield pending
    yield []
    for index, change in enumerate(pending):
        yield [*pending[:index], *pending[index + 1 :]]
        yield [change]
        if isinstance(change, tuple):
            offset, data = change
            for length in sorted({SECTOR, len(data) // 2 // SECTOR * SECTOR, len(data) - SECTOR}):
                if 0 < length < len(data):
                    yield [*pending[:index], (offset, data[:length]), *pending[index + 1 :]]


def _apply(content: bytearray, changes: Sequence[Change | None]) -> None:
    for change in changes:
        if isinstance(change, int):
            del content[change:]
            content.extend(bytes(change - len(content)))
        elif change is not None:
            offset, data = change
            content.extend(bytes(max(0, offset + len(data) - len(content))))
            content[offset : offset + len(data)] = data
