"""Space that is owed: a disk works for ever in the space that ``measure`` says, however often it is filled and emptied.

Hypothesis chooses what guests do on a device, or in a file system, of exactly that size. Nothing may fail for want of
space, whatever is put off, discarded or being flushed; what the disk holds is what the model says; and after a power
cut at any moment the image is sound, and has what was acknowledged.
"""

import errno
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType

import pytest
import trio
from boundedhost import BLOCK, Device, FullFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from powercut import RecordingStorage, after_cut
from storages import Gate, MemoryStorage
from trio.testing import wait_all_tasks_blocked

from cowfs.block.alignment import align_down
from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.errors import StorageError
from cowfs.formats import qcow2, qed
from cowfs.formats.raw import RawImage
from cowfs.jobs.commit import Commit, Pivot
from cowfs.jobs.stream import Stream

K = 1024
DRIVERS: dict[str, tuple[ModuleType, dict[str, str], int]] = {
    "qcow2": (qcow2, {}, 2048 * K),
    "qcow2-4k": (qcow2, {"cluster_size": "4k"}, 640 * K),
    "qcow2-v2": (qcow2, {"cluster_size": "4k", "compat": "0.10"}, 640 * K),
    **{
        f"qcow2-512-{bits}": (qcow2, {"cluster_size": "512", "refcount_bits": str(bits)}, 96 * K)
        for bits in (1, 2, 4, 8, 16, 32, 64)
    },
    "qcow2-ext": (qcow2, {"cluster_size": "16k", "extended_l2": "on"}, 640 * K),
    "qed": (qed, {"cluster_size": "4k", "table_size": "2"}, 640 * K),
    "qed-64k": (qed, {}, 2048 * K),
}
HOSTS = [(name, host) for name in DRIVERS for host in ("device", "file")]
EXAMPLES = int(os.environ.get("COWFS_EXAMPLES", "12"))
SEED = os.environ.get("COWFS_SEED")


class Scene:
    """An image on a host that has just enough room for it, over a base full of data."""

    def __init__(self, name: str, host: str, *, based: bool) -> None:
        self.driver, self.options, self.size = DRIVERS[name]
        self.base = random.Random(3).randbytes(self.size) if based else None
        self.host = host
        self.model = bytearray(self.base or bytes(self.size))
        #: what each sector may hold after a power cut: from what was acknowledged last up to now
        self.possible: dict[int, list[bytes]] = {}

    async def create(self) -> None:
        full = (await self.driver.measure(self.size, None, self.options)).fully_allocated
        if self.host == "file" and self.options.get("cluster_size") == "512":
            # of a file system's block, only all or nothing can be given back
            full += 4 * BLOCK
        self.top: RecordingStorage = (Device if self.host == "device" else FullFileSystem)("top", full)
        backing = Backing("base", "raw") if self.base is not None else None
        await self.driver.create(self.top, self.size, backing, self.options)
        self.top.begin()

    async def layers(self, storage: MemoryStorage) -> list[Layer]:
        layers = [Layer(await self.driver.open_image(storage))]
        if self.base is not None:
            layers.append(Layer(RawImage(MemoryStorage("base", self.base, read_only=True))))
        return layers

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[Disk]:
        self.disk = Disk(await self.layers(self.top), copy_on_read=False, flush_interval=1e9)
        async with trio.open_nursery() as nursery:
            await nursery.start(self.disk.run)
            yield self.disk
            nursery.cancel_scope.cancel()
        await self.disk.close()

    def note(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), 512):
            place = offset + at
            self.possible.setdefault(place, [bytes(self.model[place : place + 512])]).append(data[at : at + 512])
        self.model[offset : offset + len(data)] = data

    async def write(self, offset: int, data: bytes) -> None:
        self.note(offset, data)
        if not self.disk.write_now(offset, data):
            await self.disk.write(offset, data)

    async def discard(self, offset: int, length: int) -> None:
        self.note(offset, bytes(length))
        await self.disk.discard(offset, length)

    async def flush(self) -> None:
        """To be called when nothing else is under way."""
        await self.disk.flush()
        self.possible.clear()

    async def verify(self) -> None:
        assert await self.disk.read(0, self.size) == self.model

    async def assert_survives(self, chooser: random.Random) -> None:
        """The power goes now, with any of what no flush covers."""
        cut = after_cut(self.top.start, self.top.steps, chooser)
        storage = MemoryStorage("cut", cut)
        layers = await self.layers(storage)
        found = await layers[0].image.check()
        assert not found.corruptions, found.messages
        disk = Disk(layers, copy_on_read=False)
        for place in range(0, self.size, 512):
            wanted = self.possible.get(place, [bytes(self.model[place : place + 512])])
            assert bytes(await disk.read(place, 512)) in wanted, f"sector {place // 512}"


