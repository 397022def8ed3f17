import pytest
import trio
from trio.testing import Sequencer, wait_all_tasks_blocked

from cowfs.block.rangelock import RangeLock


async def test_ranges_that_do_not_overlap_are_held_at_once() -> None:
    lock = RangeLock()
    async with lock.hold(0, 10), lock.hold(10, 20), lock.hold(30, 40):
        assert lock.is_free(20, 30)
        assert not lock.is_free(9, 10)


async def test_overlapping_ranges_are_held_in_the_order_in_which_they_were_asked_for() -> None:
    lock = RangeLock()
    order: list[str] = []
    steps = Sequencer()

    async def hold(name: str, number: int, start: int, end: int) -> None:
        async with steps(number):
            pass
        async with lock.hold(start, end):
            order.append(name)

    async with trio.open_nursery() as nursery, lock.hold(0, 100):
        for number, (name, start, end) in enumerate((("wide", 50, 150), ("late", 140, 160), ("other", 0, 10))):
            nursery.start_soon(hold, name, number, start, end)
            await wait_all_tasks_blocked()
        assert order == []
    assert order.index("wide") < order.index("late")
    assert sorted(order) == ["late", "other", "wide"]


async def test_a_waiter_blocks_those_who_come_later_so_that_nobody_starves() -> None:
    lock = RangeLock()
    async with trio.open_nursery() as nursery, lock.hold(0, 10):
        nursery.start_soon(_hold_and_release, lock, 0, 20)
        await wait_all_tasks_blocked()
        assert not lock.is_free(15, 20)
    assert lock.is_free(0, 100)


async def _hold_and_release(lock: RangeLock, start: int, end: int) -> None:
    async with lock.hold(start, end):
        pass


async def test_a_cancelled_waiter_leaves_nothing_behind() -> None:
    lock = RangeLock()
    async with lock.hold(0, 10):
        with trio.move_on_after(0):
            async with lock.hold(5, 15):
                pytest.fail("it was held by someone else")
        assert lock.is_free(10, 15)
    assert lock.is_free(0, 100)


async def test_a_cancelled_holder_lets_go() -> None:
    lock = RangeLock()
    with trio.CancelScope() as scope:
        async with lock.hold(0, 10):
            scope.cancel()
            await trio.sleep_forever()
    assert lock.is_free(0, 10)
