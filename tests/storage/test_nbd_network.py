"""Servers that go away and come back, requests that are cancelled, writes that must survive both."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing
from commandline import PATIENCE
from nbdhostile import FLAGS, HostileServer, Request, ack, info_export, serving, simple
from nbdservers import Servers

from cowfs.errors import StorageError
from cowfs.storage import Network
from cowfs.storage.nbd import journal
from cowfs.storage.nbd import protocol as nbd
from cowfs.storage.nbd import request as nbd_request
from cowfs.storage.nbd.storage import CHUNK, NbdStorage

CONTENT = random.Random(1).randbytes(1 << 20)
_GO = nbd.OPT_GO


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[HostileServer]:
    async with serving(tmp_path / "socket", CONTENT) as made:
        yield made


async def opened(
    server: HostileServer, *, writable: bool = False, seconds: float = 10, hold: bool = False
) -> NbdStorage:
    return await NbdStorage.open(server.uri, writable=writable, network=Network(seconds, retry=100, hold=hold))


def be_away(server: HostileServer) -> None:
    """Take connections, and end them."""
    server.cut = 0
    server.drop()


def be_back(server: HostileServer) -> None:
    server.cut = float("inf")


async def test_a_connection_that_is_lost_is_made_again(server: HostileServer) -> None:
    storage = await opened(server)
    for number in range(3):
        assert await storage.read_bytes(number, 100) == CONTENT[number : number + 100]
        server.drop()
    assert await storage.read_bytes(9, CHUNK * 3) == CONTENT[9 : 9 + CHUNK * 3]
    assert server.connections == 4
    await storage.close()


async def test_a_server_that_shuts_down_is_left_for_the_next_one(server: HostileServer) -> None:
    storage = await opened(server)
    server.replies[nbd.CMD_READ] = lambda r: simple(r.cookie, error=108)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.read_bytes, 0, 100)
        while server.connections < 2:
            await trio.lowlevel.checkpoint()
        del server.replies[nbd.CMD_READ]
    await storage.close()


async def test_requests_fail_when_the_server_has_been_away_for_too_long(
    server: HostileServer, autojump_clock: trio.testing.MockClock
) -> None:
    storage = await opened(server)
    be_away(server)
    begin = trio.current_time()
    with pytest.raises(StorageError, match="is away: the server has closed the connection") as caught:
        await storage.read_bytes(0, 100)
    assert caught.value.file == server.uri
    assert 99 < trio.current_time() - begin < 110
    # the others need not wait for what is known by now
    begin = trio.current_time()
    with pytest.raises(StorageError):
        await storage.read_bytes(0, 100)
    assert trio.current_time() - begin < 1
    attempts = server.connections
    assert 20 < attempts < 40, "the pauses between attempts grow, up to a bound"
    be_back(server)
    await trio.sleep(6)
    assert await storage.read_bytes(0, 100) == CONTENT[:100]
    await storage.close()


async def test_a_server_that_answers_nothing_but_greetings_is_away_too(
    server: HostileServer, autojump_clock: trio.testing.MockClock
) -> None:
    async def silence(request: Request) -> None:
        await trio.sleep_forever()

    storage = await opened(server)
    server.before_reply = silence
    begin = trio.current_time()
    with pytest.raises(StorageError, match="did not answer within 10 seconds"):
        await storage.read_bytes(0, 100)
    assert 100 < trio.current_time() - begin < 125
    await storage.close()


async def test_requests_are_held_if_that_is_asked_for(
    server: HostileServer, autojump_clock: trio.testing.MockClock
) -> None:
    storage = await opened(server, hold=True)
    be_away(server)
    got: list[bytes] = []

    async def read() -> None:
        got.append(await storage.read_bytes(0, 100))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.sleep(10_000)
        assert not got
        be_back(server)
    assert got == [CONTENT[:100]]
    # whoever waits when it is closed does so no longer
    be_away(server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_closed, storage)
        await trio.sleep(10)
        await storage.close()


async def _expect_closed(storage: NbdStorage) -> None:
    with pytest.raises(StorageError, match="was closed"):
        await storage.read_bytes(0, 100)


async def test_closing_ends_what_is_under_way_and_says_so(server: HostileServer) -> None:
    """Wherever it is: not yet sent, sent, or waiting for the answer."""

    async def silence(request: Request) -> None:
        await trio.sleep_forever()

    for steps in range(20):
        storage = await opened(server)
        server.before_reply = silence
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_expect_closed, storage)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                await storage.close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (info_export(len(CONTENT) - 1), "the export has 1048575 bytes now, and had 1048576"),
        (info_export(len(CONTENT) + 1), "the export has 1048577 bytes now, and had 1048576"),
        (info_export(len(CONTENT), FLAGS | nbd.READ_ONLY), "can do less"),
        (info_export(len(CONTENT), FLAGS & ~nbd.SEND_FLUSH), "can do less"),
        (info_export(1 << 63), "says that its export has"),
    ],
)
async def test_an_export_that_has_become_another_is_not_used(
    server: HostileServer, autojump_clock: trio.testing.MockClock, answer: bytes, says: str
) -> None:
    storage = await opened(server, writable=True)
    server.answers[_GO] = lambda data: answer + ack(_GO)
    server.drop()
    reads = len(server.log)
    with pytest.raises(StorageError, match=says) as caught:
        await storage.read_bytes(0, 100)
    assert str(caught.value).count(storage.name) == 1
    assert len(server.log) == reads, "nothing is read from it"
    del server.answers[_GO]
    await trio.sleep(6)
    assert await storage.read_bytes(0, 100) == CONTENT[:100]
    await storage.close()


# -- writes


async def test_what_a_crashed_server_has_lost_is_written_again(server: HostileServer) -> None:
    storage = await opened(server, writable=True)
    model = bytearray(CONTENT)

    async def write(offset: int, data: bytes) -> None:
        await storage.write(offset, [data])
        model[offset : offset + len(data)] = data

    await write(0, b"durable")
    await storage.flush()
    await write(3, b"lost")
    await write(5, b"overlapping")
    await storage.punch(6, 2)
    model[6:8] = bytes(2)
    await write(500_000, random.Random(2).randbytes(400_000))
    server.crash()
    assert server.content[:7] == b"durable"
    await storage.flush()
    assert server.durable == model
    # and what is durable is not written once more
    writes = [entry for entry in server.log if entry[0] == nbd.CMD_WRITE]
    server.crash()
    await storage.flush()
    assert [entry for entry in server.log if entry[0] == nbd.CMD_WRITE] == writes
    await storage.close()


async def test_no_more_is_kept_than_there_is_room_for(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BOUND", 100_000)
    storage = await opened(server, writable=True)
    data = random.Random(3).randbytes(60_000)
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(storage.write, number * 60_000, [data])
    flushes = sum(command == nbd.CMD_FLUSH for command, _, _ in server.log)
    assert flushes >= 3
    server.crash()
    await storage.flush()
    assert server.durable[:480_000] == data * 8
    await storage.close()


def test_what_is_written_again_is_written_in_order() -> None:
    """At a time go only those writes of which the order does not matter."""
    kept = journal.Journal()
    for offset, length in ((0, 10), (10, 10), (5, 10), (100, 10), (0, 200)):
        kept.record([nbd_request.Request(nbd.CMD_WRITE, offset, length, data=[memoryview(bytes(length))])])
    batches = [[(entry.offset, entry.length) for entry in batch] for batch in kept.batches(32)]
    assert batches == [[(0, 10), (10, 10)], [(5, 10), (100, 10)], [(0, 200)]]
    assert [len(batch) for batch in kept.batches(1)] == [1] * 5
    kept.forget(4)
    assert [len(batch) for batch in kept.batches(32)] == [1]
    kept.forget(5)
    assert not list(kept.batches(32))
    assert kept.size == 0


async def test_writes_under_way_are_made_again_as_a_whole(server: HostileServer) -> None:
    storage = await opened(server, writable=True)
    data = random.Random(4).randbytes(3 * CHUNK)
    seen = 0

    async def crash_at_the_second(request: Request) -> None:
        nonlocal seen
        seen += request.command == nbd.CMD_WRITE
        if seen == 2:
            seen += 1
            server.crash()

    server.before_reply = crash_at_the_second
    await storage.write(5, [data])
    await storage.flush()
    assert server.durable[5 : 5 + len(data)] == data
    await storage.close()


async def test_a_flush_that_failed_goes_on_failing(server: HostileServer) -> None:
    storage = await opened(server, writable=True)
    await storage.write(0, [b"x"])
    server.replies[nbd.CMD_FLUSH] = lambda r: simple(r.cookie, error=5)
    with pytest.raises(StorageError, match="cannot flush: Input/output error"):
        await storage.flush()
    del server.replies[nbd.CMD_FLUSH]
    with pytest.raises(StorageError, match="cannot flush"):
        await storage.flush()
    await storage.close()


async def test_a_flush_without_a_server_is_made_good(
    server: HostileServer, autojump_clock: trio.testing.MockClock
) -> None:
    storage = await opened(server, writable=True)
    await storage.write(0, [b"x"])
    be_away(server)
    server.crash()
    with pytest.raises(StorageError, match="is away"):
        await storage.flush()
    be_back(server)
    await trio.sleep(6)
    await storage.flush()
    assert server.durable[:1] == b"x"
    await storage.close()


# -- cancellation


@pytest.mark.parametrize("writing", [False, True])
async def test_whoever_is_cancelled_leaves_nothing_behind(server: HostileServer, writing: bool) -> None:
    """After every number of steps; the next request is answered right, and nothing comes into a buffer given up."""
    storage = await opened(server, writable=writing, seconds=1000)
    expected = bytearray(CONTENT)
    cancelled = 0
    for steps in range(60):
        buffer = bytearray(3 * CHUNK)
        async with trio.open_nursery() as nursery:
            if writing:
                nursery.start_soon(storage.write, 0, [CONTENT[: 3 * CHUNK]])
            else:
                nursery.start_soon(storage.read, 0, [memoryview(buffer)])
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            cancelled += bool(nursery.child_tasks)
            nursery.cancel_scope.cancel()
        buffer[:] = b"\xaa" * len(buffer)
        # long before a deadline would help
        with trio.fail_after(PATIENCE):
            assert await storage.read_bytes(steps, 5000) == expected[steps : steps + 5000]
        assert buffer == b"\xaa" * len(buffer)
    assert cancelled > 5, "some were cancelled before they had come to their end"
    await storage.close()


async def test_a_reply_that_nobody_waits_for_does_not_take_a_place(server: HostileServer) -> None:
    gate = trio.Event()

    async def wait(request: Request) -> None:
        await gate.wait()

    storage = await opened(server)
    server.before_reply = wait
    for _ in range(100):
        with trio.move_on_after(0.001):
            await storage.read_bytes(0, 100)
    gate.set()
    assert await storage.read_bytes(0, 100) == CONTENT[:100]
    assert server.connections == 1
    await storage.close()


# -- real servers


@pytest.mark.parametrize("how", ["kill", "freeze"])
async def test_a_stream_goes_on_when_the_server_does(servers: Servers, tmp_path: Path, how: str) -> None:
    path = tmp_path / "disk.raw"
    _write(path, CONTENT * 16)
    server = servers.qemu(path)
    storage = await NbdStorage.open(server.uri, writable=False, network=Network(timeout=1, retry=60))
    got = bytearray()

    async def read() -> None:
        while len(got) < storage.length:
            got.extend(await storage.read_bytes(len(got), 100_000 if how == "kill" else 1 << 20))

    async def trouble() -> None:
        while len(got) < storage.length // 3:
            await trio.lowlevel.checkpoint()
        if how == "kill":
            server.kill()
            await trio.to_thread.run_sync(server.start)
        else:
            server.freeze()
            while storage.connections:
                await trio.lowlevel.checkpoint()
            server.thaw()

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(trouble)
    assert got[: storage.length] == CONTENT * 16
    await storage.close()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