#: what is done; where and how much of it in parts of 64; which bytes
THINGS = st.lists(
    st.tuples(
        st.sampled_from(
            ["write"] * 4 + ["discard"] * 2 + ["fill", "empty", "sectors", "parts", "flush", "cut", "rest"]
        ),
        st.integers(0, 63),
        st.integers(1, 24),
        st.integers(0, 255),
    ),
    min_size=5,
    max_size=30,
)


@pytest.mark.parametrize(("name", "host"), HOSTS)
@pytest.mark.parametrize("based", [False, True], ids=["alone", "on a base"])
def test_what_fits_always_fits(name: str, host: str, based: bool) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=SEED is None and "COWFS_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(things=THINGS)
    def run(things: list[tuple[str, int, int, int]]) -> None:
        trio.run(_do, Scene(name, host, based=based), things)

    run()


async def _do(scene: Scene, things: list[tuple[str, int, int, int]]) -> None:
    await scene.create()
    part = scene.size // 64
    async with scene.in_use() as disk:
        for what, at, parts, value in things:
            start = at * part
            length = min(parts * part, scene.size - start)
            data = random.Random(value).randbytes(length)
            if what == "write":
                await scene.write(start, data)
            elif what == "fill":
                async with trio.open_nursery() as nursery:
                    for place in range(0, scene.size, part):
                        nursery.start_soon(scene.write, place, bytes([value | 1]) * part)
            elif what == "empty":
                await scene.discard(0, scene.size)
            elif what == "discard":
                await scene.discard(start, length)
            elif what == "sectors":
                # a sector here and there, whose clusters are put off
                for place in range(start, start + length, part):
                    await scene.write(place, bytes([value]) * 512)
            elif what == "parts":
                for place in range(start, start + length, part):
                    await scene.discard(place + 512, min(part, 4 * K) - 512)
            elif what == "flush":
                await scene.flush()
            elif what == "rest":
                disk.layers[0].image.rest()
            else:
                await scene.assert_survives(random.Random(value))
        await scene.verify()
        await scene.flush()
        await scene.assert_survives(random.Random(1))
    found = await (await scene.driver.open_image(scene.top)).check()
    assert not found.corruptions, found.messages


