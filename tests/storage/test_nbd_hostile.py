"""Servers that lie, stall, and go away in the middle: a clear line, in time, and nothing is taken from them."""

import math
import random
import struct
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from commandline import PATIENCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbdhostile import (
    GREETING,
    HostileServer,
    Request,
    ack,
    chunk,
    data_chunk,
    end_chunk,
    error_chunk,
    hole_chunk,
    info_blocks,
    info_export,
    option_reply,
    serving,
    simple,
)

from cowfs.errors import CowfsError, StorageError
from cowfs.storage import Network
from cowfs.storage.base import Region
from cowfs.storage.nbd import protocol as nbd
from cowfs.storage.nbd.handshake import MAX_REPLIES
from cowfs.storage.nbd.session import list_exports
from cowfs.storage.nbd.storage import NbdStorage

CONTENT = random.Random(1).randbytes(1 << 20)
#: no second chance
STRICT = Network(timeout=10, retry=0)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[HostileServer]:
    async with serving(tmp_path / "socket", CONTENT) as made:
        yield made


async def refused(server: HostileServer) -> str:
    """The sentence with which opening fails, or else reading; without the name."""
    with pytest.raises(CowfsError) as caught:
        await read_from(server)
    assert caught.value.file == server.uri
    assert "\n" not in str(caught.value)
    assert len(caught.value.message) < 500
    return caught.value.message


async def read_from(server: HostileServer, offset: int = 1000, length: int = 5000) -> bytes:
    with trio.fail_after(PATIENCE):
        storage = await NbdStorage.open(server.uri, writable=False, network=STRICT)
        try:
            return await storage.read_bytes(offset, length)
        finally:
            await storage.close()


async def test_it_serves_well_if_it_is_let(server: HostileServer) -> None:
    assert await read_from(server) == CONTENT[1000:6000]


# -- the handshake

_GREETINGS = {
    "no magic": (b"HTTP/1.1" + GREETING[8:], "greets in another way"),
    "another magic": (GREETING[:8] + b"IHAVEN'T" + GREETING[16:], "greets in another way"),
    "old": (nbd.INIT_MAGIC + b"\0" + nbd.OLDSTYLE_MAGIC + bytes(140), "old protocol"),
    "not fixed": (GREETING[:16] + b"\0\0", "fixed newstyle"),
}


@pytest.mark.parametrize("name", _GREETINGS)
async def test_greetings(server: HostileServer, name: str) -> None:
    server.greeting, says = _GREETINGS[name]
    assert says in await refused(server)


_GO = nbd.OPT_GO
_ANSWERS: dict[str, tuple[int, bytes, str]] = {
    "wrong magic": (_GO, b"\0" * 20, "no reply to an option"),
    "wrong echo": (_GO, ack(nbd.OPT_LIST), "was not asked for"),
    "oversize": (
        _GO,
        nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, _GO, nbd.REP_INFO, 1 << 31),
        "with 2147483648 bytes",
    ),
    "endless": (_GO, option_reply(_GO, nbd.REP_INFO, b"\0\x01") * (MAX_REPLIES + 1), "never comes to an end"),
    "nothing said": (_GO, ack(_GO), "how large"),
    "no info": (_GO, option_reply(_GO, nbd.REP_SERVER) + ack(_GO), "makes no sense"),
    "short info": (_GO, option_reply(_GO, nbd.REP_INFO, b"\0") + ack(_GO), "makes no sense"),
    "short export": (_GO, option_reply(_GO, nbd.REP_INFO, b"\0\0" + bytes(9)) + ack(_GO), "makes no sense"),
    "twice": (_GO, info_export(1) + info_export(2) + ack(_GO), "makes no sense"),
    "huge": (_GO, info_export(1 << 63) + ack(_GO), "9223372036854775808 bytes"),
    "no flags": (_GO, info_export(1, 0) + ack(_GO), "can do"),
    "odd blocks": (_GO, info_blocks(3, 4096, 8192) + info_export(3) + ack(_GO), "block sizes"),
    "no blocks": (_GO, info_blocks(0, 4096, 8192) + info_export(3) + ack(_GO), "block sizes"),
    "huge blocks": (_GO, info_blocks(1 << 17, 1 << 17, 1 << 20) + info_export(1 << 20) + ack(_GO), "block sizes"),
    "crossed blocks": (_GO, info_blocks(4096, 4096, 512) + info_export(4096) + ack(_GO), "block sizes"),
    "half a block": (_GO, info_blocks(4096, 4096, 4096) + info_export(4097) + ack(_GO), "in blocks of 4096"),
    "policy": (_GO, option_reply(_GO, nbd.REP_ERR_POLICY, b"go\x1b[31m away\n"), "policy forbids it ('go?[31m away')"),
    "TLS": (_GO, option_reply(_GO, nbd.REP_ERR_TLS_REQD), "write nbds://"),
    "TLS early": (nbd.OPT_STRUCTURED_REPLY, option_reply(8, nbd.REP_ERR_TLS_REQD), "write nbds://"),
    "shutdown": (_GO, option_reply(_GO, nbd.REP_ERR_SHUTDOWN), "shutting down"),
    "huge text": (_GO, option_reply(_GO, nbd.REP_ERR_INVALID, b"x" * 30_000), "x…"),
    "unknown": (_GO, option_reply(_GO, nbd.REP_ERR_UNKNOWN), "has no export ''"),
    "unknown error": (_GO, option_reply(_GO, nbd.REP_FLAG_ERROR | 99), "error 99"),
    "other context": (
        nbd.OPT_SET_META_CONTEXT,
        option_reply(10, nbd.REP_META_CONTEXT, bytes(4) + b"qemu:x") + ack(10),
        "metadata",
    ),
}


