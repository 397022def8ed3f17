"""``cowfs commit`` of image files beside ``qemu-img commit`` on copies of them."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal

KINDS = {
    "raw": ["-f", "raw"],
    "qcow2": ["-f", "qcow2"],
    "v2-4k": ["-f", "qcow2", "-o", "compat=0.10,cluster_size=4k"],
    "extended": ["-f", "qcow2", "-o", "extended_l2=on,cluster_size=32k"],
    "2M": ["-f", "qcow2", "-o", "cluster_size=2M"],
    "qed": ["-f", "qed"],
}
#: of base and overlay; one is no multiple of any cluster
PAIRS = [
    ("raw", 3_000_320, "qcow2", 3_000_320),
    ("raw", 1_500_160, "qcow2", 3_000_320),
    ("raw", 3_000_320, "qed", 2_500_096),
    ("qcow2", 1_000_448, "qcow2", 3_000_320),
    ("qcow2", 3_000_320, "qcow2", 2_500_096),
    ("qcow2", 1_000_448, "qed", 3_000_320),
    ("qed", 3_000_320, "qcow2", 2_500_096),
    ("qed", 1_000_448, "v2-4k", 3_000_320),
    ("2M", 1_000_448, "extended", 3_000_320),
    ("extended", 2_500_096, "2M", 3_000_320),
    ("v2-4k", 2_500_096, "extended", 2_500_096),
]
#: of base, middle and top
TRIPLES = [
    ("raw", 3_000_320, "qcow2", 1_000_448, "qcow2", 2_500_096),
    ("qcow2", 1_000_448, "qed", 3_000_320, "qcow2", 2_500_096),
    ("qed", 1_000_448, "v2-4k", 2_500_096, "qed", 3_000_320),
    ("extended", 3_000_320, "2M", 2_500_096, "extended", 2_500_096),
]


def _format(kind: str) -> str:
    return KINDS[kind][1]


def _create(here: Path, name: str, kind: str, size: int, below: tuple[str, str] | None = None) -> Path:
    link = ["-b", below[0], "-F", _format(below[1])] if below else []
    ok(qemu_img("create", "-q", *KINDS[kind], *link, name, str(size), cwd=here))
    return here / name


def _fill(path: Path, kind: str, size: int, *, seed: int, zeros: bool = True) -> None:
    """Data and zeros at both ends and inside, aligned and not."""
    words = [f"write -P {seed} 0 5k", f"write -P {seed + 1} 700k 65k", f"write -P {seed + 2} {size - 512} 512"]
    if zeros:
        words += ["write -z 128k 128k", f"write -z {500 << 10} 3k"]
    qemu_io(path, _format(kind), *words)


def _content(path: Path, kind: str) -> bytes:
    flat = path.with_name("flat")
    ok(qemu_img("convert", "-f", _format(kind), "-O", "raw", path, flat))
    return flat.read_bytes()


def _clean(path: Path, kind: str) -> None:
    if kind != "raw":
        ok(qemu_img("check", "-q", "-f", _format(kind), path))


def _held(path: Path) -> list[object]:
    """What the image itself says of its disk, be it data or zeros."""
    entries = json.loads(ok(qemu_img("map", "--output=json", path)))
    return [entry for entry in entries if entry["depth"] == 0 and entry["present"]]


def _commit_both(here: Path, *words: str) -> tuple[Path, Path]:
    """Commit in two copies of a directory; where cowfs did, and where qemu-img did."""
    ours, theirs = here.with_name("ours"), here.with_name("theirs")
    for directory in (ours, theirs):
        shutil.copytree(here, directory)
    assert ok(cowfs("commit", *words, cwd=ours)).endswith("Image committed.\n")
    assert ok(qemu_img("commit", *words, cwd=theirs)) == "Image committed.\n"
    return ours, theirs


@pytest.fixture
def here(tmp_path: Path) -> Path:
    directory = tmp_path / "here"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("keep", [[], ["-d"]], ids=["empties", "keeps"])
@pytest.mark.parametrize(("base_kind", "base_size", "kind", "size"), PAIRS)
def test_into_the_backing_file(
    here: Path, base_kind: str, base_size: int, kind: str, size: int, keep: list[str]
) -> None:
    base = _create(here, "base", base_kind, base_size)
    qemu_io(base, _format(base_kind), f"write -P 200 0 {base_size}")
    top = _create(here, "top", kind, size, ("base", base_kind))
    _fill(top, kind, size, seed=1)
    before, held = _content(top, kind), _held(top)
    ours, theirs = _commit_both(here, *keep, "top")
    assert _content(ours / "top", kind) == _content(theirs / "top", kind) == before
    assert _content(ours / "base", base_kind) == _content(theirs / "base", base_kind)
    assert _held(ours / "top") == (held if keep else [])
    if keep or kind != "qed":
        # QEMU does not know how to empty QED images
        assert _held(theirs / "top") == _held(ours / "top")
    _clean(ours / "top", kind)
    _clean(ours / "base", base_kind)


@pytest.mark.parametrize(("base_kind", "base_size", "mid_kind", "mid_size", "kind", "size"), TRIPLES)
def test_into_a_base_further_down(
    here: Path, base_kind: str, base_size: int, mid_kind: str, mid_size: int, kind: str, size: int
) -> None:
    base = _create(here, "base", base_kind, base_size)
    qemu_io(base, _format(base_kind), f"write -P 200 0 {base_size}")
    _fill(_create(here, "mid", mid_kind, mid_size, ("base", base_kind)), mid_kind, mid_size, seed=10)
    top = _create(here, "top", kind, size, ("mid", mid_kind))
    qemu_io(top, _format(kind), "write -P 1 600k 200k", f"write -P 2 {size - 1024} 1k", "write -z 0 64k")
    files = {name: (here / name).read_bytes() for name in ("top", "mid")}
    before = _content(top, kind)
    ours, theirs = _commit_both(here, "-b", "base", "top")
    assert _content(ours / "base", base_kind) == _content(theirs / "base", base_kind)
    assert _content(ours / "base", base_kind)[:size] == before
    assert _content(ours / "top", kind) == before
    assert {name: (ours / name).read_bytes() for name in files} == files
    _clean(ours / "base", base_kind)


def test_a_base_given_by_name_is_not_emptied_into(here: Path) -> None:
    """Any -b means -d, as with qemu-img; names are relative to the image above, or to where one is."""
    (here / "sub").mkdir()
    _create(here, "base.raw", "raw", 2 << 20)
    mid = _create(here, "sub/mid", "qcow2", 2 << 20)
    ok(qemu_img("rebase", "-u", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", mid))
    top = _create(here, "top", "qed", 2 << 20, ("sub/mid", "qcow2"))
    qemu_io(top, "qed", "write -P 7 64k 64k")
    held = _held(top)
    for name in ("sub/mid", "./sub/mid", "../here/sub/mid", str(mid)):
        ok(cowfs("commit", "-q", "-b", name, top, cwd=here))
        assert _held(top) == held
        assert len(_held(mid)) == 1
    for name in ("../base.raw", str(here / "base.raw"), "base.raw"):
        (here / "base.raw").write_bytes(bytes(2 << 20))
        ok(cowfs("commit", "-q", "-b", name, top, cwd=here))
        assert (here / "base.raw").read_bytes().count(7) == 65536


def test_the_base_may_be_anything_that_can_be_written(here: Path) -> None:
    """One with snapshots, compressed clusters and a backing file of its own, longer than it."""
    _create(here, "below", "raw", 4 << 20)
    qemu_io(here / "below", "raw", "write -P 9 0 4M")
    (here / "plain").write_bytes(b"packed text " * 100_000)
    ok(qemu_img("convert", "-c", "-O", "qcow2", "-B", "below", "-F", "raw", "plain", "base", cwd=here))
    ok(qemu_img("snapshot", "-c", "kept", here / "base"))
    top = _create(here, "top", "qcow2", 3_500_032, ("base", "qcow2"))
    _fill(top, "qcow2", 3_500_032, seed=3)
    ok(qemu_img("snapshot", "-c", "own", top))
    before = _content(top, "qcow2")
    ours, theirs = _commit_both(here, "top")
    assert _content(ours / "top", "qcow2") == before
    for name in ("top", "base"):
        _clean(ours / name, "qcow2")
        assert _content(ours / name, "qcow2") == _content(theirs / name, "qcow2")
        facts = [json.loads(ok(qemu_img("info", "--output=json", where / name))) for where in (ours, theirs)]
        assert facts[0]["snapshots"] == facts[1]["snapshots"]
        assert facts[0]["virtual-size"] == facts[1]["virtual-size"]
    ok(qemu_img("snapshot", "-a", "kept", ours / "base"))
    assert _content(ours / "base", "qcow2") == _content(here / "base", "qcow2")


def test_what_overlays_remember_is_no_hindrance(here: Path) -> None:
    """Every image is made by cowfs, and remembers its backing file; the disk stays good, and a second run too."""
    _create(here, "base", "qcow2", 2 << 20)
    for name, below in (("low", "base"), ("mid", "low"), ("top", "mid")):
        ok(cowfs("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", name, cwd=here))
        qemu_io(here / name, "qcow2", "write -P 5 1M 64k" if name == "top" else "read 0 512")
    before = _content(here / "top", "qcow2")
    for words in (["-b", "base"], ["-b", "low"], ["-d"], ["-b", "base"]):
        ok(cowfs("commit", "-q", *words, "top", cwd=here))
        ok(cowfs("convert", "-O", "raw", "top", "flat", cwd=here))
        assert (here / "flat").read_bytes() == before
    assert _content(here / "base", "qcow2") == before
    for name in ("base", "low", "mid", "top"):
        _clean(here / name, "qcow2")


def test_a_failure_on_the_way_leaves_the_content(here: Path) -> None:
    """The first run ends in the middle, for the base cannot grow; the next one takes up its work."""
    _create(here, "base", "qcow2", 4 << 20)
    top = _create(here, "top", "qcow2", 4 << 20, ("base", "qcow2"))
    _fill(top, "qcow2", 4 << 20, seed=5)
    qemu_io(top, "qcow2", "write -P 3 1M 2M")
    before = _content(top, "qcow2")
    for words in (["-d"], ["-b", "base"], []):
        limited = cowfs("commit", "-q", *words, top, prefix=("prlimit", "--fsize=1500000"))
        assert "File too large" in refusal(limited)
        assert _content(top, "qcow2") == before
        _clean(here / "base", "qcow2")
        _clean(top, "qcow2")
    ok(cowfs("commit", top))
    assert _content(top, "qcow2") == _content(here / "base", "qcow2") == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["alone"], "alone: there is no backing file to commit into"),
        (["-f", "raw", "top"], "top: there is no backing file to commit into"),
        (["-b", "gone", "top"], "top: there is no backing file 'gone' in its chain"),
        (["-b", "top", "top"], "top: there is no backing file 'top' in its chain"),
        (["-b", "base", "alone"], "alone: there is no backing file"),
        (["gone"], "gone: cannot open: No such file or directory"),
        (["-r", "fast", "top"], "top: 'fast' is not a size"),
        (["-t", "bogus", "top"], "bogus"),
        (["--no-wait", "top"], "top: --no-wait needs a disk of a mount"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused_changes_nothing(here: Path, words: list[str], says: str) -> None:
    _create(here, "alone", "raw", 1 << 20)
    _create(here, "base", "qcow2", 1 << 20)
    qemu_io(_create(here, "top", "qcow2", 2 << 20, ("base", "qcow2")), "qcow2", "write 1M 64k")
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in here.iterdir()}
    code = 2 if says == "bogus" else 1
    assert says in refusal(cowfs("commit", *words, cwd=here), code)
    assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in here.iterdir()}
