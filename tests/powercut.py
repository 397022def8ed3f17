"""Power cuts: what a storage may hold when the power goes, from a record of what was done to it."""

import random
from collections.abc import Iterator

from storages import MemoryStorage

from cowfs.storage.base import WriteBuffers

#: bytes that a disk writes whole or not at all
SECTOR = 512
#: offset and bytes of a write, or a length to cut the file to; None is a flush
Step = tuple[int, bytes] | int | None


class RecordingStorage(MemoryStorage):
    """Remembers what is done to it. ``journal`` may be shared by several storages, to keep their order."""

    def __init__(
        self,
        name: str,
        content: bytes = b"",
        *,
        cold: bool = False,
        read_only: bool = False,
        journal: "list[tuple[str, Step]] | None" = None,
    ) -> None:
        super().__init__(name, content, cold=cold, read_only=read_only)
        self.steps: list[Step] = []
        #: for each flush, how many steps had been made when it began
        self.covered: list[int] = []
        self.journal = journal if journal is not None else []

    def _record(self, step: Step) -> None:
        self.steps.append(step)
        self.journal.append((self.name, step))

    def _store(self, offset: int, buffers: WriteBuffers) -> None:
        self._record((offset, b"".join(buffers)))
        super()._store(offset, buffers)

    async def flush(self) -> None:
        covered = len(self.steps)
        await super().flush()
        self.covered.append(covered)
        self._record(None)

    async def truncate(self, length: int) -> None:
        await super().truncate(length)
        self._record(length)

    async def punch(self, offset: int, length: int) -> None:
        await super().punch(offset, length)
        end = min(offset + length, len(self.content))
        if offset < end:
            self._record((offset, bytes(end - offset)))


def after_cut(start: bytes, steps: list[Step], losing: random.Random | None) -> bytes:
    """Content of the disk if power goes after ``steps``: all before the last flush, and some of the rest.

    With ``losing``, each write that no flush made durable is lost, torn at a sector, or made, as it decides.
    """
    flushed = max((index for index, step in enumerate(steps) if step is None), default=-1)
    content = bytearray(start)
    for index, step in enumerate(steps):
        if step is None or (index > flushed and losing is not None and losing.random() < 0.5):
            continue
        if index > flushed and losing is not None and isinstance(step, tuple) and losing.random() < 0.2:
            step = step[0], step[1][: len(step[1]) // 1024 * 512]
        _apply(content, step)
    return bytes(content)


def every_cut(storage: RecordingStorage, start: bytes) -> Iterator[tuple[int, bytes]]:
    """Content of the disk if power goes before, in or after any step: (steps that were begun, content), each once.

    Of the steps that no flush covers: all were made; all but one; one alone; all but the end of one, torn at a
    sector; or none.
    """
    content = bytearray(start)
    durable = 0
    seen: set[bytes] = set()
    covered = iter(storage.covered)
    for end in range(len(storage.steps) + 1):
        if end and storage.steps[end - 1] is None and (reach := next(covered)) > durable:
            for step in storage.steps[durable:reach]:
                _apply(content, step)
            durable = reach
            seen.clear()
        for pending in _subsets([step for step in storage.steps[durable:end] if step is not None]):
            cut = bytearray(content)
            for step in pending:
                _apply(cut, step)
            if (left := bytes(cut)) not in seen:
                seen.add(left)
                yield end, left


def _subsets(pending: list[Step]) -> Iterator[list[Step]]:
    yield pending
    yield []
    for index, step in enumerate(pending):
        yield [*pending[:index], *pending[index + 1 :]]
        yield [step]
        if isinstance(step, tuple):
            offset, data = step
            for length in sorted({SECTOR, len(data) // 2 // SECTOR * SECTOR, len(data) - SECTOR}):
                if 0 < length < len(data):
                    yield [*pending[:index], (offset, data[:length]), *pending[index + 1 :]]


def _apply(content: bytearray, step: Step) -> None:
    if isinstance(step, int):
        del content[step:]
        content.extend(bytes(step - len(content)))
    elif step is not None:
        offset, data = step
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data
