"""What a job and guests do to a chain at once, and what is durable of it. Every order is forced; nothing sleeps."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from commandline import ok, qemu_img
from storages import Gate, MemoryStorage
from trio.testing import MockClock, wait_all_tasks_blocked

from cowfs.block.disk import Disk
from cowfs.block.extent import Kind
from cowfs.block.identity import stamp_of
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.block.writetracker import WriteTracker
from cowfs.errors import CorruptImage, CowfsError, StorageError
from cowfs.formats import qcow2
from cowfs.formats.chain import open_disk, open_image, remember_base
from cowfs.formats.raw import RawImage
from cowfs.jobs.commit import Commit, Pivot
from cowfs.jobs.job import Job, OnError, State
from cowfs.jobs.stream import Stream

CLUSTER = 65536
SIZE = 16 * CLUSTER
BROKEN = StorageError("broken", errno=errno.EIO, file="base")


class Setup:
    """Images over a raw base, "top" the active one, and what the disk holds."""

    def __init__(self, disk: Disk, storages: dict[str, MemoryStorage]) -> None:
        self.disk = disk
        self.storages = storages
        self.base = storages["base"]
        self.model = bytearray(self.base.content[: disk.size].ljust(disk.size, b"\0"))

    async def write(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        if not self.disk.write_now(offset, data):
            await self.disk.write(offset, data)

    async def verify(self) -> None:
        assert await self.disk.read(0, self.disk.size) == self.model

    async def verify_anew(self, name: str = "top") -> None:
        """As whoever opens the images next would see them."""
        layers: list[Layer] = []
        backing: Backing | None = Backing(name, "raw" if name == "base" else "qcow2")
        while backing is not None:
            storage = MemoryStorage(backing.name, bytes(self.storages[backing.name].content), read_only=True)
            layers.append(Layer(RawImage(storage) if backing.name == "base" else await qcow2.open_image(storage)))
            backing = layers[-1].backing
        disk = Disk(layers)
        assert await disk.read(0, disk.size) == self.model

    def base_is_durable(self) -> bool:
        """Whether a flush has come after the last write to the base."""
        return [what for what, _, _ in self.base.log if what in ("write", "flush")][-1] == "flush"


@asynccontextmanager
async def setup(
    *between: str, size: int = SIZE, mid_size: int = SIZE, interval: float = 1e9, cold: bool = True
) -> AsyncIterator[Setup]:
    names = ["top", *between, "base"]
    storages = {name: MemoryStorage(name, read_only=name != "top") for name in names}
    storages["base"] = MemoryStorage("base", b"b" * SIZE, cold=cold, read_only=True)
    for name, below in pairwise(names):
        length = size if name == "top" else mid_size
        await qcow2.create(storages[name], length, Backing(below, "raw" if below == "base" else "qcow2"), {})
    layers = [Layer(await qcow2.open_image(storages[name])) for name in names[:-1]]
    disk = Disk([*layers, Layer(RawImage(storages["base"]))], copy_on_read=False, flush_interval=interval)
    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        yield Setup(disk, storages)
        nursery.cancel_scope.cancel()


async def reached(job: Job, state: State) -> None:
    while job.state is not state:
        assert job.state in (State.NONE, State.RUNNING), job.error
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def drained(s: Setup) -> AsyncIterator[Commit]:
    """A commit that has emptied the active layer and waits; what guests write goes to the base."""
    job = Commit(s.disk, pivot=Pivot.WAIT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.run)
        await reached(job, State.READY)
        yield job
        if job.state is State.READY:
            job.cancel()


async def test_a_flush_that_joins_another_waits_for_what_that_one_has_not_done_yet() -> None:
    async with setup() as s, drained(s):
        await s.write(0, b"w" * 512)
        gate = s.base.gates["flush"] = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.disk.flush)
            await gate.arrived.wait()
            done = trio.Event()

            async def flush() -> None:
                await s.disk.flush()
                done.set()

            nursery.start_soon(flush)
            await wait_all_tasks_blocked()
            assert not done.is_set()
            gate.open()


async def test_what_is_written_while_a_flush_goes_by_is_flushed_by_the_next() -> None:
    async with setup() as s, drained(s):
        gate = s.base.gates["write"] = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.write, 0, b"w" * 512)
            await gate.arrived.wait()
            await s.disk.flush()
            gate.open()
        # the gate is passed after the log's entry
        s.base.log.clear()
        await s.disk.flush()
        assert [what for what, _, _ in s.base.log] == ["flush"]


@pytest.mark.parametrize("cold", [False, True])
async def test_the_periodic_flush_makes_durable_what_went_below(cold: bool, autojump_clock: MockClock) -> None:
    async with setup(interval=5, cold=cold) as s, drained(s):
        await s.write(0, b"w" * 512)
        assert not s.base_is_durable()
        await trio.sleep(6)
        assert s.base_is_durable()


@pytest.mark.parametrize("error", [BROKEN, CorruptImage("is broken", file="base")])
async def test_what_the_base_cannot_take_the_active_layer_takes(error: CowfsError) -> None:
    async with setup() as s:
        async with drained(s) as job:
            s.base.failures["write"] = [error]
            await s.write(4096, b"w" * 512)
            await s.verify()
            job.complete()
            await job.wait()
        assert (job.state, job.error) == (State.COMPLETED, "")
        await s.verify()
        assert len(s.disk.layers) == 1


async def test_what_comes_to_the_active_layer_by_other_ways_is_not_left_behind() -> None:
    async with setup() as s:
        async with drained(s) as job:
            async with s.disk.lock.hold(0, CLUSTER):
                await s.disk.zero_layer(0, 0, CLUSTER)
            s.model[:CLUSTER] = bytes(CLUSTER)
            job.complete()
            await job.wait()
        assert job.state is State.COMPLETED
        await s.verify()
        await s.verify_anew("base")


@pytest.mark.parametrize("times", [1, 2, 100])
async def test_a_base_that_cannot_be_flushed_goes_on_taking_what_guests_write(times: int) -> None:
    async with setup() as s:
        await s.write(CLUSTER, b"m" * CLUSTER)
        async with drained(s) as job:
            await s.write(0, b"w" * 512)
            s.base.failures["flush"] = [BROKEN] * times
            job.cancel()
            await job.wait()
        assert (s.disk.sink is None) == s.disk.layers[1].storage.read_only
        await s.write(2 * CLUSTER, b"x" * 512)
        await s.verify()
        if times > 2:
            # what is not durable is not said to be
            for _ in range(3):
                with pytest.raises(StorageError, match="broken"):
                    await s.disk.flush()
            s.base.failures["flush"].clear()
        await s.disk.flush()
        assert s.base_is_durable()
        again = Commit(s.disk)
        await again.run()
        assert (again.state, again.error) == (State.COMPLETED, "")
        assert s.disk.layers[1].storage.read_only
        await s.verify()
        await s.verify_anew()


async def _left_open(s: Setup) -> None:
    """A commit that has failed to make the base durable."""
    async with drained(s) as job:
        await s.write(0, b"w" * 512)
        s.base.failures["flush"] = [BROKEN] * 9
        job.cancel()
        await job.wait()
    assert s.disk.sink is not None
    s.base.failures.clear()


async def test_a_stream_after_it() -> None:
    async with setup() as s:
        await _left_open(s)
        job = Stream(s.disk)
        await job.run()
        assert (job.state, job.error) == (State.COMPLETED, "")
        assert len(s.disk.layers) == 1
        await s.disk.grow(2 * SIZE)
        s.model.extend(bytes(SIZE))
        # into nothing, with no layer below that could take it
        await s.write(SIZE, b"x" * 512)
        await s.verify()
        await s.disk.flush()
        await s.verify_anew()


async def test_a_snapshot_after_it() -> None:
    async with setup() as s:
        await _left_open(s)
        storage = s.storages["new"] = MemoryStorage("new")
        await qcow2.create(storage, SIZE, Backing("top", "qcow2"), {})
        await s.disk.push(Layer(await qcow2.open_image(storage)))
        await s.write(CLUSTER, b"x" * 512)
        await s.verify()
        await s.disk.flush()
        await s.verify_anew("new")


async def test_a_base_that_cannot_be_flushed_is_not_linked_to_though_errors_are_ignored() -> None:
    async with setup("mid") as s:
        await s.disk.set_layer_writable(1, True)
        await s.disk.write_layer(1, 0, memoryview(b"m" * CLUSTER))
        await s.disk.set_layer_writable(1, False)
        s.model[:CLUSTER] = b"m" * CLUSTER
        s.base.failures["flush"] = [BROKEN]
        job = Commit(s.disk, top=s.disk.layers[1], on_error=OnError.IGNORE)
        await job.run()
        assert (job.state, job.error) == (State.FAILED, "base: broken")
        assert [layer.name for layer in s.disk.layers] == ["top", "mid", "base"]
        await s.verify_anew()


@pytest.mark.parametrize("merging", [False, True])
async def test_a_disk_that_grows_before_the_chain_changes_shows_nothing_of_a_longer_base(merging: bool) -> None:
    half = SIZE // 2
    async with setup("mid", size=half, mid_size=half) as s:
        base = s.disk.layers[2]
        job = Commit(s.disk, top=s.disk.layers[1], base=base) if merging else Stream(s.disk, base=base)
        await s.write(0, b"w" * CLUSTER)
        gate = s.storages["top"].gates["flush"] = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            # all is copied, and the chain about to change
            await gate.arrived.wait()
            nursery.start_soon(s.disk.grow, SIZE)
            await wait_all_tasks_blocked()
            gate.open()
        assert (job.state, job.error) == (State.COMPLETED, "")
        s.model.extend(bytes(SIZE - half))
        assert len(s.disk.layers) == 2
        await s.verify()
        await s.disk.flush()
        await s.verify_anew()


async def test_layers_that_a_commit_has_spoiled_stay_so_if_it_fails() -> None:
    async with setup("one", "two") as s:
        _, one, two, base = s.disk.layers
        for depth in (1, 2):
            await s.disk.set_layer_writable(depth, True)
            await s.disk.write_layer(depth, depth * CLUSTER, memoryview(b"m" * CLUSTER))
            await s.disk.set_layer_writable(depth, False)
            s.model[depth * CLUSTER : (depth + 1) * CLUSTER] = b"m" * CLUSTER
        s.base.failures["flush"] = [BROKEN]
        job = Commit(s.disk, top=one, base=base)
        await job.run()
        assert job.state is State.FAILED
        # without the one above it, it shows that one's content
        assert await s.disk.read(CLUSTER, CLUSTER, 2) == b"m" * CLUSTER
        assert s.disk.spoiled == {two}
        await s.verify()
        again = Commit(s.disk, top=one, base=base)
        await again.run()
        assert again.state is State.COMPLETED
        assert not s.disk.spoiled


async def test_all_that_is_left_behind_is_closed_though_some_of_it_makes_trouble() -> None:
    async with setup("one", "two") as s:
        s.storages["one"].failures["write"] = [BROKEN] * 9
        job = Commit(s.disk, top=s.disk.layers[1], base=s.disk.layers[3])
        await job.run()
        assert job.state is State.COMPLETED
        assert "could not be marked as merged" in job.error
        assert s.storages["one"].closings == s.storages["two"].closings == 1
        await s.verify_anew()


async def test_a_snapshot_that_fails_leaves_the_active_layer_writable() -> None:
    async with setup() as s:
        await s.write(0, b"w" * CLUSTER)
        storage = s.storages["new"] = MemoryStorage("new")
        await qcow2.create(storage, SIZE, Backing("top", "qcow2"), {})
        layer, settle = s.disk.layers[0], s.disk.layers[0].image.settle

        async def fail() -> None:
            raise BROKEN

        layer.image.settle = fail  # type: ignore[method-assign]
        with pytest.raises(StorageError, match="broken"):
            await s.disk.push(Layer(await qcow2.open_image(storage)))
        layer.image.settle = settle  # type: ignore[method-assign]
        assert not layer.storage.read_only
        await s.write(CLUSTER, b"w" * 512)
        await s.disk.flush()
        await s.verify()
        await s.verify_anew()


@pytest.mark.parametrize("pushing", [False, True])
async def test_an_image_is_not_closed_or_reopened_under_a_flush(pushing: bool) -> None:
    async with setup() as s:
        await s.write(0, b"w" * CLUSTER)
        await s.disk.flush()
        top = s.storages["top"]
        gate = top.gates["punch"] = Gate()
        async with trio.open_nursery() as nursery:
            job = Commit(s.disk, pivot=Pivot.NO if pushing else Pivot.YES)
            if pushing:
                assert await s.disk.drop(0, CLUSTER, WriteTracker(1))
                s.model[:CLUSTER] = b"b" * CLUSTER
            else:
                nursery.start_soon(job.run)
                while (await s.disk.layers[0].map(0, CLUSTER))[0].kind is Kind.DATA:
                    await trio.lowlevel.checkpoint()
            # what was let go of is given back to the host
            nursery.start_soon(s.disk.flush)
            await gate.arrived.wait()
            if pushing:
                storage = s.storages["new"] = MemoryStorage("new")
                await qcow2.create(storage, SIZE, Backing("top", "qcow2"), {})
                nursery.start_soon(s.disk.push, Layer(await qcow2.open_image(storage)))
            await wait_all_tasks_blocked()
            assert not top.closings
            assert not top.read_only
            gate.open()
        assert len(s.disk.layers) == (3 if pushing else 1)
        await s.verify()


@pytest.mark.needs("qemu-img")
async def test_a_base_with_a_colon_in_its_name_can_be_opened_again(tmp_path: Path) -> None:
    base, mid, top = (tmp_path / name for name in ("disk:1.raw", "mid.qcow2", "top.qcow2"))
    base.write_bytes(b"b" * SIZE)
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", mid))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", mid, "-F", "qcow2", top))
    disk = await open_disk(str(top), writable=True)
    job = Stream(disk, base=disk.layers[2])
    await job.run()
    assert (job.state, job.error) == (State.COMPLETED, "")
    await disk.close()
    disk = await open_disk(str(top))
    assert len(disk.layers) == 2
    assert await disk.read(0, SIZE) == b"b" * SIZE
    await disk.close()
    ok(qemu_img("compare", "-f", "qcow2", "-F", "raw", top, f"file:{base}"))


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("other", ["base.raw", "one.qcow2"])
async def test_a_commit_that_is_refused_leaves_what_the_layers_remember(tmp_path: Path, other: str) -> None:
    paths = [tmp_path / name for name in ("base.raw", "one.qcow2", "two.qcow2", "top.qcow2")]
    paths[0].write_bytes(b"b" * SIZE)
    for below, above in pairwise(paths):
        ok(qemu_img("create", "-q", "-f", "qcow2", "-b", below.name, "-F", below.suffix[1:], above))
        disk = await open_disk(str(above), writable=True)
        await remember_base(disk)
        await disk.close()
    disk = await open_disk(str(paths[-1]), writable=True)
    # as another image of the mount would that lies on it
    user = await open_image(str(tmp_path / other))
    job = Commit(disk, base=disk.layers[3])
    await job.run()
    assert job.state is State.FAILED
    assert f"{other}: is in use" in job.error
    assert all(stamp_of(layer) is not None for layer in disk.layers[:3])
    assert [layer.storage.read_only for layer in disk.layers] == [False, True, True, True]
    assert not disk.spoiled
    await user.close()
    await disk.close()
    # and it is what there is
    disk = await open_disk(str(paths[-1]), writable=True)
    again = Commit(disk, base=disk.layers[3])
    await again.run()
    assert (again.state, again.error) == (State.COMPLETED, "")
    await disk.close()