@pytest.mark.parametrize("name", _ANSWERS)
async def test_answers_to_options(server: HostileServer, name: str) -> None:
    option, answer, says = _ANSWERS[name]
    server.answers[option] = lambda data: answer
    assert says in await refused(server)


@pytest.mark.parametrize("missing", [nbd.OPT_STRUCTURED_REPLY, nbd.OPT_SET_META_CONTEXT])
async def test_simple_servers_do(server: HostileServer, missing: int) -> None:
    server.answers[missing] = lambda data: option_reply(missing, nbd.REP_ERR_UNSUP)
    if missing == nbd.OPT_STRUCTURED_REPLY:
        server.replies[nbd.CMD_READ] = lambda r: simple(r.cookie, CONTENT[r.offset : r.offset + r.length])
    assert await read_from(server) == CONTENT[1000:6000]
    storage = await NbdStorage.open(server.uri, writable=False)
    assert await storage.regions(5, 10) == [Region(5, 10, hole=False)]
    await storage.close()


async def test_lists_of_exports_have_an_end(server: HostileServer) -> None:
    storage = await NbdStorage.open(server.uri, writable=False)
    await storage.close()
    entry = option_reply(nbd.OPT_LIST, nbd.REP_SERVER, struct.pack(">I", 1) + b"a" + b"about it")
    for answer, says in (
        (entry * 10_001, "never comes to an end"),
        (option_reply(nbd.OPT_LIST, nbd.REP_SERVER, struct.pack(">I", 9) + b"a") + ack(nbd.OPT_LIST), "makes no sense"),
        (option_reply(nbd.OPT_LIST, nbd.REP_SERVER, b"a") + ack(nbd.OPT_LIST), "makes no sense"),
    ):
        server.answers[nbd.OPT_LIST] = lambda data, answer=answer: answer  # type: ignore[misc]
        with pytest.raises(StorageError, match=says):
            await list_exports(storage.address, 10)
    server.answers[nbd.OPT_LIST] = lambda data: entry + ack(nbd.OPT_LIST)
    assert await list_exports(storage.address, 10) == [("a", "about it")]
    server.answers[nbd.OPT_GO] = lambda data: option_reply(_GO, nbd.REP_ERR_UNKNOWN)
    assert await refused(server) == "the NBD server has no export ''; it has 'a'"


# -- replies


def _part(r: Request, start: int, end: int, *, done: bool = False) -> bytes:
    """Bytes ``start`` to ``end`` of what was asked for."""
    return data_chunk(r.cookie, r.offset + start, CONTENT[r.offset + start : r.offset + end], done=done)


