"""What copying is made of: finding zeros, shaping areas. The commands' tests hold the whole against QEMU."""

from itertools import pairwise

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from storages import MemoryStorage
from trio.testing import MockClock

from cowfs.block.chain import Chain
from cowfs.block.copying import CopyOptions, copy
from cowfs.block.joined import Area, Held, Joined, rounded
from cowfs.block.layer import Layer
from cowfs.block.zeros import find_zeros
from cowfs.formats.raw import RawImage


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=20),
    st.sampled_from([8, 16, 64]),
    st.integers(1, 200),
)
def test_zeros_are_zeros_and_all_long_runs_are_found(parts: list[tuple[bool, int]], grain: int, shortest: int) -> None:
    data = b"".join(bytes(length) if zero else b"\7" * length for zero, length in parts)
    found = list(find_zeros(memoryview(data), grain, shortest))
    assert [found[0].start, *(stretch.end for stretch in found)] == [0, *(s.start for s in found[1:]), len(data)]
    for one, two in pairwise(found):
        assert one.is_zero != two.is_zero
    for start, end, is_zero in found:
        assert not is_zero or not any(data[start:end])
        assert not start % grain
    # what is not told as zeros has no run of whole grains of zeros that is long enough
    whole = -(-shortest // grain)
    for start, end, is_zero in found:
        if not is_zero:
            grains = [any(data[at : min(at + grain, end)]) for at in range(start, end, grain)]
            run = "".join("x" if used else "0" for used in grains)
            assert "0" * max(whole, 1) not in run


_HELD = st.lists(st.tuples(st.sampled_from(Held), st.integers(1, 50)), min_size=1, max_size=12)


@given(_HELD, st.sampled_from([1, 4, 16]))
def test_data_grows_to_whole_units_and_nothing_is_lost(parts: list[tuple[Held, int]], unit: int) -> None:
    areas: list[Area] = []
    for held, length in parts:
        start = areas[-1].end if areas else 0
        areas.append(Area(start, start + length, held))
    end = areas[-1].end
    shaped = rounded(areas, unit)
    assert [shaped[0].start, *(area.end for area in shaped)] == [0, *(area.start for area in shaped[1:]), end]
    before = [area.held for area in areas for _ in range(area.start, area.end)]
    after = [area.held for area in shaped for _ in range(area.start, area.end)]
    for place in range(0, end, unit):
        cluster = before[place : place + unit]
        if Held.DATA in cluster:
            assert set(after[place : place + unit]) == {Held.DATA}
        else:
            assert after[place : place + unit] == cluster


async def test_disks_end_to_end_count_in_whole_sectors() -> None:
    chains = [Chain([Layer(RawImage(MemoryStorage("a", b"\1" * size)))]) for size in (700, 512, 1)]
    source = Joined(chains)
    assert source.size == 1024 + 512 + 512
    buffer = bytearray(source.size)
    await source.readinto(0, memoryview(buffer))
    assert buffer == (b"\1" * 700).ljust(1024, b"\0") + b"\1" * 512 + b"\1".ljust(512, b"\0")
    part = bytearray(600)
    await source.readinto(1000, memoryview(part))
    assert part == buffer[1000:1600]


async def test_a_blank_target_is_written_in_order_and_only_where_there_is_data() -> None:
    content = bytes(1 << 20) + b"\1" * 5000 + bytes(5 << 20) + b"\2" * 4096 + bytes(100)
    target = MemoryStorage("target", bytes(len(content)))
    source = Joined([Chain([Layer(RawImage(MemoryStorage("source", content)))])])
    done: list[int] = []
    chain = Chain([Layer(RawImage(target))])
    await copy(source, chain, CopyOptions(blank=True), lambda position, total: done.append(position))
    assert target.content == content
    writes = [(offset, length) for operation, offset, length in target.log if operation == "write"]
    assert writes == sorted(writes)
    assert sum(length for _, length in writes) <= 8192 + 8192
    assert done == sorted(done)
    assert done[-1] == source.size


async def test_a_limit_on_speed_is_kept(autojump_clock: MockClock) -> None:
    """Zeros that need not be written count for nothing."""
    content = b"data" * (5 << 18) + bytes(20 << 20)
    source = Chain([Layer(RawImage(MemoryStorage("source", content)))])
    target = Chain([Layer(RawImage(MemoryStorage("target", bytes(len(content)))))])
    start = trio.current_time()
    await copy(Joined([source]), target, CopyOptions(speed=1 << 20), lambda done, total: None)
    assert trio.current_time() - start == pytest.approx(5)
    assert bytes(await target.read(0, len(content))) == content
