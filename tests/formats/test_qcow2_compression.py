"""Compressed clusters of qcow2, written: QEMU reads them, its check finds their references counted rightly."""

import random
import threading
import zlib
from array import array
from pathlib import Path
from types import ModuleType

import pytest
import trio
from commandline import PATIENCE, ok, qemu_img
from imagetools import disk_at, disk_content, image_at, in_memory, qemu_content, qemu_create
from isal import isal_zlib
from powercut import RecordingStorage, after_cut
from storages import Gate, MemoryStorage

from cowfs.block.extent import Kind
from cowfs.block.layer import Layer
from cowfs.errors import CorruptImage, CowfsError, StorageError
from cowfs.formats import qcow2
from cowfs.formats.qcow2 import compressed
from cowfs.formats.qcow2.image import Qcow2Image

VARIANTS = [
    {"cluster_size": 65536},
    {"cluster_size": 65536, "compression_type": "zstd"},
    {"cluster_size": 512},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": 4096, "refcount_bits": 2},
    {"cluster_size": 16384, "refcount_bits": 64},
    {"cluster_size": 16384, "extended_l2": "on"},
    {"cluster_size": 2 << 20},
]


def _id(options: dict[str, object]) -> str:
    return "-".join(str(value) for value in options.values())


def compressible(rnd: random.Random, length: int, share: float) -> bytes:
    """Bytes of which about ``share`` are random, in short pieces between repetitions."""
    data = bytearray()
    while len(data) < length:
        data += rnd.randbytes(rnd.randrange(1, 40)) if rnd.random() < share else b"over and over again " * 3
    return bytes(data[:length])


async def write_packed(image: Qcow2Image, offset: int, data: bytes) -> None:
    packed = image.pack(data)
    assert packed is not None
    assert len(packed) < len(data)
    await Layer(image).write_packed(offset, packed)


async def _empty(size: int, **options: str) -> Qcow2Image:
    storage = MemoryStorage("image")
    await qcow2.create(storage, size, None, options)
    return await qcow2.open_image(storage)


# -- packing