_REPLIES: dict[str, tuple[Callable[[Request], bytes], str]] = {
    "no magic": (lambda r: bytes(16), "no reply"),
    "unknown cookie": (lambda r: end_chunk(r.cookie ^ 1 << 40), "was not made"),
    "cookie of nobody": (lambda r: simple(0), "was not made"),
    "simple": (lambda r: simple(r.cookie, bytes(r.length)), "wrong kind"),
    "nothing": (lambda r: end_chunk(r.cookie), "leaves out"),
    "a part": (lambda r: _part(r, 0, r.length - 1, done=True), "leaves out"),
    "a gap": (lambda r: _part(r, 0, 10) + _part(r, 11, r.length, done=True), "leaves out"),
    "overlapping": (lambda r: _part(r, 0, 600) + _part(r, 599, r.length, done=True), "twice"),
    "overlapping before": (lambda r: _part(r, 600, r.length) + _part(r, 0, 601, done=True), "twice"),
    "contained": (lambda r: _part(r, 0, r.length) + _part(r, 5, 6, done=True), "twice"),
    "hole over data": (lambda r: _part(r, 0, 600) + hole_chunk(r.cookie, r.offset, r.length, done=True), "twice"),
    "before": (lambda r: data_chunk(r.cookie, r.offset - 1, bytes(r.length), done=True), "not asked for"),
    "behind": (lambda r: data_chunk(r.cookie, r.offset + 1, bytes(r.length), done=True), "not asked for"),
    "too long": (lambda r: chunk(r.cookie, 1, length=9 + r.length), "not asked for"),
    "huge": (lambda r: chunk(r.cookie, 1, length=(1 << 32) - 1), "not asked for"),
    "huge hole": (lambda r: hole_chunk(r.cookie, r.offset, (1 << 32) - 1), "not asked for"),
    "far away": (lambda r: hole_chunk(r.cookie, (1 << 64) - 1, 1), "not asked for"),
    "no bytes": (lambda r: chunk(r.cookie, 1, bytes(8)), "not asked for"),
    "an empty hole": (lambda r: hole_chunk(r.cookie, r.offset, 0), "not asked for"),
    "half a hole": (lambda r: chunk(r.cookie, 2, bytes(11)), "wrong kind"),
    "unfinished nothing": (lambda r: chunk(r.cookie, 0), "wrong kind"),
    "filled nothing": (lambda r: chunk(r.cookie, 0, b"x", done=True), "wrong kind"),
    "unknown type": (lambda r: chunk(r.cookie, 99, done=True), "wrong kind"),
    "block status": (lambda r: chunk(r.cookie, 5, bytes(12), done=True), "wrong kind"),
    "endless": (lambda r: b"".join(_part(r, n, n + 1) for n in range(r.length)), "never comes to an end"),
    "endless errors": (lambda r: error_chunk(r.cookie, 5, done=False) * 1000, "never comes to an end"),
    "huge error": (lambda r: error_chunk(r.cookie, 5, b"x" * 5000), "with 5006 bytes"),
    "boundless error": (lambda r: chunk(r.cookie, 1 << 15 | 1, length=(1 << 32) - 1), "with 4294967295 bytes"),
    "short error": (lambda r: chunk(r.cookie, 1 << 15 | 1, bytes(5), done=True), "with 5 bytes"),
    "error without error": (lambda r: error_chunk(r.cookie, 0), "makes no sense"),
    "error that claims more": (lambda r: error_chunk(r.cookie, 5, b"abc", claimed=4), "makes no sense"),
    "error": (lambda r: error_chunk(r.cookie, 28, b"full\n\x07of it"), "No space left on device ('full ?of it')"),
    "error of another type": (
        lambda r: chunk(r.cookie, 1 << 15 | 77, nbd.ERROR.pack(1, 0) + b"more", done=True),
        "Operation not permitted",
    ),
    "unknown error": (lambda r: error_chunk(r.cookie, 4242), "Input/output error"),
    "error after all": (lambda r: _part(r, 0, r.length) + error_chunk(r.cookie, 5), "Input/output error"),
    "error before all": (
        lambda r: error_chunk(r.cookie, 5, done=False) + _part(r, 0, r.length, done=True),
        "Input/output error",
    ),
    "simple error": (lambda r: simple(r.cookie, error=12), "Cannot allocate memory"),
    "shutdown": (lambda r: simple(r.cookie, error=108), "shutting down"),
}


