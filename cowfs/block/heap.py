"""The process's memory: what has been let go of goes back to the system, which free(3) by itself leaves undone."""

import ctypes

import trio

#: bytes that are worth a look through the whole heap
WORTHWHILE = 4 << 20
#: seconds between two of them at the least
INTERVAL = 5.0

# musl has none, and returns what is free by itself
_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)


class Heap:
    """Counts what is let go of, until it is worth giving back."""

    def __init__(self) -> None:
        self._released = 0
        self._next = 0.0

    async def give_back(self, released: int) -> None:
        """Count bytes that were let go of; let the system have them once they are many, and not too often."""
        self._released += released
        now = trio.current_time()
        if self._released >= WORTHWHILE and now >= self._next:
            self._released, self._next = 0, now + INTERVAL
            # in a thread, since it may take some milliseconds
            await trio.to_thread.run_sync(_trim, 0)


#: there is one in a process
HEAP = Heap()
