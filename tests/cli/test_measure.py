"""``cowfs measure`` against ``qemu-img measure``: the same numbers, text, JSON and exit codes."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal

from cowfs.formats.chain import open_disk
from cowfs.formats.registry import FORMATS

SIZES = [0, 1, 12_345, 5_000_192, (1 << 30) + 512, 10 << 30, 3 << 40]
OPTIONS = [
    "cluster_size=64k",
    "cluster_size=4k",
    "cluster_size=2M,refcount_bits=1",
    "cluster_size=1k,refcount_bits=64",
    "compat=0.10",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full,cluster_size=8k",
    "lazy_refcounts=on,compression_type=zstd",
    "backing_file=not-looked-at,backing_fmt=raw",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all formats, with holes, zeros, compressed clusters, backing files, bitmaps."""
    here = tmp_path_factory.mktemp("images")
    rnd = random.Random(1)
    (here / "odd.raw").write_bytes(rnd.randbytes(3_000_000) + bytes(1_000_001))
    ok(qemu_img("create", "-q", "-f", "raw", here / "sparse.raw", "9M"))
    qemu_io(here / "sparse.raw", "raw", "write 100k 4k", "write 3M 700k", "write 8M 4k")
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", "sparse.raw", "-F", "raw", here / "over.qcow2", "12M"))
    qemu_io(here / "over.qcow2", "qcow2", "write 1M 3k", "write -z 3200k 64k", "write 11M 64k")
    ok(qemu_img("create", "-q", "-f", "qed", "-b", "over.qcow2", "-F", "qcow2", here / "top.qed"))
    qemu_io(here / "top.qed", "qed", "write 6M 100k")
    ok(qemu_img("convert", "-c", "-O", "qcow2", here / "odd.raw", here / "packed.qcow2"))
    ok(qemu_img("convert", "-O", "qcow2", "-o", "compat=0.10", here / "odd.raw", here / "v2.qcow2"))
    ok(qemu_img("convert", "-O", "qcow2", here / "odd.raw", here / "marked.qcow2"))
    for name, granularity in (("first", "64k"), ("second-with-a-long-name", "512")):
        ok(qemu_img("bitmap", "--add", "-g", granularity, here / "marked.qcow2", name))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", here / "holes.qcow2", "5M"))
    qemu_io(here / "holes.qcow2", "qcow2", "write 100k 100k")
    ok(qemu_img("create", "-q", "-f", "qcow2", here / "kept.qcow2", "10M"))
    for place, name in ((1, "one"), (3, "1"), (5, "")):
        qemu_io(here / "kept.qcow2", "qcow2", f"write {place}M 700k")
        if name:
            ok(qemu_img("snapshot", "-c", name, here / "kept.qcow2"))
    return here


_NAMES = ["odd.raw", "sparse.raw", "over.qcow2", "top.qed", "packed.qcow2", "v2.qcow2", "marked.qcow2", "holes.qcow2"]


def _expected(*words: str, cwd: Path | None = None) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(ok(qemu_img("measure", "--output=json", *words, cwd=cwd)))
    return facts


def _options(text: str) -> dict[str, str]:
    return dict(word.split("=") for word in text.split(","))


@pytest.mark.parametrize("options", OPTIONS)
async def test_sizes_of_empty_qcow2_images(options: str) -> None:
    measure = FORMATS["qcow2"].measure
    for size in SIZES:
        if "cluster_size=1k" in options and size > 1 << 40:
            continue
        required, full, bitmaps = await measure(size, None, _options(options))
        expected = _expected("-O", "qcow2", "-o", options, "--size", str(size))
        assert {"required": required, "fully-allocated": full} == expected
        assert bitmaps is None


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", _NAMES)
async def test_sizes_of_qcow2_copies(images: Path, options: str, name: str) -> None:
    measure = FORMATS["qcow2"].measure
    disk = await open_disk(str(images / name))
    required, full, bitmaps = await measure(0, disk, _options(options))
    await disk.close()
    expected = _expected("-O", "qcow2", "-o", options, name, cwd=images)
    assert (required, full, bitmaps) == (expected["required"], expected["fully-allocated"], expected.get("bitmaps"))


@pytest.mark.parametrize(
    "words",
    [
        ["odd.raw"],
        ["--size", "1.5G"],
        ["top.qed"],
        ["-O", "qcow2", "odd.raw"],
        ["-O", "qcow2", "marked.qcow2"],
        ["-O", "qcow2", "-f", "raw", "marked.qcow2"],
        ["-O", "raw", "-o", "preallocation=full", "over.qcow2"],
        ["-O", "qcow2", "-o", "size=3G", "--size", "1G"],
        ["-O", "qcow2", "-l", "one", "kept.qcow2"],
        ["-O", "qcow2", "-l", "1", "kept.qcow2"],
        ["-O", "qcow2", "-l", "snapshot.name=1", "kept.qcow2"],
        ["-O", "qcow2", "-l", "snapshot.id=1,snapshot.name=one", "kept.qcow2"],
    ],
    ids=" ".join,
)
def test_it_says_what_qemu_img_says(images: Path, words: list[str]) -> None:
    assert ok(cowfs("measure", *words, cwd=images)) == ok(qemu_img("measure", *words, cwd=images))
    assert json.loads(ok(cowfs("measure", "--json", *words, cwd=images))) == _expected(*words, cwd=images)


