"""The NBD client against servers that other people wrote."""

import errno
import random
from pathlib import Path

import pytest
import trio
from nbdservers import Server, Servers

from cowfs.errors import NotFound, ReadOnly, StorageError
from cowfs.storage import Network, open_storage
from cowfs.storage.base import Region
from cowfs.storage.nbd.session import CONNECTIONS, list_exports
from cowfs.storage.nbd.storage import NbdStorage

SIZE = 9 << 20
CONTENT = random.Random(1).randbytes(SIZE)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    return path


async def opened(server: Server, *, writable: bool = False, network: Network | None = None) -> NbdStorage:
    storage = await NbdStorage.open(server.uri, writable=writable, network=network or Network(10, 30))
    assert storage.name == server.uri
    return storage


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def space_of(path: Path) -> int:
    return path.stat().st_blocks * 512


def views(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(b"\xaa" * size)) for size in sizes]


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("kind", ["qemu", "nbdkit"])
async def test_reads_of_every_shape(servers: Servers, disk: Path, kind: str, tcp: bool) -> None:
    server = servers.qemu(disk, tcp=tcp) if kind == "qemu" else servers.nbdkit("file", str(disk), tcp=tcp)
    storage = await opened(server)
    assert storage.length == SIZE
    assert storage.is_remote
    for sizes in ((1,), (4096,), (3, 5000, 1, 70_000), (5 << 20, 1, 3 << 20), (1,) * 3000):
        for offset in (0, 1, 4095, 200_001, SIZE - 1, SIZE - 4000, SIZE, SIZE + 5):
            buffers = views(*sizes)
            assert not storage.read_now(offset, buffers)
            await storage.read(offset, buffers)
            assert b"".join(buffers) == CONTENT[offset : offset + sum(sizes)].ljust(sum(sizes), b"\0")
    ranges = [(0, 10), (SIZE - 3, 10), (70_000, 300_000), (5, 0)]
    assert await storage.read_each(ranges) == [CONTENT[at : at + size].ljust(size, b"\0") for at, size in ranges]
    await storage.close()
    await storage.close()


@pytest.mark.parametrize("kind", ["qemu", "nbdkit"])
async def test_writes_are_there_for_everybody(servers: Servers, disk: Path, kind: str) -> None:
    server = servers.qemu(disk) if kind == "qemu" else servers.nbdkit("file", str(disk))
    storage = await opened(server, writable=True)
    model = bytearray(CONTENT)
    rnd = random.Random(2)
    for offset, sizes in ((0, (1,)), (4095, (2,)), (100, (5, 1 << 20, 3)), (SIZE - 5, (5,)), (7777, (5 << 20,))):
        parts = [rnd.randbytes(size) for size in sizes]
        assert not storage.write_now(offset, parts)
        await storage.write(offset, parts)
        model[offset : offset + sum(sizes)] = b"".join(parts)
    for offset, length in ((3, 1), (10_000, 1 << 20), (4096, 65_536), (SIZE - 100, 500)):
        await storage.punch(offset, length)
        model[offset : offset + length] = bytes(min(length, SIZE - offset))
    assert await storage.read_bytes(0, SIZE) == model
    await storage.flush()
    assert content_of(disk) == model
    await storage.close()


async def test_a_disk_of_a_fixed_size(servers: Servers, disk: Path) -> None:
    storage = await opened(servers.qemu(disk), writable=True)
    for offset, length in ((SIZE, 1), (SIZE - 1, 2)):
        with pytest.raises(StorageError) as caught:
            await storage.write(offset, [bytes(length)])
        assert caught.value.errno == errno.ENOSPC
    with pytest.raises(StorageError) as caught:
        await storage.truncate(SIZE + 1)
    assert caught.value.errno == errno.ENOSPC
    await storage.truncate(SIZE - 1)
    assert storage.length == SIZE
    assert storage.keeps_old_bytes
    await storage.close()


