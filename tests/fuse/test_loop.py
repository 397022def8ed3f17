"""How pyfuse3's tasks wait for requests."""

import filecmp
import os
import select
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pyfuse3
import pytest
import trio
from mounting import Mounted, Mounts, wait_for_end
from trio.testing import wait_all_tasks_blocked

from cowfs.fuse import loop
from cowfs.fuse.loop import TURN, Waiting


class Pipe:
    """A descriptor that can be read as often as something was put into it."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def put(self, count: int = 1) -> None:
        os.write(self.writer, b"x" * count)

    def take(self) -> None:
        os.read(self.reader, 1)

    def end(self) -> None:
        trio.lowlevel.notify_closing(self.reader)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    os.close(pipe.reader)
    os.close(pipe.writer)


@asynccontextmanager
async def waiting_on(pipe: Pipe) -> AsyncIterator[Waiting]:
    waiting = Waiting(pipe.reader)
    trio.lowlevel.add_instrument(waiting)
    try:
        yield waiting
    finally:
        trio.lowlevel.remove_instrument(waiting)


async def test_what_is_there_is_answered_at_once_but_not_for_ever(pipe: Pipe) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    pipe.put()
    async with waiting_on(pipe) as waiting, trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(TURN):
            assert await waiting.readable()
        assert turns == 0
        # the order of tasks that can both go on is random, so it takes two chances
        for _ in range(TURN + 2):
            assert await waiting.readable()
        assert turns > 0
        nursery.cancel_scope.cancel()


async def test_each_request_is_one_task_s_and_none_waits_for_those_that_take_longer(pipe: Pipe) -> None:
    gate = trio.Event()
    answered: list[int] = []

    async def serve(number: int) -> None:
        while await waiting.readable():
            pipe.take()
            if not gate.is_set():
                await gate.wait()
            answered.append(number)

    async with waiting_on(pipe) as waiting, trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(serve, number)
        await wait_all_tasks_blocked()
        # one watches, four sleep; each of these requests holds up whoever took it
        assert len(waiting._asleep) == 4
        for _ in range(4):
            pipe.put()
            await wait_all_tasks_blocked()
        assert (answered, waiting._asleep) == ([], [])
        gate.set()
        await wait_all_tasks_blocked()
        assert len(set(answered)) == 4
        pipe.put(3 * TURN)
        await wait_all_tasks_blocked()
        assert len(answered) == 4 + 3 * TURN
        pipe.end()


async def test_a_task_that_answers_at_once_wakes_no_other(pipe: Pipe) -> None:
    async def serve() -> None:
        while await waiting.readable():
            pipe.take()

    async with waiting_on(pipe) as waiting, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(serve)
        await wait_all_tasks_blocked()
        asleep = list(waiting._asleep)
        for _ in range(10):
            pipe.put()
            await wait_all_tasks_blocked()
        assert waiting._asleep == asleep
        pipe.end()


async def test_the_next_request_is_looked_for_where_they_follow_each_other_closely(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with waiting_on(pipe) as waiting, trio.open_nursery() as nursery:
        monkeypatch.setattr(loop, "LOOK", 60.0)

        async def come_soon() -> None:
            pipe.put()

        nursery.start_soon(come_soon)
        assert await waiting.readable()
        pipe.take()
        # the first one came soon; so the next is looked for, by the very task, though it comes from elsewhere
        writer = threading.Timer(0.01, pipe.put)
        writer.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(waiting, "_watch", None)
            assert await waiting.readable()
        writer.join()
        pipe.take()
        # but not while a thread is at work, which would be held up
        gate = threading.Event()
        nursery.start_soon(wait_in_thread, gate)
        await wait_all_tasks_blocked()
        assert not waiting._look()
        gate.set()
        while waiting._threads.borrowed_tokens:
            await trio.lowlevel.checkpoint()
        # and in vain it is done once
        monkeypatch.setattr(loop, "LOOK", 0.001)
        assert not waiting._look()
        monkeypatch.setattr(loop, "LOOK", 60.0)
        assert not waiting._look()


@pytest.mark.parametrize("is_watched", [True, False])
async def test_all_end_when_there_is_nothing_more(pipe: Pipe, is_watched: bool) -> None:
    gate, ended = trio.Event(), 0

    async def serve() -> None:
        nonlocal ended
        while await waiting.readable():
            pipe.take()
            await gate.wait()
        ended += 1

    async with waiting_on(pipe) as waiting, trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(serve)
        await wait_all_tasks_blocked()
        if is_watched:
            pipe.end()
        else:
            # the one that was woken to watch has not begun to when the end comes
            pipe.put()
            await pipe_taken(pipe)
            pipe.end()
            waiting.end()
            gate.set()
        await wait_all_tasks_blocked()
        assert ended == 4
        # also for who comes later
        assert not await waiting.readable()


async def wait_in_thread(gate: threading.Event) -> None:
    await trio.to_thread.run_sync(gate.wait)


async def pipe_taken(pipe: Pipe) -> None:
    """Wait until nothing is in it, turn by turn."""
    while select.select([pipe.reader], [], [], 0)[0]:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("is_watching", [True, False])
async def test_somebody_else_watches_when_a_task_is_cancelled(pipe: Pipe, is_watching: bool) -> None:
    scopes = [trio.CancelScope(), trio.CancelScope()]
    answered: list[int] = []

    async def serve(number: int) -> None:
        with scopes[number]:
            while await waiting.readable():
                pipe.take()
                answered.append(number)

    async with waiting_on(pipe) as waiting, trio.open_nursery() as nursery:
        for number in range(2):
            nursery.start_soon(serve, number)
            await wait_all_tasks_blocked()
        scopes[0 if is_watching else 1].cancel()
        await wait_all_tasks_blocked()
        pipe.put()
        await wait_all_tasks_blocked()
        assert answered == [1 if is_watching else 0]
        pipe.end()


async def test_a_task_that_is_cancelled_as_it_is_woken_leaves_nobody_waiting(pipe: Pipe) -> None:
    scope, gate = trio.CancelScope(), trio.Event()
    answered: list[int] = []

    async def serve(number: int) -> None:
        with scope if number == 2 else trio.CancelScope():
            while await waiting.readable():
                pipe.take()
                answered.append(number)
                if number == 0:
                    # the step ends here, and wakes the last to fall asleep
                    scope.cancel()
                    await gate.wait()

    async with waiting_on(pipe) as waiting, trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(serve, number)
            await wait_all_tasks_blocked()
        pipe.put(2)
        await wait_all_tasks_blocked()
        assert answered == [0, 1]
        gate.set()
        pipe.end()


def test_pyfuse3_is_as_it_was() -> None:
    """What `Loop.serve` replaces: a coroutine function that pyfuse3's own loop finds by its name, without arguments."""
    assert callable(getattr(pyfuse3, loop._NAME))
    source = Path(pyfuse3.__file__).with_name("internal.pxi").read_text()
    assert f"async def {loop._NAME}():" in source
    assert f"if not await {loop._NAME}():" in source


_PROGRAM = """
import sys
from cowfs.fuse import loop
{change}
from cowfs.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.needs("fuse")
@pytest.mark.parametrize(
    ("change", "is_used"),
    [("", True), ("loop._NAME = 'gone'", False), ("loop._session_descriptor = lambda: None", False)],
)
def test_a_mount_works_with_it_and_without(
    mount: Mounts, tmp_path: Path, raw_image: Path, change: str, is_used: bool
) -> None:
    point, log = mount.new_point(), tmp_path / "log"
    program = _PROGRAM.format(change=change)
    words: list[str | Path] = ["mount", "-o", f"log={log}", raw_image, point]
    subprocess.run([sys.executable, "-c", program, *words], check=True)
    mounted = Mounted(point)
    assert filecmp.cmp(mounted.flat("plain"), raw_image, shallow=False)
    with mounted.flat("plain").open("r+b") as file:
        file.write(b"new")
    mounted.umount()
    wait_for_end(mounted.process)
    os.close(mounted.process)
    assert raw_image.read_bytes()[:3] == b"new"
    assert ("its own loop" in log.read_text()) is not is_used
