"""Changes that were given up and are not over: nothing newer gets to their range before they are."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from nbdhostile import FLAGS, HostileServer, Request, ack, info_export, serving

from cowfs.errors import StorageError
from cowfs.storage import Network
from cowfs.storage.nbd import protocol as nbd
from cowfs.storage.nbd import session as nbd_session
from cowfs.storage.nbd.storage import CHUNK, NbdStorage
from cowfs.storage.nbd.transport import LostError

CONTENT = random.Random(1).randbytes(1 << 20)
OLD = b"A" * 4096
NEW = b"B" * 4096
CHANGES = {
    "write": nbd.CMD_WRITE,
    "zeros": nbd.CMD_WRITE_ZEROES,
    "trim": nbd.CMD_TRIM,
}


class Gate:
    """Keeps the first changes that come, as many as ``count``, from being carried out until it is opened."""

    def __init__(self, count: int = 1) -> None:
        self._left = count
        self._open = trio.Event()
        self.reached = trio.Event()

    async def __call__(self, request: Request) -> None:
        if request.command in nbd.CHANGES and self._left:
            self._left -= 1
            self.reached.set()
            await self._open.wait()

    def open(self) -> None:
        self._open.set()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[HostileServer]:
    async with serving(tmp_path / "socket", CONTENT) as made, trio.open_nursery() as nursery:
        made.parallel = nursery
        yield made
        nursery.cancel_scope.cancel()


async def opened(server: HostileServer, *, hold: bool = False, retry: float = 100) -> NbdStorage:
    return await NbdStorage.open(server.uri, writable=True, network=Network(timeout=10, retry=retry, hold=hold))


def change(storage: NbdStorage, kind: str, data: bytes) -> Callable[[], Awaitable[None]]:
    """What changes the first 4096 bytes."""
    if kind == "write":
        return lambda: storage.write(0, [data])
    return lambda: (storage.punch if kind == "zeros" else storage.discard)(0, 4096)


async def cancelled_at(gate: Gate, work: Callable[[], Awaitable[None]]) -> None:
    """Begin to change something, and cancel that when the server has it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await gate.reached.wait()
        nursery.cancel_scope.cancel()


def changes(server: HostileServer) -> list[tuple[int, int, int]]:
    """Changes that the server was asked for."""
    return [entry for entry in server.asked if entry[0] in nbd.CHANGES]


# -- cancelled


@pytest.mark.parametrize("new", CHANGES)
@pytest.mark.parametrize("old", CHANGES)
async def test_nothing_overtakes_a_change_that_was_cancelled(server: HostileServer, old: str, new: str) -> None:
    storage = await opened(server)
    gate = server.before_reply = Gate()
    await cancelled_at(gate, change(storage, old, OLD))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(change(storage, new, NEW))
        await trio.testing.wait_all_tasks_blocked()
        assert changes(server) == [(CHANGES[old], 0, 4096)]
        # the same connection does everything else meanwhile
        await storage.write(8192, [b"beside"])
        assert await storage.read_bytes(8190, 8) == CONTENT[8190:8192] + b"beside"
        await storage.flush()
        gate.open()
    carried_out = [entry[0] for entry in server.log if entry[0] in nbd.CHANGES and entry[1] == 0]
    assert carried_out == [CHANGES[old], CHANGES[new]]
    if new == "write":
        assert server.content[:4096] == NEW
    assert server.connections == 1
    await storage.close()


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (4095, 2), (100, 50), (0, 1 << 20)])
async def test_nobody_reads_where_nobody_knows_what_there_will_be(
    server: HostileServer, offset: int, length: int
) -> None:
    storage = await opened(server)
    gate = server.before_reply = Gate()
    await cancelled_at(gate, change(storage, "write", OLD))
    got = bytearray(length)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.read, offset, [memoryview(got)])
        nursery.start_soon(storage.regions, offset, length)
        await trio.testing.wait_all_tasks_blocked()
        assert not any(entry[0] in (nbd.CMD_READ, nbd.CMD_BLOCK_STATUS) for entry in server.asked)
        assert await storage.read_bytes(4096, 10) == CONTENT[4096:4106]
        gate.open()
    assert got == (OLD + CONTENT[4096:])[offset : offset + length]
    await storage.close()


async def test_what_was_cancelled_and_read_all_the_same_survives_a_crash(server: HostileServer) -> None:
    storage = await opened(server)
    await storage.write(0, [b"first" * 100])
    gate = server.before_reply = Gate()
    buffer = bytearray(OLD)
    await cancelled_at(gate, lambda: storage.write(0, [buffer]))
    buffer[:] = bytes(4096)
    gate.open()
    assert await storage.read_bytes(0, 4096) == OLD
    server.crash()
    assert await storage.read_bytes(0, 4096) == OLD
    await storage.flush()
    assert server.durable[:4096] == OLD
    await storage.close()