@pytest.mark.parametrize("name", _REPLIES)
async def test_replies_to_reads(server: HostileServer, name: str) -> None:
    reply, says = _REPLIES[name]
    server.replies[nbd.CMD_READ] = reply
    assert says in await refused(server)


@pytest.mark.parametrize(
    "reply",
    [
        lambda r: _part(r, 3000, r.length) + _part(r, 0, 1000) + _part(r, 1000, 3000, done=True),
        lambda r: _part(r, 0, 1) + _part(r, 1, r.length) + end_chunk(r.cookie),
        lambda r: (
            b"".join(_part(r, n * 500, n * 500 + 500) for n in (9, 0, 8, 1, 7, 2, 6, 3, 5, 4)) + end_chunk(r.cookie)
        ),
    ],
)
async def test_chunks_may_come_in_any_order(server: HostileServer, reply: Callable[[Request], bytes]) -> None:
    server.replies[nbd.CMD_READ] = reply
    assert await read_from(server) == CONTENT[1000:6000]


async def test_holes_are_zeros(server: HostileServer) -> None:
    server.replies[nbd.CMD_READ] = lambda r: _part(r, 4000, 5000) + hole_chunk(r.cookie, r.offset, 4000, done=True)
    assert await read_from(server) == bytes(4000) + CONTENT[5000:6000]


_STATUS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "without what was asked for"),
    "no extents": (bytes(4), "makes no sense"),
    "half an extent": (bytes(11), "makes no sense"),
    "another context": (nbd.CONTEXT.pack(8) + nbd.DESCRIPTOR.pack(1, 0), "was not asked for"),
    "an empty extent": (nbd.CONTEXT.pack(7) + nbd.DESCRIPTOR.pack(0, 0), "makes no sense"),
    "an endless list": (b"endless", "makes no sense"),
}


@pytest.mark.parametrize("name", _STATUS)
async def test_replies_about_holes(server: HostileServer, name: str) -> None:
    payload, says = _STATUS[name]

    def reply(r: Request) -> bytes:
        if not payload:
            return end_chunk(r.cookie)
        length = (1 << 32) - 4 if payload == b"endless" else len(payload)
        return chunk(r.cookie, nbd.CHUNK_BLOCK_STATUS, payload, done=True, length=length)

    server.replies[nbd.CMD_BLOCK_STATUS] = reply
    storage = await NbdStorage.open(server.uri, writable=False, network=STRICT)
    with pytest.raises(StorageError, match=says):
        await storage.regions(0, 4096)
    await storage.close()


async def test_holes_that_are_told_of_byte_by_byte_pass_for_data(server: HostileServer) -> None:
    server.replies[nbd.CMD_BLOCK_STATUS] = lambda r: chunk(
        r.cookie, nbd.CHUNK_BLOCK_STATUS, nbd.CONTEXT.pack(7) + nbd.DESCRIPTOR.pack(1, 3 * (r.offset & 1)), done=True
    )
    storage = await NbdStorage.open(server.uri, writable=False, network=STRICT)
    regions = await storage.regions(0, len(CONTENT))
    assert len(regions) <= 4097
    assert not regions[-1].hole
    assert sum(region.length for region in regions) == len(CONTENT)
    await storage.close()


async def test_one_who_lies_is_not_asked_again_for_the_same(server: HostileServer) -> None:
    """It fails at once, however long a server that is away would be waited for; what comes later is asked for anew."""
    server.replies[nbd.CMD_READ] = lambda r: bytes(16)
    storage = await NbdStorage.open(server.uri, writable=False, network=Network(1000, 1000, hold=True))
    with trio.fail_after(PATIENCE), pytest.raises(StorageError, match="what is no reply"):
        await storage.read_bytes(0, 1)
    del server.replies[nbd.CMD_READ]
    assert await storage.read_bytes(0, 100) == CONTENT[:100]
    assert server.connections == 2
    await storage.close()


# -- time


