"""QED beyond what QEMU makes or takes: here images are made, and judged, by the letter of the specification."""

import random
from pathlib import Path

import pytest
from commandline import ok, qemu_img
from qedspec import NEED_CHECK, Read, Spec
from qedtools import M, drop, image_of, opened, patch, pattern, qemu_content

from cowfs.block.image import Backing
from cowfs.errors import Unsupported
from cowfs.formats.chain import open_disk, open_image

K = 1 << 10


def some_clusters(spec: Spec, tables: int, seed: int = 1) -> None:
    """Put data into the first and last clusters that each table maps, and a zero cluster after the first."""
    chooser = random.Random(seed)
    for table in range(tables):
        first = table * spec.entries
        spec.clusters[first] = chooser.randbytes(4096).rjust(spec.cluster_size, b"\1")
        spec.clusters[first + 1] = None
        spec.clusters[first + spec.entries - 1] = chooser.randbytes(4096).ljust(spec.cluster_size, b"\0")


def places(spec: Spec) -> list[int]:
    """Offsets of the disk about which something is known: where clusters begin, end, and where nothing is."""
    around = {number + step for number in spec.clusters for step in (0, 1, 2)}
    offsets = {number * spec.cluster_size + within for number in around for within in (0, spec.cluster_size - 512)}
    return sorted(offset for offset in offsets if offset + 512 <= spec.size)


SIZES = [(cluster, 1) for cluster in (4 * K, 8 * K, 64 * K, M)] + [
    (4 * K, 16),
    (256 * K, 8),
    (8 * M, 4),
    (16 * M, 1),
    (16 * M, 4),
    (32 * M, 2),
    (64 * M, 1),
]


@pytest.mark.parametrize(("cluster", "table"), SIZES)
async def test_sizes(tmp_path: Path, cluster: int, table: int) -> None:
    """Read, write, drop, write again; then read by the specification."""
    spec = Spec(cluster, table, 2)
    tables = 3 if spec.span < 1 << 40 and cluster < 16 * M else 1
    # the last cluster of the disk is cut short
    spec.size = tables * spec.span - 512
    some_clusters(spec, tables)
    spec.write(path := tmp_path / "disk.qed")
    read = Read(path)
    model = {offset: read.content(offset, 512) for offset in places(spec)}
    assert any(any(data) for data in model.values())
    fresh = 7 * cluster
    async with opened(path) as disk:
        for offset, data in model.items():
            assert await disk.read(offset, 512) == data
        for offset in (100, cluster + 512, spec.size - 512, fresh + 5):
            await disk.write(offset, b"w" * 100)
        await drop(disk, 0, cluster)
        await disk.write(2 * cluster, b"again")
        await disk.flush()
        assert not (await image_of(disk).check()).corruptions
    read = Read(path)
    assert (read.features, read.leaks, read.size) == (0, 0, spec.size)
    assert 0 not in read.clusters
    assert read.content(2 * cluster, 5) == b"again"
    assert read.content(fresh, 200) == bytes(5) + b"w" * 100 + bytes(95)
    for offset, data in model.items():
        if offset >= cluster:
            expected = bytearray(data)
            for start, what in ((cluster + 512, b"w" * 100), (spec.size - 512, b"w" * 100), (2 * cluster, b"again")):
                if offset <= start < offset + 512:
                    expected[start - offset : start - offset + len(what)] = what
            assert read.content(offset, 512) == expected
    async with opened(path, writable=False) as disk:
        assert await disk.read(cluster, 1024) == bytes(512) + b"w" * 100 + bytes(412)


