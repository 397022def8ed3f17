"""Changes that a server has been asked for, and that are not known to have come to an end.

Whoever gives up a write, since he is cancelled or has waited for long enough, ends nothing: the server may carry it out
later, and whatever was written to the same range meanwhile would be lost. So nobody gets at such a range before the
doubt has ended. It ends with the server's answer, however late. If the connection is gone, and with it the answer:

* The server itself has closed it. Section "Terminating the transmission phase" lets it do that when it is shut down,
  and it should have finished what was under way; or it has crashed. As not all servers wait, and what a server has
  started may outlive it, nothing newer is sent to the range until the request is as old as a request may become,
  `Network.timeout`. To make the same request again does no harm at any time.
* It was lost in any other way. Then nothing tells what the server does, and the doubt does not end.
"""

import math
from collections.abc import Callable, Iterable

import trio

from cowfs.errors import StorageError
from cowfs.storage.nbd import protocol as nbd
from cowfs.storage.nbd.request import Operation, Request
from cowfs.storage.nbd.transport import LostError

_DOING = {nbd.CMD_WRITE: "a write", nbd.CMD_WRITE_ZEROES: "a write of zeros", nbd.CMD_TRIM: "a trim"}


class Doubt:
    """One such change: ``end`` is the time until which it is in doubt, infinite if that cannot be told.

    ``reason`` says what has become of the connection.
    """

    def __init__(self, request: Request, end: float = math.inf, *, is_lost: bool = False, reason: str = "") -> None:
        self.request = request
        self.start = request.offset
        self.stop = request.offset + request.length
        self.end = end
        #: whether no answer can come any more that would tell
        self.is_lost = is_lost
        self.reason = reason

    def concerns(self, request: Request) -> bool:
        """Whether a request must not be made before this has ended."""
        if request is self.request or request.offset >= self.stop or request.offset + request.length <= self.start:
            return False
        # what will be there is known where the change is made again, or has been
        return request.is_change or self.is_lost or self.request.abandoned

    def __str__(self) -> str:
        return f"{_DOING[self.request.command]} of {self.request.length} bytes at {self.start}"


class Doubts:
    """Those of one export. ``record`` is given changes that nobody waits for, and that the server has made after all;
    ``on_end`` is called when a doubt has ended before its time."""

    def __init__(self, record: Callable[[Request], None], on_end: Callable[[], None]) -> None:
        self._record = record
        self._on_end = on_end
        self._doubts: list[Doubt] = []

    def concerning(self, requests: Iterable[Request]) -> Doubt | None:
        """Return one because of which some requests must wait, if there is any.

        Raises `StorageError`, EIO, where waiting would never end.
        """
        if not self._doubts:
            return None
        now = trio.current_time()
        self._doubts = [doubt for doubt in self._doubts if doubt.end > now]
        found = [doubt for request in requests for doubt in self._doubts if doubt.concerns(request)]
        lost = next((doubt for doubt in found if doubt.is_lost), None)
        if lost is not None:
            raise unknown(lost)
        return found[0] if found else None

    @property
    def unanswered(self) -> list[Doubt]:
        """Those that an answer would end, or would have ended."""
        return [doubt for doubt in self._doubts if doubt.end == math.inf]

    def abandon(self, operation: Operation) -> None:
        """Nobody waits for an operation any more; its buffers are left alone from now on."""
        for request in operation.requests:
            if request.abandoned:
                continue
            request.abandoned = True
            if not request.is_change:
                continue
            if request.done:
                self._keep(request)
            elif request.is_sent:
                request.own()
                self._doubts.append(Doubt(request))

    def answered(self, request: Request) -> None:
        """The server has answered a change that nobody waits for any more."""
        self._doubts = [doubt for doubt in self._doubts if doubt.request is not request]
        self._keep(request)
        self._on_end()

    def _keep(self, request: Request) -> None:
        # or what somebody has read there by then might be gone again if the server crashes before a flush
        if request.failure is None and request.error is None:
            self._record(request)

    def cut_off(self, request: Request, error: Exception) -> Exception:
        """A connection has ended before the answer to a change came; returns what the request fails with."""
        self._doubts = [doubt for doubt in self._doubts if doubt.request is not request]
        by_server = isinstance(error, LostError) and error.by_server
        end = request.deadline if by_server else math.inf
        doubt = Doubt(request, end, is_lost=not by_server, reason=str(error))
        if doubt.end > trio.current_time():
            self._doubts.append(doubt)
        self._on_end()
        return error if by_server else unknown(doubt)


def unknown(doubt: Doubt) -> StorageError:
    """Return the error for a change of which nobody can tell any more whether it is over."""
    return StorageError(
        f"the NBD server has not answered {doubt}, and the connection is lost ({doubt.reason}): as it may still carry"
        " that out, nothing there is read or written any more; restart the server, and open the image again",
        errno=StorageError.errno,
    )
