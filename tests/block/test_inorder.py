from collections.abc import AsyncGenerator

import pytest
import trio

from cowfs.block.inorder import in_order


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

    with pytest.raises(BaseException) as caught:
        await in_order(jobs(), work, use, limit=4)
    error = caught.value
    while parts := getattr(error, "exceptions", ()):
        error = parts[0]
    assert (type(error), str(error)) == (ValueError, where)
    assert closed
