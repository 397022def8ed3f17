from hypothesis import given
from hypothesis import strategies as st

from cowfs.block.alignment import align_down, align_up, split

_UNITS = st.integers(0, 24).map(lambda bits: 1 << bits)


@given(st.integers(0, 1 << 50), st.integers(1, 1 << 30), _UNITS)
def test_a_split_covers_the_range_with_whole_units(offset: int, length: int, unit: int) -> None:
    start, end, head, tail = split(offset, length, unit)
    assert start % unit == end % unit == 0
    assert 0 <= head < unit
    assert 0 <= tail < unit
    assert start + head == offset
    assert offset + length + tail == end


@given(st.integers(0, 1 << 50), _UNITS)
def test_aligning_moves_by_less_than_a_unit(value: int, unit: int) -> None:
    assert align_down(value, unit) <= value <= align_up(value, unit)
    assert align_up(value, unit) - align_down(value, unit) in (0, unit)
