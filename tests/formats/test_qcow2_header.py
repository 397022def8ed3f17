"""Rewriting the qcow2 header: each write leaves a header that means the old or the new, to cowfs and to QEMU."""

import json
import random
import struct
from pathlib import Path

import pytest
from commandline import ok, qemu_img, qemu_io
from powercut import Flushed, RecordingStorage
from storages import MemoryStorage

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.errors import StorageError, Unsupported, UsageError
from cowfs.formats import qcow2
from cowfs.formats.qcow2.header import first_sector, plan
from cowfs.formats.qcow2.layout import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_FEATURE_NAMES,
    SECTOR,
    V3_LENGTH,
    Header,
    parse_header,
)

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

SIZE = 1 << 20
#: what QEMU writes: larger, together with the rest, than a sector
NAMES = (EXTENSION_FEATURE_NAMES, b"".join(bytes([0, bit]) + b"a feature".ljust(46, b"\0") for bit in range(8)))
STRANGE = (0x12345678, bytes(range(1, 200)))
OTHER = (0x9ABCDEF0, b"odd")
OLD, NEW = Backing("old.raw", "raw"), Backing("a/longer/name", "qcow2")


def extensions_of(format: str | None, *others: tuple[int, bytes], first: bool = True) -> list[tuple[int, bytes]]:
    own = [(EXTENSION_BACKING_FORMAT, format.encode())] if format else []
    return [*own, *others] if first else [*others, *own]


async def image_with(
    backing: Backing | None,
    others: list[tuple[int, bytes]],
    *,
    first: bool = True,
    cluster_size: int = 65536,
    **more: str,
) -> bytes:
    """An image whose header has these extensions, with the name right behind them as QEMU puts it."""
    storage = MemoryStorage("image")
    await qcow2.create(storage, SIZE, None, {"cluster_size": str(cluster_size), **more})
    header = parse_header(bytes(storage.content[:cluster_size]), storage.length)
    header.extensions = extensions_of(backing.format if backing else None, *others, first=first)
    name = backing.name.encode() if backing else b""
    header.backing_offset, header.backing_length = (len(header.pack()), len(name)) if backing else (0, 0)
    head = header.pack() + name
    assert len(head) <= cluster_size
    storage.content[: len(head)] = head
    return bytes(storage.content)


def meaning(content: bytes) -> tuple[Backing | None, list[tuple[int, bytes]]]:
    """Backing file, and the extensions that are neither its format nor a filler, whatever their order."""
    header = parse_header(content[: 1 << int.from_bytes(content[20:24], "big")], len(content))
    others = [
        (kind, data)
        for kind, data in header.extensions
        if kind != EXTENSION_BACKING_FORMAT and not (kind == EXTENSION_FEATURE_NAMES and not any(data[:48]))
    ]
    return header.backing, sorted(others)


def qemu_meaning(path: Path) -> Backing | None:
    facts = json.loads(ok(qemu_img("info", "-U", "--output=json", path)))
    if "backing-filename" not in facts:
        return None
    return Backing(facts["backing-filename"], facts.get("backing-filename-format"))


def in_first_sector(step: object) -> bool:
    return isinstance(step, tuple) and step[0] < SECTOR


CASES = {
    "everything in the first sector": [],
    "a feature name table that fills the sector": [NAMES],
    "extensions far beyond it": [NAMES, STRANGE, OTHER],
    "unknown ones only": [OTHER, STRANGE, STRANGE],
}
CHANGES = {
    "another name": (OLD, Backing("b", "raw")),
    "a longer name": (OLD, Backing("n" * 1023, "raw")),
    "name and format": (OLD, NEW),
    "a long format": (OLD, Backing("b", "host_device")),
    "format only": (OLD, Backing("old.raw", "qcow2")),
    "shorter format": (Backing("b", "host_device"), OLD),
    "from nothing": (None, NEW),
    "from no format": (Backing("old.raw", None), NEW),
    "to no format": (OLD, Backing("b", None)),
    "dropped": (OLD, None),
    "nothing to drop": (None, None),
}