@pytest.mark.parametrize("size", [512, 4096, 65536, 2 << 20])
def test_deflate_has_the_window_that_qemu_reads_with(size: int) -> None:
    # what repeats lies farther apart than that window
    data = (random.Random(1).randbytes(min(5000, size // 4)) + bytes(size))[: size // 2] * 2
    packed = compressed.pack(data, 0)
    assert packed is not None
    assert zlib.decompressobj(-12).decompress(packed) == data
    assert compressed.unpack(packed + b"what follows", 0, size) == data


@pytest.mark.parametrize("library", [zlib, isal_zlib], ids=["zlib", "isal"])
def test_both_libraries_inflate_the_same_and_refuse_the_same(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compressed._inflater is isal_zlib.decompressobj
    monkeypatch.setattr(compressed, "_inflater", library.decompressobj)
    monkeypatch.setattr(compressed, "_InflateError", library.error)
    data = compressible(random.Random(4), 65536, 0.3)
    packed = compressed.pack(data, 0)
    assert packed is not None
    assert compressed.unpack(packed, 0, 65536) == data
    # also where the sector goes on with something else
    assert compressed.unpack(packed + data[:300], 0, 65536) == data
    for broken in (packed[: len(packed) // 2], b"", b"\xff" * 100, data[:500]):
        with pytest.raises(CorruptImage, match="a compressed cluster"):
            compressed.unpack(broken, 0, 65536)


@pytest.mark.parametrize("method", [0, 1])
def test_what_cannot_be_packed_is_not(method: int) -> None:
    assert compressed.pack(random.Random(2).randbytes(65536), method) is None


@pytest.mark.parametrize("bits", range(9, 22))
def test_a_place_survives_its_description(bits: int) -> None:
    for offset in (0, 1, 511, 512, (1 << bits) - 1, (123 << bits) + 77):
        for length in (1, 511, 512, 513, (1 << bits) - 1):
            place = compressed.locate(compressed.describe(offset, length, bits), bits)
            assert place.offset == offset
            assert (place.offset + place.length) % 512 == 0
            assert length <= place.length < length + 512


# -- packed clusters in images


async def test_clusters_of_one_request_are_unpacked_side_by_side_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, unit, data = tmp_path / "image", 65536, compressible(random.Random(5), 4 * 65536, 0.3)
    qemu_create(path, len(data))
    unpack, together = compressed.unpack, threading.Barrier(4)

    def meet(packed: bytes, method: int, size: int) -> bytes:
        together.wait(timeout=PATIENCE)
        return unpack(packed, method, size)

    monkeypatch.setattr(compressed, "unpack", meet)
    async with disk_at(path) as disk:
        image = disk.layers[0].image
        assert isinstance(image, Qcow2Image)
        for start in range(0, len(data), unit):
            await write_packed(image, start, data[start : start + unit])
        view = memoryview(bytearray(len(data)))
        assert not disk.readinto_now(0, view)
        await disk.readinto(0, view)
        assert view == data
        # nobody is met from now on
        part = memoryview(bytearray(3 * unit))
        assert disk.readinto_now(1000, part)
        assert part == data[1000 : 1000 + 3 * unit]
        await disk.write(unit, b"new")
        assert disk.readinto_now(0, view)
        assert view == data[:unit] + b"new" + data[unit + 3 :]


@pytest.mark.parametrize("options", VARIANTS, ids=_id)
async def test_packed_data_and_zeros_over_each_other(tmp_path: Path, options: dict[str, object]) -> None:
    """Whatever replaces whatever, content is exact, and all references are counted, at each opening."""
    path, unit = tmp_path / "image", int(str(options["cluster_size"]))
    clusters = 5 if unit > 65536 else 60
    size = clusters * unit - (512 if unit > 512 else 0)
    qemu_create(path, size, **options)
    rnd = random.Random(3)
    model = bytearray(clusters * unit)
    for _ in range(3):
        async with disk_at(path) as disk:
            layer = disk.layers[0]
            for _ in range(clusters):
                number = rnd.randrange(clusters)
                start = number * unit
                choice = rnd.random()
                if choice < 0.6:
                    data = compressible(rnd, unit, rnd.choice([0.05, 0.3, 0.6]))
                    packed = layer.image.pack(data)
                    assert packed is not None
                    await layer.write_packed(start, packed)
                elif choice < 0.8:
                    data = rnd.randbytes(unit)
                    await disk.write(start, data[: size - start])
                else:
                    data = bytes(unit)
                    await disk.zero_layer(0, start, min(unit, size - start))
                model[start : start + unit] = data
                if rnd.random() < 0.1:
                    await disk.flush()
            assert await disk.read(0, size) == model[:size]
        ok(qemu_img("check", path))
        assert qemu_content(path) == model[:size]


async def test_packed_clusters_share_host_clusters(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, 64 * 65536)
    async with image_at(path) as image:
        assert isinstance(image, Qcow2Image)
        before = image.refcounts.end
        for number in range(64):
            await write_packed(image, number * 65536, bytes([number + 1]) * 65536)
        # one for all of them, and a table
        assert image.refcounts.end == before + 2
    assert path.stat().st_size % 512 == 0
    assert "100.00% compressed" in ok(qemu_img("check", path))


@pytest.mark.parametrize(("bits", "host_clusters"), [("1", 7), ("2", 3), ("4", 1)])
async def test_a_count_that_is_full_starts_a_new_host_cluster(bits: str, host_clusters: int) -> None:
    image = await _empty(1 << 20, refcount_bits=bits)
    await write_packed(image, 0, b"\1" * 65536)
    before = image.refcounts.end
    for number in range(1, 7):
        await write_packed(image, number * 65536, bytes([number + 1]) * 65536)
    assert image.refcounts.end == before + host_clusters - 1
    await image.flush()
    found = await image.check()
    assert (found.corruptions, found.leaks) == (0, 0)


async def test_nothing_is_put_behind_a_cluster_that_was_given_back() -> None:
    """Its host cluster has become somebody else's."""
    image = await _empty(1 << 30)
    layer = Layer(image)
    await write_packed(image, 0, b"\1" * 65536)
    await image.flush()
    (old,) = await image.map(0, 65536)
    await layer.deallocate(0, 65536)
    await image.settle()
    await layer.write_clusters(512 << 20, [b"\2" * 65536])
    assert image.table_offset(image.l1.entries[1]) == compressed.locate(old.host_offset, 16).offset
    await write_packed(image, 65536, b"\3" * 65536)
    await image.flush()
    assert isinstance(image.storage, MemoryStorage)
    again = await in_memory(bytes(image.storage.content))
    assert await Layer(again).map(512 << 20, 65536) == await image.map(512 << 20, 65536)
    found = await again.check()
    assert (found.corruptions, found.leaks) == (0, 0)


async def test_packed_clusters_of_a_snapshot_stay(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_create(path, 1 << 20)
    rnd = random.Random(4)
    first, second = compressible(rnd, 1 << 20, 0.2), compressible(rnd, 1 << 20, 0.2)
    for content in (first, second):
        async with disk_at(path) as disk:
            for start in range(0, 1 << 20, 65536):
                packed = disk.layers[0].image.pack(content[start : start + 65536])
                assert packed is not None
                await disk.layers[0].write_packed(start, packed)
        ok(qemu_img("check", path))
        if content is first:
            ok(qemu_img("snapshot", "-c", "first", path))
    assert qemu_content(path) == second
    ok(qemu_img("snapshot", "-a", "first", path))
    assert qemu_content(path) == first
    ok(qemu_img("snapshot", "-d", "first", path))
    ok(qemu_img("check", path))


# -- side by side, failures, power cuts


async def test_writers_side_by_side_do_not_overwrite_each_other() -> None:
    """On a storage that waits, the padding of one must not hit the next."""
    image = await _empty(1 << 20)
    storage = image.storage
    assert isinstance(storage, MemoryStorage)
    rnd = random.Random(5)
    data = [compressible(rnd, 65536, 0.1) for _ in range(8)]
    await write_packed(image, 0, data[0])
    gate = storage.gates["write"] = Gate()
    storage.cold = True
    async with trio.open_nursery() as nursery:
        for number in range(1, 8):
            nursery.start_soon(write_packed, image, number * 65536, data[number])
        await gate.arrived.wait()
        gate.open()
    del storage.gates["write"]
    await image.flush()
    assert (await disk_content(image))[: 8 << 16] == b"".join(data)
    found = await image.check()
    assert (found.corruptions, found.leaks) == (0, 0)


async def test_a_failed_write_gives_its_place_back() -> None:
    image = await _empty(1 << 20)
    storage = image.storage
    assert isinstance(storage, MemoryStorage)
    await write_packed(image, 0, b"\1" * 65536)
    for _ in range(3):
        storage.failures["write"] = [StorageError("cannot write", errno=5)]
        with pytest.raises(StorageError):
            await write_packed(image, 65536, b"\2" * 65536)
    await write_packed(image, 131072, b"\3" * 65536)
    await image.settle()
    assert [extent.kind for extent in await image.map(0, 3 << 16)] == [
        Kind.COMPRESSED,
        Kind.UNALLOCATED,
        Kind.COMPRESSED,
    ]
    found = await image.check()
    assert (found.corruptions, found.leaks) == (0, 0)
    assert (await disk_content(image))[: 3 << 16] == b"\1" * 65536 + bytes(65536) + b"\3" * 65536


async def test_a_place_too_far_for_a_descriptor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    image = await _empty(1 << 20)
    monkeypatch.setattr(compressed, "_offset_bits", lambda bits: 17)
    with pytest.raises(CowfsError, match="largest size"):
        await write_packed(image, 0, b"\1" * 65536)
    await image.settle()
    found = await image.check()
    assert (found.corruptions, found.leaks) == (0, 0)


@pytest.mark.parametrize("bits", ["2", "16"])
async def test_a_power_cut_leaves_old_or_new_content(bits: str) -> None:
    unit, count = 4096, 24
    storage = RecordingStorage("image")
    await qcow2.create(storage, unit * count, None, {"cluster_size": str(unit), "refcount_bits": bits})
    storage.begin()
    image = await qcow2.open_image(storage)
    rnd = random.Random(6)
    allowed = [[bytes(unit)] for _ in range(count)]
    for _ in range(3 * count):
        number = rnd.randrange(count)
        data = compressible(rnd, unit, 0.2)
        allowed[number].append(data)
        await write_packed(image, number * unit, data)
        if rnd.random() < 0.1:
            await image.flush()
    await image.close()
    for moment in range(len(storage.steps) + 1):
        for losing in (None, rnd):
            cut = await in_memory(after_cut(storage.start, storage.steps[:moment], losing))
            assert (await cut.check()).corruptions == 0
            content = await disk_content(cut)
            for number, choices in enumerate(allowed):
                assert content[number * unit : (number + 1) * unit] in choices


async def test_the_l2_entry_of_a_packed_cluster_has_no_copied_flag() -> None:
    image = await _empty(1 << 20)
    await write_packed(image, 0, b"\1" * 65536)
    table = image.tables.get(image.table_offset(image.l1.entries[0]))
    assert table is not None
    entries: array[int] = table.entries
    assert entries[0] >> 62 == 0b01
