"""Tasks side by side: the first error comes out, as itself."""

import pytest
import trio

from cowfs.errors import StorageError
from cowfs.storage.nursery import side_by_side


async def _fail(text: str, before: trio.Event | None = None) -> None:
    try:
        if before is None:
            await trio.sleep_forever()
        else:
            await before.wait()
    finally:
        raise StorageError(text, errno=5)


async def test_the_first_of_several_errors_is_raised() -> None:
    now = trio.Event()
    with pytest.raises(StorageError, match=r"^the first$") as caught:
        async with side_by_side() as nursery:
            nursery.start_soon(_fail, "of a cancellation")
            nursery.start_soon(_fail, "the first", now)
            await trio.testing.wait_all_tasks_blocked()
            now.set()
            await trio.sleep_forever()
    assert caught.value.__context__ is None or isinstance(caught.value.__context__, trio.Cancelled)


async def test_the_error_of_the_body_is_raised() -> None:
    with pytest.raises(ValueError, match=r"^of the body$"):
        async with side_by_side() as nursery:
            nursery.start_soon(_fail, "of a cancellation")
            await trio.testing.wait_all_tasks_blocked()
            raise ValueError("of the body")


async def test_one_inside_of_another_makes_no_group() -> None:
    now = trio.Event()
    with pytest.raises(StorageError, match=r"^deep$"):
        async with side_by_side(), trio.open_nursery() as inner:
            inner.start_soon(_fail, "deep", now)
            now.set()


async def test_cancellation_passes() -> None:
    with trio.CancelScope() as scope:
        async with side_by_side() as nursery:
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()
    assert scope.cancelled_caught


async def test_nothing_wrong_is_nothing_raised() -> None:
    async with side_by_side() as nursery:
        nursery.start_soon(trio.lowlevel.checkpoint)