@pytest.mark.parametrize("name", ["odd.raw", "over.qcow2", "top.qed"])
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k"])
def test_a_conversion_needs_no_more(images: Path, name: str, options: str) -> None:
    facts = json.loads(ok(cowfs("measure", "--json", "-O", "qcow2", "-o", options, name, cwd=images)))
    ok(cowfs("convert", "-O", "qcow2", "-o", options, name, "made", cwd=images))
    assert (images / "made").stat().st_size <= facts["required"]


QED_OPTIONS = ["", "-o cluster_size=4k", "-o cluster_size=4k,table_size=2", "-o cluster_size=1M,table_size=16"]


@pytest.mark.parametrize("options", QED_OPTIONS)
@pytest.mark.parametrize("name", ["odd.raw", "sparse.raw", "over.qcow2", "top.qed", "packed.qcow2", "empty.raw"])
def test_qed_figures_are_those_of_the_file(images: Path, tmp_path: Path, options: str, name: str) -> None:
    """As converted, and once its disk was written to all over, by QEMU."""
    (images / "empty.raw").touch()
    words = ["-O", "qed", *options.split()]
    facts = json.loads(ok(cowfs("measure", "--json", *words, name, cwd=images)))
    assert list(facts) == ["required", "fully-allocated"]
    made = tmp_path / "made.qed"
    # so a conversion does not look for zeros in what is held as data, and neither does measure
    ok(cowfs("convert", *words, "-S", "16M", name, made, cwd=images))
    assert made.stat().st_size == facts["required"]
    size = json.loads(ok(qemu_img("info", "--output=json", made)))["virtual-size"]
    if size:
        qemu_io(made, "qed", f"write -P 1 0 {size}")
    assert made.stat().st_size == facts["fully-allocated"]
    overlay = json.loads(ok(cowfs("measure", "--json", *words, "-o", "backing_file=any", name, cwd=images)))
    assert set(overlay.values()) == {facts["fully-allocated"]}
    empty = json.loads(ok(cowfs("measure", "--json", *words, "--size", str(size))))
    ok(cowfs("create", "-q", "-f", "qed", *options.split(), made, str(size)))
    assert empty == {"required": made.stat().st_size, "fully-allocated": facts["fully-allocated"]}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-O", "bogus", "odd.raw"], "unknown format 'bogus'"),
        ([], "--size"),
        (["--size", "1G", "odd.raw"], "--size"),
        (["-f", "raw", "--size", "1G"], "-f"),
        (["-l", "one", "--size", "1G"], "-l"),
        (["-l", "none", "kept.qcow2"], "kept.qcow2: there is no snapshot 'none'"),
        (["-l", "snapshot.id=2,snapshot.name=one", "kept.qcow2"], "no snapshot with id '2' and name 'one'"),
        (["-l", "snapshot.names=one", "kept.qcow2"], "kept.qcow2: 'snapshot.names=one' is no snapshot"),
        (["-l", "1", "odd.raw"], "odd.raw: "),
        (["-l", "snapshot.id=1", "odd.raw"], "no snapshot with id '1'"),
        (["-f", "bogus", "odd.raw"], "unknown format 'bogus'"),
        (["--size", "x"], "'x' is not a size"),
        (["--size", "-1"], "'-1' is not a size"),
        (["--size", "16E"], "too large"),
        (["-O", "qcow2", "-o", "cluster_size=512", "--size", "1T"], "too large"),
        (["-O", "qcow2", "-o", "cluster_size=3k", "--size", "1G"], "cluster_size=3k"),
        (["-O", "qcow2", "-o", "compat=0.10,refcount_bits=1", "--size", "1G"], "compat=1.1"),
        (["-O", "qcow2", "-o", "lala=1", "--size", "1G"], "no option 'lala'"),
        (["-O", "raw", "-o", "backing_file=x", "--size", "1G"], "no option 'backing_file'"),
        (["gone"], "gone: cannot open: No such file"),
        (["odd.raw", "sparse.raw"], "sparse.raw"),
        (["--output=xml", "odd.raw"], "xml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(images: Path, words: list[str], says: str) -> None:
    assert qemu_img("measure", *words, cwd=images).returncode == 1
    assert says in refusal(cowfs("measure", *words, cwd=images))
