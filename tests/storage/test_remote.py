"""Objects of HTTP servers, good and bad."""

import errno
import itertools
import logging
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from commandline import PATIENCE
from httpservers import Handler, Web, drop, saying, stalled, status, web_server

from cowfs.errors import CowfsError, NotFound, ReadOnly, StorageError, Unsupported, UsageError
from cowfs.storage import Network, RemoteStorage, cache, is_remote, open_storage
from cowfs.storage.ahead import Ahead
from cowfs.storage.base import Region
from cowfs.storage.cache import BLOCK
from cowfs.storage.remote.address import without_credentials

SIZE = (9 << 20) + 12_345
CONTENT = random.Random(2).randbytes(SIZE)
PATIENT = Network(10, 30)


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as web:
        web.put("disk.raw", CONTENT)
        yield web


@asynccontextmanager
async def opened(url: str, network: Network = PATIENT) -> AsyncIterator[RemoteStorage]:
    storage = await open_storage(url, writable=False, network=network)
    assert isinstance(storage, RemoteStorage)
    try:
        yield storage
    finally:
        await storage.close()


async def refused(url: str, kind: type[CowfsError]) -> str:
    with pytest.raises(kind) as caught:
        await open_storage(url, writable=False, network=Network(2, 1))
    return str(caught.value)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


def views(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(b"\xaa" * size)) for size in sizes]


async def test_reads_of_every_shape(web: Web) -> None:
    async with opened(web.url("disk.raw")) as storage:
        assert (storage.length, storage.read_only, storage.is_remote) == (SIZE, True, True)
        for sizes in ((1,), (4096,), (3, 5000, 1, 70_000), (5 << 20, 1, 3 << 20), (0, 7, 0), (1,) * 300):
            for offset in (0, 1, 4095, 200_001, SIZE - 1, SIZE - 4000, SIZE, SIZE + 5):
                expected = CONTENT[offset : offset + sum(sizes)].ljust(sum(sizes), b"\0")
                buffers = views(*sizes)
                await storage.read(offset, buffers)
                assert b"".join(buffers) == expected, (sizes, offset)
                buffers = views(*sizes)
                if storage.read_now(offset, buffers):
                    assert b"".join(buffers) == expected, (sizes, offset)
        ranges = [(0, 10), (SIZE - 3, 10), (70_000, 300_000), (5, 0)]
        assert await storage.read_each(ranges) == [CONTENT[at : at + size].ljust(size, b"\0") for at, size in ranges]
        found = await storage.regions(SIZE - 5, 10)
        assert found == [Region(SIZE - 5, 5, hole=False), Region(SIZE, 5, hole=True)]


async def test_what_has_come_in_is_not_asked_for_again(web: Web) -> None:
    async with opened(web.url("disk.raw")) as storage:
        assert not storage.read_now(5 << 20, views(10))
        await storage.read_bytes(5 << 20, 10)
        asked = len(web.seen.ranges)
        assert storage.read_now((5 << 20) + 100, views(1000))
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(storage.read_bytes, 7 << 20, 3 * BLOCK)
        assert web.seen.ranges[asked:] == [(7 << 20, (7 << 20) + 3 * BLOCK)], (
            "one request for neighbours and all readers"
        )


