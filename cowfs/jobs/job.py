"""The life of a job: start, progress, pause, speed limit, cancel, end. What it does is its subclass's matter."""

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from functools import partial
from itertools import islice
from typing import ClassVar, TypeVar

import trio

from cowfs.block.disk import Disk
from cowfs.block.viewers import Lost, Risk, keep_snapshots
from cowfs.errors import CorruptImage, CowfsError, StorageError, UsageError
from cowfs.jobs.pacing import MOST, Pacer

log = logging.getLogger(__name__)

T = TypeVar("T")

#: seconds over which the rate is measured
RATE_WINDOW = 5.0
#: bytes, if that is whole clusters, that an error may cost where errors are ignored
SKIPPED = 1 << 20


class State(str, Enum):
    """Where in its life a job is."""

    NONE = "none"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_active(self) -> bool:
        """Whether the job goes on, or can."""
        return self in (State.RUNNING, State.PAUSED, State.READY)


class OnError(str, Enum):
    """What a job does when a step of it fails."""

    #: end as failed
    REPORT = "report"
    #: pause; when it is resumed, try again
    STOP = "stop"
    #: go on with the next step, and end as failed once everything else is done
    IGNORE = "ignore"


class Job(ABC):
    """One job on one disk. ``offset`` and ``length`` are bytes of the guest's disk, ``speed`` bytes a second.

    ``alone`` says that nobody else uses the disk while the job works.

    A subclass does its work in `work`, calling `advance` between steps; there it is paused, slowed down and
    cancelled. Every change of state is told to ``on_change``.
    """

    verb: ClassVar[str]

    def __init__(self, disk: Disk, *, alone: bool = False, speed: int = 0, on_error: OnError = OnError.REPORT) -> None:
        self.disk = disk
        self.alone = alone
        self.speed = speed
        self.on_error = on_error
        self._ignored: CowfsError | None = None
        self.state = State.NONE
        self.offset = 0
        self.length = disk.size
        self.error = ""
        #: whether it would go on after a restart of the server
        self.resumes = False
        self.on_change: Callable[[], None] = lambda: None
        self._scope = trio.CancelScope()
        self._resumed = trio.Event()
        self._retimed = trio.Event()
        self._not_before = 0.0
        # when, how far it was then, and bytes copied since the entry before
        self._recent: deque[tuple[float, int, int]] = deque()
        self._pacer: Pacer
        self._completed = trio.Event()
        self._done = trio.Event()
        self._longest_pause = 0.0
        self._is_harmless = False

    # -- for whoever commands it

    async def require_harmless(self) -> None:
        """See to internal snapshots that would lose what the job takes away, or raise `Busy`; see `keep_snapshots`.

        It is asked for before the job changes anything, and by `run` if nobody has. Nobody changes the chain meanwhile.
        """
        if not self._is_harmless:
            await keep_snapshots(self.risks())
            self._is_harmless = True

    async def run(self, *, paused: bool = False) -> None:
        """Work until the end, whatever that is; never raises but for a cancellation from outside.

        One that begins ``paused`` does nothing at all until it is resumed.
        """
        self._pacer = Pacer(self.disk)
        self._not_before = trio.current_time()
        self._measure_anew()
        self.disk.longest_pause = 0.0
        self._enter(State.PAUSED if paused else State.RUNNING)
        outcome = State.FAILED
        try:
            with self._scope:
                await self.resumed()
                await self.require_harmless()
                await self.work()
                self.offset = self.length
                outcome = State.COMPLETED
            if self._scope.cancelled_caught:
                outcome = State.CANCELLED
        except CowfsError as error:
            self.error = str(error)
            log.error("%s: %s", self.verb, error)
        except Exception:
            self.error = "internal error; the log has the details"
            log.exception("%s: internal error", self.verb)
        except BaseException:
            outcome = State.CANCELLED
            raise
        finally:
            self._longest_pause = self.disk.longest_pause
            self._enter(outcome)
            self._done.set()

    async def wait(self) -> None:
        """Wait until it has ended."""
        await self._done.wait()

    def pause(self) -> None:
        """Stop at the next step until `resume`."""
        self._require("pause", State.RUNNING)
        self._resumed = trio.Event()
        self._enter(State.PAUSED)

    def resume(self) -> None:
        """Go on after a `pause`."""
        self._require("resume", State.PAUSED)
        self.error = ""
        self._not_before = trio.current_time()
        self._measure_anew()
        self._enter(State.RUNNING)
        self._resumed.set()

    def cancel(self) -> None:
        """End it at the next step; what it has done so far stays done."""
        self._require("cancel", State.RUNNING, State.PAUSED, State.READY)
        self._scope.cancel()

    @property
    def is_told_to_cancel(self) -> bool:
        """Whether `cancel` was called; it may not have ended yet."""
        return self._scope.cancel_called

    def complete(self) -> None:
        """Tell a job that is ready to finish."""
        self._require("complete", State.READY)
        self._completed.set()

    def set_speed(self, speed: int) -> None:
        """Limit what is copied to ``speed`` bytes a second; 0 lifts the limit."""
        self.speed = speed
        self._not_before = trio.current_time()
        self._retimed.set()
        self._retimed = trio.Event()

    @property
    def percent(self) -> float:
        """How far it is, 0 to 100."""
        if self.state is State.COMPLETED or not self.length:
            return 100.0
        return 100.0 * self.offset / self.length

    @property
    def longest_pause(self) -> float:
        """Seconds; the longest that the job has held guests off all of the disk at once."""
        return self.disk.longest_pause if self.state.is_active else self._longest_pause

    @property
    def rate(self) -> int:
        """Bytes a second that were copied over the last seconds; 0 unless running."""
        return self._speed_of(sum(copied for _, _, copied in islice(self._recent, 1, None)))

    @property
    def eta(self) -> int | None:
        """Seconds that are left if the rest of the disk goes as the last part of it; None if that cannot be said.

        What holds nothing to be copied is passed over at once, so this is no matter of `rate` alone.
        """
        passed = self._speed_of(self.offset - self._recent[0][1] if self._recent else 0)
        return -(-(self.length - self.offset) // passed) if passed else None

    def _speed_of(self, size: int) -> int:
        """Bytes a second, if so many were dealt with over the last seconds."""
        if self.state is not State.RUNNING:
            return 0
        elapsed = trio.current_time() - self._recent[0][0]
        return int(size / elapsed) if elapsed > 0 else 0

    def _measure_anew(self) -> None:
        self._recent.clear()
        self._recent.append((trio.current_time(), self.offset, 0))

    def _require(self, verb: str, *states: State) -> None:
        if self.state not in states:
            raise UsageError(f"cannot {verb} a {self.verb} job that is {self.state.value}")

    def _enter(self, state: State) -> None:
        self.state = state
        self.on_change()

    # -- for the subclass

    @abstractmethod
    async def work(self) -> None:
        """Do it. Errors that are raised end the job as failed."""

    def risks(self) -> Sequence[Risk]:
        """Layers whose internal snapshots may look through to what the job takes away or changes."""
        return ()

    def risk(self, depth: int, lost: Lost) -> Risk:
        """Return what the snapshots of one layer may lose; those of the active one can be given it, if `alone`."""
        if depth:
            return Risk(self.disk.layers[depth], lost)
        below = partial(self.disk.read, depth=1) if self.alone else None
        return Risk(self.disk.layers[0], lost, below, ", or do this while the disk is not mounted")

    async def attempt(self, step: Callable[[], Awaitable[T]]) -> T | None:
        """Make one step, and do what ``on_error`` says if the host fails it; None for a step that was skipped.

        A step that failed must be safe to be done again, or left. Other errors are raised.
        """
        while True:
            try:
                return await step()
            except (StorageError, CorruptImage) as error:
                if self.on_error is OnError.REPORT:
                    raise
                log.error("%s: %s", self.verb, error)
                self.error = str(error)
                if self.on_error is OnError.IGNORE:
                    self._ignored = self._ignored or error
                    return None
            if self.state is State.RUNNING:
                self.pause()
            await self.resumed()

    async def ready(self) -> None:
        """Be ready, and wait until told to complete."""
        self._enter(State.READY)
        await self._completed.wait()
        self._enter(State.RUNNING)

    def require_no_errors(self) -> None:
        """Raise the first error that was ignored; called before a step that needs all the others."""
        if self._ignored is not None:
            raise self._ignored

    def step(self, unit: int) -> int:
        """Bytes to copy before the next call of `advance`, whole units: more while no guest is in the way."""
        limits = [MOST]
        if self.speed:
            limits.append(self.speed // 10)
        if self.on_error is OnError.IGNORE:
            limits.append(SKIPPED)
        return self._pacer.step(unit, min(limits))

    async def advance(self, offset: int, copied: int) -> None:
        """Say that the job has come to ``offset`` and copied so many bytes since the last call.

        Gives way to everyone else; waits while guests are busy (see `cowfs.jobs.pacing`), paused, or too fast.
        """
        self.offset = max(self.offset, offset)
        now = trio.current_time()
        if copied or self.offset > self._recent[-1][1]:
            self._recent.append((now, self.offset, copied))
            self._forget_old()
        if self.speed:
            self._not_before = max(self._not_before, now - 0.1) + copied / self.speed
        await trio.lowlevel.checkpoint()
        await self._pacer.give_way(copied)
        while self.speed and trio.current_time() < self._not_before:
            with trio.move_on_at(self._not_before):
                await self._retimed.wait()
        await self.resumed()

    async def resumed(self) -> None:
        """Wait while paused; called before a step that changes the chain, too."""
        while self.state is State.PAUSED:
            await self._resumed.wait()
        self._pacer.go()

    def _forget_old(self) -> None:
        oldest = trio.current_time() - RATE_WINDOW
        while len(self._recent) > 2 and self._recent[1][0] < oldest:
            self._recent.popleft()
