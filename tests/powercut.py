"""Power cuts: what a storage may hold when the power goes, from a record of what was done to it."""

import random

from storages import MemoryStorage

from cowfs.storage.base import WriteBuffers

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
        self.journal = journal if journal is not None else []

    def _record(self, step: Step) -> None:
        self.steps.append(step)
        self.journal.append((self.name, step))

    def _store(self, offset: int, buffers: WriteBuffers) -> None:
        self._record((offset, b"".join(buffers)))
        super()._store(offset, buffers)

    async def flush(self) -> None:
        await super().flush()
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
        if isinstance(step, int):
            del content[step:]
            content.extend(bytes(step - len(content)))
            continue
        offset, data = step
        if index > flushed and losing is not None and losing.random() < 0.2:
            data = data[: len(data) // 1024 * 512]
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data
    return bytes(content)
