"""Going to the background, and saying how that went.

The server forks away first and does everything after: opening images, threads and trio do not survive a fork.
The terminal's process waits at a pipe until the server says that its mount answers, or why not.

Until then the server stays in the process group of the command. Where systemd mounts when a directory is first looked
at (automount), the kernel lets nobody else near that directory meanwhile.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from cowfs.errors import CowfsError

log = logging.getLogger(__name__)

_READY = b"\0"
#: what a terminal sends to the command: that ends the command, and the server when it cannot tell it that it is ready
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP)


def in_background(serve: Callable[[Callable[[], None]], int]) -> None:
    """Run ``serve(ready)`` in a process of its own; returns once that called ``ready``.

    Raises what kept it from getting there, as a `CowfsError` with the same text.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _detach(serve, writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if answer != _READY:
        raise CowfsError(answer.decode(errors="surrogateescape") or "the server died before its mount was ready")


def _detach(serve: Callable[[Callable[[], None]], int], writer: int) -> NoReturn:
    code = 1
    try:
        if os.fork():
            os._exit(0)
        handlers = [(number, signal.signal(number, signal.SIG_IGN)) for number in _FROM_TERMINAL]
        os.chdir("/")

        def ready() -> None:
            os.setsid()
            for number, handler in handlers:
                # not what serve() has set for itself
                if signal.getsignal(number) is signal.SIG_IGN:
                    signal.signal(number, handler)
            _report_ready(writer)

        code = serve(ready)
    except BaseException as error:  # noqa: BLE001
        _report_failure(error, writer)
    finally:
        logging.shutdown()
        os._exit(code)


def _report_ready(writer: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    # if nobody waits any more, this raises, and the server ends
    os.write(writer, _READY)
    os.close(writer)


def _report_failure(error: BaseException, writer: int) -> None:
    if isinstance(error, CowfsError):
        text = str(error)
    else:
        log.exception("internal error", exc_info=error)
        text = f"internal error: {type(error).__name__}: {error}"
    try:
        os.write(writer, os.fsencode(text))
    except OSError as failure:
        log.error("%s (and nobody to tell: %s)", text, failure)
