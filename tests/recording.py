"""A storage that remembers what is done to it, and what a power cut would have left of that at any moment."""

from collections.abc import Iterator
from random import Random

from storages import MemoryStorage

from cowfs.storage.base import WriteBuffers

#: offset and bytes of a write, or a length to cut the file to; None is a flush
Step = tuple[int, bytes] | int | None


class RecordingStorage(MemoryStorage):
    """``start`` is the content at the last `begin`, ``steps`` what was done since."""

    def __init__(self, content: bytes, name: str = "image") -> None:
        super().__init__(name, content)
        self.begin()

    def begin(self) -> None:
        """Forget what was done so far."""
        self.start = bytes(self.content)
        self.steps: list[Step] = []

    def _store(self, offset: int, buffers: WriteBuffers) -> None:
        self.steps.append((offset, b"".join(buffers)))
        super()._store(offset, buffers)

    async def flush(self) -> None:
        await super().flush()
        self.steps.append(None)

    async def truncate(self, length: int) -> None:
        await super().truncate(length)
        self.steps.append(length)

    async def punch(self, offset: int, length: int) -> None:
        await super().punch(offset, length)
        length = min(length, len(self.content) - offset)
        if length > 0:
            self.steps.append((offset, bytes(length)))

    def prefixes(self) -> Iterator[bytes]:
        """Content after each step, in order, beginning with none."""
        content = bytearray(self.start)
        yield bytes(content)
        for step in self.steps:
            if step is not None:
                _apply(content, step)
                yield bytes(content)

    def cuts(self, chooser: Random, subsets: int) -> Iterator[bytes]:
        """At each moment, ``subsets`` times: all up to the last flush, and some of what came after it."""
        durable = bytearray(self.start)
        pending: list[tuple[int, bytes] | int] = []
        for step in self.steps:
            if step is not None:
                pending.append(step)
                continue
            for _ in range(subsets):
                content = bytearray(durable)
                for one in pending:
                    if chooser.random() < 0.5:
                        _apply(content, one)
                yield bytes(content)
            for one in pending:
                _apply(durable, one)
            pending.clear()


def _apply(content: bytearray, step: tuple[int, bytes] | int) -> None:
    if isinstance(step, int):
        del content[step:]
        content.extend(bytes(step - len(content)))
        return
    offset, data = step
    content.extend(bytes(max(0, offset + len(data) - len(content))))
    content[offset : offset + len(data)] = data
