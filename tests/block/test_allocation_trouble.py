"""Requests that allocate side by side, and one of them fails or is cancelled at any of its storage operations.

Nothing leaks, nobody else is harmed, and what failed can be done again.
"""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from errno import EIO, ENOSPC
from pathlib import Path

import faults
import pytest
import trio
from commandline import ok, qemu_img
from storages import MemoryStorage

from cowfs.block.disk import Disk
from cowfs.block.image import Backing, Image
from cowfs.block.layer import Layer
from cowfs.errors import StorageError
from cowfs.formats import qcow2, qed
from cowfs.formats.raw import RawImage
from cowfs.storage.base import WriteBuffers

CLUSTER = 4096
DRIVERS = {"qcow2": qcow2, "qed": qed}
OPTIONS = {"qcow2": {"cluster_size": "4k"}, "qed": {"cluster_size": "4k", "table_size": "2"}}
#: bytes of the disk that one L2 table maps
SPANS = {"qcow2": 512 * CLUSTER, "qed": 2 * 512 * CLUSTER}
TABLES = 7

#: what cancels the request that a task is busy with
_scope: ContextVar[trio.CancelScope] = ContextVar("_scope")


class Trouble(faults.Trouble):
    """With no error, it cancels whoever makes the operation."""

    def __init__(self, at: int, error: int | None) -> None:
        super().__init__(at, error or EIO)
        self._cancels = error is None

    def hit(self, operation: str) -> None:
        if self._cancels:
            _scope.get().cancel()
        else:
            super().hit(operation)


