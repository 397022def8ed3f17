"""Quiescence: knowing when everyone who might still use something has left.

Readers hold no lock. A reader that suspends between looking up where data lies and reading it stands inside
`Readers.inside`; whoever takes that place away (frees clusters, closes a backing file) first makes it
unreachable for newcomers and then awaits `Readers.gone`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class _Epoch:
    __slots__ = ("count", "empty")

    def __init__(self) -> None:
        self.count = 0
        self.empty: trio.Event | None = None


class Readers:
    """The readers of one disk that are suspended in the middle of a read."""

    def __init__(self) -> None:
        self._epochs: list[_Epoch] = [_Epoch()]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Count as a reader; what a lookup made in here found stays readable until the end."""
        epoch = self._epochs[-1]
        epoch.count += 1
        try:
            yield
        finally:
            epoch.count -= 1
            if not epoch.count and epoch.empty is not None:
                epoch.empty.set()

    def mark(self) -> "Mark":
        """Remember who is inside now."""
        before = [epoch for epoch in self._epochs if epoch.count]
        self._epochs = [*before, _Epoch()]
        return Mark(before)

    async def gone(self) -> None:
        """Wait until every reader that is inside now has left. Readers that come later do not delay it."""
        await self.mark().wait()


class Mark:
    """The readers that were inside at one moment."""

    def __init__(self, epochs: list[_Epoch]) -> None:
        self._before = epochs

    @property
    def passed(self) -> bool:
        """Whether all of them have left."""
        return not any(epoch.count for epoch in self._before)

    async def wait(self) -> None:
        """Wait until all of them have left."""
        for epoch in self._before:
            if epoch.count:
                if epoch.empty is None:
                    epoch.empty = trio.Event()
                await epoch.empty.wait()
