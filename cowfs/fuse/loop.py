"""A faster loop for pyfuse3.

On small requests pyfuse3's loop costs more than the work: each takes a turn of trio's scheduler for its lock and
another to wait for the device. pyfuse3 keeps trio in a module global, which its own asyncio adapter replaces. The
stand-in here differs from trio in two names: a wait for a device that is readable already returns at once, and a
lock that is free is taken without giving way.
"""

import select
from types import TracebackType
from typing import Any

import pyfuse3
import trio

#: requests after which everything else gets its turn, however many more are waiting
TURN = 64


class _Lock:
    """A lock without checkpoint and without fairness.

    Who releases it may take it again before those who wait for it get their turn: a task that answers its
    requests without suspending goes on with the next one, and the others wake up only when it does suspend.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiting.park()
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held = False
        self._waiting.unpark()


class _Delegate:
    """Whatever is not overridden is the other module's."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _LowLevel(_Delegate):
    def __init__(self) -> None:
        super().__init__(trio.lowlevel)
        self._poll = select.poll()
        self._known: int | None = None
        self._answered = 0

    async def wait_readable(self, fd: int) -> None:
        if fd != self._known:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
            self._known = fd
        self._answered += 1
        if self._answered < TURN and self._poll.poll(0):
            return
        self._answered = 0
        await trio.lowlevel.wait_readable(fd)


class _Trio(_Delegate):
    def __init__(self) -> None:
        super().__init__(trio)
        self.lowlevel = _LowLevel()
        self.Lock = _Lock


def speed_up() -> None:
    """Make pyfuse3 use the stand-in, for this process."""
    pyfuse3.trio = _Trio()  # type: ignore[attr-defined]