class Troubled(MemoryStorage):
    """A cold storage in trouble; a write that fails has written one half."""

    trouble: Trouble | None = None

    async def write(self, offset: int, buffers: WriteBuffers) -> None:
        try:
            await super().write(offset, buffers)
        except BaseException:
            data = b"".join(buffers)
            self._store(offset, [data[: len(data) // 2]])
            raise

    async def _step(self, operation: str, offset: int, length: int) -> None:
        await super()._step(operation, offset, length)
        if self.trouble is not None:
            self.trouble.strike(operation)
            await trio.lowlevel.checkpoint()


@dataclass
class Request:
    """A range of the disk, and whether the request for it was carried out."""

    offset: int
    length: int
    done: bool = False

    @property
    def data(self) -> bytes:
        return bytes([self.offset // 1000 % 250 + 1]) * self.length


class Scene:
    """An overlay of many tables over a raw base, the last table of which is on disk and not in memory."""

    def __init__(self, format: str) -> None:
        self.driver = DRIVERS[format]
        self.options = OPTIONS[format]
        self.span = SPANS[format]
        self.size = self.span * TABLES
        self.base = Troubled("base", bytes(range(1, 252)) * (self.size // 251 + 1), cold=True, read_only=True)
        del self.base.content[self.size :]
        self.top = Troubled("top", cold=True)

    async def open(self, *, marked: bool) -> None:
        await self.driver.create(self.top, self.size, Backing("base", "raw"), self.options)
        await (await self._disk()).write((TABLES - 1) * self.span, b"o" * CLUSTER)
        await self.disk.close()
        await self._disk()
        if marked:
            await self.disk.write((TABLES - 2) * self.span, b"m" * CLUSTER)
            await self.disk.flush()

    async def _disk(self) -> Disk:
        self.disk = Disk([Layer(await self.driver.open_image(self.top)), Layer(RawImage(self.base))])
        return self.disk

    def requests(self) -> list[Request]:
        """Under four new tables, two of them by one request; three under the same; parts of clusters; an old table."""
        return [
            Request(0, CLUSTER),
            Request(CLUSTER, 9 * CLUSTER),
            Request(20 * CLUSTER + 100, 7000),
            Request(self.span + 512, 512),
            Request(3 * self.span - 2 * CLUSTER, 4 * CLUSTER),
            Request((TABLES - 1) * self.span + 3 * CLUSTER, CLUSTER),
            Request((TABLES - 1) * self.span + 9 * CLUSTER + 1, 2 * CLUSTER),
        ]

    async def run(self, requests: list[Request], do: "Callable[[Request], Awaitable[object]]", trouble: Trouble) -> int:
        """Make all requests at once; returns how many failed or were cancelled."""
        self.top.trouble = self.base.trouble = trouble

        async def one(request: Request) -> None:
            with trio.CancelScope() as scope:
                _scope.set(scope)
                try:
                    await do(request)
                except StorageError as error:
                    assert error.errno == trouble.error
                else:
                    request.done = True

        async with trio.open_nursery() as nursery:
            for request in requests:
                nursery.start_soon(one, request)
        self.top.trouble = self.base.trouble = None
        return sum(not request.done for request in requests)

    async def write(self, request: Request) -> None:
        await self.disk.write(request.offset, request.data)

    async def flush(self, _: Request) -> None:
        await self.disk.flush()

    async def copy_up(self, request: Request) -> None:
        await self.disk.copy_up(request.offset, request.length)

    def below(self, request: Request) -> bytes:
        return bytes(self.base.content[request.offset : request.offset + request.length])

    async def assert_sound_after_a_crash(self) -> None:
        """As it stands on disk now: nothing is damaged, and what leaked is gone after one more use."""
        storage = MemoryStorage("crash", bytes(self.top.content))
        image: Image = await self.driver.open_image(storage)
        result = await image.check()
        assert not result.corruptions, result.messages
        if self.driver is qed:
            await image.close()
            result = await (await qed.open_image(MemoryStorage("after", bytes(storage.content)))).check()
            assert (result.corruptions, result.leaks) == (0, 0), result.messages

    async def assert_clean(self) -> None:
        await self.disk.close()
        result = await (await self.driver.open_image(MemoryStorage("again", bytes(self.top.content)))).check()
        assert (result.corruptions, result.leaks) == (0, 0), result.messages

    def assert_clean_to_qemu(self, folder: Path) -> None:
        (folder / "base").touch()
        path = folder / "image"
        path.write_bytes(self.top.content)
        ok(qemu_img("check", "-q", "-f", self.disk.layers[0].format, path))


@pytest.fixture(params=["qcow2", "qed"])
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("error", [EIO, ENOSPC, None], ids=["EIO", "ENOSPC", "cancelled"])
@pytest.mark.parametrize("marked", [True, False], ids=["under way", "first writes"])
async def test_writes(tmp_path: Path, format: str, error: int | None, marked: bool) -> None:
    for nth in range(200):
        scene = Scene(format)
        await scene.open(marked=marked)
        requests, trouble = scene.requests(), Trouble(nth, error)
        failed = await scene.run(requests, scene.write, trouble)
        # before the very first write all wait for one step, and fail with it; cancelled, another takes it over
        assert failed <= (1 if marked or error is None else len(requests))
        await scene.assert_sound_after_a_crash()
        for request in requests:
            found = bytes(await scene.disk.read(request.offset, request.length))
            assert found in ((request.data,) if request.done else (request.data, scene.below(request)))
            if not request.done:
                await scene.write(request)
        await scene.disk.flush()
        await scene.assert_sound_after_a_crash()
        for request in requests:
            assert await scene.disk.read(request.offset, request.length) == request.data
        await scene.assert_clean()
        if not trouble.struck:
            assert nth > 2 * len(requests)
            scene.assert_clean_to_qemu(tmp_path)
            return
    raise AssertionError("trouble without end")


@pytest.mark.parametrize("error", [EIO, ENOSPC, None], ids=["EIO", "ENOSPC", "cancelled"])
async def test_copy_ups(tmp_path: Path, format: str, error: int | None) -> None:
    for nth in range(200):
        scene = Scene(format)
        await scene.open(marked=True)
        requests, trouble = scene.requests(), Trouble(nth, error)
        assert await scene.run(requests, scene.copy_up, trouble) <= 1
        await scene.assert_sound_after_a_crash()
        for request in requests:
            assert await scene.disk.read(request.offset, request.length) == scene.below(request)
            await scene.copy_up(request)
            extents = await scene.disk.layers[0].map(request.offset, request.length)
            assert all(extent.host_offset >= 0 for extent in extents)
            assert await scene.disk.read(request.offset, request.length) == scene.below(request)
        await scene.disk.flush()
        await scene.assert_sound_after_a_crash()
        await scene.assert_clean()
        if not trouble.struck:
            assert nth > 2 * len(requests)
            scene.assert_clean_to_qemu(tmp_path)
            return
    raise AssertionError("trouble without end")


@pytest.mark.parametrize("error", [EIO, ENOSPC, None], ids=["EIO", "ENOSPC", "cancelled"])
async def test_flushes_that_complete_partly_written_clusters(tmp_path: Path, format: str, error: int | None) -> None:
    for nth in range(200):
        scene = Scene(format)
        await scene.open(marked=True)
        async with trio.open_nursery() as nursery:
            await nursery.start(scene.disk.run)
            scene.top.cold = False
            requests = [Request(number * scene.span // 2 + 512, 1024) for number in range(8)]
            for request in requests:
                await scene.write(request)
            scene.top.cold = True
            trouble = Trouble(nth, error)
            assert await scene.run([Request(0, 0)], scene.flush, trouble) <= 1
            await scene.assert_sound_after_a_crash()
            for request in requests:
                assert await scene.disk.read(request.offset, request.length) == request.data
            await scene.disk.flush()
            await scene.assert_sound_after_a_crash()
            nursery.cancel_scope.cancel()
        await scene.assert_clean()
        for request in requests:
            start = request.offset - 512
            expected = scene.base.content[start : start + 512] + request.data
            again = Disk([Layer(await scene.driver.open_image(scene.top)), Layer(RawImage(scene.base))])
            assert await again.read(start, 1536) == expected
        if not trouble.struck:
            assert nth > len(requests)
            scene.assert_clean_to_qemu(tmp_path)
            return
    raise AssertionError("trouble without end")
