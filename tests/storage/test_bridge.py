"""Coroutines of asyncio, awaited from trio."""

import asyncio
import gc
import threading

import pytest
import trio
from commandline import PATIENCE

from cowfs.storage.remote import bridge
from cowfs.storage.remote.bridge import in_loop


async def test_what_comes_out_of_a_coroutine_comes_back() -> None:
    async def work(error: Exception | None) -> int:
        await asyncio.sleep(0)
        if error is not None:
            raise error
        return threading.get_ident()

    assert await in_loop(work(None)) != threading.get_ident()
    with pytest.raises(ValueError, match="wrong"):
        await in_loop(work(ValueError("wrong")))


async def test_a_coroutine_has_ended_before_its_cancelled_caller_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    token = trio.lowlevel.current_trio_token()
    begun = trio.Event()
    steps: list[str] = []

    async def work() -> None:
        token.run_sync_soon(begun.set)
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(100):
                await asyncio.sleep(0)
            steps.append("ended")
            raise RuntimeError("nobody is told of this")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_loop, work())
        await begun.wait()
        nursery.cancel_scope.cancel()
    steps.append("returned")
    assert steps == ["ended", "returned"]
    gc.collect()
    assert caplog.text == ""


async def test_a_caller_that_is_cancelled_at_once_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    ended = []

    async def work() -> None:
        ended.append(asyncio.current_task())

    with trio.CancelScope() as scope:
        scope.cancel()
        await in_loop(work())
    assert scope.cancelled_caught
    gc.collect()
    assert caplog.text == ""


async def test_a_coroutine_that_does_not_end_keeps_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "PATIENCE", 0.05)
    token = trio.lowlevel.current_trio_token()
    begun, ended = trio.Event(), trio.Event()
    release = threading.Event()

    async def work() -> None:
        token.run_sync_soon(begun.set)
        while not release.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        token.run_sync_soon(ended.set)

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_loop, work())
            await begun.wait()
            nursery.cancel_scope.cancel()
        release.set()
        await ended.wait()
