"""The stand-in for trio that pyfuse3's loop runs on."""

import os

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cowfs.fuse.loop import TURN, _Lock, _Trio


async def test_a_lock_excludes_and_none_is_left_waiting() -> None:
    lock, inside, order = _Lock(), 0, []

    async def enter(number: int) -> None:
        nonlocal inside
        async with lock:
            inside += 1
            assert inside == 1
            await trio.lowlevel.checkpoint()
            inside -= 1
        order.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(enter, number)
    assert sorted(order) == list(range(10))


async def test_a_cancelled_waiter_does_not_take_the_lock_along() -> None:
    lock = _Lock()

    async def wait(scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                raise AssertionError("it was cancelled")

    async with trio.open_nursery() as nursery:
        await lock.__aenter__()
        scope = trio.CancelScope()
        nursery.start_soon(wait, scope)
        await wait_all_tasks_blocked()
        scope.cancel()
        await lock.__aexit__(None, None, None)
    async with lock:
        pass


async def test_a_free_lock_does_not_give_way() -> None:
    ran = False

    async def other() -> None:
        nonlocal ran
        ran = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(100):
            async with _Lock():
                pass
        assert not ran


async def test_a_readable_descriptor_is_answered_at_once_but_not_for_ever() -> None:
    stand_in = _Trio()
    reader, writer = os.pipe()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    try:
        os.write(writer, b"x")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(TURN - 1):
                await stand_in.lowlevel.wait_readable(reader)
            assert turns == 0
            # the order of tasks that can both go on is random, so it takes two chances
            for _ in range(TURN + 1):
                await stand_in.lowlevel.wait_readable(reader)
            assert turns > 0
            os.read(reader, 1)
            with trio.move_on_after(0) as scope:
                await stand_in.lowlevel.wait_readable(reader)
            assert scope.cancelled_caught
            nursery.cancel_scope.cancel()
    finally:
        os.close(reader)
        os.close(writer)


def test_everything_else_is_trio() -> None:
    assert _Trio().open_nursery is trio.open_nursery
    assert _Trio().lowlevel.current_task is trio.lowlevel.current_task
    with pytest.raises(AttributeError):
        _ = _Trio().no_such_thing