@pytest.mark.parametrize("first", [True, False], ids=["format first", "format last"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", CASES)
async def test_every_write_leaves_the_old_or_the_new(tmp_path: Path, case: str, change: str, first: bool) -> None:
    old, new = CHANGES[change]
    others = CASES[case]
    storage = RecordingStorage("image", await image_with(old, others, first=first))
    image = await qcow2.open_image(storage)
    await image.set_backing(new)
    await image.close()
    wanted = sorted(others)
    seen = [meaning(content) for content in storage.prefixes()]
    assert seen[0] == (old, wanted)
    assert seen[-1] == (new, wanted)
    switched = seen.index((new, wanted))
    assert all(state == (old, wanted) for state in seen[:switched])
    assert all(state == (new, wanted) for state in seen[switched:])
    # what was not flushed when the power went may be there or not
    for content in storage.cuts(random.Random(1), 3):
        assert meaning(content) in ((old, wanted), (new, wanted))
    # behind the first sector nothing is touched that counts: each write of the sector is one, and flushed around
    switches = [index for index, step in enumerate(storage.steps) if in_first_sector(step)]
    assert len(switches) <= 3
    for index in switches:
        assert isinstance(storage.steps[index - 1], Flushed)
        assert any(isinstance(step, Flushed) for step in storage.steps[index + 1 :][:2])
    # the format's extension is there if and only if there is something to say, and no filler stays
    header = parse_header(bytes(storage.content[:65536]), storage.length)
    assert header.extensions == image.header.extensions
    kinds = [kind for kind, _ in header.extensions]
    assert kinds.count(EXTENSION_BACKING_FORMAT) == bool(new and new.format)
    assert len(kinds) == len(others) + bool(new and new.format)


@pytest.mark.parametrize("change", ["name and format", "a long format", "from nothing", "dropped"])
@pytest.mark.parametrize("case", CASES)
async def test_qemu_reads_every_state(tmp_path: Path, case: str, change: str) -> None:
    old, new = CHANGES[change]
    storage = RecordingStorage("image", await image_with(old, CASES[case], first=False))
    image = await qcow2.open_image(storage)
    await image.set_backing(new)
    await image.close()
    path = tmp_path / "cut"
    for content in dict.fromkeys(storage.prefixes()):
        path.write_bytes(content)
        assert qemu_meaning(path) == meaning(content)[0]
        alone = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(path)}}
        ok(qemu_img("check", "-q", f"json:{json.dumps(alone)}"))


async def test_a_header_that_a_crash_left_with_a_filler_is_put_right(tmp_path: Path) -> None:
    others = CASES["extensions far beyond it"]
    storage = RecordingStorage("image", await image_with(OLD, others, first=False))
    await (await qcow2.open_image(storage)).set_backing(Backing("b", "host_device"))
    fillers = [
        content
        for content in storage.prefixes()
        if not any(parse_header(content[:65536], len(content)).extensions[0][1][:48])
    ]
    assert fillers
    again = RecordingStorage("image", fillers[-1])
    await (await qcow2.open_image(again)).set_backing(NEW)
    states = [meaning(content) for content in again.prefixes()]
    assert set(map(str, states)) == {str((OLD, sorted(others))), str((NEW, sorted(others)))}
    kinds = [kind for kind, _ in parse_header(bytes(again.content[:65536]), again.length).extensions]
    assert sorted(kinds) == sorted([EXTENSION_BACKING_FORMAT, *(kind for kind, _ in others)])