async def test_one_who_reads_in_order_is_served_ahead_by_several_requests(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = threading.Event()

    def slow(handler: Handler) -> bool:
        if web.seen.at_once >= 3:
            three.set()
        found = handler.range_of(web.things["/disk.raw"])
        # the reader is known by then
        if found is not None and found[0] >= 2 << 20:
            assert three.wait(PATIENCE)
        return False

    # of a fast link, however fast this machine is
    monkeypatch.setattr(Ahead, "measured", lambda self, *_: setattr(self, "rate", 1e9))
    async with opened(web.url("disk.raw")) as storage:
        web.fault = slow
        for offset in range(0, SIZE, 128 << 10):
            assert (
                await storage.read_bytes(offset, min(128 << 10, SIZE - offset))
                == CONTENT[offset : offset + (128 << 10)]
            )
    assert web.seen.most_at_once >= 3
    assert sum(end - start for start, end in web.seen.ranges) == SIZE, "nothing comes twice"
    assert max(end - start for start, end in web.seen.ranges) >= 1 << 20
    assert len(web.seen.ranges) < 40


async def test_random_reads_fetch_little(web: Web) -> None:
    places = random.Random(3).sample(range(1, SIZE // BLOCK, 2), 20)
    async with opened(web.url("disk.raw")) as storage:
        for place in places:
            await storage.read_bytes(place * BLOCK + 100, 4096)
        assert storage.fetched_bytes == 20 * BLOCK


async def test_memory_is_bounded(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BOUND", 1 << 20)
    async with opened(web.url("disk.raw")) as storage:
        assert await storage.read_bytes(0, SIZE) == CONTENT
        assert len(cache.Blocks._all) == 16
        assert await storage.read_each([(0, 10), (5 << 20, 10)]) == [CONTENT[:10], CONTENT[5 << 20 :][:10]]
    assert not cache.Blocks._all


async def test_an_empty_object(web: Web) -> None:
    async with opened(web.put("none", b"")) as storage:
        assert storage.length == 0
        assert await storage.read_bytes(0, 10) == bytes(10)


async def test_nothing_can_be_written(web: Web) -> None:
    with pytest.raises(ReadOnly):
        await open_storage(web.url("disk.raw"), writable=True)
    async with opened(web.url("disk.raw")) as storage:
        for work in (storage.write(0, [b"x"]), storage.truncate(5), storage.punch(0, 5), storage.reopen(writable=True)):
            with pytest.raises(ReadOnly):
                await work


async def test_servers_that_are_of_no_use(web: Web) -> None:
    assert "not the parts" in await refused(web.put("whole", CONTENT, ranges=False), Unsupported)
    assert "no such object" in await refused(web.url("missing"), NotFound)
    for number, text in ((403, "does not allow"), (401, "credentials come from"), (500, "status 500"), (418, "418")):
        web.faults = [status(number)]
        assert text in await refused(web.url("disk.raw"), StorageError)
    web.stop()
    assert "cannot connect" in await refused(web.url("disk.raw"), StorageError)


@pytest.mark.parametrize(
    "header",
    [
        "bytes 1-65536/{size}",
        "bytes 0-65535/*",
        "bytes 0-65535",
        "0-65535/{size}",
        "bytes 0-65534/{size}",
        "bytes 0-65536/{size}",
        "bytes 0-65535/99999999999999999999999999",
        "bytes 0-65535/-5",
        "bytes 65535-0/{size}",
        "",
    ],
)
async def test_a_range_that_is_another_than_was_asked_for(web: Web, header: str) -> None:
    web.fault = saying(lambda handler: handler.answer(**{"Content-Range": header.format(size=SIZE)}))
    assert "the server sends" in await refused(web.url("disk.raw"), StorageError)


@pytest.mark.parametrize("kind", ["short", "drop", "500", "429", "stall"])
async def test_what_goes_wrong_for_a_while_is_done_again(web: Web, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()

    def short(handler: Handler) -> bool:
        thing = web.things["/disk.raw"]
        start, end = handler.range_of(thing) or (0, 0)
        span = {"Content-Range": f"bytes {start}-{end - 1}/{SIZE}", "ETag": thing.tag}
        handler.say(206, thing.content[start:end], span, sent=1000)
        return True

    faults = {"short": short, "drop": drop, "500": status(500), "429": status(429), "stall": stalled(over)}
    async with opened(web.url("disk.raw"), Network(1 if kind == "stall" else 10, 30)) as storage:
        web.faults = [faults[kind]] * 2
        assert await storage.read_bytes(5 << 20, 100) == CONTENT[5 << 20 :][:100]
        assert not web.faults
    over.set()


async def test_for_as_long_as_was_said(web: Web) -> None:
    async with opened(web.url("disk.raw"), Network(1, 0.3)) as storage:
        web.fault = status(503)
        with pytest.raises(StorageError, match="is away: it answers with status 503") as caught:
            await storage.read_bytes(5 << 20, 100)
        assert caught.value.errno == errno.EIO
        web.fault = None
        assert await storage.read_bytes(5 << 20, 100) == CONTENT[5 << 20 :][:100]


async def test_requests_that_are_held_end_with_the_program_or_the_storage(web: Web) -> None:
    async with opened(web.url("disk.raw"), Network(1, 0, hold=True)) as storage:
        web.fault = status(503)
        failed = trio.Event()

        async def read(offset: int) -> None:
            with pytest.raises(StorageError):
                await storage.read_bytes(offset, 100)
            failed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 5 << 20)
            await until(lambda: storage._away_since is not None)
            storage.stop_holding()
            await failed.wait()
        storage._network = Network(1, 0, hold=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 6 << 20)
            await until(lambda: bool(storage._fetcher._under_way))
            await storage.close()


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
async def test_an_object_that_changes_is_not_read_any_more(
    web: Web, etag: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    url = web.put("changing", CONTENT, etag=etag)
    async with opened(url) as storage:
        assert await storage.read_bytes(0, 100) == CONTENT[:100]
        web.put("changing", CONTENT[::-1], etag=etag and 'W/"other"')
        with caplog.at_level(logging.ERROR):
            for offset in (5 << 20, 6 << 20, 8 << 20):
                with pytest.raises(StorageError, match="has changed since it was opened") as caught:
                    await storage.read_bytes(offset, 100)
                assert caught.value.errno == errno.ESTALE
        assert len(caplog.records) == 1, "one line, and no more"
        assert await storage.read_bytes(0, 100) == CONTENT[:100], "what has come in is of the first version"
    with pytest.raises(StorageError, match="has changed"):
        async with opened(web.put("changing", CONTENT)) as storage:
            web.put("changing", CONTENT + b"more", etag=web.things["/changing"].tag)
            await storage.read_bytes(5 << 20, 100)


async def test_a_cancelled_reader_disturbs_nobody(web: Web) -> None:
    over = threading.Event()
    async with opened(web.url("disk.raw"), Network(5, 30)) as storage:
        web.faults = [stalled(over)]
        with trio.move_on_after(0.1):
            await storage.read_bytes(5 << 20, 100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(storage.read_bytes, 5 << 20, 100)
            over.set()
        assert storage.read_now(5 << 20, views(100))


@pytest.mark.parametrize(
    "name",
    [
        "https://user:geheim@host/x",
        "https://user@host/x",
        "s3://geheim@bucket/x",
        "https://host/x?X-Amz-Signature=geheim",
        "https://host/x?a=b;sig=geheim",
        "https://host/x?a=b&%73ig=geheim",
        "https://host/x?__token__=geheim",
        "https://host/x?hdnts=geheim",
        "https://host/x?q-signature=geheim",
        "https://host/x#access_token=geheim",
        "s3://bucket/x?X-Amz-Signature=geheim",
    ],
)
async def test_credentials_are_refused_and_not_repeated(name: str) -> None:
    text = await refused(name, Unsupported)
    assert "configuration" in text
    assert "geheim" not in text


def test_no_sentence_has_credentials_in_it() -> None:
    text = "cannot open 'https://me:geheim@h/x' (of http://h/y?sig=geheim&a=b); see https://h/z?page=2, nbd://u@h/e"
    assert without_credentials(text) == (
        "cannot open 'https://…@h/x' (of http://h/y?…); see https://h/z?page=2, nbd://…@h/e"
    )


@pytest.mark.parametrize("name", ["https://", "https://host", "http://host:99999/x", "http://h/a b", "http://h/x#y"])
async def test_names_that_are_none(name: str) -> None:
    await refused(name, UsageError)


async def test_which_names_lead_over_a_network() -> None:
    for name in ("http://h/x", "HTTPS://h/x", "s3://b/k", "gs://b/k", "sftp://h/x"):
        assert is_remote(name)
    for name in (
        "./http://h/x",
        "/http://h/x",
        "file:///x",
        "memory://x",
        "local://x",
        "https:/x",
        "zip://x",
        "data:x",
    ):
        assert not is_remote(name)
    await refused("https://h/x::s3://y/z", Unsupported)


async def test_redirections(web: Web) -> None:
    def elsewhere(handler: Handler) -> bool:
        if handler.path != "/old":
            return False
        handler.say(302, b"", {"Location": web.url("disk.raw")})
        return True

    web.fault = elsewhere
    async with opened(web.url("old")) as storage:
        assert storage.name == web.url("old")
        assert await storage.read_bytes(5 << 20, 100) == CONTENT[5 << 20 :][:100]
    web.fault = saying(lambda handler: handler.say(302, b"", {"Location": web.url("old")}))
    assert "without end" in await refused(web.url("old"), StorageError)


# -- other names for the same version


def _naming(web: Web, name: Callable[[], str]) -> None:
    def answer(handler: Handler) -> None:
        handler.server.web.things["/disk.raw"].etag = name()
        handler.answer()

    web.fault = saying(answer)


@pytest.mark.parametrize("weak", ["", "W/"])
async def test_names_that_come_and_go_tell_nothing(web: Web, weak: str) -> None:
    """A new one each time, or those of several servers behind one; what changes is noticed by the content."""
    for names in (itertools.count(), itertools.cycle([1, 2, 2])):
        web.put("disk.raw", CONTENT)
        _naming(web, lambda names=names: f'{weak}"{next(names)}"')  # type: ignore[misc]
        async with opened(web.url("disk.raw")) as storage:
            assert await storage.read_bytes(0, 6 << 20) == CONTENT[: 6 << 20]
            assert storage.version == ""
            web.put("disk.raw", CONTENT[::-1])
            with pytest.raises(StorageError, match=r"has changed since it was opened .* sample") as caught:
                await storage.read_bytes(6 << 20, 3 << 20)
            assert caught.value.errno == errno.ESTALE


async def test_a_name_that_lasts_is_of_another_version(web: Web) -> None:
    async with opened(web.url("disk.raw")) as storage:
        web.things["/disk.raw"].etag = '"other"'
        with pytest.raises(StorageError, match=r"again and again; [0-9]+ samples? of its content .* the same"):
            await storage.read_bytes(5 << 20, 100)


async def test_one_mirror_that_differs_ends_it(web: Web) -> None:
    """By a single sample."""
    place = (SIZE - 4096) * 7 // 29 // 4096 * 4096
    with web_server() as same, web_server() as other:
        same.put("disk.raw", CONTENT, etag='"same"')
        other.put("disk.raw", CONTENT[:place] + b"?" + CONTENT[place + 1 :], etag='"other"')
        mirrors = iter([web, web, same, same, same])

        def elsewhere(handler: Handler) -> bool:
            if handler.path != "/mirrored":
                return False
            handler.say(302, b"", {"Location": next(mirrors, other).url("disk.raw")})
            return True

        web.fault = elsewhere
        async with opened(web.url("mirrored")) as storage:
            for offset in (1 << 20, 3 << 20, 5 << 20):
                assert await storage.read_bytes(offset, 100) == CONTENT[offset : offset + 100]
            for _ in range(2):
                with pytest.raises(StorageError, match=r"and of [0-9]+ samples .* were compared, 1 differs"):
                    await storage.read_bytes(7 << 20, 100)
