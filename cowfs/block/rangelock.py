"""The range lock: serialises writes, copy-ups and job steps that touch the same clusters of a disk.

Guarantees: ranges that overlap are held one at a time, in the order in which they were asked for; ranges
that do not overlap never wait for each other; releasing is synchronous, so a cancelled holder cannot leak
its range.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class _Claim:
    __slots__ = ("blockers", "end", "granted", "start", "waiters")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.blockers = 0
        self.waiters: list[_Claim] = []
        self.granted: trio.Event | None = None


class RangeLock:
    """A lock over byte ranges. Belongs to one trio thread."""

    def __init__(self) -> None:
        # held and waiting claims, oldest first
        self._claims: list[_Claim] = []

    def is_free(self, start: int, end: int) -> bool:
        """Whether nobody holds or awaits any of ``[start, end)``.

        True lets the caller act on the range without the lock for as long as it does not suspend.
        """
        if not self._claims:
            return True
        return all(claim.end <= start or end <= claim.start for claim in self._claims)

    @asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Hold ``[start, end)``, after all overlapping ranges that were asked for earlier."""
        claim = self._claim(start, end)
        try:
            if claim.blockers:
                claim.granted = trio.Event()
                await claim.granted.wait()
            yield
        finally:
            self._release(claim)

    def _claim(self, start: int, end: int) -> _Claim:
        claim = _Claim(start, end)
        for earlier in self._claims:
            if earlier.start < end and start < earlier.end:
                earlier.waiters.append(claim)
                claim.blockers += 1
        self._claims.append(claim)
        return claim

    def _release(self, claim: _Claim) -> None:
        self._claims.remove(claim)
        for waiter in claim.waiters:
            waiter.blockers -= 1
            if not waiter.blockers and waiter.granted is not None:
                waiter.granted.set()
