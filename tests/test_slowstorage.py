"""The slow host of the tests holds, and lets go of, what it says."""

import os
from pathlib import Path

import pytest
import trio
from slowstorage import Holding, files_in_the_loop
from storages import MemoryStorage

from cowfs.storage.file import FileStorage

SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
async def test_all_come_to_their_end_although_many_are_held(seed: int) -> None:
    storage = MemoryStorage("slow", bytes(4096))
    storage.holding = holding = Holding(seed)
    order: list[int] = []

    async def write(number: int) -> None:
        await storage.write(number * 8, [bytes([number]) * 8])
        order.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(64):
            nursery.start_soon(write, number)
    assert sorted(order) == list(range(64))
    assert order != sorted(order)
    assert storage.content[: 64 * 8] == b"".join(bytes([number]) * 8 for number in range(64))
    assert holding.count
    assert not holding.holds_any


async def test_what_is_held_takes_effect_before_or_after_others() -> None:
    """Two writes of the same place: either may be the last, and a read beside one sees it, or does not."""
    seen = set()
    for seed in range(60):
        storage = MemoryStorage("slow", b"0")
        storage.holding = Holding(seed)
        found: list[bytes] = []

        async def read(storage: MemoryStorage, found: list[bytes]) -> None:
            buffer = bytearray(1)
            await storage.read(0, [memoryview(buffer)])
            found.append(bytes(buffer))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(storage.write, 0, [b"1"])
            nursery.start_soon(storage.write, 0, [b"2"])
            nursery.start_soon(read, storage, found)
        seen.add((found[0], bytes(storage.content)))
    assert seen >= {(b"0", b"1"), (b"0", b"2"), (b"1", b"2"), (b"2", b"1")}


async def test_some_outlast_the_calls_in_which_they_were_begun() -> None:
    outlasted = 0
    for seed in range(30):
        holding = Holding(seed)
        async with trio.open_nursery() as nursery:

            async def begin(nursery: trio.Nursery = nursery, holding: Holding = holding) -> None:
                for _ in range(5):
                    nursery.start_soon(holding.pause)

            await holding.answer(begin)
            outlasted += holding.holds_any
            for _ in range(10):
                await holding.answer(trio.lowlevel.checkpoint)
            assert not holding.holds_any
    assert outlasted


async def test_files_answer_at_once_or_not_and_the_kernel_does_a_part_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content := os.urandom(100_000))
    holding = Holding(1)
    answers = set()
    with files_in_the_loop(holding.pause, holding.declines, holding.short):
        storage = FileStorage.open(str(path), writable=True)
        for at in range(0, 90_000, 3000):
            buffer = bytearray(5000)
            answers.add(storage.read_now(at, [memoryview(buffer)[:100], memoryview(buffer)[100:]]))
            assert await storage.read_bytes(at, 5000) == content[at : at + 5000]
            data = os.urandom(5000)
            if not storage.write_now(at, [data[:7], data[7:]]):
                await storage.write(at, [data])
            content = content[:at] + data + content[at + 5000 :]
        await storage.close()
    assert answers == {True, False}
    assert path.read_bytes() == content
