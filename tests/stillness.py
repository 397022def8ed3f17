"""A trio loop in which nothing happens but what a test lets happen, the same every time.

Time stands still until it is moved, what otherwise runs in threads runs in the loop, jobs stop before every step, and
tasks that could go on go on in an order that a seed decides. On a host that holds operations, some of them outlast what
the test does next.
"""

import random
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from unittest.mock import patch

import trio
from slowstorage import Holding, files_in_the_loop
from trio._core import _run
from trio.testing import MockClock, wait_all_tasks_blocked

from cowfs.jobs.job import Job

T = TypeVar("T")

#: times that a call which would run in a thread lets others go first, before and after, at most
DETOURS = 3


class Steps:
    """How many steps jobs may make."""

    def __init__(self) -> None:
        self.left = 0
        self.unbounded = False
        self._granted = trio.Event()

    def grant(self, count: int) -> None:
        """Let jobs make ``count`` steps more."""
        self.left += count
        self._granted.set()

    def unbind(self) -> None:
        """Let jobs make all that they want, until `unbounded` is taken back."""
        self.unbounded = True
        self._granted.set()

    async def take(self) -> None:
        """Wait for leave to make one."""
        while not self.left and not self.unbounded:
            self._granted = trio.Event()
            await self._granted.wait()
        self.left = max(0, self.left - 1)


class StillLoop:
    """The loop, in a thread of its own.

    ``cold`` has every read and write of a file wait. ``held`` has any operation of the host wait while others go
    on, and the kernel do less than it is asked for.
    """

    def __init__(self, seed: int, *, cold: bool, held: bool = False) -> None:
        self.chooser = random.Random(seed)
        self.steps = Steps()
        self.holding = Holding(seed) if held else None
        self._clock = MockClock()
        self._cold = cold
        self._token: trio.lowlevel.TrioToken
        self._failure: BaseException | None = None
        self._started = threading.Event()
        self._patches = files_in_the_loop(self.detour, self._declines, self.holding.short if self.holding else None)
        self._patch(seed)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._started.wait()

    def _patch(self, seed: int) -> None:
        steps, advance = self.steps, Job.advance

        async def step(job: Job, offset: int, copied: int) -> None:
            await steps.take()
            await advance(job, offset, copied)

        put = self._patches.enter_context
        _run._r.seed(seed)
        put(patch.object(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True))
        put(patch.object(Job, "advance", step))

    def _declines(self) -> bool:
        return self._cold or (self.holding is not None and self.holding.declines())

    async def detour(self) -> None:
        """Let others go first, for a while."""
        for _ in range(self.chooser.randrange(DETOURS)):
            await trio.lowlevel.checkpoint()
        if self.holding is not None:
            await self.holding.pause()

    def _run(self) -> None:
        try:
            trio.run(self._main, clock=self._clock)
        except BaseException as error:  # noqa: BLE001 - it is raised where the loop is closed
            self._failure = error
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self.nursery:
            self._started.set()
            await trio.sleep_forever()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Call from outside, and return once that is done and nothing else can go on, but for what is held longer."""

        async def call() -> T:
            if self.holding is not None:
                return await self.holding.answer(function, *args)
            result = await function(*args)
            await wait_all_tasks_blocked()
            return result

        return trio.from_thread.run(call, trio_token=self._token)

    def tell(self, function: Callable[..., object], *args: object) -> None:
        """Call what does not wait; what follows from it has happened then."""

        async def tell() -> None:
            function(*args)

        self.call(tell)

    def let_pass(self, seconds: float) -> None:
        """Move the time."""
        self.tell(self._clock.jump, seconds)

    def close(self) -> None:
        """End everything in it; raises what has gone wrong behind the test's back."""

        async def end() -> None:
            if self.holding is not None:
                self.holding.let_go()
            self.nursery.cancel_scope.cancel()

        try:
            if self._thread.is_alive():
                trio.from_thread.run(end, trio_token=self._token)
            self._thread.join()
        finally:
            self._patches.close()
        if self._failure is not None:
            raise self._failure
