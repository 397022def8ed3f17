"""Second tries: what the host has no space for is tried again once the space that is owed has come back.

Space that was let go of can be used again only when that is durable and no reader is left in it; until then it is owed.
A disk that holds no more than fits must not fail for want of it. So whoever finds no space has what is owed brought
back, and looks again, before anyone is told.
"""

import errno
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from cowfs.block.image import Image
from cowfs.errors import CowfsError

Result = TypeVar("Result")

#: errnos for want of space: of the device or file system, of somebody's quota
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


def lacks_space(error: CowfsError) -> bool:
    """Whether an error says that the host has no space left."""
    return error.errno in _NO_SPACE


class SpaceRetry:
    """Second tries for the changes of one image. Belongs to one trio thread."""

    def __init__(self, image: Image) -> None:
        self._image = image
        # one at a time, so that those who look again do not take from each other what came back
        self._turn = trio.Lock()

    async def insist(self, change: Callable[[], Awaitable[Result]]) -> Result:
        """Make a change that, if it fails, leaves nothing behind; again, as often as space has come back meanwhile.

        The caller is not inside of `Readers.inside`. Raises what the last try does, or what bringing space back does.
        """
        image = self._image
        is_owed, let_go = image.owes_space, image.let_go
        try:
            return await change()
        except CowfsError as error:
            if not lacks_space(error) or not (is_owed or image.let_go != let_go or self._turn.locked()):
                raise
        async with self._turn:
            while True:
                seen = self._state()
                await image.regain()
                try:
                    return await change()
                except CowfsError as error:
                    if not lacks_space(error) or self._state() == seen:
                        raise

    def _state(self) -> tuple[int, int]:
        """What has changed if there may be more space than before: things let go of, and others who gave up."""
        return self._image.let_go, self._turn.statistics().tasks_waiting
