"""Work that goes on in threads beside a test, and single calls that may have to wait."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from commandline import PATIENCE
from mounting import Mounted, wait_for

T = TypeVar("T")

#: answers to others after which a call that still waits has gone as far as it can
ANSWERS = 40


class Work:
    """Something that is done again and again in a thread, until it says that it is done or is told to stop."""

    def __init__(self, once: Callable[[int], bool]) -> None:
        self._once = once
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self.rounds = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and self._once(self.rounds):
                self.rounds += 1
        except BaseException as error:  # noqa: BLE001 - `stop` returns it
            self._failure = error

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def stop(self) -> BaseException | None:
        """Let the last round end; returns what went wrong."""
        self._stop.set()
        self._thread.join()
        return self._failure


@contextmanager
def at_work(*tasks: Callable[[int], bool]) -> Iterator[list[Work]]:
    """Have things done while the context lasts; the first that goes wrong is raised at its end."""
    work = [Work(task) for task in tasks]
    try:
        yield work
    finally:
        failures = [failure for failure in (one.stop() for one in work) if failure is not None]
    if failures:
        raise failures[0]


class Call(Generic[T]):
    """One call in a thread of its own."""

    def __init__(self, function: Callable[..., T], *args: object) -> None:
        self._function = function
        self._args = args
        self._result: list[T] = []
        self._failure: BaseException | None = None
        # one that never ends must not keep the tests from ending
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._function(*self._args))
        except BaseException as error:  # noqa: BLE001 - `result` raises it
            self._failure = error

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for it; what it returned, or raises what it raised."""
        self._thread.join(PATIENCE)
        assert self.is_over, f"{self._function.__name__}{self._args} did not return"
        if self._failure is not None:
            raise self._failure
        return self._result[0]

    def _waits(self) -> bool:
        """Whether the kernel lets it wait, for the server or for another call, and not for a lock of Python's."""
        try:
            place = Path(f"/proc/self/task/{self._thread.native_id}/wchan").read_text()
        except FileNotFoundError:
            return False
        return place not in ("", "0") and not place.startswith("futex")

    def goes_as_far_as_it_can(self, mounted: Mounted) -> None:
        """Wait until it is over, or has waited while the server answered many others."""
        answers = 0

        def is_stuck() -> bool:
            nonlocal answers
            answers = answers + 1 if self._waits() else 0
            mounted.status()
            return answers > ANSWERS

        wait_for("a call to be over or to wait", lambda: self.is_over or is_stuck())
