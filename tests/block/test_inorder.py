from collections.abc import AsyncGenerator

import pytest
import trio

from cowfs.block.inorder import in_order
from cowfs.errors import StorageError


async def _numbers(count: int) -> AsyncGenerator[int, None]:
    for number in range(count):
        yield number


async def test_results_come_in_the_order_of_the_jobs(autojump_clock: trio.testing.MockClock) -> None:
    running = most = 0
    used: list[int] = []

    async def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        # later ones are done first
        await trio.sleep(10 - number % 7)
        running -= 1
        return number * 10

    async def use(result: int) -> None:
        await trio.lowlevel.checkpoint()
        used.append(result)

    await in_order(_numbers(40), work, use, limit=4)
    assert used == [number * 10 for number in range(40)]
    assert 1 < most <= 6


async def test_a_slow_user_holds_the_jobs_up() -> None:
    begun = 0
    go_on = trio.Event()

    async def work(number: int) -> int:
        nonlocal begun
        begun += 1
        return number

    async def use(_: int) -> None:
        await go_on.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: in_order(_numbers(100), work, use, limit=3))
        await trio.testing.wait_all_tasks_blocked()
        assert begun <= 5
        go_on.set()
    assert begun == 100


@pytest.mark.parametrize("where", ["jobs", "work", "use"])
async def test_the_first_error_ends_it(where: str) -> None:
    closed = False

    async def jobs() -> AsyncGenerator[int, None]:
        nonlocal closed
        try:
            for number in range(1000):
                if where == "jobs" and number == 7:
                    raise ValueError(where)
                yield number
        finally:
            closed = True

    async def work(number: int) -> int:
        if where == "work" and number == 7:
            raise ValueError(where)
        return number

    async def use(result: int) -> None:
        assert result <= 7
        if where == "use" and result == 7:
            raise ValueError(where)

    # itself, not in a group, and not what the others make of it
    with pytest.raises(ValueError, match=rf"^{where}$"):
        await in_order(jobs(), work, use, limit=4)
    assert closed


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("others", ["fail", "wait", "have ended"])
async def test_the_error_of_a_worker_is_told_whatever_the_others_do(number: int, others: str) -> None:
    """Whoever waits for the result of one that fails learns of it at the same moment as the nursery does."""
    go_on, waiting = trio.Event(), trio.Event()

    async def work(job: int) -> int:
        if job == number:
            await go_on.wait()
            raise StorageError("the first", errno=5, file="source")
        if others == "fail":
            try:
                await trio.sleep_forever()
            finally:
                raise StorageError("of a cancellation", errno=5, file="other")
        if others == "wait":
            await trio.sleep_forever()
        return job

    async def use(_: int) -> None:
        if others == "have ended" and number == 0:
            raise AssertionError("nothing comes before the first")
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:

        async def run() -> None:
            with pytest.raises(StorageError, match=r"^source: the first$"):
                await in_order(_numbers(8), work, use, limit=4)
            waiting.set()

        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        await waiting.wait()


async def test_a_cancellation_stays_one() -> None:
    with trio.CancelScope() as scope:

        async def work(_: int) -> int:
            await trio.lowlevel.checkpoint()
            scope.cancel()
            await trio.sleep_forever()

        async def use(_: int) -> None:
            raise AssertionError("there is nothing to use")

        await in_order(_numbers(8), work, use, limit=4)
    assert scope.cancelled_caught
