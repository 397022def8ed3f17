"""qcow2 with external data files: beside QEMU on the same images, and what a header may name."""

import errno
import json
import os
import random
from pathlib import Path

import pytest
import trio
from powercut import Flushed, RecordingStorage, after_cut
from qcow2twin import Twin, assert_same_check, damage, qemu
from storages import Gate, MemoryStorage

from cowfs.block.disk import Disk
from cowfs.block.extent import Kind
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.errors import CorruptImage, CowfsError, UsageError
from cowfs.formats import qcow2
from cowfs.formats.chain import open_disk, open_image
from cowfs.formats.create import create_image, remove_image
from cowfs.formats.qcow2.layout import Header
from cowfs.jobs.commit import Commit
from cowfs.storage import FileStorage

SIZE = 3_000_832


@pytest.mark.parametrize("base_size", [SIZE, 1_000_448])
async def test_overlays_with_a_data_file(tmp_path: Path, base_size: int) -> None:
    twin = await Twin(tmp_path, SIZE, base_size=base_size).create(data_file="data", cluster_size="4k")
    await twin.use()
    await twin.verify()
    twin.use_with_qemu()
    disk = await open_disk(str(twin.path), writable=True)
    await disk.copy_up(SIZE // 4, SIZE // 2)
    await disk.close()
    await twin.verify()


async def test_commit_gives_the_space_of_the_data_file_back(tmp_path: Path) -> None:
    twin = await Twin(tmp_path, SIZE, base_size=SIZE).create(data_file="data")
    await twin.use()
    assert (tmp_path / "data").stat().st_blocks
    disk = await open_disk(str(twin.path), writable=True)
    job = Commit(disk)
    await job.run()
    assert job.state.value == "completed", job.error
    await disk.close()
    assert (tmp_path / "base").read_bytes() == twin.model
    assert not (tmp_path / "data").stat().st_blocks
    await twin.verify()
    await twin.use()
    await twin.verify()


async def test_the_rest_of_the_last_cluster_does_not_show_what_a_longer_backing_file_has_there(tmp_path: Path) -> None:
    size = SIZE & -4096 | 512
    twin = await Twin(tmp_path, size, base_size=2 * SIZE).create(data_file="data", cluster_size="4k")
    disk = await open_disk(str(twin.path), writable=True)
    await disk.grow(2 * SIZE)
    await disk.close()
    twin.model, twin.size = twin.model.ljust(2 * SIZE, b"\0"), 2 * SIZE
    await twin.verify()


@pytest.mark.parametrize("raw", ["off", "on"])
async def test_growing(tmp_path: Path, raw: str) -> None:
    twin = await Twin(tmp_path, SIZE).create(data_file="data", data_file_raw=raw)
    await twin.use(10)
    with (tmp_path / "data").open("r+b") as data:
        data.seek(SIZE)
        data.write(b"no part of the disk")
    disk = await open_disk(str(twin.path), writable=True)
    await disk.grow(SIZE + 1_000_448)
    await disk.close()
    twin.model += bytes(1_000_448)
    twin.size += 1_000_448
    await twin.verify()
    assert (tmp_path / "data").stat().st_size == twin.size
    if raw == "on":
        assert (tmp_path / "data").read_bytes() == twin.model
    await twin.use()
    await twin.verify()


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
async def test_preallocation(tmp_path: Path, preallocation: str) -> None:
    twin = await Twin(tmp_path, SIZE).create(data_file="data", preallocation=preallocation)
    await twin.verify()
    assert (tmp_path / "data").stat().st_size == SIZE
    assert bool((tmp_path / "data").stat().st_blocks) == (preallocation != "metadata")


async def test_raw_data_stays_raw_and_other_autoclear_bits_go(tmp_path: Path) -> None:
    twin = await Twin(tmp_path, SIZE).create(data_file="data", data_file_raw="on")
    content = bytearray(twin.path.read_bytes())
    content[95] = 0xFF
    twin.path.write_bytes(content)
    await twin.use(5)
    assert twin.path.read_bytes()[88:96] == (2).to_bytes(8, "big")


async def test_discards_of_a_raw_data_file_show_in_it(tmp_path: Path) -> None:
    twin = await Twin(tmp_path, SIZE).create(data_file="data", data_file_raw="on", cluster_size="4k")
    await twin.use()
    disk = await open_disk(str(twin.path), writable=True)
    await disk.layers[0].deallocate(40_960, 409_600)
    await disk.close()
    twin.model[40_960 : 40_960 + 409_600] = bytes(409_600)
    await twin.verify()
    assert (tmp_path / "data").read_bytes() == twin.model


async def test_info_says_what_qemu_says(tmp_path: Path) -> None:
    twin = await Twin(tmp_path, SIZE).create(data_file="data", data_file_raw="on")
    expected = json.loads(qemu("qemu-img", "info", "--output=json", "top", cwd=tmp_path))
    image = await open_image(str(twin.path))
    assert await image.details() == expected["format-specific"]["data"]
    await image.close()


@pytest.mark.parametrize("seed", range(30))
async def test_check_counts_what_qemu_counts_on_damaged_images(tmp_path: Path, seed: int) -> None:
    twin = Twin(tmp_path, SIZE, seed)
    twin.create_with_qemu(data_file="data", cluster_size=twin.rnd.choice(["512", "4k", "64k"]))
    twin.use_with_qemu()
    damage(twin.path, twin.rnd, 8)
    await assert_same_check(twin.path)


async def test_data_that_is_not_where_the_guest_has_it_is_an_error(tmp_path: Path) -> None:
    twin = await Twin(tmp_path, SIZE).create(data_file="data", preallocation="metadata")
    content = bytearray(twin.path.read_bytes())
    l1 = int.from_bytes(content[40:48], "big")
    table = int.from_bytes(content[l1 : l1 + 8], "big") & ~(1 << 63)
    content[table : table + 8] = (1 << 63 | 0x20000).to_bytes(8, "big")
    content[table + 8 : table + 16] = (1 << 62).to_bytes(8, "big")
    twin.path.write_bytes(content)
    disk = await open_disk(str(twin.path), writable=True)
    with pytest.raises(CorruptImage, match="guest offset 0x0 has its data at offset 0x20000 of the data file"):
        await disk.write(0, b"x")
    with pytest.raises(CorruptImage, match="has a compressed cluster"):
        await disk.read(65_536, 512)
    await disk.close()


# -- durability


async def in_memory(tmp_path: Path, **options: str) -> tuple[RecordingStorage, RecordingStorage, Disk]:
    """Make a disk whose image and data file are in memory, with one journal."""
    await create_image(str(tmp_path / "top"), "qcow2", SIZE, None, {"data_file": "data", **options})
    top = RecordingStorage("top", (tmp_path / "top").read_bytes())
    data = RecordingStorage("data", (tmp_path / "data").read_bytes(), journal=top.journal)
    image = await qcow2.open_image(top)
    image.attach_data(data)
    return top, data, Disk([Layer(image)])


async def test_the_data_file_is_flushed_before_the_tables_that_point_into_it(tmp_path: Path) -> None:
    top, data, disk = await in_memory(tmp_path)
    await disk.write(0, b"x" * 65_536)
    data.gates["flush"] = gate = Gate()
    before = len(top.journal)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.flush)
        await gate.arrived.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert len(top.journal) == before, "nothing is written to the image meanwhile"
        gate.open()
    name, step = top.journal[before]
    assert (name, isinstance(step, Flushed)) == ("data", True)
    assert {name for name, _ in top.journal[before + 1 :]} == {"top"}


