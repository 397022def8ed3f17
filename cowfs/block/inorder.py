"""Work on several things side by side, and use of the results one by one, in order."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import trio

from cowfs.storage.nursery import side_by_side

Job = TypeVar("Job")
Result = TypeVar("Result")


async def in_order(
    jobs: AsyncGenerator[Job, None],
    work: Callable[[Job], Awaitable[Result]],
    use: Callable[[Result], Awaitable[None]],
    *,
    limit: int,
) -> None:
    """Call ``work`` on up to ``limit`` jobs at a time, and ``use`` on each result, in the order of the jobs.

    No more than ``limit`` results wait to be used. The first error, wherever it is, ends everything, and is raised.
    """
    async with side_by_side() as nursery:

        async def feed(queue: "trio.MemorySendChannel[trio.MemoryReceiveChannel[Result]]") -> None:
            async with queue, aclosing(jobs):
                async for job in jobs:
                    slot: tuple[trio.MemorySendChannel[Result], trio.MemoryReceiveChannel[Result]]
                    slot = trio.open_memory_channel(1)
                    await queue.send(slot[1])
                    nursery.start_soon(do, job, slot[0])

        async def do(job: Job, slot: "trio.MemorySendChannel[Result]") -> None:
            async with slot:
                await slot.send(await work(job))

        ends: tuple[
            trio.MemorySendChannel[trio.MemoryReceiveChannel[Result]],
            trio.MemoryReceiveChannel[trio.MemoryReceiveChannel[Result]],
        ]
        ends = trio.open_memory_channel(limit)
        nursery.start_soon(feed, ends[0])
        async with ends[1]:
            async for slot in ends[1]:
                async with slot:
                    await use(await _result(slot))


async def _result(slot: "trio.MemoryReceiveChannel[Result]") -> Result:
    try:
        return await slot.receive()
    except trio.EndOfChannel:
        # whoever works on it has failed; that error ends this too, and is the one that counts
        await trio.sleep_forever()
