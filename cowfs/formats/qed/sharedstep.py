"""A step that must be made once before others go on, whoever comes first."""

from collections.abc import Awaitable, Callable

import trio

from cowfs.errors import CowfsError


class _Attempt:
    __slots__ = ("ended", "error")

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.error: CowfsError | None = None


class SharedStep:
    """Makes a step when it is first awaited; those who come meanwhile wait for that one attempt.

    Nobody goes on before it has succeeded. If it fails, everyone who waits fails with it, and whoever comes
    later tries again. An attempt that is cancelled is taken over by one of the others.
    """

    def __init__(self, step: Callable[[], Awaitable[None]]) -> None:
        self._step = step
        self._attempt: _Attempt | None = None
        #: set back to have the step made again
        self.done = False

    async def __call__(self) -> None:
        """Have the step made, if it is not."""
        while not self.done:
            if (attempt := self._attempt) is None:
                await self._try()
            else:
                await attempt.ended.wait()
                if attempt.error is not None:
                    raise attempt.error

    async def _try(self) -> None:
        attempt = self._attempt = _Attempt()
        try:
            await self._step()
            self.done = True
        except CowfsError as error:
            attempt.error = error
            raise
        finally:
            self._attempt = None
            attempt.ended.set()
