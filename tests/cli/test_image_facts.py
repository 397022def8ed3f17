"""``info``, ``map`` and ``check`` against ``qemu-img`` on the same images."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal


def _make(path: Path, *args: str) -> Path:
    ok(qemu_img("create", *args[:-1], path, args[-1]) if args[-1] else qemu_img("create", *args[:-1], path))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of every kind, with data, holes, zeros, and chains across formats."""
    here = tmp_path_factory.mktemp("images")
    (here / "sub").mkdir()
    raw = _make(here / "base.raw", "-f", "raw", "3M")
    qemu_io(raw, "raw", "write -P 1 0 4k", "write -P 2 1M 100k")
    v3 = _make(here / "v3.qcow2", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "10M")
    qemu_io(v3, "qcow2", "write -P 3 64k 128k", "write -z 1M 64k", "write -P 4 9M 64k", "write -z -u 5M 1M")
    v2 = _make(here / "v2.qcow2", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", "10M")
    qemu_io(v2, "qcow2", "write -P 3 10k 128k", "write -P 3 20k 4k", "write -P 3 2M 4k", "write -P 3 1M 4k")
    qed = _make(here / "top.qed", "-f", "qed", "-b", "v3.qcow2", "-F", "qcow2", "12M")
    qemu_io(qed, "qed", "write -P 5 0 64k", "write -z 9M 64k", "write -P 5 11M 64k")
    _make(here / "onraw.qed", "-f", "qed", "-b", "base.raw", "-F", "raw", "")
    _make(here / "sub/far.qcow2", "-f", "qcow2", "-b", "../top.qed", "-F", "qed", "")
    _make(here / "fancy.qcow2", "-f", "qcow2", "-o", "lazy_refcounts=on,compression_type=zstd,refcount_bits=64", "1G")
    ok(qemu_img("convert", "-c", "-O", "qcow2", v3, here / "packed.qcow2"))
    (here / "empty.raw").touch()
    dirty = _make(here / "dirty.qcow2", "-f", "qcow2", "1M")
    _patch(dirty, 79, b"\x01")
    dirty = _make(here / "dirty.qed", "-f", "qed", "1M")
    _patch(dirty, 16, b"\x02")
    marked = _make(here / "marked.qcow2", "-f", "qcow2", "2M")
    for words in (["-g", "4096", "first"], ["--disable", "second"]):
        ok(qemu_img("bitmap", "--add", *words[:-1], marked, words[-1]))
    (here / "odd.raw").write_bytes(b"odd" * 33_333)
    _make(here / "onodd.qcow2", "-f", "qcow2", "-b", "odd.raw", "-F", "raw", "")
    ok(qemu_img("create", "-f", "qcow2", "-o", "data_file=flat.data,extended_l2=on", "data.qcow2", "2M", cwd=here))
    corrupt = _make(here / "corrupt.qcow2", "-f", "qcow2", "1M")
    _patch(corrupt, 79, b"\x02")
    return here


def _patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


_NAMES = [
    "base.raw", "v3.qcow2", "v2.qcow2", "top.qed", "onraw.qed", "sub/far.qcow2", "fancy.qcow2", "packed.qcow2",
    "empty.raw", "dirty.qcow2", "dirty.qed", "marked.qcow2", "odd.raw", "onodd.qcow2", "data.qcow2", "corrupt.qcow2",
]  # fmt: skip
_CLEAN = [name for name in _NAMES if not name.endswith(".raw") and "dirty" not in name]


# of a QED image, qemu-img 7.2 does not tell the mark
@pytest.mark.parametrize("name", [name for name in _NAMES if name != "dirty.qed"])
@pytest.mark.parametrize("chain", [[], ["--backing-chain"]], ids=["one", "chain"])
def test_info_says_what_qemu_img_says(images: Path, name: str, chain: list[str]) -> None:
    assert ok(cowfs("info", *chain, name, cwd=images)) == ok(qemu_img("info", *chain, name, cwd=images))
    expected = json.loads(ok(qemu_img("info", *chain, "--output=json", name, cwd=images)))
    for option in ("--json", "--output=json"):
        assert json.loads(ok(cowfs("info", *chain, option, name, cwd=images))) == expected


def test_info_takes_the_format_it_is_told(images: Path) -> None:
    facts = json.loads(ok(cowfs("info", "--json", "-f", "raw", "v3.qcow2", cwd=images)))
    assert (facts["format"], facts["virtual-size"]) == ("raw", (images / "v3.qcow2").stat().st_size)


def test_info_tells_that_a_qed_image_was_not_closed_cleanly(images: Path) -> None:
    assert "\ncleanly shut down: no\n" in ok(cowfs("info", "dirty.qed", cwd=images))
    assert json.loads(ok(cowfs("info", "--json", "dirty.qed", cwd=images)))["dirty-flag"] is True


@pytest.mark.parametrize("name", [name for name in _NAMES if name != "empty.raw"])
def test_map_is_byte_for_byte_that_of_qemu_img(images: Path, name: str) -> None:
    expected = qemu_img("map", "--output=json", name, cwd=images).stdout
    assert ok(cowfs("map", "--json", name, cwd=images)) == expected


@pytest.mark.parametrize("name", [name for name in _NAMES if name != "packed.qcow2"])
def test_map_for_people_is_the_table_of_qemu_img(images: Path, name: str) -> None:
    assert ok(cowfs("map", name, cwd=images)) == ok(qemu_img("map", name, cwd=images))


def test_map_for_people_cannot_place_compressed_clusters(images: Path) -> None:
    assert "--json" in refusal(cowfs("map", "packed.qcow2", cwd=images))


def test_map_of_a_part(images: Path) -> None:
    part = ["-s", "64k", "-l", "1M"]
    expected = ok(qemu_img("map", *part, "--output=json", "top.qed", cwd=images))
    assert ok(cowfs("map", *part, "--json", "top.qed", cwd=images)) == expected
    assert "12582912" in refusal(cowfs("map", "-s", "13M", "top.qed", cwd=images))
    assert "top.qed: 'x'" in refusal(cowfs("map", "-s", "x", "top.qed", cwd=images))


@pytest.mark.parametrize("name", _CLEAN)
def test_check_of_a_clean_image(images: Path, name: str) -> None:
    assert ok(cowfs("check", name, cwd=images)) == ok(qemu_img("check", name, cwd=images))
    expected = json.loads(ok(qemu_img("check", "--output=json", name, cwd=images)))
    assert json.loads(ok(cowfs("check", "--json", name, cwd=images))) == expected


def _l2_of_first_cluster(image: bytes) -> int:
    l1 = int.from_bytes(image[40:48], "big")
    return int.from_bytes(image[l1 : l1 + 8], "big") & 0x00FF_FFFF_FFFF_FE00


def _set_count(path: Path, count: int) -> None:
    """Set the reference count of the cluster that guest offset 64k lies in."""
    image = path.read_bytes()
    entry = _l2_of_first_cluster(image) + 8
    cluster = (int.from_bytes(image[entry : entry + 8], "big") & 0x00FF_FFFF_FFFF_FE00) >> 16
    table = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[table : table + 8], "big")
    _patch(path, block + 2 * cluster, count.to_bytes(2, "big"))


def _leak(path: Path) -> None:
    """Forget a data cluster, whose reference count stays."""
    _patch(path, _l2_of_first_cluster(path.read_bytes()) + 8, bytes(8))


def _corrupt(path: Path) -> None:
    _set_count(path, 0)


@pytest.mark.parametrize(("damage", "code"), [(_leak, 3), (_corrupt, 2)])
def test_check_counts_damage_as_qemu_img_does(
    images: Path, tmp_path: Path, damage: Callable[[Path], None], code: int
) -> None:
    path = tmp_path / "damaged.qcow2"
    path.write_bytes((images / "v3.qcow2").read_bytes())
    ok(qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", path))
    damage(path)
    theirs, ours = qemu_img("check", path), cowfs("check", path)
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert ours.returncode == code
    assert ours.stderr
    theirs, ours = qemu_img("check", "--output=json", path), cowfs("check", "--json", path)
    assert (ours.returncode, json.loads(ours.stdout)) == (code, json.loads(theirs.stdout))
    assert cowfs("check", "-q", path).stdout == cowfs("check", "-q", path).stderr == ""


def test_check_of_a_format_without_any(images: Path) -> None:
    assert "nothing that could be checked" in refusal(cowfs("check", "base.raw", cwd=images), 63)