async def test_half_a_request_is_sent_to_its_end(server: HostileServer) -> None:
    """More than the sockets take: who is cancelled has his buffers back, and the server gets what was in them."""
    storage = await opened(server)
    server.parallel = None
    gate = server.before_reply = Gate()
    buffer = bytearray(OLD * (len(CONTENT) // 4096))
    await cancelled_at(gate, lambda: storage.write(0, [buffer]))
    buffer[:] = b"\xaa" * len(buffer)
    gate.open()
    content = await storage.read_bytes(0, len(CONTENT))
    sent = CHUNK * len(changes(server))
    assert sent > CHUNK, "and another one had left in part"
    assert content == bytes(OLD * (sent // 4096)) + CONTENT[sent:]
    assert server.connections == 1
    await storage.close()


async def test_the_rest_of_a_block_is_read_when_the_doubt_has_ended(server: HostileServer) -> None:
    """Where the server has large blocks, writes of neighbours have them in common."""
    server.answers[nbd.OPT_GO] = lambda data: (
        info_export(len(CONTENT))
        + nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, nbd.OPT_GO, nbd.REP_INFO, 14)
        + nbd.INFO_TYPE.pack(nbd.INFO_BLOCK_SIZE)
        + nbd.BLOCK_SIZES.pack(4096, 4096, 1 << 20)
        + ack(nbd.OPT_GO)
    )
    storage = await opened(server)
    gate = server.before_reply = Gate()
    await cancelled_at(gate, lambda: storage.write(0, [OLD[:100]]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.write, 200, [NEW[:100]])
        await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert server.content[:300] == OLD[:100] + CONTENT[100:200] + NEW[:100]
    await storage.close()


async def test_closing_waits_for_what_was_cancelled(server: HostileServer) -> None:
    storage = await opened(server)
    gate = server.before_reply = Gate()
    await cancelled_at(gate, change(storage, "write", OLD))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.close)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        gate.open()
    assert server.content[:4096] == OLD


async def test_closing_ends_all_the_same_and_says_what_is_not_known(
    server: HostileServer, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    storage = await opened(server, hold=True)
    gate = server.before_reply = Gate()
    await cancelled_at(gate, change(storage, "write", OLD))
    begin = trio.current_time()
    await storage.close()
    assert 9 < trio.current_time() - begin < 12
    assert "closed, although a write of 4096 bytes at 0 has not been answered" in caplog.text


# -- late


async def test_a_late_change_is_not_made_again(server: HostileServer, autojump_clock: trio.testing.MockClock) -> None:
    storage = await opened(server)
    gate = server.before_reply = Gate()
    got: list[bytes] = []

    async def read() -> None:
        got.append(await storage.read_bytes(8192, 10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change(storage, "write", OLD))
        await trio.sleep(50)
        assert changes(server) == [(nbd.CMD_WRITE, 0, 4096)]
        assert storage.connections == 0, "it counts as away"
        nursery.start_soon(read)
        await trio.sleep(5)
        assert not got
        gate.open()
    assert got == [CONTENT[8192:8202]]
    assert changes(server) == [(nbd.CMD_WRITE, 0, 4096)]
    await storage.write(0, [NEW])
    await storage.flush()
    assert server.durable[:4096] == NEW
    assert server.connections == 1
    await storage.close()


@pytest.mark.parametrize("kind", CHANGES)
async def test_who_gives_up_a_late_change_is_told_and_nothing_overtakes_it(
    server: HostileServer, autojump_clock: trio.testing.MockClock, kind: str
) -> None:
    storage = await opened(server, retry=20)
    gate = server.before_reply = Gate()
    begin = trio.current_time()
    with pytest.raises(StorageError, match="is away: the server did not answer within 10 seconds"):
        await change(storage, kind, OLD)()
    assert 29 < trio.current_time() - begin < 32
    with pytest.raises(StorageError, match="is away"):
        await storage.write(0, [NEW])
    assert len(changes(server)) == 1
    gate.open()
    while not storage.connections:
        await trio.lowlevel.checkpoint()
    await storage.write(0, [NEW])
    assert server.content[:4096] == NEW
    await storage.close()


async def test_held_changes_wait_for_as_long_as_it_takes(
    server: HostileServer, autojump_clock: trio.testing.MockClock
) -> None:
    storage = await opened(server, hold=True)
    gate = server.before_reply = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(change(storage, "write", OLD))
        await trio.sleep(10_000)
        assert len(changes(server)) == 1
        gate.open()
    assert server.content[:4096] == OLD
    # until it is to end
    gate = server.before_reply = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_away, storage)
        await trio.sleep(10_000)
        storage.stop_holding()
    await storage.close()


async def _expect_away(storage: NbdStorage) -> None:
    with pytest.raises(StorageError, match="is away"):
        await storage.write(0, [NEW])


async def test_a_server_that_is_always_late_is_waited_for(
    server: HostileServer, autojump_clock: trio.testing.MockClock
) -> None:
    """What it may have lost is written again, and each write takes longer than it may."""

    async def take_long(request: Request) -> None:
        if request.command == nbd.CMD_WRITE:
            await trio.sleep(25)

    storage = await opened(server)
    server.before_reply = take_long
    await storage.write(0, [OLD])
    await storage.write(4096, [NEW])
    server.crash()
    await storage.flush()
    assert server.durable[:8192] == OLD + NEW
    assert len(changes(server)) == 4
    assert server.connections == 2
    await storage.close()


# -- connections that are gone


async def test_what_a_closed_connection_had_under_way_is_made_again_and_nothing_newer_for_a_while(
    server: HostileServer, autojump_clock: trio.testing.MockClock
) -> None:
    """The first form of it may outlive the server that was asked."""
    storage = await opened(server)
    gate = server.before_reply = Gate()
    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(change(storage, "write", OLD))
        await gate.reached.wait()
        server.drop()
    assert trio.current_time() - begin < 5
    assert changes(server) == [(nbd.CMD_WRITE, 0, 4096)] * 2
    assert await storage.read_bytes(0, 4096) == OLD, "which is what is there in any case"
    await storage.write(4096, [b"beside"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(change(storage, "write", NEW))
        await trio.sleep(8 - trio.current_time() + begin)
        assert len(changes(server)) == 3
        gate.open()
    assert 10 <= trio.current_time() - begin < 12
    assert server.content[:4096] == NEW
    await storage.close()


async def test_what_was_cancelled_before_its_connection_was_closed_is_in_doubt_for_a_while(
    server: HostileServer, autojump_clock: trio.testing.MockClock
) -> None:
    storage = await opened(server, retry=0)
    gate = server.before_reply = Gate()
    begin = trio.current_time()
    await cancelled_at(gate, change(storage, "write", OLD))
    server.drop()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 5)
    gate.open()
    assert await storage.read_bytes(0, 4096) == OLD
    assert 10 <= trio.current_time() - begin < 12
    assert len(changes(server)) == 1
    await storage.close()


async def test_where_nothing_tells_whether_a_change_is_over_it_fails(server: HostileServer) -> None:
    storage = await opened(server, hold=True)
    gate = server.before_reply = Gate()
    says = r"has not answered a write of 4096 bytes at 0, and the connection is lost \(Connection timed out\)"

    async def fail() -> None:
        with pytest.raises(StorageError, match=says) as caught:
            await storage.write(0, [OLD])
        assert caught.value.file == server.uri

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        await gate.reached.wait()
        # as the kernel reports it of a host that says nothing any more
        assert storage._link.session is not None
        storage._link.session.connections[0].fail(LostError("Connection timed out"))
    for attempt in (
        change(storage, "write", NEW),
        change(storage, "trim", NEW),
        lambda: storage.read_bytes(4000, 100),
    ):
        with pytest.raises(StorageError, match=says):
            await attempt()
    gate.open()
    await storage.write(4096, [b"beside"])
    assert await storage.read_bytes(4096, 6) == b"beside"
    assert len(changes(server)) == 2
    await storage.close()


async def test_a_session_ends_when_the_last_of_its_connections_has_answered(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_session, "BUSY", 1)
    server.answers[nbd.OPT_GO] = lambda data: info_export(len(CONTENT), FLAGS | nbd.CAN_MULTI_CONN) + ack(nbd.OPT_GO)
    storage = await opened(server)
    while storage.connections < nbd_session.CONNECTIONS:
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(storage.read_bytes, number, 1)
    gate = server.before_reply = Gate()
    await cancelled_at(gate, change(storage, "write", OLD))
    assert storage._link.session is not None
    idle = [each for each in storage._link.session.connections if not each.load]
    assert len(idle) == nbd_session.CONNECTIONS - 1
    idle[0].fail(LostError("Connection timed out"))
    before = server.connections
    async with trio.open_nursery() as nursery:
        nursery.start_soon(change(storage, "write", NEW))
        await trio.testing.wait_all_tasks_blocked()
        assert (len(changes(server)), server.connections) == (1, before)
        gate.open()
    assert server.content[:4096] == NEW
    assert server.connections == before + 1
    await storage.close()
