import trio
from trio.testing import wait_all_tasks_blocked

from cowfs.block.quiescence import Readers


async def test_gone_waits_for_those_inside_but_not_for_those_who_come_later() -> None:
    readers = Readers()
    done = trio.Event()

    async def wait() -> None:
        await readers.gone()
        done.set()

    async with trio.open_nursery() as nursery:
        with readers.inside():
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            assert not done.is_set()
            late = readers.inside()
            late.__enter__()
        await wait_all_tasks_blocked()
        assert done.is_set()
        late.__exit__(None, None, None)


async def test_a_mark_passes_when_its_readers_have_left() -> None:
    readers = Readers()
    assert readers.mark().passed
    with readers.inside():
        mark = readers.mark()
        assert not mark.passed
        with readers.inside():
            pass
        assert not mark.passed
    assert mark.passed
