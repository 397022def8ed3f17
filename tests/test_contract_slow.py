"""The contract on a slow host: every stack, with few tables in memory, while any operation of its files is held.

Guests do several things side by side; what a disk does behind their backs comes in between: it flushes, settles, rests,
is compacted. Nothing of that may be seen. ``COWFS_EXAMPLES`` asks for more of it, ``COWFS_SEED`` for something else.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import hypothesis
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slowstorage import Holding, files_in_the_loop
from test_contract import SIZE, STACKS, Stack
from trio._core import _run
from trio.testing import MockClock

from cowfs.block import metacache
from cowfs.block.disk import Disk
from cowfs.formats.chain import Opening, open_disk

EXAMPLES = int(os.environ.get("COWFS_EXAMPLES", "4"))
SEED = os.environ.get("COWFS_SEED")

#: kind, where, length
THINGS = st.tuples(
    st.sampled_from(["write"] * 5 + ["sector"] * 2 + ["discard", "zero", "read", "copy_up"])
    | st.sampled_from(["flush", "sync", "rest", "settle", "compact", "time"]),
    st.integers(0, SIZE - 1),
    st.sampled_from([512, 3000, 4096, 65_536]) | st.integers(1, 150_000),
)
#: what is done at once, and that time after time
ROUNDS = st.lists(st.lists(THINGS, min_size=2, max_size=10), min_size=1, max_size=8)

Thing = tuple[str, int, int]


@contextmanager
def _slow_host(seed: int) -> Iterator[Holding]:
    holding = Holding(seed)
    _run._r.seed(seed)
    with (
        files_in_the_loop(holding.pause, holding.declines, holding.short),
        patch.object(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        # who rests keeps nothing
        patch.object(metacache, "RESTING_BOUND", 0),
    ):
        yield holding


class _Guests:
    """Those who use one disk; ranges that are in use at the same time do not overlap."""

    def __init__(self, stack: Stack, disk: Disk, holding: Holding, clock: MockClock, seed: int) -> None:
        self.stack = stack
        self.disk = disk
        self.clock = clock
        self.chooser = random.Random(seed)
        holding.on_hold = lambda: self.rest() if self.chooser.random() < 0.3 else None

    def rest(self) -> None:
        for layer in self.disk.layers:
            layer.image.rest()

    async def at_once(self, things: list[Thing]) -> None:
        taken: list[tuple[int, int]] = []
        async with trio.open_nursery() as nursery:
            for kind, offset, length in things:
                if kind == "sector":
                    offset, length = offset // 512 * 512, 512
                end = min(offset + length, SIZE)
                work = self._work(kind, offset, end - offset)
                if work is None:
                    nursery.start_soon(self._behind, kind)
                elif not any(start < end and offset < stop for start, stop in taken):
                    taken.append((offset, end))
                    nursery.start_soon(work)

    def _work(self, kind: str, offset: int, length: int) -> Callable[[], Any] | None:
        """What touches a range, None for what does not."""
        if kind in ("write", "sector"):
            return partial(self.stack.write, self.disk, offset, self.chooser.randbytes(length))
        if kind in ("discard", "zero"):
            return partial(self.stack.zero, self.disk, offset, length, unmap=kind == "discard")
        if kind == "copy_up":
            return partial(self.disk.copy_up, offset, length)
        return partial(self._read, offset, length) if kind == "read" else None

    async def _read(self, offset: int, length: int) -> None:
        assert await self.stack.read(self.disk, offset, length) == self.stack.model[offset : offset + length]

    async def _behind(self, kind: str) -> None:
        if kind == "rest":
            self.rest()
        elif kind == "time":
            self.clock.jump(6)
        else:
            await getattr(self.disk, kind)()


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("name", STACKS)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=SEED is None and "COWFS_EXAMPLES" not in os.environ,
    database=None,
)
@hypothesis.seed(SEED or 0)
@given(rounds=ROUNDS, seed=st.integers(0, 10_000))
def test_guests_and_the_background_on_a_slow_host(
    tmp_path_factory: pytest.TempPathFactory, name: str, rounds: list[list[Thing]], seed: int
) -> None:
    stack = Stack(tmp_path_factory.mktemp("stack"), STACKS[name], (SIZE,) * len(STACKS[name]), seed)
    trio.run(stack.build)
    clock = MockClock()

    async def main(holding: Holding) -> None:
        disk = await open_disk(str(stack.top), writable=True, opening=Opening(cache_size=0))
        guests = _Guests(stack, disk, holding, clock, seed)
        async with trio.open_nursery() as nursery:
            await nursery.start(disk.run)
            for things in rounds:
                await guests.at_once(things)
                assert await disk.read(0, SIZE) == stack.model
            nursery.cancel_scope.cancel()
        await disk.close()

    with _slow_host(seed) as holding:
        trio.run(main, holding, clock=clock)
    stack.judge()