@pytest.mark.parametrize("version", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
async def test_qemu_and_cowfs_take_turns(tmp_path: Path, cluster_size: int, version: str) -> None:
    """QEMU rebases, cowfs rebases, QEMU writes, and so on; content and image stay right."""
    for number in range(3):
        (tmp_path / f"base{number}").write_bytes(bytes([number + 1]) * SIZE)
        ok(
            qemu_img(
                "convert", "-f", "raw", "-O", "qcow2", tmp_path / f"base{number}", tmp_path / f"base{number}.qcow2"
            )
        )
    path = tmp_path / "image"
    options = f"cluster_size={cluster_size},compat={version}"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", "base0", "-F", "raw", path))
    for turn, backing in enumerate(
        [Backing("base1.qcow2", "qcow2"), Backing("base2", "raw"), None, Backing("./base0.qcow2", "qcow2")]
    ):
        storage = MemoryStorage("image", path.read_bytes())
        disk = Disk([Layer(await qcow2.open_image(storage))], copy_on_read=False)
        await disk.layers[0].set_backing(backing)
        await disk.close()
        path.write_bytes(storage.content)
        assert qemu_meaning(path) == backing
        ok(qemu_img("check", "-q", path))
        qemu_io(path, "qcow2", f"write -P {turn + 100} {turn * 65536} 64k")
        ok(qemu_img("rebase", "-u", "-b", "base1", "-F", "raw", path))
        assert meaning(path.read_bytes())[0] == Backing("base1", "raw")
    qemu_io(path, "qcow2", *(f"read -P {turn + 100} {turn * 65536} 64k" for turn in range(4)), "read -P 2 256k 64k")


async def test_unknown_header_fields_stay(tmp_path: Path) -> None:
    content = bytearray(await image_with(None, []))
    content[100:104] = (V3_LENGTH + 32).to_bytes(4, "big")
    content[V3_LENGTH : V3_LENGTH + 32] = bytes(8) + b"something from the future"[:24]
    content[V3_LENGTH + 32 : V3_LENGTH + 40] = bytes(8)
    storage = MemoryStorage("image", bytes(content))
    await (await qcow2.open_image(storage)).set_backing(NEW)
    assert storage.content[112 : V3_LENGTH + 32] == content[112 : V3_LENGTH + 32]
    assert meaning(bytes(storage.content)) == (NEW, [])


async def test_old_names_do_not_stay_behind() -> None:
    content = await image_with(Backing("secret" * 100, "raw"), [NAMES, STRANGE])
    storage = MemoryStorage("image", content)
    image = await qcow2.open_image(storage)
    for backing in (NEW, Backing("x" * 300, "raw"), None):
        await image.set_backing(backing)
    await image.flush()
    assert b"secret" not in storage.content
    assert b"longer" not in storage.content
    assert b"xxx" not in storage.content
    assert not any(storage.content[parse_end(bytes(storage.content)) : 65536])


def parse_end(content: bytes) -> int:
    position = int.from_bytes(content[100:104], "big")
    while kind_and_length := struct.unpack_from(">II", content, position):
        if not kind_and_length[0]:
            return position + 8
        position += 8 + -(-kind_and_length[1] // 8) * 8
    raise AssertionError


async def test_a_header_without_room_says_so_and_stays(tmp_path: Path) -> None:
    content = await image_with(None, [OTHER], cluster_size=512)
    storage = MemoryStorage("image", content)
    image = await qcow2.open_image(storage)
    with pytest.raises(Unsupported, match="no room in its header"):
        await image.set_backing(Backing("n" * 400, "raw"))
    assert storage.content == content
    # 1 KiB: the extensions overlap with themselves, and there is no place to go by
    content = await image_with(OLD, [NAMES, STRANGE], first=False, cluster_size=1024)
    storage = MemoryStorage("image", content)
    image = await qcow2.open_image(storage)
    with pytest.raises(Unsupported, match="no room in its header"):
        await image.set_backing(NEW)
    assert storage.content == content
    # dropping needs no room; the format's extension, which says nothing any more, may have to stay
    await image.set_backing(None)
    assert meaning(bytes(storage.content)) == (None, sorted([NAMES, STRANGE]))


@pytest.mark.parametrize(
    ("backing", "sentence"),
    [
        (Backing("", "raw"), "from 1 to 1023 bytes"),
        (Backing("a\0b", "raw"), "from 1 to 1023 bytes"),
        (Backing("n" * 1024, "raw"), "from 1 to 1023 bytes"),
        (Backing("b", "sixteen-letters!"), "cannot be recorded as the format"),
        (Backing("b", "größe"), "cannot be recorded as the format"),
    ],
)
async def test_what_no_header_records_is_refused(backing: Backing, sentence: str) -> None:
    content = await image_with(OLD, [])
    storage = MemoryStorage("image", content)
    image = await qcow2.open_image(storage)
    with pytest.raises(UsageError, match=sentence):
        await image.set_backing(backing)
    assert storage.content == content
    assert image.backing == OLD


async def test_a_failed_switch_is_not_made_up_for_later() -> None:
    others = [STRANGE, NAMES]
    content = await image_with(OLD, others, first=False)
    for number in range(1, 30):
        storage = MemoryStorage("image", content)
        image = await qcow2.open_image(storage)
        failure = StorageError("cannot write", errno=5)
        storage.failures["write"] = [None] * number + [failure]
        try:
            await image.set_backing(NEW)
        except StorageError:
            assert image.backing == OLD
            await image.flush()
            assert meaning(bytes(storage.content)) == (OLD, others)
            await image.set_backing(NEW)
        assert meaning(bytes(storage.content)) == (NEW, others)
        if storage.failures["write"]:
            break
    else:
        raise AssertionError("every write fails once")


def test_random_headers_and_changes() -> None:
    """The plan alone, on headers of all shapes: pieces behind the first sector never disturb the state before."""
    chooser = random.Random(2)
    refused = 0
    for _ in range(3000):
        size = chooser.choice([512, 1024, 4096, 65536])
        header = Header(3, size.bit_length() - 1, size, 1, 3 * size, size, 1, length=chooser.choice([104, 112]))
        backing = chooser.choice(
            [None, OLD, NEW, Backing("old", None), Backing("q" * chooser.randrange(1, 600), "qed")]
        )
        others = [
            (chooser.randrange(1, 1 << 30), chooser.randbytes(chooser.randrange(80)))
            for _ in range(chooser.randrange(7))
        ]
        header.extensions = extensions_of(backing.format if backing else None, *others, first=chooser.random() < 0.5)
        packed = header.pack()
        name = backing.name.encode() if backing else b""
        place = len(packed) + chooser.randrange(3) * 100 if backing else 0
        if place + len(name) > size or len(packed) > size:
            continue
        header.backing, header.backing_offset, header.backing_length = backing, place, len(name)
        disk = bytearray(header.pack().ljust(size, b"\0"))
        disk[place : place + len(name)] = name
        new = chooser.choice([None, OLD, NEW, Backing("z" * chooser.randrange(1, 400), chooser.choice(["raw", None]))])
        try:
            steps = plan(header, new)
        except Unsupported:
            assert size <= 4096
            refused += 1
            continue
        before = bytes(disk)
        for state in steps.states:
            for offset, data in state.pieces:
                start = max(offset, SECTOR)
                disk[start : start + len(data[start - offset :])] = data[start - offset :]
                assert _parsed(disk) == _parsed(before), "still the state before"
            disk[:SECTOR] = first_sector(bytes(disk[:SECTOR]), header.length, state)
            assert len(disk) == size
            before = bytes(disk)
            if state is not steps.states[-1]:
                assert _parsed(before) == (backing, sorted(others))
        assert _parsed(before) == (new, sorted(others))
        for offset, length in steps.stale:
            disk[offset : offset + length] = bytes(length)
        assert _parsed(disk) == (new, sorted(others))
    assert refused < 600


def _parsed(disk: bytes | bytearray) -> tuple[Backing | None, list[tuple[int, bytes]]]:
    return meaning(bytes(disk) + bytes(4 * len(disk)))
