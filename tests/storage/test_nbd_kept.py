"""What is kept of exports that are open for reading only, and what is fetched before anybody asks."""

import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from commandline import PATIENCE
from nbdservers import Server, Servers

from cowfs.errors import StorageError
from cowfs.storage import Network, open_storage
from cowfs.storage.ahead import Ahead
from cowfs.storage.cache import BLOCK
from cowfs.storage.nbd.kept import KeptNbdStorage
from cowfs.storage.nbd.storage import clipped

SIZE = (9 << 20) + 12_288
CONTENT = random.Random(3).randbytes(SIZE)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    return path


@asynccontextmanager
async def opened(server: Server, network: Network, *, writable: bool = False) -> AsyncIterator[KeptNbdStorage]:
    storage = await open_storage(server.uri, writable=writable, network=network)
    assert isinstance(storage, KeptNbdStorage)
    try:
        yield storage
    finally:
        await storage.close()


def read_of(log: Path) -> list[tuple[int, int]]:
    """Offsets and lengths that a server was asked for."""
    return [
        (int(found[1], 16), int(found[2], 16))
        for found in re.finditer(r" Read id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", log.read_text())
    ]


async def test_no_byte_is_fetched_twice(servers: Servers, disk: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = servers.nbdkit("--filter=log", "file", str(disk), f"logfile={log}")
    async with opened(server, Network(10, 30)) as storage:
        for offset, length in ((1 << 20, 100), (1 << 20, BLOCK), (SIZE - 5, 10), (0, SIZE), (3 << 20, 1 << 20)):
            expected = CONTENT[offset : offset + length].ljust(length, b"\0")
            assert await storage.read_bytes(offset, length) == expected
        assert await storage.read_each([(70_000, 300), (5 << 20, 1)]) == [
            CONTENT[70_000:70_300],
            CONTENT[5 << 20 :][:1],
        ]
        assert storage.fetched_bytes == SIZE
    asked = read_of(log)
    assert sum(length for _, length in asked) == SIZE
    assert len({offset for offset, _ in asked}) == len(asked)


async def test_small_parts_far_from_each_other_are_fetched_alone(servers: Servers, disk: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = servers.nbdkit("--filter=log", "file", str(disk), f"logfile={log}")
    ranges = [(number << 20, 4096) for number in range(8)]
    async with opened(server, Network(10, 30)) as storage:
        assert await storage.read_each(ranges) == [CONTENT[at : at + size] for at, size in ranges]
    assert sorted(read_of(log)) == ranges


async def test_who_reads_in_order_is_served_ahead(
    servers: Servers, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of a fast link, however fast this machine is
    monkeypatch.setattr(Ahead, "measured", lambda self, *_: setattr(self, "rate", 1e9))
    server = servers.nbdkit("--filter=delay", "file", str(disk), "rdelay=20ms")
    async with opened(server, Network(10, 30)) as storage:
        piece = memoryview(bytearray(BLOCK))
        waits = 0
        for offset in range(0, SIZE, BLOCK):
            view = piece[: min(BLOCK, SIZE - offset)]
            if not storage.read_now(offset, [view]):
                waits += 1
                await storage.read(offset, [view])
            assert view == CONTENT[offset : offset + len(view)]
        assert waits < SIZE // BLOCK / 2


async def test_what_cannot_be_read_does_not_take_its_neighbours_with_it(servers: Servers, disk: Path) -> None:
    bad = (2 << 20) + 4096
    read = f"test $4 -lt {bad + 512} -a $(($4 + $3)) -gt {bad} && {{ echo EIO >&2; exit 1; }}"
    read += f"; dd if={disk} skip=$4 count=$3 iflag=count_bytes,skip_bytes 2>/dev/null"
    server = servers.nbdkit("eval", f"get_size=echo {SIZE}", f"pread={read}")
    async with opened(server, Network(10, 30)) as storage:
        for offset, length in ((bad - 512, 512), (bad + 512, 4096), (2 << 20, 4096)):
            assert await storage.read_bytes(offset, length) == CONTENT[offset : offset + length]
        with pytest.raises(StorageError, match="cannot read"):
            await storage.read_bytes(bad, 512)
        with pytest.raises(StorageError, match="cannot read"):
            await storage.read_each([(0, 10), (bad, 512)])
        assert await storage.read_each([(bad - 1, 1), (bad + 512, 1)]) == [
            CONTENT[bad - 1 : bad],
            CONTENT[bad + 512 : bad + 513],
        ]


async def test_what_has_come_in_needs_no_server(servers: Servers, disk: Path) -> None:
    server = servers.qemu(disk, "-r")
    async with opened(server, Network(10, 0)) as storage:
        assert await storage.read_bytes(BLOCK, 100) == CONTENT[BLOCK : BLOCK + 100]
        server.kill()
        assert await storage.read_bytes(BLOCK + 5000, 100) == CONTENT[BLOCK + 5000 :][:100]
        with pytest.raises(StorageError, match="away"):
            await storage.read_bytes(6 << 20, 100)


async def test_nothing_is_kept_of_what_can_be_written(servers: Servers, disk: Path) -> None:
    server = servers.qemu(disk, "--shared=8")
    async with opened(server, Network(10, 30)) as storage, opened(server, Network(10, 30), writable=True) as other:
        assert await storage.read_bytes(0, 5) == CONTENT[:5]
        await storage.reopen(writable=True)
        await other.write(0, [b"other"])
        assert await storage.read_bytes(0, 5) == b"other"
        await storage.write(0, [b"mine "])
        await storage.reopen(writable=False)
        assert await storage.read_bytes(0, 5) == b"mine "
        # and from here on it is
        await other.write(0, [b"later"])
        assert await storage.read_bytes(0, 5) == b"mine "
        await storage.flush()


async def test_holes_are_asked_for_once(servers: Servers, tmp_path: Path) -> None:
    path, log = tmp_path / "disk.raw", tmp_path / "log"
    data = [(0, 1 << 20), (5 << 20, 4096), (8 << 20, 1 << 20)]
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset, length in data:
            file.seek(offset)
            file.write(b"x" * length)
    server = servers.nbdkit("--filter=log", "file", str(path), f"logfile={log}")
    async with opened(server, Network(10, 30)) as storage:
        whole = await storage.regions(0, SIZE)
        assert [(region.offset, region.length) for region in whole if not region.hole] == data
        for offset, length in ((0, 4096), (5 << 20, 4096), (4 << 20, 3 << 20), (1, SIZE - 1), (SIZE - 1, 1)):
            found = await storage.regions(offset, length)
            assert found == clipped(whole, offset, offset + length)
            assert sum(region.length for region in found) == length
        asked = log.read_text().count(" Extents id=")
        # beyond the end there is nothing to ask for
        found = await storage.regions(SIZE - 100, 300)
        assert [(region.length, region.hole) for region in found] == [(300, True)]
        with path.open("r+b") as file:
            file.seek(6 << 20)
            file.write(b"x" * 4096)
        await storage.reopen(writable=True)
        found = await storage.regions(6 << 20, 4096)
        assert [region.hole for region in found] == [False]
    # one for each extent at the most
    assert 1 <= asked <= len(whole)


async def test_closing_ends_what_is_under_way(servers: Servers, disk: Path) -> None:
    server = servers.nbdkit("--filter=delay", "file", str(disk), "rdelay=60")
    async with opened(server, Network(100, 100)) as storage:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_refused, storage)
                await trio.testing.wait_all_tasks_blocked(0.01)
                await storage.close()


async def _refused(storage: KeptNbdStorage) -> None:
    with pytest.raises(StorageError, match="closed"):
        await storage.read_bytes(0, 100)
