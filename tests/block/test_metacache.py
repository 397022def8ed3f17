from array import array

import pytest
import trio
from storages import Gate, MemoryStorage
from trio.testing import wait_all_tasks_blocked

from cowfs.block.metacache import PAGE, Level, MetadataCache, Table
from cowfs.errors import CorruptImage, StorageError


def _cache(size: int = 1 << 20, **options: int) -> tuple[MemoryStorage, MetadataCache]:
    storage = MemoryStorage("image", bytes(size))
    return storage, MetadataCache(storage, "big", **options)


def _table(offset: int, level: Level, *, fresh: bool, entries: int = 512) -> Table:
    return Table(offset, array("Q", bytes(8 * entries)), level, fresh=fresh)


async def test_levels_are_written_in_order_with_a_flush_between() -> None:
    storage, cache = _cache()
    link = cache.keep(_table(0, Level.LINK, fresh=False))
    counts_link = cache.keep(_table(1 * PAGE, Level.COUNTS_LINK, fresh=False))
    count = cache.add(_table(2 * PAGE, Level.BODY, fresh=False))
    body = cache.add(_table(3 * PAGE, Level.LINK, fresh=True))
    for table in (link, counts_link, count, body):
        table.set(1, 7)
    await cache.flush()
    assert [(what, offset // PAGE) for what, offset, _ in storage.log] == [
        ("write", 2),
        ("write", 3),
        ("flush", 0),
        ("write", 1),
        ("flush", 0),
        ("write", 0),
        ("flush", 0),
    ]
    assert storage.content[8:16] == (7).to_bytes(8, "big")
    assert cache.is_clean


async def test_a_flush_without_links_costs_one_flush_of_the_storage() -> None:
    storage, cache = _cache()
    cache.add(_table(0, Level.BODY, fresh=False)).set(0, 1)
    await cache.flush()
    assert [what for what, _, _ in storage.log] == ["write", "flush"]


async def test_a_table_is_linked_level_only_after_it_was_durable() -> None:
    storage, cache = _cache()
    table = cache.add(_table(0, Level.LINK, fresh=True))
    await cache.flush()
    assert not table.fresh
    storage.log.clear()
    table.set(3, 4)
    await cache.flush()
    assert [what for what, _, _ in storage.log] == ["flush", "write", "flush"]


async def test_what_changes_during_a_flush_waits_for_the_next() -> None:
    storage, cache = _cache()
    table = cache.keep(_table(0, Level.LINK, fresh=False))
    table.set(0, 1)
    gate = storage.gates["flush"] = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.flush)
        await gate.arrived.wait()
        table.set(1, 2)
        gate.open()
    assert storage.content[7] == 1
    assert storage.content[15] == 0, "its data may not be durable yet"
    assert not cache.is_clean
    await cache.flush()
    assert storage.content[15] == 2


async def test_flushes_that_wait_share_one() -> None:
    storage, cache = _cache()
    gate = storage.gates["flush"] = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.flush)
        await gate.arrived.wait()
        for _ in range(5):
            nursery.start_soon(cache.flush)
        await wait_all_tasks_blocked()
        gate.open()
    assert [what for what, _, _ in storage.log] == ["flush", "flush"]


@pytest.mark.parametrize("step", range(4))
async def test_after_a_failure_everything_is_dirty_again(step: int) -> None:
    storage, cache = _cache()
    link = cache.keep(_table(0, Level.LINK, fresh=False))
    body = cache.add(_table(PAGE, Level.LINK, fresh=True))
    link.set(0, 1)
    body.set(0, 2)
    # write body, flush, write link, flush
    operation, number = (("write", 0), ("flush", 0), ("write", 1), ("flush", 1))[step]
    storage.failures[operation] = [None] * number + [StorageError("no space", errno=28)]
    with pytest.raises(StorageError):
        await cache.flush()
    assert link.dirty
    assert body.dirty
    await cache.flush()
    assert storage.content[7] == 1
    assert storage.content[PAGE + 7] == 2
    assert cache.is_clean


async def test_a_table_is_read_once_for_all_who_ask() -> None:
    storage, cache = _cache()
    storage.cold = True
    gate = storage.gates["read"] = Gate()
    found: list[Table] = []

    async def load() -> None:
        found.append(await cache.load(0, PAGE, "Q", Level.LINK, "L2 table"))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(load)
        await gate.arrived.wait()
        await wait_all_tasks_blocked()
        gate.open()
    assert len(found) == 3
    assert found[0] is found[1] is found[2]
    assert len(storage.log) == 1


