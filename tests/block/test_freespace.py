import itertools

from hypothesis import given
from hypothesis import strategies as st

from cowfs.block.freespace import FreeRuns


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5), st.booleans()), max_size=60))
def test_free_runs_are_a_set_of_clusters(operations: list[tuple[int, int, bool]]) -> None:
    runs, model = FreeRuns(), set[int]()
    for start, count, add in operations:
        clusters = set(range(start, start + count))
        if add and not clusters & model:
            runs.add(start, count)
            model |= clusters
        elif not add and (found := runs.peek(count)):
            first, taken = found
            assert taken <= count
            assert set(range(first, first + taken)) <= model
            runs.take(first, taken)
            model -= set(range(first, first + taken))
        assert runs.total == len(model)
        listed = list(runs)
        assert {c for first, length in listed for c in range(first, first + length)} == model
        assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(listed)), "runs are maximal"


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=30), st.integers(0, 60), st.integers(0, 20))
def test_any_part_can_be_taken_out(added: list[tuple[int, int]], start: int, count: int) -> None:
    runs, model = FreeRuns(), set[int]()
    for first, length in added:
        clusters = set(range(first, first + length))
        if not clusters & model:
            runs.add(first, length)
            model |= clusters
    runs.discard(start, start + count)
    model -= set(range(start, start + count))
    assert {c for first, length in runs for c in range(first, first + length)} == model
    assert (runs.total, len(runs)) == (len(model), len(list(runs)))
    for cluster in range(80):
        run = runs.around(cluster)
        assert (run is not None) == (cluster in model)
        assert run is None or run in list(runs)


def test_a_run_that_fits_closely_is_preferred_and_otherwise_the_longest() -> None:
    runs = FreeRuns()
    runs.add(10, 2)
    runs.add(20, 5)
    runs.add(30, 3)
    assert runs.peek(1) == (10, 1)
    assert runs.peek(3) == (30, 3)
    assert runs.peek(4) == (20, 4)
    assert runs.peek(9) == (20, 5)