async def test_nothing_is_waited_for_longer_than_is_said(
    server: HostileServer, autojump_clock: trio.testing.MockClock
) -> None:
    """A server that sends byte after byte, each in time, and never comes to an end."""
    server.pause = 1
    begin = trio.current_time()
    assert "did not answer within 10 seconds" in await refused(server)
    assert trio.current_time() - begin < 12
    server.pause = 0
    storage = await NbdStorage.open(server.uri, writable=False, network=STRICT)
    server.pause = 0.1
    begin = trio.current_time()
    with pytest.raises(StorageError, match="did not answer within 10 seconds"):
        await storage.read_bytes(0, 1000)
    assert trio.current_time() - begin < 12
    await storage.close()


async def test_servers_that_say_nothing(server: HostileServer, autojump_clock: trio.testing.MockClock) -> None:
    async def silence(request: Request) -> None:
        await trio.sleep_forever()

    server.before_reply = silence
    begin = trio.current_time()
    assert "did not answer within 10 seconds" in await refused(server)
    assert 10 <= trio.current_time() - begin < 12


async def test_disconnects_at_every_byte(server: HostileServer) -> None:
    assert await read_from(server, length=20) == CONTENT[1000:1020]
    total = server.sent
    assert total > 100
    for cut in range(total):
        server.cut = cut
        sentence = await _short_refusal(server)
        assert any(words in sentence for words in ("closed the connection", "Connection reset", "Broken pipe")), (
            sentence
        )
    server.cut = math.inf
    assert await read_from(server) == CONTENT[1000:6000]


async def _short_refusal(server: HostileServer) -> str:
    with pytest.raises(StorageError) as caught:
        await read_from(server, length=20)
    return str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    twist=st.dictionaries(st.integers(0, 220), st.integers(1, 255), min_size=1, max_size=3),
    cut=st.integers(0, 260) | st.just(10_000),
)
def test_any_byte_may_be_another(tmp_path_factory: pytest.TempPathFactory, twist: dict[int, int], cut: int) -> None:
    """Either it is an answer, or there is a sentence; in time, and without a byte written where none belongs."""

    async def main() -> None:
        async with serving(tmp_path_factory.mktemp("s") / "s", CONTENT[:4096]) as server:
            server.twist, server.cut = twist, cut
            try:
                with trio.fail_after(PATIENCE):
                    storage = await NbdStorage.open(server.uri, writable=False, network=Network(10, 0))
                    try:
                        guarded = bytearray(b"\xaa" * 120)
                        await storage.read(7, [memoryview(guarded)[10:60], memoryview(guarded)[60:110]])
                        assert guarded[:10] == guarded[110:] == b"\xaa" * 10
                        await storage.regions(0, 100)
                    finally:
                        await storage.close()
            except CowfsError as error:
                assert error.file == server.uri

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


_CHUNKS = st.lists(
    st.tuples(
        st.sampled_from(["data", "data", "hole", "end", "error", "simple", "junk"]),
        st.integers(-2, 130),
        st.integers(0, 130),
        st.booleans(),
    ),
    max_size=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(chunks=_CHUNKS)
def test_any_chunks_make_what_was_asked_for_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[tuple[str, int, int, bool]]
) -> None:
    def reply(r: Request) -> bytes:
        sent = b""
        for kind, start, length, done in chunks:
            at = max(0, r.offset + start)
            sent += {
                "data": partial(data_chunk, r.cookie, at, CONTENT[at : at + length], done=done),
                "hole": partial(hole_chunk, r.cookie, at, length, done=done),
                "end": partial(end_chunk, r.cookie),
                "error": partial(error_chunk, r.cookie, length, b"text", done=done),
                "simple": partial(simple, r.cookie, error=length),
                "junk": partial(bytes, length),
            }[kind]()
        return sent

    async def main() -> None:
        async with serving(tmp_path_factory.mktemp("s") / "s", CONTENT[:4096]) as server:
            server.replies[nbd.CMD_READ] = reply
            storage = await NbdStorage.open(server.uri, writable=False, network=Network(10, 0))
            buffer = bytearray(b"\xaa" * 128)
            try:
                await storage.read(100, [memoryview(buffer)])
            except StorageError as error:
                assert error.file == server.uri
            else:
                # every byte has been said, once
                expected = bytearray(128)
                for kind, start, length, done in chunks:
                    if kind == "data":
                        expected[start : start + length] = CONTENT[100 + start : 100 + start + length]
                    if kind == "end" or (kind in ("data", "hole") and done):
                        break
                assert buffer == expected
            finally:
                await storage.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