@pytest.mark.parametrize("raw", ["off", "on"])
async def test_power_cuts(tmp_path: Path, raw: str) -> None:
    top, data, disk = await in_memory(tmp_path, data_file_raw=raw, cluster_size="4k")
    start = {"top": bytes(top.content), "data": bytes(data.content)}
    rnd = random.Random(3)
    states = [[0] for _ in range(SIZE // 512)]
    flushed: list[tuple[int, list[int]]] = [(0, [0] * len(states))]
    for value in range(1, 30):
        first = rnd.randrange(len(states))
        count = min(rnd.choice([1, 8, 30, 200]), len(states) - first)
        written = 0 if value % 4 == 0 else value
        if written:
            await disk.write(first * 512, bytes([value]) * count * 512)
        else:
            await disk.zero_layer(0, first * 512, count * 512)
        for sector in range(first, first + count):
            states[sector].append(written)
        if value % 5 == 0:
            before = [len(seen) - 1 for seen in states]
            await disk.flush()
            flushed.append((len(top.journal), before))
    for moment in range(0, len(top.journal) + 1, 4):
        for losing in (None, rnd):
            files = {
                name: after_cut(content, [step for where, step in top.journal[:moment] if where == name], losing)
                for name, content in start.items()
            }
            image = await qcow2.open_image(MemoryStorage("top", files["top"], read_only=True))
            image.attach_data(MemoryStorage("data", files["data"], read_only=True))
            assert not (await image.check()).corruptions
            found = await Disk([Layer(image)]).read(0, SIZE)
            oldest = max((gone for when, gone in flushed if when <= moment), default=None)
            assert oldest is not None
            for sector, seen in enumerate(states):
                assert found[sector * 512 : sector * 512 + 512] in [bytes([v]) * 512 for v in seen[oldest[sector] :]]


# -- names


def named(image: Path, name: str) -> Path:
    """Make an image with a header that names a data file."""
    header = Header(3, 16, 1 << 20, 1, 3 << 16, 1 << 16, 1, length=104, incompatible=4)
    header.extensions.append((0x44415441, name.encode()))
    image.write_bytes(header.pack().ljust(65536, b"\0") + bytes(4 << 16))
    return image


async def refusal(path: Path) -> str:
    with pytest.raises(CowfsError) as caught:
        await open_image(str(path), writable=True)
    return str(caught.value)


async def test_a_header_names_files_in_its_own_directory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    secret = tmp_path / "elsewhere" / "secret"
    secret.write_bytes(b"secret")
    (folder / "link").symlink_to(secret)
    for name in ("../elsewhere/secret", str(secret), "link", "sub/../../elsewhere/secret", "/etc/passwd", ".."):
        path = named(folder / "hostile", name)
        assert await refusal(path) == (
            f"{path}: its data file '{name}' lies outside of the image's own directory, where a header may not lead"
        )
    (folder / "sub" / "data").write_bytes(bytes(1 << 20))
    (folder / "inner").symlink_to("sub/data")
    for name in ("sub/data", "./sub/data", str(folder / "sub" / "data"), "inner"):
        image = await open_image(str(named(folder / "fine", name)), writable=True)
        assert (await image.details())["data-file"] == name
        await image.close()
    monkeypatch.chdir(folder)
    image = await open_image("fine")
    await image.close()
    assert secret.read_bytes() == b"secret"


async def test_odd_data_files_are_refused(tmp_path: Path) -> None:
    path = named(tmp_path / "image", "image")
    assert await refusal(path) == f"{path}: names itself as its data file"
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "fifo"):
        path = named(tmp_path / "image", name)
        assert await refusal(path) == f"{path}: its data file '{name}' is not a regular file"
    path = named(tmp_path / "image", "gone")
    assert await refusal(path) == (
        f"{tmp_path}/gone: cannot open: No such file or directory (data file of {tmp_path}/image)"
    )


async def test_one_data_file_is_not_two_layers(tmp_path: Path) -> None:
    await create_image(str(tmp_path / "base"), "qcow2", SIZE, None, {"data_file": "data"})
    await create_image(str(tmp_path / "top"), "qcow2", SIZE, Backing("base", "qcow2"), {"data_file": "dat2"})
    content = bytearray((tmp_path / "top").read_bytes())
    content[content.index(b"dat2") : content.index(b"dat2") + 4] = b"data"
    (tmp_path / "top").write_bytes(content)
    with pytest.raises(CowfsError, match="comes back to this file"):
        await open_disk(str(tmp_path / "top"))


def _header(**changes: object) -> bytes:
    header = Header(3, 16, 1 << 20, 1, 3 << 16, 1 << 16, 1, length=104, incompatible=4)
    for name, value in changes.items():
        setattr(header, name, value)
    return header.pack().ljust(65536, b"\0") + bytes(4 << 16)


NAME = (0x44415441, b"data")
BAD_HEADERS = {
    "has an external data file without saying what it is called": _header(),
    "has internal snapshots and an external data file, which exclude each other": _header(
        extensions=[NAME], snapshots=1, snapshots_offset=4 << 16
    ),
    "has a backing file and a raw external data file, which exclude each other": _header(
        extensions=[NAME], autoclear=2, backing_offset=4096, backing_length=4
    ),
}


@pytest.mark.parametrize("sentence", BAD_HEADERS)
async def test_a_bad_header_is_refused_in_one_sentence(tmp_path: Path, sentence: str) -> None:
    content = bytearray(BAD_HEADERS[sentence])
    content[4096:4100] = b"base"
    path = tmp_path / "bad"
    path.write_bytes(content)
    assert await refusal(path) == f"{path}: {sentence}"


# -- creating


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data_file_raw": "on"}, "data_file_raw needs data_file"),
        ({"data_file": "data", "compat": "0.10"}, "data_file needs compat=1.1"),
        ({"data_file": ""}, "the name of the data file cannot be recorded: it has 0 bytes"),
        ({"data_file": "d" * 2000}, "the name of the data file cannot be recorded: it has 2000 bytes"),
        ({"data_file": "taken"}, "the data file 'taken' exists already, and is not replaced"),
        ({"data_file": "top"}, "names itself as its data file"),
        (
            {"data_file": "../data"},
            "its data file '../data' lies outside of the image's own directory, where a header may not lead",
        ),
    ],
)
async def test_create_refuses_before_anything_is_touched(
    tmp_path: Path, options: dict[str, str], sentence: str
) -> None:
    (tmp_path / "taken").write_bytes(b"somebody's")
    with pytest.raises(CowfsError) as caught:
        await create_image(str(tmp_path / "top"), "qcow2", SIZE, None, options)
    assert str(caught.value) == f"{tmp_path / 'top'}: {sentence}"
    assert names(tmp_path) == ["taken"]
    assert (tmp_path / "taken").read_bytes() == b"somebody's"


