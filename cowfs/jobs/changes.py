"""Telling whoever waits that something has changed."""

from collections.abc import Callable


class Changes:
    """A count of changes, and calls that are owed to those who wait for the next one.

    A waiter remembers the count when it looks; it has missed something once the count differs.
    """

    def __init__(self) -> None:
        self.count = 0
        self._owed: dict[object, Callable[[], None]] = {}

    def call_once(self, waiter: object, call: Callable[[], None]) -> None:
        """Make ``call`` at the next change; a second call of the same waiter replaces the first."""
        self._owed[waiter] = call

    def forget(self, waiter: object) -> None:
        """Owe a waiter nothing any more."""
        self._owed.pop(waiter, None)

    def happened(self) -> None:
        """Count a change and make the calls that are owed."""
        self.count += 1
        owed, self._owed = self._owed, {}
        for call in owed.values():
            call()
