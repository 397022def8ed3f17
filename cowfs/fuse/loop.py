"""A faster way for pyfuse3's tasks to wait for requests.

On small requests pyfuse3's loop costs more than the work: before each, a task takes a lock and waits for the device,
which are two turns of trio's scheduler. All of that is one function of pyfuse3, ``_wait_fuse_readable``, which its
loop finds by its name; `Waiting.readable` goes in its place. As long as requests are there, the task that answered one
takes the next at once, and no other task is woken; only if it suspends in the middle of a request another one is, to
wait for the next. Where requests follow each other closely, the next one is looked for a moment longer: that takes no
more of the processor than going to sleep by way of trio would, and all of the way back is saved.

pyfuse3 starts another task whenever none waits in its own function, up to a bound. Now that is always so; so there soon
are as many as the bound allows, and all but a few sleep. Where pyfuse3 has no such function any more, it is left alone,
and is slower.
"""

import logging
import select
from pathlib import Path
from time import perf_counter

import pyfuse3
import trio

log = logging.getLogger(__name__)

#: requests after which everything else gets its turn, however many more are waiting
TURN = 64
#: seconds for which the next request is looked for; about what it costs to be woken
LOOK = 50e-6
_NAME = "_wait_fuse_readable"


class Waiting(trio.abc.Instrument):
    """Tasks that wait until a descriptor can be read: one watches it, the others sleep until somebody has to.

    Belongs to the trio thread.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        # a task watches, or has been woken to
        self._is_watched = False
        self._is_over = False
        # the last to come is the first to go: its buffer is in the processor's cache
        self._asleep: list[trio.Event] = []
        self._answered = 0
        # whether the last request that had to be waited for came soon
        self._is_lively = False
        self._threads = trio.to_thread.current_default_thread_limiter()

    async def readable(self) -> bool:
        """Return True when the descriptor can be read, False if there is nothing more to wait for.

        Whoever gets True is to read before it suspends, since the next one gets it too.
        """
        while not self._is_over:
            if self._answered < TURN and (self._poll.poll(0) or self._look()):
                self._answered += 1
                return True
            if self._is_watched:
                await self._sleep()
            await self._watch()
        return False

    def _look(self) -> bool:
        """Look for a moment whether the descriptor can be read, unless that held others up or has been in vain."""
        if not self._is_lively or self._threads.borrowed_tokens:
            return False
        end = perf_counter() + LOOK
        while perf_counter() < end:
            if self._poll.poll(0):
                return True
        self._is_lively = False
        return False

    async def _watch(self) -> None:
        self._is_watched = True
        try:
            if not self._is_over:
                start = perf_counter()
                await trio.lowlevel.wait_readable(self._fd)
                self._is_lively = perf_counter() - start < LOOK
        except trio.ClosedResourceError:
            self.end()
        finally:
            self._is_watched = False
            self._answered = 0

    async def _sleep(self) -> None:
        turn = trio.Event()
        self._asleep.append(turn)
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():
                self._is_watched = False
            else:
                self._asleep.remove(turn)
            raise

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Have somebody watch, if whoever did is busy with a request that takes longer."""
        if not self._is_watched and self._asleep:
            self._is_watched = True
            self._asleep.pop().set()

    def end(self) -> None:
        """Let go of all who wait, as there is nothing more to wait for; who watches is let go by trio."""
        self._is_over = True
        while self._asleep:
            self._asleep.pop().set()


def _session_descriptor() -> int | None:
    """Return that of the one session that a process can have; pyfuse3 does not tell it."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if str(entry.readlink()) == "/dev/fuse":
                return int(entry.name)
        except FileNotFoundError:
            # the one that lists the directory
            continue
    return None


class Loop:
    """What answers the requests of pyfuse3's session."""

    def __init__(self) -> None:
        self._waiting: Waiting | None = None

    async def serve(self) -> None:
        """Answer until the session ends: ``pyfuse3.main``, faster."""
        fd, replaced = _session_descriptor(), getattr(pyfuse3, _NAME, None)
        if fd is None or replaced is None:
            log.info("pyfuse3 is not as it was: its own loop is used, which is slower")
            await pyfuse3.main()
            return
        self._waiting = Waiting(fd)
        setattr(pyfuse3, _NAME, self._waiting.readable)
        trio.lowlevel.add_instrument(self._waiting)
        try:
            await pyfuse3.main()
        finally:
            trio.lowlevel.remove_instrument(self._waiting)
            setattr(pyfuse3, _NAME, replaced)

    def terminate(self) -> None:
        """Have `serve` end, once what is under way has been answered: ``pyfuse3.terminate``."""
        pyfuse3.terminate()
        if self._waiting is not None:
            self._waiting.end()