async def test_raw_data_and_a_backing_file_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(SIZE))
    options = {"data_file": "data", "data_file_raw": "on"}
    with pytest.raises(UsageError, match="data_file_raw and a backing file exclude each other"):
        await create_image(str(tmp_path / "top"), "qcow2", SIZE, Backing("base", "raw"), options)
    await create_image(str(tmp_path / "top"), "qcow2", SIZE, None, options)
    disk = await open_disk(str(tmp_path / "top"), writable=True)
    with pytest.raises(CowfsError, match="raw cannot have a backing file") as caught:
        await disk.layers[0].set_backing(Backing("base", "raw"))
    assert caught.value.errno == errno.ENOTSUP
    assert [extent.kind for extent in await disk.layers[0].map(0, SIZE)] == [Kind.DATA]
    await disk.close()


async def test_a_failure_leaves_no_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*args: object, **options: object) -> None:
        raise CowfsError("no more")

    await create_image(str(tmp_path / "top"), "qcow2", SIZE, None, {"data_file": "data"})
    assert sorted(names(tmp_path)) == ["data", "top"]
    remove_image(str(tmp_path / "top"), {"data_file": "data"})
    assert not names(tmp_path)
    monkeypatch.setattr(FileStorage, "preallocate", fail)
    options = {"data_file": "data", "preallocation": "falloc"}
    with pytest.raises(CowfsError, match="no more"):
        await create_image(str(tmp_path / "top"), "qcow2", SIZE, None, options)
    assert not names(tmp_path)
