"""``cowfs rebase``, judged by QEMU's tools."""

import hashlib
import json
import random
from itertools import product
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal

#: no multiple of a cluster; the second is less than the backing files have
SIZES = [3_500_544, 2_700_288]
OVERLAYS = {
    "qcow2": ["-f", "qcow2"],
    "v2-4k": ["-f", "qcow2", "-o", "compat=0.10,cluster_size=4k"],
    "extended": ["-f", "qcow2", "-o", "extended_l2=on"],
    "qed": ["-f", "qed"],
}
BACKINGS = {"a.raw": "raw", "b.raw": "raw", "b.qcow2": "qcow2", "mid.qcow2": "qcow2", "": ""}
SOME = [("a.raw", "b.qcow2"), ("b.raw", "a.raw"), ("mid.qcow2", ""), ("", "mid.qcow2")]
CASES = [
    *[("qcow2", old, new, SIZES[0]) for old, new in product(BACKINGS, repeat=2) if old != new and old != "b.raw"],
    *[(kind, old, new, SIZES[1]) for kind in OVERLAYS for old, new in SOME],
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backing files that differ here and there, in content and size, one of them in the chain of another."""
    here = tmp_path_factory.mktemp("images")
    rnd = random.Random(3)
    first = bytearray(rnd.randbytes(3 << 20))
    first[1 << 20 : (1 << 20) + 200_000] = bytes(200_000)
    second = bytearray(first)
    for offset in (5_000, 700_000, 1_100_000, 2_000_000):
        second[offset : offset + 3_000] = rnd.randbytes(3_000)
    second[2_500_000:2_600_000] = bytes(100_000)
    (here / "a.raw").write_bytes(first)
    (here / "b.raw").write_bytes(second[:2_899_968])
    ok(qemu_img("convert", "-O", "qcow2", here / "b.raw", here / "b.qcow2"))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", "a.raw", "-F", "raw", here / "mid.qcow2"))
    qemu_io(here / "mid.qcow2", "qcow2", "write -P 4 300k 100k")
    return here


def _overlay(images: Path, name: str, kind: str, old: str, size: int) -> Path:
    path = images / name
    path.unlink(missing_ok=True)
    link = ["-b", old, "-F", BACKINGS[old]] if old else []
    ok(qemu_img("create", "-q", *OVERLAYS[kind], *link, path, str(size)))
    format = OVERLAYS[kind][1]
    qemu_io(path, format, "write -P 9 64k 3k", "write -z 1300k 128k", "write -P 7 2000k 65k")
    return path


def _allocated(path: Path) -> int:
    """Bytes that the top image itself holds."""
    entries = json.loads(ok(qemu_img("map", "--output=json", path)))
    return sum(entry["length"] for entry in entries if entry["depth"] == 0 and entry["present"])


@pytest.mark.parametrize(("kind", "old", "new", "size"), CASES)
def test_the_content_stays(images: Path, kind: str, old: str, new: str, size: int) -> None:
    ours = _overlay(images, "ours", kind, old, size)
    theirs = _overlay(images, "theirs", kind, old, size)
    ok(qemu_img("convert", "-O", "raw", ours, images / "before"))
    link = ["-b", new, "-F", BACKINGS[new]] if new else ["-b", ""]
    assert ok(cowfs("rebase", *link, ours)) == ""
    ok(qemu_img("rebase", *link, theirs))
    ok(qemu_img("compare", "-F", "raw", ours, images / "before"))
    ok(qemu_img("check", "-q", ours))
    facts, expected = (json.loads(ok(qemu_img("info", "--output=json", path))) for path in (ours, theirs))
    for key in ("backing-filename", "backing-filename-format"):
        assert facts.get(key) == expected.get(key)
    if old:
        # where there was none, qemu-img 7.2 lets the new one shine through in version 2 images
        assert _allocated(ours) <= _allocated(theirs)


@pytest.mark.parametrize("kind", ["qcow2", "qed"])
def test_unsafe_changes_the_header_alone(images: Path, kind: str) -> None:
    path = _overlay(images, "ours", kind, "a.raw", SIZES[0])
    held = _allocated(path)
    ok(cowfs("rebase", "-u", "-b", "b.raw", "-F", "raw", path))
    assert _allocated(path) == held
    ok(cowfs("rebase", "-u", "-b", "not/there", "-F", "raw", path))
    assert json.loads(ok(cowfs("info", "--json", path)))["backing-filename"] == "not/there"
    ok(cowfs("rebase", "-u", path))
    assert "backing-filename" not in json.loads(ok(qemu_img("info", "--output=json", path)))
    ok(qemu_img("check", "-q", path))


def test_progress(images: Path) -> None:
    path = _overlay(images, "ours", "qcow2", "a.raw", SIZES[0])
    # read as text, a carriage return is an end of line
    assert ok(cowfs("rebase", "-p", "-b", "b.raw", "-F", "raw", path)).splitlines()[-1] == "    (100.00/100%)"
    assert ok(cowfs("rebase", "-p", "-q", "-b", "a.raw", "-F", "raw", path)) == ""


_REFUSED: list[tuple[list[str], str]] = [
    (["ours"], "-b"),
    (["-b", "b.raw", "ours"], "ours: the format of the backing file must be given"),
    (["-u", "-b", "b.raw", "ours"], "ours: the format of the backing file must be given"),
    (["-b", "b.raw", "-F", "bogus", "ours"], "unknown format 'bogus'"),
    (["-u", "-b", "b.raw", "-F", "bogus", "ours"], "unknown format 'bogus'"),
    (["-b", "b.raw", "-F", "qcow2", "ours"], "b.raw: is not a qcow2 image"),
    (["-b", "gone", "-F", "raw", "ours"], "gone: cannot open: No such file"),
    (["-b", "ours", "-F", "qcow2", "ours"], "ours: cannot be its own backing file"),
    (["-b", "above", "-F", "qed", "ours"], "ours: cannot be its own backing file"),
    (["-b", "", "-F", "raw", "ours"], "without a backing file"),
    (["-b", "x" * 1024, "-u", "-F", "raw", "ours"], "ours: "),
    (["-b", "b.raw", "-F", "raw", "a.raw"], "a.raw: raw images have no backing file"),
    (["-u", "-b", "b.raw", "-F", "raw", "a.raw"], "a.raw: raw images have no backing file"),
    (["-f", "qcow2", "-b", "b.raw", "-F", "raw", "a.raw"], "a.raw: is not a qcow2 image"),
    (["-b", "b.raw", "-F", "raw", "gone"], "gone: cannot open"),
    (["-b", "b.raw", "-F", "raw", "orphan"], "gone.raw: cannot open: No such file or directory (backing"),
    (["-t", "bogus", "-b", "", "ours"], "bogus"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "says"), _REFUSED, ids=[" ".join(words)[:40] for words, _ in _REFUSED])
def test_what_is_refused_changes_nothing(images: Path, words: list[str], says: str) -> None:
    _overlay(images, "ours", "qcow2", "a.raw", SIZES[0])
    ok(qemu_img("create", "-q", "-f", "qed", "-b", "ours", "-F", "qcow2", "above", cwd=images))
    ok(qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "gone.raw", "-F", "raw", "orphan", "1M", cwd=images))
    before = _snapshot(images)
    assert says in refusal(cowfs("rebase", *words, cwd=images))
    assert _snapshot(images) == before


def test_a_failure_on_the_way_leaves_the_content(images: Path) -> None:
    """The first run ends in the middle, the next one takes up its work."""
    path = _overlay(images, "ours", "qcow2", "a.raw", SIZES[0])
    ok(qemu_img("convert", "-O", "raw", path, images / "before"))
    limited = cowfs("rebase", "-b", "", path, prefix=("prlimit", "--fsize=1500000"))
    assert "File too large" in refusal(limited)
    ok(qemu_img("compare", "-F", "raw", path, images / "before"))
    assert json.loads(ok(qemu_img("info", "--output=json", path)))["backing-filename"] == "a.raw"
    ok(cowfs("rebase", "-b", "", path))
    ok(qemu_img("compare", "-F", "raw", path, images / "before"))
    ok(qemu_img("check", "-q", path))


def _snapshot(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}