async def test_a_load_that_fails_lets_the_next_one_try() -> None:
    storage, cache = _cache()
    storage.cold = True
    storage.failures["read"].append(StorageError("unplugged", errno=5))
    with pytest.raises(StorageError):
        await cache.load(0, PAGE, "Q", Level.LINK, "L2 table")
    assert (await cache.load(0, PAGE, "Q", Level.LINK, "L2 table")).size == PAGE


async def test_a_table_cut_off_by_the_end_of_the_file_is_named() -> None:
    _, cache = _cache(PAGE + 100)
    with pytest.raises(CorruptImage, match="L2 table at offset 0x1000 lies beyond the end of the file"):
        await cache.load(PAGE, PAGE, "Q", Level.LINK, "L2 table")


async def test_the_cache_keeps_its_bound_but_never_drops_what_is_dirty_or_pinned() -> None:
    _, cache = _cache(bound=4 * PAGE)
    dirty = await cache.load(0, PAGE, "Q", Level.LINK, "table")
    dirty.set(0, 1)
    pinned = await cache.load(PAGE, PAGE, "Q", Level.LINK, "table")
    pinned.pins += 1
    for number in range(2, 20):
        await cache.load(number * PAGE, PAGE, "Q", Level.LINK, "table")
    assert cache.get(0) is dirty
    assert cache.get(PAGE) is pinned
    assert sum(cache.get(number * PAGE) is not None for number in range(20)) == 4


@pytest.mark.parametrize("evict", ["loads", "rest", "relieve"])
@pytest.mark.parametrize("level", [Level.LINK, Level.BODY])
async def test_what_a_flush_is_writing_stays_in_memory(evict: str, level: Level) -> None:
    """The file has the old page until the flush is over; whoever read it back would take that for the truth."""
    storage, cache = _cache(bound=4 * PAGE)
    cache.data_storage = MemoryStorage("data")
    table = await cache.load(0, PAGE, "Q", level, "table")
    table.set(0, 7)
    for gated in (cache.data_storage, storage):
        gate = gated.gates["flush"] = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.flush)
            await gate.arrived.wait()
            assert not cache.is_clean
            if evict == "loads":
                for number in range(2, 20):
                    await cache.load(number * PAGE, PAGE, "Q", level, "table")
            elif evict == "rest":
                cache.rest()
            else:
                cache.bound = 0
                with trio.move_on_after(0):
                    await cache.relieve()
            assert cache.get(0) is table
            table.set(1, 8)
            gate.open()
        assert table.dirty, "what changed meanwhile is for the next flush"
        assert not table.being_written
        del gated.gates["flush"]
    await cache.flush()
    assert cache.is_clean
    assert storage.content[7] == 7
    assert storage.content[15] == 8


async def test_nothing_is_read_back_or_given_away_while_it_is_being_written() -> None:
    storage, cache = _cache()
    table = cache.add(_table(PAGE, Level.BODY, fresh=False))
    table.set(0, 1)
    gate = storage.gates["flush"] = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.flush)
        await gate.arrived.wait()
        cache.forget(table)
        with pytest.raises(AssertionError, match="given away"):
            cache.add(_table(PAGE, Level.BODY, fresh=True))
        with pytest.raises(AssertionError, match="read back"):
            await cache.load(PAGE, PAGE, "Q", Level.BODY, "table")
        with pytest.raises(AssertionError, match="would be lost"):
            cache.clear()
        gate.open()
    assert cache.is_clean


async def test_a_table_that_is_made_where_an_old_one_is_being_read_wins() -> None:
    storage, cache = _cache()
    storage.cold = True
    gate = storage.gates["read"] = Gate()
    found: list[Table] = []

    async def load() -> None:
        found.append(await cache.load(0, PAGE, "Q", Level.LINK, "table"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(load)
        await gate.arrived.wait()
        made = cache.add(_table(0, Level.LINK, fresh=True))
        gate.open()
    assert found == [made]
    assert cache.get(0) is made


async def test_no_flush_is_under_way_while_somebody_wants_none() -> None:
    storage, cache = _cache()
    table = cache.add(_table(0, Level.BODY, fresh=False))
    gate = storage.gates["flush"] = Gate()
    held = trio.Event()
    ended = trio.Event()

    async def hold() -> None:
        async with cache.not_flushing():
            assert cache.is_clean
            held.set()
            await ended.wait()

    async with trio.open_nursery() as nursery:
        table.set(0, 1)
        nursery.start_soon(cache.flush)
        await gate.arrived.wait()
        nursery.start_soon(hold)
        await wait_all_tasks_blocked()
        assert not held.is_set(), "it waits for the flush under way"
        gate.open()
        await held.wait()
        table.set(0, 2)
        nursery.start_soon(cache.flush)
        await wait_all_tasks_blocked()
        assert table.dirty, "and whoever comes then waits for it"
        ended.set()
    assert cache.is_clean