async def test_an_export_that_cannot_be_written(servers: Servers, disk: Path) -> None:
    server = servers.qemu(disk, "-r")
    with pytest.raises(StorageError, match="offers it read-only") as caught:
        await opened(server, writable=True)
    assert caught.value.errno == errno.EROFS
    storage = await opened(server)
    with pytest.raises(ReadOnly):
        await storage.write(0, [b"x"])
    with pytest.raises(StorageError):
        await storage.reopen(writable=True)
    await storage.close()


async def test_reading_and_writing_are_exchanged_in_place(servers: Servers, disk: Path) -> None:
    storage = await opened(servers.qemu(disk))
    with pytest.raises(ReadOnly):
        storage.write_now(0, [b"x"])
    await storage.reopen(writable=True)
    await storage.write(0, [b"x"])
    await storage.flush()
    await storage.reopen(writable=False)
    with pytest.raises(ReadOnly):
        await storage.write(0, [b"x"])
    await storage.close()
    assert content_of(disk)[:1] == b"x"


async def test_holes_are_told_from_data(servers: Servers, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(3 << 30)
        file.seek(1 << 30)
        file.write(b"x" * (1 << 20))
    expected = [
        Region(5, (1 << 30) - 5, hole=True),
        Region(1 << 30, 1 << 20, hole=False),
        Region((1 << 30) + (1 << 20), (2 << 30) - (1 << 20) + 7, hole=True),
    ]
    for server in (servers.qemu(path), servers.nbdkit("file", str(path))):
        storage = await opened(server)
        assert await storage.regions(5, (3 << 30) + 2) == expected
        assert await storage.regions(3 << 30, 5) == [Region(3 << 30, 5, hole=True)]
        await storage.close()
    plain = await opened(servers.nbdkit("--filter=noextents", "file", str(path)))
    assert await plain.regions(0, 100) == [Region(0, 100, hole=False)]
    await plain.close()


async def test_holes_are_made(servers: Servers, disk: Path) -> None:
    storage = await opened(servers.qemu(disk), writable=True)
    await storage.punch(0, 4 << 20)
    await storage.discard((4 << 20) + 1, 4 << 20)
    await storage.flush()
    assert space_of(disk) <= SIZE - (7 << 20)
    assert await storage.regions(0, 1 << 20) == [Region(0, 1 << 20, hole=True)]
    await storage.close()


async def test_a_server_that_cannot_zero_or_trim_is_given_zeros(servers: Servers) -> None:
    storage = await opened(
        servers.nbdkit("--filter=nozero", "--filter=blocksize", "data", "(0xff)*3145728"), writable=True
    )
    await storage.punch(100, 1 << 20)
    assert await storage.read_bytes(99, (1 << 20) + 2) == b"\xff" + bytes(1 << 20) + b"\xff"
    await storage.discard(0, 1 << 20)
    await storage.close()


@pytest.mark.parametrize("sizes", ["4096 65536 1048576", "65536 65536 65536"])
async def test_block_sizes_are_kept(servers: Servers, disk: Path, sizes: str) -> None:
    least, preferred, most = sizes.split()
    policy = [f"blocksize-minimum={least}", f"blocksize-preferred={preferred}", f"blocksize-maximum={most}"]
    filters = ["--filter=blocksize-policy", "file", str(disk), *policy, "blocksize-error-policy=error"]
    storage = await opened(servers.nbdkit(*filters), writable=True)
    model = bytearray(CONTENT)
    rnd = random.Random(3)
    for offset, length in ((1, 1), (4095, 2), (0, 5 << 20), (65_536, 65_536), (SIZE - 1, 1), (12_345, 3_000_000)):
        data = rnd.randbytes(length)
        await storage.write(offset, [data[:1], data[1:]])
        model[offset : offset + length] = data
        start = max(0, offset - 3)
        assert await storage.read_bytes(start, length + 6) == model[start : start + length + 6].ljust(length + 6, b"\0")
    await storage.punch(5000, 200_000)
    model[5000:205_000] = bytes(200_000)
    assert await storage.read_bytes(0, SIZE) == model
    assert (await storage.regions(1, 5))[0].offset == 1
    await storage.flush()
    await storage.close()
    assert content_of(disk) == model


async def test_neighbours_in_one_block_may_be_written_at_a_time(servers: Servers) -> None:
    sizes = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536"]
    server = servers.nbdkit("--filter=blocksize-policy", "memory", "64K", *sizes, "blocksize-error-policy=error")
    storage = await opened(server, writable=True)
    async with trio.open_nursery() as nursery:
        for number in range(128):
            nursery.start_soon(storage.write, number * 512, [bytes([number]) * 512])
    assert await storage.read_bytes(0, 65_536) == b"".join(bytes([number]) * 512 for number in range(128))
    await storage.close()


async def test_more_connections_where_the_server_takes_them(servers: Servers, disk: Path) -> None:
    for server, expected in (
        (servers.nbdkit("file", str(disk)), CONNECTIONS),
        (servers.nbdkit("--filter=multi-conn", "file", str(disk), "multi-conn-mode=disable"), 1),
    ):
        storage = await opened(server)
        assert storage.connections == 1
        for _ in range(2 * CONNECTIONS):
            assert await storage.read_bytes(0, SIZE) == CONTENT
        assert storage.connections == expected
        await storage.close()


async def test_exports_have_names(servers: Servers, tmp_path: Path) -> None:
    for name in ("one", "with space+%?"):
        (tmp_path / "exports").mkdir(exist_ok=True)
        (tmp_path / "exports" / name).write_bytes(name.encode().ljust(512))
    server = servers.nbdkit("file", f"dir={tmp_path / 'exports'}")
    for name in ("one", "with space+%?"):
        server.export = name
        storage = await opened(server)
        assert (await storage.read_bytes(0, 512)).strip() == name.encode()
        assert sorted(await list_exports(storage.address, 10)) == [("one", ""), ("with space+%?", "")]
        await storage.close()


async def test_an_export_that_is_not_there_is_told_with_those_that_are(servers: Servers, disk: Path) -> None:
    server = servers.qemu(disk, export="vm")
    with pytest.raises(NotFound) as caught:
        await open_storage(server.uri_of("other"), writable=False)
    assert str(caught.value) == f"{server.uri_of('other')}: the NBD server has no export 'other'; it has 'vm'"


async def test_an_export_is_the_same_whatever_its_server_is_called(servers: Servers, disk: Path) -> None:
    server = servers.qemu(disk, tcp=True)
    one = await opened(server)
    other = await NbdStorage.open(server.uri.replace("localhost", "127.0.0.1"), writable=False)
    assert one.identity == other.identity
    await one.close()
    await other.close()


async def test_errors_of_the_server_are_those_of_the_request(servers: Servers) -> None:
    server = servers.nbdkit("--filter=error", "memory", "1M", "error-pread=ENOSPC", "error-pread-rate=100%")
    storage = await opened(server, writable=True)
    with pytest.raises(StorageError, match="cannot read: No space left on device") as caught:
        await storage.read_bytes(0, 1)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.file == server.uri
    await storage.write(0, [b"others go on"])
    await storage.close()


async def test_many_requests_are_under_way_at_a_time(servers: Servers) -> None:
    """Each takes a tenth of a second; one after the other they would take more than four."""
    storage = await opened(servers.nbdkit("--filter=delay", "memory", "16M", "delay-read=100ms"))
    begin = trio.current_time()
    await storage.read_bytes(0, 11 << 20)
    assert trio.current_time() - begin < 2.2
    await storage.close()


async def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    for uri, reason in (
        (f"nbd+unix:///?socket={tmp_path}/none", "cannot connect: No such file or directory"),
        ("nbd://localhost:1/", "cannot connect: Connection refused"),
    ):
        with pytest.raises(StorageError) as caught:
            await open_storage(uri, writable=False)
        assert str(caught.value) == f"{uri}: {reason}"
        assert caught.value.errno == errno.EIO