async def test_tables_of_one_cluster_are_compacted_and_checked_after_a_crash(tmp_path: Path) -> None:
    spec = Spec(4 * K, 1, 3, size=32 * 512 * 4 * K)
    some_clusters(spec, 32)
    spec.write(path := tmp_path / "disk.qed")
    read = Read(path)
    async with opened(path) as disk:
        for table in range(0, 32, 2):
            await drop(disk, table * spec.span, spec.span)
        await disk.compact()
    assert Read(path).leaks == 0
    assert path.stat().st_size < len(read.clusters) * 4 * K
    assert {number: data for number, data in read.clusters.items() if number // 512 % 2} == Read(path).clusters
    # a crash: two leaked clusters and an entry that leads nowhere
    patch(path, path.stat().st_size + 2 * 4 * K - 1, b"\0")
    patch(path, 16, bytes([NEED_CHECK]))
    async with opened(path):
        pass
    assert (Read(path).leaks, Read(path).features) == (0, 0)
    assert {number: data for number, data in read.clusters.items() if number // 512 % 2} == Read(path).clusters


async def test_what_cannot_be_given_back_stays_under_the_mark(tmp_path: Path) -> None:
    """L1 does not move; where it is the last thing in the file, what is let go of before it stays free."""
    spec = Spec(l1_last=True)
    some_clusters(spec, 1)
    spec.clusters = {number: bytes([number + 1]) * 4096 for number in range(8)}
    spec.write(path := tmp_path / "disk.qed")
    assert Read(path).leaks == 0
    async with opened(path) as disk:
        await drop(disk, 0, 4096 * 5)
    read = Read(path)
    assert (read.leaks, read.features) == (5, NEED_CHECK)
    async with opened(path) as disk:
        await disk.write(512 * K, b"y" * 5 * 4096)
        assert await disk.read(5 * 4096, 3 * 4096) == b"".join(spec.clusters[number] or b"" for number in (5, 6, 7))
    read = Read(path)
    assert (read.leaks, read.features) == (0, 0)
    assert len(read.clusters) == 8


@pytest.mark.parametrize("header_size", [2, 5])
async def test_what_else_is_in_the_header_clusters_stays(tmp_path: Path, header_size: int) -> None:
    """Through all that rewrites the header: only the fields and the backing file's name ever change."""
    (tmp_path / "one").write_bytes(pattern(M, 1))
    (tmp_path / "two").write_bytes(pattern(M, 1))
    extra = bytearray(pattern(header_size * 64 * K - 64, 3))
    # a name in the first sector with no room left around it; and room for one more elsewhere
    extra[3000:3200] = bytes(200)
    spec = Spec(64 * K, 2, header_size, 4, 1 << 60 | 1, 1 << 63 | 8, M, b"one", 100, bytes(extra))
    some_clusters(spec, 1)
    del spec.clusters[spec.entries - 1]
    spec.clusters[15] = b"l" * 64 * K
    spec.write(path := tmp_path / "disk.qed")
    ok(qemu_img("check", "-q", "-f", "qed", path))
    before = Read(path).header

    def changed() -> set[int]:
        """Offsets of what has changed, but for the fields."""
        return {at for at, (old, new) in enumerate(zip(before, Read(path).header, strict=True)) if old != new} - {
            *range(64)
        }

    async with opened(path) as disk:
        image = image_of(disk)
        await disk.write(5 * 64 * K, b"x")
        await disk.flush()
        assert (Read(path).features, Read(path).autoclear, Read(path).compat) == (7, 0, 1 << 60 | 1)
        assert not changed()
        await image.settle()
        assert Read(path).features == 5
        await disk.grow(2 * M)
        assert not changed()
        await disk.layers[0].set_backing(Backing("two", "raw"))
        await disk.flush()
        assert changed() <= {*range(100, 103), *range(3064, 3264)}
        assert Read(path).backing == b"two"
        await disk.layers[0].set_backing(Backing("one", None))
        await disk.layers[0].set_backing(Backing("two", "raw"))
        await disk.layers[0].set_backing(None)
        await disk.flush()
        await disk.compact()
    assert changed() == {100, 101, 102}, "the name that was overwritten with zeros"
    assert (Read(path).features, Read(path).compat, Read(path).leaks) == (0, 1 << 60 | 1, 0)
    ok(qemu_img("check", "-q", "-f", "qed", path))
    assert Read(path).content(5 * 64 * K, 2)[:1] == b"x"


async def test_a_name_that_reaches_beyond_the_first_sector(tmp_path: Path) -> None:
    (tmp_path / ("n" * 200)).write_bytes(b"b" * M)
    name = b"./" * 200 + b"n" * 200
    spec = Spec(4 * K, 2, 3, 4, size=M, backing=name, backing_offset=300, extra=b"e" * 236)
    spec.write(path := tmp_path / "disk.qed")
    async with opened(path) as disk:
        assert await disk.read(0, M) == b"b" * M
        await disk.write(0, b"x")
        await disk.layers[0].set_backing(Backing("/" + name.decode(), "raw"))
        await disk.layers[0].set_backing(Backing(name.decode(), "raw"))
    read = Read(path)
    assert read.backing == name
    assert read.header.count(b"n" * 200) == 1
    assert read.header[64:300] == b"e" * 236
    assert qemu_content(path) == b"x" + b"b" * (M - 1)


@pytest.mark.parametrize("bit", range(3, 64))
async def test_every_unknown_feature_is_refused_by_its_number(tmp_path: Path, bit: int) -> None:
    Spec(features=1 << bit).write(path := tmp_path / "disk.qed")
    before = path.read_bytes()
    for writable in (True, False):
        with pytest.raises(Unsupported, match=f"disk.qed: needs qed features .*incompatible feature bits {bit}\\)"):
            await open_image(str(path), "qed", writable=writable)
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["write in place", "allocate", "zeroes", "drop", "grow", "set_backing"])
async def test_unknown_autoclear_bits_go_with_the_first_change(tmp_path: Path, change: str) -> None:
    spec = Spec(compat=(1 << 64) - 1, autoclear=(1 << 64) - 1)
    some_clusters(spec, 1)
    spec.clusters = {0: b"x" * 4096, 1: None}
    spec.write(path := tmp_path / "disk.qed")
    before = path.read_bytes()
    async with opened(path) as disk:
        await disk.read(0, M)
        await disk.flush()
    async with opened(path, writable=False) as disk:
        await disk.read(0, M)
    assert path.read_bytes() == before
    disk = await open_disk(str(path), "qed", writable=True)
    top = disk.layers[0]
    if change == "write in place":
        assert not disk.write_now(0, b"y")
        await disk.write(0, b"y")
    elif change == "allocate":
        await disk.write(9000, b"y")
    elif change == "zeroes":
        await top.write_zeroes(0, 4096)
    elif change == "drop":
        await drop(disk, 0, 4096)
    elif change == "grow":
        await disk.grow(2 * M)
    else:
        await top.set_backing(Backing("none", "raw"))
    assert (Read(path).autoclear, Read(path).compat) == (0, (1 << 64) - 1)
    await disk.close()
    assert (Read(path).autoclear, Read(path).compat, Read(path).leaks) == (0, (1 << 64) - 1, 0)
