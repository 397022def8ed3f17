"""Every handler stands behind the guard."""

import errno
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import trio

from cowfs.errors import Busy, CowfsError, StorageError
from cowfs.fuse.guard import HANDLERS, guarded
from cowfs.fuse.images import Mount
from cowfs.fuse.operations import Operations
from cowfs.fuse.options import Settings


def failing(error: BaseException) -> Any:
    """Operations of which every handler raises one error."""

    async def handler(self: object, inode: int) -> None:
        raise error

    members: dict[str, Any] = dict.fromkeys(HANDLERS, handler)

    class Failing(pyfuse3.Operations):
        def __init__(self) -> None:
            super().__init__()
            self.reports: list[tuple[CowfsError, object, bool]] = []

        def report(self, error: CowfsError, number: object, *, by_handle: bool) -> None:
            self.reports.append((error, number, by_handle))

    return guarded(type("AllFailing", (Failing,), members))()


@pytest.mark.parametrize("name", HANDLERS)
@pytest.mark.parametrize(
    ("error", "number"),
    [
        (Busy("a job is running"), errno.EBUSY),
        (StorageError("no space", errno=errno.ENOSPC), errno.ENOSPC),
        (OSError(errno.EACCES, "no"), errno.EACCES),
        (OSError("without a number"), errno.EIO),
        (KeyError("a bug"), errno.EIO),
        (AssertionError("a bug"), errno.EIO),
        (pyfuse3.FUSEError(errno.ENOENT), errno.ENOENT),
    ],
    ids=repr,
)
async def test_whatever_is_raised_becomes_an_errno(name: str, error: Exception, number: int) -> None:
    operations = failing(error)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await getattr(operations, name)(7)
    assert caught.value.errno == number
    assert operations.reports == ([(error, 7, False)] if isinstance(error, CowfsError) else [])


@pytest.mark.parametrize("name", HANDLERS)
async def test_cancellation_passes(name: str) -> None:
    async def handler(self: object, inode: int) -> None:
        await trio.sleep_forever()

    operations = guarded(type("Waiting", (pyfuse3.Operations,), {name: handler}))()
    with trio.CancelScope() as scope:
        scope.cancel()
        await getattr(operations, name)(1)
    assert scope.cancelled_caught


async def test_a_bug_leaves_its_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(pyfuse3.FUSEError):
        await failing(ZeroDivisionError("of all things")).read(1)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "ZeroDivisionError: of all things" in caplog.text


def test_the_mount_guards_all_handlers(tmp_path: Path) -> None:
    operations = Operations(Mount(str(tmp_path), Settings()))
    handlers: dict[str, Callable[..., Awaitable[object]]] = {name: getattr(operations, name) for name in HANDLERS}
    assert len(handlers) > 25
    assert {name for name, handler in handlers.items() if not hasattr(handler, "__wrapped__")} == set()


async def test_a_handle_tells_which_image_failed(tmp_path: Path) -> None:
    class Reading(pyfuse3.Operations):
        def report(self, error: CowfsError, number: object, *, by_handle: bool) -> None:
            reports.append((number, by_handle))

        async def read(self, fh: int, off: int, size: int) -> bytes:
            raise Busy("no")

    reports: list[tuple[object, bool]] = []
    with pytest.raises(pyfuse3.FUSEError):
        await guarded(Reading)().read(5, 0, 10)
    assert reports == [(5, True)]