@pytest.mark.parametrize(
    ("name", "host"), [("qcow2-4k", "device"), ("qcow2-4k", "file"), ("qed", "device"), ("qed", "file")]
)
async def test_a_stream_fits_beside_guests_who_discard_and_write(name: str, host: str) -> None:
    scene = Scene(name, host, based=True)
    await scene.create()
    chooser = random.Random(4)
    async with scene.in_use() as disk:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Stream(disk).run)
            for _ in range(60):
                start = chooser.randrange(scene.size // 4096) * 4096
                length = min(chooser.choice([4096, 64 * K, 200 * K]), scene.size - start)
                if chooser.random() < 0.5:
                    await scene.write(start, chooser.randbytes(length))
                else:
                    await scene.discard(start, length)
                await trio.lowlevel.checkpoint()
        assert len(disk.layers) == 1
        await scene.verify()
        await scene.flush()
        await scene.write(0, chooser.randbytes(scene.size))
        await scene.flush()
        await scene.verify()


@pytest.mark.parametrize("host", ["device", "file"])
async def test_a_commit_fits_into_a_base_that_was_discarded(host: str) -> None:
    """What guests discard below comes back for what the commit copies there."""
    scene = Scene("qcow2-4k", host, based=False)
    await scene.create()
    async with scene.in_use() as disk:
        await scene.write(0, random.Random(5).randbytes(scene.size))
        await scene.discard(0, scene.size)
    overlay = RecordingStorage("overlay")
    await qcow2.create(overlay, scene.size, Backing("top", "qcow2"), {"cluster_size": "4k"})
    scene.top.read_only = True
    layers = [Layer(await qcow2.open_image(overlay)), *await scene.layers(scene.top)]
    scene.disk = disk = Disk(layers, copy_on_read=False, flush_interval=1e9)
    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        await scene.write(0, random.Random(6).randbytes(scene.size))
        await Commit(disk, pivot=Pivot.YES).run()
        assert len(disk.layers) == 1
        await scene.verify()
        nursery.cancel_scope.cancel()
    await disk.close()


@pytest.mark.parametrize("name", ["qcow2-4k", "qcow2", "qcow2-ext"])
async def test_what_a_deleted_snapshot_kept_can_be_used_again(name: str) -> None:
    scene = Scene(name, "device", based=False)
    await scene.create()
    for turn in range(4):
        async with scene.in_use():
            await scene.discard(0, scene.size)
            await scene.write(0, random.Random(turn).randbytes(scene.size // 4))
        image = await scene.driver.open_image(scene.top)
        await image.create_snapshot("s", (0, 0))
        await image.close()
        async with scene.in_use():
            await scene.write(0, random.Random(turn + 10).randbytes(scene.size // 4))
        image = await scene.driver.open_image(scene.top)
        await image.delete_snapshot("s")
        await image.close()
        async with scene.in_use():
            await scene.verify()
            await scene.write(0, random.Random(turn + 20).randbytes(scene.size))
            await scene.verify()
    assert not (await (await scene.driver.open_image(scene.top)).check()).corruptions


@pytest.mark.parametrize("cold", [False, True])
async def test_a_reader_in_what_is_owed_is_waited_for(cold: bool) -> None:
    scene = Scene("qcow2-4k", "device", based=False)
    await scene.create()
    async with scene.in_use() as disk:
        await scene.write(0, b"A" * scene.size)
        await scene.flush()
        scene.top.cold = True
        gate = scene.top.gates["read"] = Gate()
        seen = bytearray(4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.readinto, 0, memoryview(seen))
            await gate.arrived.wait()
            del scene.top.gates["read"]
            scene.top.cold = cold
            await scene.discard(0, scene.size)
            nursery.start_soon(scene.write, 0, b"B" * scene.size)
            await wait_all_tasks_blocked()
            gate.open()
        assert seen == b"A" * 4096
        scene.top.cold = False
        await scene.verify()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
async def test_what_does_not_fit_is_refused_and_nothing_is_lost(error: int) -> None:
    scene = Scene("qcow2-4k", "file", based=False)
    await scene.create()
    assert isinstance(scene.top, FullFileSystem)
    scene.top.error = error
    scene.top.room -= scene.size // 2
    async with scene.in_use() as disk:
        half = align_down(scene.size // 3, 4096)
        await scene.write(0, b"A" * half)
        await scene.flush()
        for _ in range(3):
            with pytest.raises(StorageError) as caught:
                await disk.write(half, b"B" * (scene.size - half))
            assert caught.value.errno == error
            await scene.flush()
            await scene.verify()
        await scene.discard(0, half)
        await scene.write(scene.size - half, b"C" * half)
        await scene.flush()
        await scene.verify()
