"""When a job takes its next step, and how large a step: idle time is used, a busy guest is left alone.

Whether the guest is busy is judged from what the disk counts anyway, between steps. Nothing is added to a request.
"""

import math
from typing import Protocol

import trio

from cowfs.block.alignment import align_up

#: bytes of a step while the guest is busy, if that is whole clusters: what is asked in the meantime waits for it, so
#: that fewer, larger ones are felt by fewer requests
LEAST = 256 << 10
#: bytes of a step whatever the limit, if that is whole clusters
SMALLEST = 64 << 10
#: bytes of a step that nobody is in the way of
MOST = 8 << 20
#: bytes a second that are copied however busy the guest is
MIN_RATE = 4 << 20
#: seconds without a request after which the guest counts as idle
QUIET = 0.005
#: seconds that a step may take; larger ones would keep a guest waiting that wakes up
LONG = 0.01
#: part of the time for which the guest has been quiet that a step may take: who paused for a moment is soon back
TRUST = 0.1
#: part of the time that goes into looking for something to copy while the guest is busy
SEARCHING = 0.1
#: seconds of the minimum rate that are made up for when a step came late
CATCH_UP = 0.2


class Guest(Protocol):
    """Whoever is to be left alone."""

    @property
    def requests(self) -> int:
        """Requests that have been answered."""

    @property
    def waiting(self) -> int:
        """Requests that are not answered yet, as far as they take more than a moment."""


class Pacer:
    """Sizes the steps of one job, and spaces them."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._seen = guest.requests
        self._size = LEAST
        self._least = LEAST
        self._busy = False
        self._begun = self._due = trio.current_time()
        #: when it was last seen to be; a job begins as if that were long ago, with little
        self._last_active = -math.inf

    def step(self, unit: int, limit: int = MOST) -> int:
        """Bytes that the next step should copy, whole units; ``limit`` if that is less, but at least `SMALLEST`."""
        self._least = align_up(LEAST, unit)
        return align_up(min(self._size, max(limit, SMALLEST)), unit)

    async def give_way(self, copied: int) -> None:
        """Judge the step that has just ended, and return when the next one may begin."""
        now = trio.current_time()
        took = now - self._begun
        if not self._is_guest_active():
            self._busy = False
            self._due = now
            self._resize(took, min(LONG, (now - self._last_active) * TRUST))
        else:
            if copied:
                # what was copied while the guest was idle is not held against the job
                counted = copied if self._busy else min(copied, self._least)
                self._due = max(self._due, self._begun - CATCH_UP) + counted / MIN_RATE
            else:
                self._due = now + took * (1 - SEARCHING) / SEARCHING
            self._size = LEAST
            self._busy = await self._stay_away()

    def go(self) -> None:
        """Say that the next step begins."""
        self._begun = trio.current_time()

    def _resize(self, took: float, longest: float) -> None:
        if took > longest:
            self._size = max(SMALLEST, self._size // 2)
        elif took < longest / 2:
            self._size = min(MOST, self._size * 2)

    async def _stay_away(self) -> bool:
        """Wait until the guest is quiet, or until the step is due; whether it is the latter."""
        while (left := self._due - trio.current_time()) > 0:
            await trio.sleep(min(QUIET, left))
            # a server that was kept from running has not seen yet what was asked of it meanwhile
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            if left > QUIET and not self._is_guest_active():
                return False
        return True

    def _is_guest_active(self) -> bool:
        """Whether it made requests since the last look, or until a moment ago, or waits for an answer."""
        now = trio.current_time()
        requests = self._guest.requests
        if requests != self._seen or self._guest.waiting > 0:
            self._last_active = now
        self._seen = requests
        return now - self._last_active < QUIET
